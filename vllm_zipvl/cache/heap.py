"""The worker's page heap: which pages each slot holds in each layer, and what is in them."""

import torch

from vllm_zipvl.core.geometry import PageGeometry
from vllm_zipvl.core.quantization import KeyNorm, key_norm
from vllm_zipvl.ops.page_codec import write_pages


class PageCursor:
    """Hands out a request's pages in the order in which they fill."""

    def __init__(self, heap_block_ids: list[int], first_page: int, pages_per_block: int) -> None:
        self.num_pages = first_page
        self._block_ids = heap_block_ids
        self._pages_per_block = pages_per_block

    def take(self, num_pages: int) -> list[int]:
        """The ids of the next `num_pages` pages.

        Raises:
            IndexError: The scheduler's reserve was too small.
        """
        pages = range(self.num_pages, self.num_pages + num_pages)
        self.num_pages += num_pages
        per_block = self._pages_per_block
        return [self._block_ids[i // per_block] * per_block + i % per_block for i in pages]


class PageHeap:
    """Pages of all slots and layers, and the memory behind them.

    Attributes:
        memory: The KV cache's memory as pages, uint8 [num_pages, page_bytes].
        page_table: int32 [num_layers, num_slots, width]; kept tokens' pages from the left,
            the rest's from the right end.
        page_counts: int32 [num_layers, num_slots, 2], tokens in pages: kept, rest.
        key_norms: float32 [num_layers, num_slots, 2, num_kv_heads, head_size].
        compressed_lens: int32 [num_slots], tokens that are in pages or evicted.
    """

    def __init__(
        self,
        memory: torch.Tensor,
        geometry: PageGeometry,
        num_slots: int,
        max_model_len: int,
    ) -> None:
        self.memory = memory
        self.geometry = geometry
        width = geometry.max_pages_per_layer(max_model_len)
        shape = (geometry.num_layers, num_slots)
        self.page_table = torch.zeros(*shape, width, dtype=torch.int32, device=memory.device)
        self.page_counts = torch.zeros(*shape, 2, dtype=torch.int32, device=memory.device)
        # What quantised keys are normalised by: mean and scale of each channel.
        heads = (2, geometry.num_kv_heads, geometry.head_size)
        self.key_norms = torch.zeros(*shape, *heads, device=memory.device)
        self.key_norms[:, :, 1] = 1
        self.compressed_lens = torch.zeros(num_slots, dtype=torch.int32, device=memory.device)
        # A host copy: compression is steered from the host.
        self._counts = [[[0, 0] for _ in range(num_slots)] for _ in range(geometry.num_layers)]

    def reset(self, slot: int) -> None:
        """Empty a slot for its new owner."""
        self.compressed_lens[slot] = 0
        self.page_counts[:, slot] = 0
        self.key_norms[:, slot, 0] = 0
        self.key_norms[:, slot, 1] = 1
        for counts in self._counts:
            counts[slot] = [0, 0]

    def set_key_norm(self, layer: int, slot: int, keys: torch.Tensor) -> None:
        """Take the channel statistics of a request's first compressed keys.

        All later ones use them too: a request's pages are read with one set.

        Args:
            layer: Index of the layer.
            slot: The request's slot.
            keys: [num_tokens, num_kv_heads, head_size].
        """
        self.key_norms[layer, slot] = torch.stack(key_norm(keys))

    def append(
        self, layer: int, slot: int, precision: int, kv: torch.Tensor, cursor: PageCursor
    ) -> None:
        """Encode tokens into the slot's pages of one layer and precision.

        Args:
            layer: Index of the layer.
            slot: The request's slot.
            precision: 0 for kept tokens, 1 for the rest.
            kv: [num_tokens, num_kv_heads, 2 * head_size].
            cursor: Where new pages come from.
        """
        bits = self.geometry.bits[precision]
        num_new = kv.shape[0]
        if bits == 0 or num_new == 0:
            return
        counts = self._counts[layer][slot]
        before = counts[precision]
        capacity = self.geometry.layout(bits).capacity
        num_held = self.geometry.num_pages(before, bits)
        num_after = self.geometry.num_pages(before + num_new, bits)
        new_ids = torch.tensor(cursor.take(num_after - num_held), dtype=torch.int32)
        table = self.page_table[layer, slot]
        width = table.shape[0]
        if precision == 0:
            table[num_held:num_after] = new_ids
        else:
            table[width - num_after : width - num_held] = new_ids.flip(0)
        first = before // capacity
        ids = (
            table[first:num_after]
            if precision == 0
            else table[width - num_after : width - first].flip(0)
        )
        norm = KeyNorm(*self.key_norms[layer, slot])
        write_pages(kv, self.memory, ids, before - first * capacity, bits, self.geometry, norm)
        counts[precision] = before + num_new
        self.page_counts[layer, slot, precision] = before + num_new
