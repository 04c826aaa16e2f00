"""What the attention benchmarks run on any device, and how it is checked first.

Tensors are made on torch's default device.
"""

from dataclasses import replace
from functools import cache
from typing import NamedTuple

import torch

from vllm_zipvl.backend.prompts import PromptBatch, PromptSelector
from vllm_zipvl.cache.heap import HeapTables, Moves, PageHeap
from vllm_zipvl.config import ZipVLConfig
from vllm_zipvl.core.geometry import UNQUANTISED, PageGeometry, cdiv, num_compressible
from vllm_zipvl.core.sequences import Sequences
from vllm_zipvl.core.transfer import to_device
from vllm_zipvl.ops.decode_attention import CachedContext, DecodeRows, decode_attention
from vllm_zipvl.ops.decode_attention import reference as decode_reference
from vllm_zipvl.ops.dense_blocks import gather_kv, store_kv
from vllm_zipvl.ops.prefill_attention import prefill_attention, sparse_prefill_attention
from vllm_zipvl.ops.probe_scores import ProbePlaces, probe_scores
from vllm_zipvl.plan import ChunkPlan
from vllm_zipvl.rules import CacheRules

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
    def label(self) -> str:
        """Its heads, of queries and of keys."""
        return f"{self.num_heads}/{self.num_kv_heads}"

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


def fault(found: torch.Tensor, expected: torch.Tensor) -> str | None:
    """How an operation is off by more than a few roundings of the dtype, if it is."""
    error = float((found.float() - expected.float()).abs().max())
    budget = 4 * torch.finfo(DTYPE).eps * float(expected.abs().max())
    if error <= budget:
        return None
    return f"differs from its reference by {error:.3g} > {budget:.3g}"


def agree(name: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    """Stop the run if an operation is off."""
    if reason := fault(found, expected):
        raise SystemExit(f"{name} {reason}")


def prompt_batch(
    config: ZipVLConfig, geometry: PageGeometry, num_tokens: int, device: torch.device
) -> tuple[PromptSelector, PromptBatch]:
    """A step with a prompt in one chunk, which attends sparsely however short it is."""
    rules = CacheRules(replace(config, min_tokens=1), geometry)
    selector = PromptSelector(rules, lambda mass: mass, num_tokens)
    chunk = ChunkPlan("bench", 0, 0, 0, num_tokens, True, False)
    (batch,) = selector.batches([chunk], device)
    return selector, batch


@cache
def _prompt(
    layer: Layer, num_tokens: int, ratio: float, device: torch.device
) -> tuple[PromptSelector, PromptBatch]:
    """Its places are found once for all layers, as by the backend."""
    config = ZipVLConfig(ratio=ratio)
    geometry = layer.geometry(config.high_bits, config.low_bits)
    return prompt_batch(config, geometry, num_tokens, device)


def probe_mass(layer: Layer, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """What the backend asks of one layer of a prompt in one chunk, float32 [num_tokens]."""
    selector, batch = _prompt(layer, len(query), 1.0, query.device)
    queries, contexts = query[batch.probe_places], batch.rows.contexts
    near = selector.config.window, selector.config.sinks
    return probe_scores(queries, batch.probes, key, contexts, layer.scale, *near).sum((0, 1))


def selected(layer: Layer, query: torch.Tensor, key: torch.Tensor, ratio: float) -> torch.Tensor:
    """The tokens of a prompt that a layer keeps, bool [num_tokens]."""
    selector, batch = _prompt(layer, len(query), ratio, query.device)
    kept = selector.select(0, batch, query, key, layer.scale)
    assert kept is not None
    return kept


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
    store_kv(key, value, kv_cache, slots)
    selector, batch = _prompt(layer, len(query), ratio, query.device)
    kept = selected(layer, query, key, ratio)
    near = selector.config.window, selector.config.sinks
    return sparse_prefill_attention(query, key, value, kept, layer.scale, *near, chunks=batch.rows)


def moves_of(
    slot: int, block_ids: torch.Tensor, num_tokens: int, heap_block_ids: list[int]
) -> Moves:
    """A prompt's first tokens into a slot's pages, without a dense head."""
    device = block_ids.device
    return Moves(
        slots=to_device([slot], device),
        block_table=block_ids[None],
        contexts=Sequences([num_tokens], device),
        ends=to_device([num_tokens], device, torch.int32),
        heap_block_ids=[heap_block_ids],
        first_pages=to_device([0], device),
        is_first=[True],
    )


def check_prefill(layer: Layer) -> None:
    num_tokens = 300
    query = randn(100, layer.num_heads, layer.head_size)
    key, value = randn(2, num_tokens, layer.num_kv_heads, layer.head_size)
    expected = prefill_attention(query, key, value, layer.scale, "reference")
    agree("prefill attention", prefill_attention(query, key, value, layer.scale), expected)
    num_blocks = cdiv(num_tokens, layer.block_size)
    cache = randn(num_blocks, layer.num_kv_heads, layer.block_size, 2 * layer.head_size)
    store_kv(key, value, cache, torch.arange(num_tokens))
    contexts = Sequences([num_tokens], cache.device)
    stored = gather_kv(cache, torch.arange(num_blocks)[None], contexts)
    agree("dense blocks", stored, torch.cat([key, value], dim=-1))
    positions = torch.tensor([250, 299])
    is_random = torch.tensor([True, False])
    probes = ProbePlaces(positions, is_random, Sequences([2], cache.device))
    mass = probe_scores(query[:2], probes, key, contexts, layer.scale, 0, 0).sum((0, 1))
    keys = key.repeat_interleave(layer.num_heads // layer.num_kv_heads, dim=1).double()
    scores = torch.einsum("ihd,jhd->ihj", query[:2].double(), keys * layer.scale)
    hidden = torch.arange(num_tokens) > positions[:, None, None]
    exact = scores.masked_fill(hidden, float("-inf")).softmax(-1).sum((0, 1))
    agree("probe scores", mass, exact)


def decode_bytes(
    layer: Layer, num_rows: int, num_tokens: int, bits: tuple[int, int], kept: float
) -> int:
    """What a decode step has to read of the rows of a `decode_case`."""
    geometry = layer.geometry(*bits)
    end = num_compressible(num_tokens, RESIDUAL, layer.block_size)
    num_high = round(kept * end)
    read = num_high * geometry.token_head_bytes(bits[0])
    read += (end - num_high) * geometry.token_head_bytes(bits[1])
    read += (num_tokens - end) * geometry.token_head_bytes(UNQUANTISED)
    return read * num_rows * layer.num_kv_heads


def decode_case(
    layer: Layer,
    num_rows: int,
    num_tokens: int,
    bits: tuple[int, int],
    kept: float,
    is_filled: bool = True,
) -> tuple[CachedContext, DecodeRows]:
    """Rows whose prompts are compressed, in memory where pages of all rows are mixed.

    Those that are not filled have no pages: enough to compile what attends to them.
    """
    geometry, block_size = layer.geometry(*bits), layer.block_size
    end = num_compressible(num_tokens, RESIDUAL, block_size)
    mask = torch.arange(end) < round(kept * end)
    num_high, num_low = int(mask.sum()), int((~mask).sum())
    pages = geometry.num_pages(num_high, bits[0]) + geometry.num_pages(num_low, bits[1])
    blocks = torch.randperm(num_rows * geometry.num_blocks(pages)).view(num_rows, -1)
    tail = cdiv(num_tokens - end, block_size)
    num_pages = (blocks.numel() if is_filled else 1) * geometry.pages_per_block
    memory = torch.zeros(num_pages, geometry.page_bytes, dtype=torch.uint8)
    heap = PageHeap(memory, geometry, HeapTables(geometry, num_rows, num_tokens))
    block_table = torch.zeros(num_rows, cdiv(num_tokens, block_size), dtype=torch.int32)
    for i in range(num_rows if is_filled else 0):
        prompt = randn(end // block_size, layer.num_kv_heads, block_size, 2 * layer.head_size)
        moves = moves_of(i, torch.arange(len(prompt)), end, blocks[i].tolist())
        heap.move(moves, [prompt], mask[None])
        block_table[i, end // block_size :] = torch.arange(i * tail, (i + 1) * tail)
    kv_cache = randn(num_rows * tail, layer.num_kv_heads, block_size, 2 * layer.head_size)
    tables = heap.tables
    context = CachedContext(
        kv_cache, memory, tables.page_table[0], tables.page_counts[0], block_table, geometry,
        tables.key_norms[0],
    )  # fmt: skip
    every = torch.arange(num_rows, dtype=torch.int32)
    ends = torch.full((num_rows,), end, dtype=torch.int32)
    no_head, lens = torch.zeros_like(ends), torch.full_like(ends, num_tokens)
    return context, DecodeRows(every, every, no_head, ends, lens)


def check_decode(layer: Layer, bits: tuple[int, int], kept: float) -> None:
    context, rows = decode_case(layer, 2, 300, bits, kept)
    query = randn(2, layer.num_heads, layer.head_size)
    out, expected = (torch.full_like(query, torch.nan) for _ in range(2))
    decode_attention(query, context, rows, layer.scale, out)
    decode_reference.decode_attention(query, context, rows, layer.scale, expected)
    agree(f"decode attention at {bits}", out, expected)
