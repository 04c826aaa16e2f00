"""The worker's page heap: which pages each slot holds in each layer.

Counts and page ids are tensors, so that a GPU need not be waited for.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from vllm_zipvl.core.geometry import PageGeometry
from vllm_zipvl.core.quantization import plain_norm
from vllm_zipvl.core.sequences import Sequences
from vllm_zipvl.core.transfer import table_to_device, to_device
from vllm_zipvl.ops.page_codec import PageTables, write_tokens


class HeapTables:
    """Which pages each slot holds in each layer.

    Made with the layers, before there is a heap, so that vLLM's memory profiling counts them.

    Attributes:
        page_table: int32 [num_layers, num_slots, width]; kept tokens' pages from the left,
            the rest's from the right end.
        page_counts: int32 [num_layers, num_slots, 2], tokens in pages: kept, rest.
        key_norms: float16 [num_layers, num_slots, 3, num_kv_heads, head_size].
        compressed_lens: int32 [num_slots], where the tokens end that are in pages or evicted; 0
            for none.

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
        # What quantised keys are normalised by.
        plain = plain_norm(geometry.num_kv_heads, geometry.head_size, device)
        self.key_norms = torch.stack(plain).repeat(*shape, 1, 1, 1)
        self.compressed_lens = torch.zeros(num_slots, dtype=torch.int32, device=device)


class Moves(NamedTuple):
    """Tokens of several requests that move from dense blocks into pages at once.

    Attributes:
        slots: The requests' slots, int64 [num_requests].
        block_table: Dense blocks of each one's tokens, integers [num_requests, any].
        contexts: How many tokens each moves.
        ends: Where they end in their requests, int32 [num_requests].
        heap_block_ids: Each one's heap blocks, whose pages fill in this order.
        first_pages: The first of their pages that is not in use yet, int64 [num_requests].
        is_first: Whether these are its first tokens: a request's pages are read with one set of
            key statistics.
    """

    slots: torch.Tensor
    block_table: torch.Tensor
    contexts: Sequences
    ends: torch.Tensor
    heap_block_ids: list[list[int]]
    first_pages: torch.Tensor
    is_first: list[bool]


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
        geometry = self.geometry
        # Made anew: sleep level 2 loses what was made with the layers, this table too.
        plain = plain_norm(geometry.num_kv_heads, geometry.head_size, tables.key_norms.device)
        tables.key_norms[:, slot].copy_(torch.stack(plain))

    def move(
        self, moves: Moves, kv_caches: Sequence[torch.Tensor], kept: torch.Tensor
    ) -> torch.Tensor:
        """Copy requests' next tokens from dense blocks, which are only read, into pages.

        Args:
            moves: Whose tokens, from which blocks into which.
            kv_caches: Per layer, the dense blocks.
            kept: Which tokens go to the high precision, bool [num_layers, num_tokens].

        Returns:
            How many pages each request has in use now, int64 [num_requests].
        """
        tables, contexts = self.tables, moves.contexts
        lengths = contexts.device_lengths.int()
        num_kept = contexts.counts(kept).int()
        has_rest = bool(self.geometry.low_bits)
        num_rest = lengths - num_kept if has_rest else torch.zeros_like(num_kept)
        before, num_pages = self.take_pages(moves, torch.stack([num_kept, num_rest], dim=-1))
        page_tables = PageTables(
            self.memory, tables.page_table, moves.slots, before, tables.key_norms, self.geometry
        )
        write_tokens(kv_caches, moves.block_table, contexts, kept, page_tables, moves.is_first)
        tables.compressed_lens.index_copy_(0, moves.slots, moves.ends)
        return num_pages

    def take_pages(self, moves: Moves, num_new: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Enter the pages that new tokens need into their slots' tables, layer by layer.

        Args:
            moves: Whose tokens.
            num_new: Tokens of each layer and precision, int32 [num_layers, num_requests, 2]; 0 for
                evicted ones.

        Returns:
            Tokens in pages before, int32 [num_layers, num_requests, 2], and how many pages each
            request has in use now, int64 [num_requests]. More than its blocks hold means that the
            scheduler's reserve was too small: then the last block's pages are named more than once.
        """
        geometry, device, slots = self.geometry, num_new.device, moves.slots
        num_requests = len(slots)
        before = self.tables.page_counts[:, slots]
        self.tables.page_counts[:, slots] = before + num_new
        # Host arithmetic of `geometry.num_pages`, on tensors.
        capacity = [geometry.layout(bits).capacity if bits else 1 for bits in geometry.bits]
        capacities = to_device(capacity, device)
        held = (before + capacities - 1) // capacities
        needed = (before + num_new + capacities - 1) // capacities - held
        # A request's pages fill layer by layer.
        in_turn = needed.transpose(0, 1).flatten(1)
        ends = moves.first_pages[:, None] + in_turn.cumsum(1)
        starts = (ends - in_turn).unflatten(1, (-1, 2)).transpose(0, 1)
        heap_blocks = table_to_device([ids or [0] for ids in moves.heap_block_ids], device)
        last = to_device([max(len(ids), 1) - 1 for ids in moves.heap_block_ids], device)
        per_block = geometry.pages_per_block
        table = self.tables.page_table
        num_layers, num_slots, width = table.shape
        owner = torch.arange(num_layers, device=device)[:, None] * num_slots + slots
        request = torch.arange(num_requests, device=device)[:, None]
        for precision, bits in enumerate(geometry.bits):
            if bits == 0:
                continue
            most = geometry.num_pages(moves.contexts.max_length, bits)
            steps = torch.arange(min(most, width), device=device)
            page = starts[..., precision, None] + steps
            block = heap_blocks[request, (page // per_block).minimum(last[:, None])]
            ids = (block * per_block + page % per_block).int()
            column = held[..., precision, None] + steps
            is_new = (steps < needed[..., precision, None]) & (column < width)
            column = column % width
            if precision == 1:
                column = width - 1 - column
            # Every place is named once; those without a new page keep what they have.
            place = owner[..., None] * width + column
            entries = table.view(-1)
            entries[place] = torch.where(is_new, ids, entries[place])
        return before, ends[:, -1]
