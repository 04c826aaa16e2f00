"""Prefill of one prompt, and its compression, as the backend does them for all layers."""

from dataclasses import replace

import numpy as np
import torch
from attention_cases import DTYPE
from whole_model_decoder import ModelShape

from vllm_zipvl.cache.heap import HeapTables, PageHeap
from vllm_zipvl.config import ZipVLConfig
from vllm_zipvl.core.geometry import PageGeometry, cdiv, num_compressible
from vllm_zipvl.core.probes import num_visible_probes, probe_positions
from vllm_zipvl.core.selection import Selection, cap_selections, select
from vllm_zipvl.ops.dense_blocks import store_kv
from vllm_zipvl.ops.prefill_attention import find_kernel, sparse_prefill_attention
from vllm_zipvl.ops.probe_scores import probe_scores
from vllm_zipvl.ops.transfer import to_device


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
        self.probes = probe_positions(
            config.seed, 0, num_tokens, config.probe_recent, config.probe_random
        )
        positions, device = np.concatenate(self.probes), self.slots.device
        self.positions = to_device(positions, device)
        visible = num_visible_probes(positions, num_tokens)
        self.num_visible = to_device(visible, device, torch.float32)
        self.kernel = find_kernel("auto", device.type, DTYPE, shape.layer.head_size)
        self.selections: list[Selection | None] = [None] * shape.num_layers

    @property
    def end(self) -> int:
        """Tokens before this one are compressed."""
        return num_compressible(self.num_tokens, self.config.residual, self.geometry.block_size)

    @property
    def kept(self) -> float:
        """Share of the tokens that attend, mean over layers."""
        masks = [selection.kept for selection in self.selections if selection is not None]
        return float(torch.stack(masks).float().mean())

    def prefill(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        scale = self.shape.layer.scale
        store_kv(key, value, self.kv_caches[layer], self.slots)
        num_random = len(self.probes.random)
        mass = probe_scores(query[self.positions], self.positions, num_random, key, scale)
        selection = select(
            mass.random + mass.recent, self.num_visible, len(self.probes.recent), self.config
        )
        self.selections[layer] = selection
        return sparse_prefill_attention(query, key, value, selection.kept, scale, self.kernel)

    def masks(self) -> torch.Tensor:
        """What the cache keeps at high precision of the tokens that are compressed, by layer."""
        selections = [selection for selection in self.selections if selection is not None]
        kept = cap_selections(selections, len(self.probes.recent), self.config.max_kept)
        return torch.stack([mask[: self.end] for mask in kept])

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
        masks = prompt.masks()
        heap.move(
            0, prompt.kv_caches, prompt.block_ids, masks, self.block_ids, takes_norms=True
        )  # fmt: skip
