"""One layer on the CPU: prefill, decode and compression against vLLM's own kernel."""

import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import vllm
from attention_cases import (
    DTYPE,
    RESIDUAL,
    Layer,
    agree,
    check_decode,
    check_prefill,
    decode_case,
    randn,
    selected,
    sparse_prefill,
)
from attention_rows import row
from stock_attention import BLOCK_SIZE, StockAttention

from vllm_zipvl.cache.compression import compress, moves_of_plans
from vllm_zipvl.cache.heap import HeapTables, PageHeap
from vllm_zipvl.core.geometry import cdiv, num_compressible
from vllm_zipvl.core.quantization import key_norm
from vllm_zipvl.core.sequences import Sequences
from vllm_zipvl.ops.decode_attention import decode_attention
from vllm_zipvl.ops.dense_blocks import gather_kv
from vllm_zipvl.ops.page_codec import read_pages
from vllm_zipvl.ops.page_codec import reference as codec_reference
from vllm_zipvl.plan import CompressionPlan

LAYER = Layer(num_heads=32, num_kv_heads=8, head_size=128, block_size=BLOCK_SIZE)
NUM_LAYERS = 32
PREFILL_TOKENS = (512, 1024, 2048, 4096, 8192)
PREFILL_KEPT = 0.42
DECODE_ROWS = 8
DECODE_TOKENS = (4096, 16384)
DECODE_METHODS = ((16, 0, 0.42), (4, 0, 0.42), (4, 2, 0.286), (16, 16, 1.0))
COMPRESS_SHAPES = ((2900, 8), (2900, 32), (626, 8), (626, 32))
COMPRESS_KEPT = 0.286
BASELINE = "vLLM CPU attention"


def in_turns(repeats: int, *runs: Callable[[], object]) -> list[float]:
    """Median seconds of each run; they take turns, after one round that does not count."""
    seconds: list[list[float]] = [[] for _ in runs]
    for i in range(repeats + 1):
        for run, taken in zip(runs, seconds, strict=True):
            start = time.perf_counter()
            run()
            if i:
                taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in seconds]


def prefill_row(num_tokens: int, repeats: int) -> dict[str, Any]:
    query = randn(num_tokens, LAYER.num_heads, LAYER.head_size)
    key, value = randn(2, num_tokens, LAYER.num_kv_heads, LAYER.head_size)
    stock = StockAttention(query, 1, num_tokens, LAYER.num_kv_heads)
    num_blocks = cdiv(num_tokens, BLOCK_SIZE)
    cache = randn(num_blocks, LAYER.num_kv_heads, BLOCK_SIZE, 2 * LAYER.head_size)
    slots = torch.randperm(num_blocks)[:, None] * BLOCK_SIZE + torch.arange(BLOCK_SIZE)
    slots = slots.flatten()[:num_tokens]

    def dense() -> None:
        stock.store(key, value)
        stock.attend()

    def sparse() -> torch.Tensor:
        return sparse_prefill(LAYER, query, key, value, cache, slots, PREFILL_KEPT)

    kept = float(selected(LAYER, query, key, PREFILL_KEPT).float().mean())
    baseline, seconds = in_turns(repeats, dense, sparse)
    shape = {"tokens": num_tokens, "heads": LAYER.heads}
    return row("prefill", shape, "sparse", seconds, BASELINE, baseline, kept=kept)


def decode_row(
    num_tokens: int, bits: tuple[int, int], kept: float, stock: StockAttention, repeats: int
) -> dict[str, Any]:
    context, rows = decode_case(LAYER, DECODE_ROWS, num_tokens, bits, kept)
    out = torch.empty_like(stock.query)
    baseline, seconds = in_turns(
        repeats,
        stock.attend,
        lambda: decode_attention(stock.query, context, rows, LAYER.scale, out),
    )
    shape = {"rows": DECODE_ROWS, "tokens": num_tokens, "heads": LAYER.heads}
    return row("decode", shape, f"{bits[0]}/{bits[1]}", seconds, BASELINE, baseline, kept=kept)


def kv_bytes_ratio(num_tokens: int, num_kv_heads: int) -> float:
    """Whole dense blocks of a prompt over what is held right after its compression.

    Counted are the heap blocks of all layers with their partly filled pages, and the dense
    blocks of the tail.
    """
    layer = LAYER._replace(num_kv_heads=num_kv_heads)
    geometry = replace(layer.geometry(4, 2), num_layers=NUM_LAYERS)
    end = num_compressible(num_tokens, RESIDUAL, BLOCK_SIZE)
    high = round(COMPRESS_KEPT * end)
    pages = geometry.num_pages(high, 4) + geometry.num_pages(end - high, 2)
    held = geometry.num_blocks(NUM_LAYERS * pages) + cdiv(num_tokens - end, BLOCK_SIZE)
    return cdiv(num_tokens, BLOCK_SIZE) / held


def compress_row(num_tokens: int, num_kv_heads: int, repeats: int) -> dict[str, Any]:
    """Seconds to compress one layer of a prompt, beside its dense attention."""
    layer = LAYER._replace(num_kv_heads=num_kv_heads)
    geometry = layer.geometry(4, 2)
    end = num_compressible(num_tokens, RESIDUAL, BLOCK_SIZE)
    kept = torch.rand(end) < COMPRESS_KEPT
    num_blocks = geometry.num_blocks(geometry.max_new_pages(end, int(kept.sum())))
    memory = torch.zeros(num_blocks * geometry.pages_per_block, geometry.page_bytes).byte()
    heap = PageHeap(memory, geometry, HeapTables(geometry, 1, num_tokens))
    kv_cache = randn(end // BLOCK_SIZE, num_kv_heads, BLOCK_SIZE, 2 * LAYER.head_size)
    plan = CompressionPlan(
        plan_id=0,
        request_id="bench",
        slot=0,
        start=0,
        end=end,
        context_len=num_tokens,
        is_prompt=True,
        head_block_ids=[],
        dense_block_ids=list(range(len(kv_cache))),
        heap_block_ids=list(range(num_blocks)),
        first_page=0,
        is_first=True,
    )

    def run() -> None:
        heap.reset(0)
        compress([plan], moves_of_plans([plan], kept.device), kept[None], [kv_cache], heap)

    run()
    check_compressed(heap, kv_cache, kept)
    query = randn(num_tokens, LAYER.num_heads, LAYER.head_size)
    stock = StockAttention(query, 1, num_tokens, num_kv_heads)
    baseline, seconds = in_turns(repeats, stock.attend, run)
    shape = {"tokens": num_tokens, "heads": layer.heads}
    return row(
        "compress", shape, "4/2", seconds, kept=COMPRESS_KEPT,
        kv_bytes_ratio=kv_bytes_ratio(num_tokens, num_kv_heads),
        share_of_dense_prefill_attention=seconds / baseline,
    )  # fmt: skip


def check_compressed(heap: PageHeap, kv_cache: torch.Tensor, kept: torch.Tensor) -> None:
    """Both classes' pages decode to what the codec's reference makes of the same tokens."""
    geometry = heap.geometry
    contexts = Sequences([len(kept)], kept.device)
    kv = gather_kv(kv_cache, torch.arange(len(kv_cache))[None], contexts)
    norm = key_norm(kv[..., : LAYER.head_size])
    table = heap.tables.page_table[0, 0]
    for mask, bits, name in ((kept, 4, "kept"), (~kept, 2, "other")):
        num = int(mask.sum())
        num_pages = geometry.num_pages(num, bits)
        ids = table[:num_pages] if name == "kept" else table[-num_pages:].flip(0)
        held = read_pages(heap.memory, ids, num, bits, DTYPE, geometry)
        pages = torch.zeros(num_pages, geometry.page_bytes, dtype=torch.uint8)
        every = torch.arange(num_pages)
        codec_reference.write_pages(kv[mask], pages, every, 0, bits, geometry, norm)
        expected = codec_reference.read_pages(pages, every, num, bits, DTYPE, geometry)
        agree(f"compressed keys and values of the {name} tokens", held, expected)


def measure(ops: list[str], repeats: int) -> Iterator[dict[str, Any]]:
    if "prefill" in ops:
        check_prefill(LAYER)
        for num_tokens in PREFILL_TOKENS:
            yield prefill_row(num_tokens, repeats)
    if "decode" in ops:
        for high, low, kept in DECODE_METHODS:
            check_decode(LAYER, (high, low), kept)
        for num_tokens in DECODE_TOKENS:
            query = randn(DECODE_ROWS, LAYER.num_heads, LAYER.head_size)
            stock = StockAttention(query, DECODE_ROWS, num_tokens, LAYER.num_kv_heads)
            for high, low, kept in DECODE_METHODS:
                yield decode_row(num_tokens, (high, low), kept, stock, repeats)
    if "compress" in ops:
        for num_tokens, num_kv_heads in COMPRESS_SHAPES:
            yield compress_row(num_tokens, num_kv_heads, repeats)


def about() -> dict[str, Any]:
    return {
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "vllm": vllm.__version__,
        "block_size": BLOCK_SIZE,
        "baseline": "vLLM CPU attention kernel, same process, in turns",
    }
