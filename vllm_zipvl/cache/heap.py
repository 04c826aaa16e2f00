"""The worker's page heap: which pages each slot holds in each layer.

Counts and page ids are tensors, so that a GPU need not be waited for.
"""

import torch

from vllm_zipvl.core.geometry import PageGeometry
from vllm_zipvl.ops.page_codec import PageTables, write_tokens
from vllm_zipvl.ops.transfer import to_device


class HeapTables:
    """Which pages each slot holds in each layer.

    Made with the layers, before there is a heap, so that vLLM's memory profiling counts them.

    Attributes:
        page_table: int32 [num_layers, num_slots, width]; kept tokens' pages from the left,
            the rest's from the right end.
        page_counts: int32 [num_layers, num_slots, 2], tokens in pages: kept, rest.
        key_norms: float32 [num_layers, num_slots, 2, num_kv_heads, head_size].
        compressed_lens: int32 [num_slots], tokens that are in pages or evicted.

    Args:
        geometry: Shapes of pages.
        num_slots: How many requests have pages at a time.
        max_tokens: How many tokens of a request may be in pages.
        device: Of the tables.
    """

    def __init__(
        self,
        geometry: PageGeometry,
        num_slots: int,
        max_tokens: int,
        device: torch.device | None = None,
    ) -> None:
        width = geometry.max_pages_per_layer(max_tokens)
        shape = (geometry.num_layers, num_slots)
        self.page_table = torch.zeros(*shape, width, dtype=torch.int32, device=device)
        self.page_counts = torch.zeros(*shape, 2, dtype=torch.int32, device=device)
        # What quantised keys are normalised by: mean and scale of each channel.
        heads = (2, geometry.num_kv_heads, geometry.head_size)
        self.key_norms = torch.zeros(*shape, *heads, dtype=torch.float32, device=device)
        self.key_norms[:, :, 1] = 1
        self.compressed_lens = torch.zeros(num_slots, dtype=torch.int32, device=device)


class PageHeap:
    """Pages of all slots and layers, and the memory behind them.

    Attributes:
        memory: The KV cache's memory as pages, uint8 [num_pages, page_bytes].
        tables: Which of them hold what; changed in place.
    """

    def __init__(self, memory: torch.Tensor, geometry: PageGeometry, tables: HeapTables) -> None:
        self.memory = memory
        self.geometry = geometry
        self.tables = tables

    def reset(self, slot: int) -> None:
        """Empty a slot for its new owner."""
        tables = self.tables
        # What assigns a number to one element of a GPU's tensor waits for the GPU; this does not.
        tables.compressed_lens[slot].fill_(0)
        tables.page_counts[:, slot].fill_(0)
        tables.key_norms[:, slot, 0].fill_(0)
        tables.key_norms[:, slot, 1].fill_(1)

    def move(
        self,
        slot: int,
        kv_caches: list[torch.Tensor],
        block_ids: torch.Tensor,
        kept: torch.Tensor,
        heap_block_ids: list[int],
        first_page: int | torch.Tensor = 0,
        *,
        takes_norms: bool,
    ) -> torch.Tensor:
        """Copy a slot's next tokens from dense blocks, which are only read, into pages.

        Args:
            slot: The request's slot.
            kv_caches: Per layer, the dense blocks.
            block_ids: Those of the tokens, integers [num_blocks].
            kept: Which tokens go to the high precision, bool [num_layers, num_tokens].
            heap_block_ids: As for `take_pages`.
            first_page: As for `take_pages`.
            takes_norms: Whether these are the first tokens: a request's pages are read with one
                set of statistics.

        Returns:
            How many pages are in use now, int64 [].
        """
        num_tokens, tables = kept.shape[1], self.tables
        num_kept = kept.sum(1)
        has_rest = bool(self.geometry.low_bits)
        num_rest = num_tokens - num_kept if has_rest else torch.zeros_like(num_kept)
        num_new = torch.stack([num_kept, num_rest], dim=1).int()
        before, num_pages = self.take_pages(slot, num_new, heap_block_ids, first_page)
        pages, norms = tables.page_table[:, slot], tables.key_norms[:, slot]
        page_tables = PageTables(self.memory, pages, before, norms, self.geometry)
        write_tokens(kv_caches, block_ids, kept, page_tables, takes_norms=takes_norms)
        tables.compressed_lens[slot].add_(num_tokens)
        return num_pages

    def take_pages(
        self,
        slot: int,
        num_new: torch.Tensor,
        heap_block_ids: list[int],
        first_page: int | torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Enter the pages that new tokens of a slot need into its table, layer by layer.

        Args:
            slot: The request's slot.
            num_new: Tokens of each layer and precision, int32 [num_layers, 2]; 0 for evicted ones.
            heap_block_ids: The request's heap blocks, whose pages fill in this order.
            first_page: The first of their pages that is not in use yet.

        Returns:
            Tokens in pages before, int32 [num_layers, 2], and how many pages are in use now,
            int64 []. More than the blocks hold means that the scheduler's reserve was too small:
            then the last block's pages are named more than once.
        """
        geometry, device = self.geometry, num_new.device
        table = self.tables.page_table[:, slot]
        before = self.tables.page_counts[:, slot].clone()
        self.tables.page_counts[:, slot] += num_new
        # Host arithmetic of `geometry.num_pages`, on tensors.
        capacity = [geometry.layout(bits).capacity if bits else 1 for bits in geometry.bits]
        capacities = to_device(capacity, device)
        held = (before + capacities - 1) // capacities
        needed = (before + num_new + capacities - 1) // capacities - held
        ends = first_page + needed.flatten().cumsum(0)
        starts = (ends - needed.flatten()).view_as(needed)
        blocks = to_device(heap_block_ids or [0], device)
        per_block, width = geometry.pages_per_block, table.shape[1]
        for precision, bits in enumerate(geometry.bits):
            if bits == 0:
                continue
            steps = torch.arange(width, device=device)
            page = starts[:, precision, None] + steps
            block = blocks[(page // per_block).clamp(max=len(blocks) - 1)]
            ids = (block * per_block + page % per_block).int()
            column = held[:, precision, None] + steps
            is_new = (steps < needed[:, precision, None]) & (column < width)
            column = column % width
            if precision == 1:
                column = width - 1 - column
            # Every column is named once; those without a new page keep what they have.
            table.scatter_(1, column, torch.where(is_new, ids, table.gather(1, column)))
        return before, ends[-1]
