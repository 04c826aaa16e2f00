"""Prefill of one prompt, and its compression, as the backend does them for all layers."""

from dataclasses import replace

import torch
from attention_cases import DTYPE, moves_of, prompt_batch
from whole_model_decoder import ModelShape

from vllm_zipvl.cache.heap import HeapTables, Moves, PageHeap
from vllm_zipvl.config import ZipVLConfig
from vllm_zipvl.core.geometry import PageGeometry, cdiv, num_compressible
from vllm_zipvl.ops.dense_blocks import store_kv
from vllm_zipvl.ops.prefill_attention import find_kernel, sparse_prefill_attention


def geometry_of(shape: ModelShape, config: ZipVLConfig) -> PageGeometry:
    one = shape.layer.geometry(config.high_bits, config.low_bits)
    return replace(one, num_layers=shape.num_layers)


def layers_of(memory: torch.Tensor, geometry: PageGeometry) -> list[torch.Tensor]:
    """Each layer's dense blocks in memory [num_pages, page_bytes], whose blocks hold all layers."""
    heads = (geometry.num_kv_heads, geometry.block_size, 2 * geometry.head_size)
    return list(memory.view(DTYPE).view(-1, geometry.num_layers, *heads).unbind(1))


def new_memory(geometry: PageGeometry, num_blocks: int) -> torch.Tensor:
    num_pages = num_blocks * geometry.pages_per_block
    return torch.zeros(num_pages, geometry.page_bytes, dtype=torch.uint8)


class Prompt:
    """A prompt in one chunk; its dense blocks and what each layer selected stay.

    Args:
        shape: The model's.
        config: The settings.
        num_tokens: Of the prompt.
    """

    def __init__(self, shape: ModelShape, config: ZipVLConfig, num_tokens: int) -> None:
        self.shape, self.config, self.num_tokens = shape, config, num_tokens
        self.geometry = geometry_of(shape, config)
        block_size = self.geometry.block_size
        num_blocks = cdiv(num_tokens, block_size)
        self.kv_caches = layers_of(new_memory(self.geometry, num_blocks), self.geometry)
        self.block_ids = torch.randperm(num_blocks)
        slots = self.block_ids[:, None] * block_size + torch.arange(block_size)
        self.slots = slots.flatten()[:num_tokens]
        self.kernel = find_kernel("auto", self.slots.device.type, DTYPE, shape.layer.head_size)
        self._kept: dict[int, torch.Tensor] = {}
        self.begin()

    def begin(self) -> None:
        """Resolve the batch of a step."""
        self.selector, self.batch = prompt_batch(
            self.config, self.geometry, self.num_tokens, self.slots.device
        )

    @property
    def end(self) -> int:
        """Tokens before this one are compressed."""
        return num_compressible(self.num_tokens, self.config.residual, self.geometry.block_size)

    @property
    def kept(self) -> float:
        """Share of the tokens that attend, mean over layers."""
        return float(torch.stack(list(self._kept.values())).float().mean())

    def prefill(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        if layer == 0:
            self.begin()
        scale, batch = self.shape.layer.scale, self.batch
        store_kv(key, value, self.kv_caches[layer], self.slots)
        kept = self.selector.select(layer, batch, query, key, scale)
        assert kept is not None
        self._kept[layer] = kept
        near = self.config.window, self.config.sinks
        return sparse_prefill_attention(
            query, key, value, kept, scale, *near, self.kernel, batch.rows
        )

    def masks(self) -> torch.Tensor:
        """What the cache keeps at high precision of the tokens that are compressed, by layer."""
        if not self.config.chooses_for_cache:
            return torch.ones(len(self.kv_caches), self.end, dtype=torch.bool)
        (masks,) = self.batch.probed.masks
        return masks[:, : self.end]

    def moves(self, slot: int, heap_block_ids: list[int]) -> Moves:
        """All of them into a slot's pages."""
        return moves_of(slot, self.block_ids, self.end, heap_block_ids)

    def num_pages(self, masks: torch.Tensor) -> int:
        """That its compressed tokens fill."""
        high, low = self.geometry.bits
        counts = masks.sum(1).tolist()
        pages = self.geometry.num_pages
        return sum(pages(n, high) + pages(self.end - n, low) for n in counts)


class Compressor:
    """Compresses a prompt into a heap of its own, any number of times."""

    def __init__(self, prompt: Prompt) -> None:
        geometry, num_tokens = prompt.geometry, prompt.num_tokens
        self.prompt = prompt
        num_blocks = geometry.num_blocks(prompt.num_pages(prompt.masks()))
        self.block_ids = torch.randperm(num_blocks).tolist()
        tables = HeapTables(geometry, 1, num_tokens)
        self.heap = PageHeap(new_memory(geometry, num_blocks), geometry, tables)

    def run(self) -> None:
        prompt, heap = self.prompt, self.heap
        heap.reset(0)
        heap.move(prompt.moves(0, self.block_ids), prompt.kv_caches, prompt.masks())
