"""Requests that decode over pages and tail, as the backend lets them.

Tails grow, fall due in turn and are compressed between steps, outside of the CUDA graph.
"""

import torch
from attention_cases import DTYPE
from whole_model_prompt import Prompt, layers_of, new_memory

from vllm_zipvl.backend.tail import TailProbes
from vllm_zipvl.cache.heap import HeapTables, PageHeap
from vllm_zipvl.config import ZipVLConfig
from vllm_zipvl.core.geometry import PageGeometry, cdiv
from vllm_zipvl.core.selection import num_to_keep, top_mask
from vllm_zipvl.ops.decode_attention import CachedContext, DecodeRows, decode_attention
from vllm_zipvl.ops.dense_blocks import gather_kv, store_kv
from vllm_zipvl.ops.transfer import to_device


def interval_of(config: ZipVLConfig, geometry: PageGeometry) -> int:
    """Tokens of a tail that are compressed at once."""
    return cdiv(config.interval, geometry.block_size) * geometry.block_size


def prompt_tokens(config: ZipVLConfig, geometry: PageGeometry, num_tokens: int) -> int:
    """The prompt after which requests have `num_tokens` tokens, mean over requests and steps."""
    end = num_tokens - config.residual - interval_of(config, geometry)
    return end // geometry.block_size * geometry.block_size + config.residual


def request_bytes(prompt: Prompt, num_pages: int) -> int:
    """KV memory of a request in the middle between two compressions of its tail."""
    config, geometry = prompt.config, prompt.geometry
    interval, block_size = interval_of(config, geometry), geometry.block_size
    tails = [cdiv(config.residual + 1 + i, block_size) for i in range(interval)]
    share = config.ratio or 1.0
    num_pages += geometry.max_new_pages(interval // 2, int(share * interval // 2) + 1)
    num_blocks = geometry.num_blocks(num_pages) + sum(tails) / len(tails)
    return round(num_blocks * geometry.block_bytes)


class ZipVLRequests:
    """Requests with the same prompt, each in pages of its own, blocks of all mixed.

    Args:
        prompt: Has been prefilled.
        num_requests: How many decode at once.
        num_steps: That may be decoded before `rewind`.
        in_turn: Tails are of different lengths, so that they fall due one after another.
    """

    def __init__(
        self, prompt: Prompt, num_requests: int, num_steps: int, in_turn: bool = True
    ) -> None:
        self.prompt, self.config, self.geometry = prompt, prompt.config, prompt.geometry
        self.layer, self.num_layers = prompt.shape.layer, prompt.shape.num_layers
        self.interval = interval_of(self.config, self.geometry)
        self.num_pages = prompt.num_pages(prompt.masks())
        self._take_memory(num_requests, num_steps)
        self.slots = torch.arange(num_requests, dtype=torch.int32)
        device = self.slots.device
        shape = (num_requests, self.layer.num_heads, self.layer.head_size)
        self.tail_probes = [
            TailProbes(shape, self.layer.scale, DTYPE, device) for _ in range(self.num_layers)
        ]
        extra = self.interval if in_turn else 0
        first = prompt.num_tokens
        self.lens_of_prompts = [first + i * extra // num_requests for i in range(num_requests)]
        self.lens = torch.zeros(num_requests, dtype=torch.int32)
        self.positions = self.lens.long()

    def _take_memory(self, num_requests: int, num_steps: int) -> None:
        geometry, block_size = self.geometry, self.geometry.block_size
        num_tokens = self.prompt.num_tokens + self.interval + num_steps
        new_tokens = cdiv(num_steps, self.interval) * self.interval
        num_new = geometry.max_new_pages(new_tokens, new_tokens)
        heap_blocks = geometry.num_blocks(self.num_pages + num_new)
        # A tail's blocks are used in turns, and one more is being begun.
        self.num_tail = cdiv(self.config.residual + self.interval, block_size) + 1
        per_request = heap_blocks + self.num_tail
        block_ids = torch.randperm(num_requests * per_request).view(num_requests, -1)
        self.heap_block_ids = block_ids[:, self.num_tail :].tolist()
        columns = torch.arange(cdiv(num_tokens, block_size)) % self.num_tail
        self.block_table = block_ids[:, columns].int()
        self.tables = self.block_table.tolist()
        memory = new_memory(geometry, block_ids.numel())
        self.kv_caches = layers_of(memory, geometry)
        self.heap = PageHeap(memory, geometry, HeapTables(geometry, num_requests, num_tokens))

    def fill(self) -> None:
        """Compress the prompt for every request, and give every tail its last tokens."""
        prompt, block_size, masks = self.prompt, self.geometry.block_size, self.prompt.masks()
        for slot, blocks in enumerate(self.heap_block_ids):
            num_pages = self.heap.move(
                slot, prompt.kv_caches, prompt.block_ids, masks, blocks, takes_norms=True
            )
            assert int(num_pages) == self.num_pages
        self.counts = self.heap.tables.page_counts.clone()
        tail = torch.arange(prompt.end, prompt.num_tokens, device=masks.device)
        slots = self.block_table[:, tail // block_size].long() * block_size + tail % block_size
        for kv_cache, source in zip(self.kv_caches, prompt.kv_caches, strict=True):
            kv = gather_kv(source, prompt.block_ids, prompt.end, prompt.num_tokens)
            key, value = kv.repeat(len(slots), 1, 1).chunk(2, dim=-1)
            store_kv(key, value, kv_cache, slots.flatten())
        self.rewind()

    def rewind(self) -> None:
        """Undo all steps."""
        self.heap.tables.page_counts.copy_(self.counts)
        self.heap.tables.compressed_lens.fill_(self.prompt.end)
        self.lens.copy_(torch.tensor(self.lens_of_prompts, device="cpu"))
        self.lens_on_host = list(self.lens_of_prompts)
        self.ends = [self.prompt.end] * len(self.lens)
        self.first_pages: list[int | torch.Tensor] = [self.num_pages] * len(self.lens)

    def begin(self) -> None:
        """Resolve the batch of a step; captured with it."""
        block_size = self.geometry.block_size
        self.positions.copy_(self.lens)
        self.lens += 1
        block = self.block_table.gather(1, self.positions[:, None] // block_size)[:, 0]
        self.slot_mapping = block.long() * block_size + self.positions % block_size
        tail_starts = self.heap.tables.compressed_lens[self.slots]
        self.rows = DecodeRows(self.slots, self.slots, tail_starts, self.lens)

    def decode(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        tables, kv_cache = self.heap.tables, self.kv_caches[layer]
        store_kv(key, value, kv_cache, self.slot_mapping)
        context = CachedContext(
            kv_cache, self.heap.memory, tables.page_table[layer], tables.page_counts[layer],
            self.block_table, self.geometry, tables.key_norms[layer],
        )  # fmt: skip
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        lse = decode_attention(query, context, self.rows, self.layer.scale, out)
        self.tail_probes[layer].note(self.slots, query, lse)
        return out

    def after(self) -> None:
        """Compress the tails that are due after a step."""
        for i in range(len(self.ends)):
            self.lens_on_host[i] += 1
            if self.lens_on_host[i] >= self.ends[i] + self.config.residual + self.interval:
                self._compress_tail(i)

    def _compress_tail(self, request: int) -> None:
        start, num_tokens = self.ends[request], self.interval
        first = start // self.geometry.block_size
        dense = self.tables[request][first : first + num_tokens // self.geometry.block_size]
        masks = [self._kept_of_tail(i, request, dense) for i in range(self.num_layers)]
        block_ids = to_device(dense, self.lens.device)
        self.first_pages[request] = self.heap.move(
            request, self.kv_caches, block_ids, torch.stack(masks),
            self.heap_block_ids[request], self.first_pages[request], takes_norms=False,
        )  # fmt: skip
        self.ends[request] += num_tokens

    def _kept_of_tail(self, layer: int, request: int, dense: list[int]) -> torch.Tensor:
        block_ids = to_device(dense, self.lens.device)
        kv = gather_kv(self.kv_caches[layer], block_ids, 0, self.interval)
        mass = self.tail_probes[layer].mass(request, kv[..., : self.geometry.head_size])
        return top_mask(mass, num_to_keep(mass, self.config))
