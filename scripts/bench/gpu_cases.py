"""One layer of a 7B model at work: prefill, compression and decode, on random data.

Tensors are made on torch's default device.
"""

from typing import NamedTuple

import torch
from attention_cases import (
    DTYPE,
    Layer,
    decode_bytes,
    decode_case,
    fault,
    moves_of,
    probe_mass,
    randn,
    selected,
    sparse_prefill,
)
from dense_attention import DenseAttention

from vllm_zipvl.cache.heap import HeapTables, PageHeap
from vllm_zipvl.core.geometry import cdiv
from vllm_zipvl.ops.decode_attention import DecodeRows, decode_attention, reference
from vllm_zipvl.ops.dense_blocks import store_kv

LAYERS = {
    "LongVA-7B": Layer(num_heads=28, num_kv_heads=4, head_size=128, block_size=16),
    "LLaVA-NeXT-7B": Layer(num_heads=32, num_kv_heads=32, head_size=128, block_size=16),
}
DRY_LAYERS = {
    "LongVA-7B": Layer(num_heads=2, num_kv_heads=1, head_size=32, block_size=16),
    "LLaVA-NeXT-7B": Layer(num_heads=1, num_kv_heads=1, head_size=32, block_size=16),
}
MODELS = tuple(LAYERS)
DECODE_TOKENS, DRY_TOKENS, DRY_ROWS = 16384, 64, 2
BITS = (4, 2)
PREFILL_KEPT, CACHE_KEPT = 0.42, 0.286
"""Shares of tokens that attend, and that the cache keeps at high precision."""
CHECKED_ROWS = 2
"""Of a batch; the oracle is slow."""


def layer_of(model: str, is_dry: bool) -> Layer:
    return (DRY_LAYERS if is_dry else LAYERS)[model]


class DecodeShape(NamedTuple):
    """How many rows of a model's layer decode at once."""

    model: str
    num_rows: int

    def __str__(self) -> str:
        return f"{LAYERS[self.model].label} x {self.num_rows}"


DECODE_SHAPES = tuple(DecodeShape(MODELS[0], rows) for rows in (1, 8, 64))
DECODE_SHAPES += (DecodeShape(MODELS[1], 64),)


def decode_shapes(is_dry: bool) -> tuple[DecodeShape, ...]:
    return (DecodeShape(MODELS[0], DRY_ROWS),) if is_dry else DECODE_SHAPES


class PrefillCase:
    """A prompt in one chunk; keys and values are stored first."""

    def __init__(self, layer: Layer, num_tokens: int) -> None:
        self.layer = layer
        self.query = randn(num_tokens, layer.num_heads, layer.head_size)
        self.key, self.value = randn(2, num_tokens, layer.num_kv_heads, layer.head_size)
        num_blocks, block_size = cdiv(num_tokens, layer.block_size), layer.block_size
        self.cache = randn(num_blocks, layer.num_kv_heads, block_size, 2 * layer.head_size)
        slots = torch.randperm(num_blocks)[:, None] * block_size + torch.arange(block_size)
        self.slots = slots.flatten()[:num_tokens]
        self.baseline = DenseAttention(layer)
        self._attend = self.baseline.prefill(self.query, self.key, self.value)

    def dense(self) -> torch.Tensor:
        store_kv(self.key, self.value, self.cache, self.slots)
        return self._attend()

    def sparse(self) -> torch.Tensor:
        return sparse_prefill(
            self.layer, self.query, self.key, self.value, self.cache, self.slots, PREFILL_KEPT
        )

    def probe(self) -> torch.Tensor:
        return probe_mass(self.layer, self.query, self.key)

    def kept(self) -> float:
        """Share of the tokens that attend among each other, the recent probes among them."""
        return float(selected(self.layer, self.query, self.key, PREFILL_KEPT).float().mean())


class CompressCase:
    """A prompt into pages at 4 and 2 bits."""

    def __init__(self, layer: Layer, num_tokens: int) -> None:
        geometry = layer.geometry(*BITS)
        self.num_tokens = num_tokens
        self.kept = torch.rand(1, num_tokens) < CACHE_KEPT
        num_pages = geometry.max_new_pages(num_tokens, int(self.kept.sum()))
        self.heap_block_ids = list(range(geometry.num_blocks(num_pages)))
        shape = (len(self.heap_block_ids) * geometry.pages_per_block, geometry.page_bytes)
        memory = torch.zeros(shape, dtype=torch.uint8)
        self.heap = PageHeap(memory, geometry, HeapTables(geometry, 1, num_tokens))
        num_blocks = num_tokens // layer.block_size
        self.cache = randn(num_blocks, layer.num_kv_heads, layer.block_size, 2 * layer.head_size)
        self.block_ids = torch.randperm(num_blocks)

    def run(self) -> None:
        self.heap.reset(0)
        moves = moves_of(0, self.block_ids, self.num_tokens, self.heap_block_ids)
        self.heap.move(moves, [self.cache], self.kept)


class DecodeCase:
    """A step of rows of one length, most of which is in pages."""

    def __init__(
        self,
        layer: Layer,
        num_rows: int,
        num_tokens: int,
        bits: tuple[int, int] = BITS,
        kept: float = CACHE_KEPT,
        is_filled: bool = True,
    ) -> None:
        self.layer = layer
        self.context, self.rows = decode_case(layer, num_rows, num_tokens, bits, kept, is_filled)
        self.query = randn(num_rows, layer.num_heads, layer.head_size)
        self.out = torch.empty_like(self.query)
        self.read_bytes = decode_bytes(layer, num_rows, num_tokens, bits, kept)

    def run(self) -> None:
        decode_attention(self.query, self.context, self.rows, self.layer.scale, self.out)

    def expected(self) -> torch.Tensor:
        """What the oracle gives for the first rows."""
        rows = DecodeRows(*(column[:CHECKED_ROWS] for column in self.rows))
        query = self.query[:CHECKED_ROWS]
        out = torch.full_like(query, torch.nan, dtype=DTYPE)
        reference.decode_attention(query, self.context, rows, self.layer.scale, out)
        return out

    def fault(self, expected: torch.Tensor | None = None) -> str | None:
        """What is wrong with a step's output, if anything is."""
        self.out.fill_(torch.nan)
        self.run()
        if not bool(self.out.isfinite().all()):
            return "leaves values unwritten or not finite"
        first = self.out[:CHECKED_ROWS]
        return fault(first, self.expected() if expected is None else expected)
