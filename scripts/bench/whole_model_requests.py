"""Requests that decode over pages and tail, as the backend lets them.

Tails grow, fall due in turn and are compressed between steps, outside of the CUDA graph.
"""

import torch
from attention_cases import DTYPE
from whole_model_prompt import Prompt, layers_of, new_memory

from vllm_zipvl.backend.tail import TailProbes
from vllm_zipvl.cache.heap import HeapTables, Moves, PageHeap
from vllm_zipvl.config import ZipVLConfig
from vllm_zipvl.core.geometry import PageGeometry, cdiv
from vllm_zipvl.core.selection import num_to_keep, top_mask
from vllm_zipvl.core.sequences import Sequences
from vllm_zipvl.core.transfer import table_to_device, to_device
from vllm_zipvl.ops.decode_attention import CachedContext, DecodeRows, decode_attention
from vllm_zipvl.ops.dense_blocks import gather_kv, store_kv
from vllm_zipvl.ops.tail_scores import tail_scores


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
        shape = (self.num_layers, num_requests, self.layer.num_heads, self.layer.head_size)
        self.tail_probes = TailProbes(shape, DTYPE, device)
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
            num_pages = self.heap.move(prompt.moves(slot, blocks), prompt.kv_caches, masks)
            assert int(num_pages) == self.num_pages
        self.counts = self.heap.tables.page_counts.clone()
        tail = torch.arange(prompt.end, prompt.num_tokens, device=masks.device)
        slots = self.block_table[:, tail // block_size].long() * block_size + tail % block_size
        own_blocks = prompt.block_ids[None, prompt.end // block_size :]
        rest = Sequences([len(tail)], masks.device)
        for kv_cache, source in zip(self.kv_caches, prompt.kv_caches, strict=True):
            kv = gather_kv(source, own_blocks, rest)
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
        self.first_pages = torch.full_like(self.lens, self.num_pages, dtype=torch.int64)

    def begin(self) -> None:
        """Resolve the batch of a step; captured with it."""
        block_size = self.geometry.block_size
        self.positions.copy_(self.lens)
        self.lens += 1
        block = self.block_table.gather(1, self.positions[:, None] // block_size)[:, 0]
        self.slot_mapping = block.long() * block_size + self.positions % block_size
        tail_starts = self.heap.tables.compressed_lens[self.slots]
        no_head = torch.zeros_like(tail_starts)
        self.rows = DecodeRows(self.slots, self.slots, no_head, tail_starts, self.lens)

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
        self.tail_probes.note(layer, self.slots, query, lse)
        return out

    def after(self) -> None:
        """Compress the tails that are due after a step."""
        due = []
        for i in range(len(self.ends)):
            self.lens_on_host[i] += 1
            if self.lens_on_host[i] >= self.ends[i] + self.config.residual + self.interval:
                due.append(i)
        if due:
            self._compress_tails(due)

    def _compress_tails(self, requests: list[int]) -> None:
        block_size, device = self.geometry.block_size, self.lens.device
        slots = to_device(requests, device)
        tails = Sequences([self.interval] * len(requests), device)
        firsts = [self.ends[i] // block_size for i in requests]
        dense = [
            self.tables[i][first : first + self.interval // block_size]
            for i, first in zip(requests, firsts, strict=True)
        ]
        table = table_to_device(dense, device)
        queries, lse = self.tail_probes.queries[:, slots], self.tail_probes.lse[:, slots]
        mass = tail_scores(queries, lse, self.kv_caches, table, tails, self.layer.scale)
        moves = Moves(
            slots=slots,
            block_table=table,
            contexts=tails,
            ends=to_device([self.ends[i] + self.interval for i in requests], device, torch.int32),
            heap_block_ids=[self.heap_block_ids[i] for i in requests],
            first_pages=self.first_pages[slots],
            is_first=[False] * len(requests),
        )
        kept = top_mask(mass, num_to_keep(mass, self.config, tails), tails)
        self.first_pages[slots] = self.heap.move(moves, self.kv_caches, kept)
        for i in requests:
            self.ends[i] += self.interval
