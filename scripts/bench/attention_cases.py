"""What the attention benchmarks run on any device, and how it is checked first.

Tensors are made on torch's default device.
"""

from functools import cache
from typing import NamedTuple

import numpy as np
import torch

from vllm_zipvl.cache.heap import HeapTables, PageHeap
from vllm_zipvl.config import ZipVLConfig
from vllm_zipvl.core.geometry import PageGeometry, cdiv, num_compressible
from vllm_zipvl.core.probes import num_visible_probes, probe_positions
from vllm_zipvl.core.selection import select
from vllm_zipvl.ops.decode_attention import CachedContext, DecodeRows, decode_attention
from vllm_zipvl.ops.decode_attention import reference as decode_reference
from vllm_zipvl.ops.dense_blocks import gather_kv, store_kv
from vllm_zipvl.ops.prefill_attention import prefill_attention, sparse_prefill_attention
from vllm_zipvl.ops.prefill_attention import reference as prefill_reference
from vllm_zipvl.ops.probe_scores import probe_scores
from vllm_zipvl.ops.transfer import to_device

DTYPE = torch.bfloat16
RESIDUAL = 32


class Layer(NamedTuple):
    """The shape of one layer and of the blocks that its keys and values lie in."""

    num_heads: int
    num_kv_heads: int
    head_size: int
    block_size: int

    @property
    def heads(self) -> list[int]:
        return [self.num_heads, self.num_kv_heads, self.head_size]

    @property
    def scale(self) -> float:
        return self.head_size**-0.5

    def geometry(self, high_bits: int, low_bits: int) -> PageGeometry:
        return PageGeometry(
            1, self.num_kv_heads, self.head_size, DTYPE.itemsize, self.block_size, high_bits,
            low_bits,
        )  # fmt: skip


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=DTYPE)


def agree(name: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    """Stop the run if an operation is off by more than a few roundings of the dtype."""
    error = float((found.float() - expected.float()).abs().max())
    budget = 4 * torch.finfo(DTYPE).eps * float(expected.abs().max())
    if not error <= budget:
        raise SystemExit(f"{name} differs from its reference by {error:.3g} > {budget:.3g}")


@cache
def _probes(num_tokens: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Positions, how many of them may see each token, and how many are random.

    Found once for all layers, as by the backend.
    """
    config = ZipVLConfig()
    probes = probe_positions(0, 0, num_tokens, config.probe_recent, config.probe_random)
    positions = np.concatenate(probes)
    visible = num_visible_probes(positions, num_tokens)
    return to_device(positions, device), to_device(visible, device), len(probes.random)


def probe_mass(layer: Layer, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """What the backend asks of one layer of a prompt in one chunk, float32 [num_tokens]."""
    positions, _, num_random = _probes(query.shape[0], query.device)
    mass = probe_scores(query[positions], positions, num_random, key, layer.scale)
    return mass.random + mass.recent


def sparse_prefill(
    layer: Layer,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    slots: torch.Tensor,
    ratio: float,
) -> torch.Tensor:
    """What the backend does for one layer of a prompt in one chunk."""
    config = ZipVLConfig(ratio=ratio)
    store_kv(key, value, kv_cache, slots)
    positions, visible, num_random = _probes(query.shape[0], query.device)
    num_recent = len(positions) - num_random
    selection = select(probe_mass(layer, query, key), visible, num_recent, config)
    return sparse_prefill_attention(query, key, value, selection.kept, layer.scale)


def check_prefill(layer: Layer) -> None:
    num_tokens = 300
    query = randn(100, layer.num_heads, layer.head_size)
    key, value = randn(2, num_tokens, layer.num_kv_heads, layer.head_size)
    expected = prefill_reference.prefill_attention(query, key, value, layer.scale)
    agree("prefill attention", prefill_attention(query, key, value, layer.scale), expected)
    num_blocks = cdiv(num_tokens, layer.block_size)
    cache = randn(num_blocks, layer.num_kv_heads, layer.block_size, 2 * layer.head_size)
    store_kv(key, value, cache, torch.arange(num_tokens))
    stored = gather_kv(cache, torch.arange(num_blocks), 0, num_tokens)
    agree("dense blocks", stored, torch.cat([key, value], dim=-1))
    positions = torch.tensor([250, 299])
    mass = sum(probe_scores(query[:2], positions, 1, key, layer.scale))
    keys = key.repeat_interleave(layer.num_heads // layer.num_kv_heads, dim=1).double()
    scores = torch.einsum("ihd,jhd->ihj", query[:2].double(), keys * layer.scale)
    hidden = torch.arange(num_tokens) > positions[:, None, None]
    exact = scores.masked_fill(hidden, float("-inf")).softmax(-1).sum((0, 1))
    agree("probe scores", mass, exact)


def decode_case(
    layer: Layer, num_rows: int, num_tokens: int, bits: tuple[int, int], kept: float
) -> tuple[CachedContext, DecodeRows]:
    """Rows whose prompts are compressed, in memory where pages of all rows are mixed."""
    geometry, block_size = layer.geometry(*bits), layer.block_size
    end = num_compressible(num_tokens, RESIDUAL, block_size)
    mask = torch.arange(end) < round(kept * end)
    num_high, num_low = int(mask.sum()), int((~mask).sum())
    pages = geometry.num_pages(num_high, bits[0]) + geometry.num_pages(num_low, bits[1])
    blocks = torch.randperm(num_rows * geometry.num_blocks(pages)).view(num_rows, -1)
    tail = cdiv(num_tokens - end, block_size)
    num_pages = blocks.numel() * geometry.pages_per_block
    memory = torch.zeros(num_pages, geometry.page_bytes, dtype=torch.uint8)
    heap = PageHeap(memory, geometry, HeapTables(geometry, num_rows, num_tokens))
    block_table = torch.zeros(num_rows, cdiv(num_tokens, block_size), dtype=torch.int32)
    for i in range(num_rows):
        prompt = randn(end // block_size, layer.num_kv_heads, block_size, 2 * layer.head_size)
        block_ids, heap_blocks = torch.arange(len(prompt)), blocks[i].tolist()
        heap.move(i, [prompt], block_ids, mask[None], heap_blocks, takes_norms=True)
        block_table[i, end // block_size :] = torch.arange(i * tail, (i + 1) * tail)
    kv_cache = randn(num_rows * tail, layer.num_kv_heads, block_size, 2 * layer.head_size)
    tables = heap.tables
    context = CachedContext(
        kv_cache, memory, tables.page_table[0], tables.page_counts[0], block_table, geometry,
        tables.key_norms[0],
    )  # fmt: skip
    every = torch.arange(num_rows, dtype=torch.int32)
    ends = torch.full((num_rows,), end, dtype=torch.int32)
    return context, DecodeRows(every, every, ends, torch.full_like(ends, num_tokens))


def check_decode(layer: Layer, bits: tuple[int, int], kept: float) -> None:
    context, rows = decode_case(layer, 2, 300, bits, kept)
    query = randn(2, layer.num_heads, layer.head_size)
    out, expected = torch.empty_like(query), torch.empty_like(query)
    decode_attention(query, context, rows, layer.scale, out)
    decode_reference.decode_attention(query, context, rows, layer.scale, expected)
    agree(f"decode attention at {bits}", out, expected)
