"""Attention of one layer against vLLM's own CPU kernel: prefill, decode and compression.

    python scripts/bench/attention.py --device cpu --json OUT

Inputs are random, so the kept share is set, not found. Stock and ours run in turns in the same
process; figures are medians. A ratio above 1 is better than stock. Every operation is checked
against its reference first, and nothing is printed for one that fails.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import vllm
from stock_attention import BLOCK_SIZE, StockAttention

from vllm_zipvl.cache.compression import compress
from vllm_zipvl.cache.heap import PageCursor, PageHeap
from vllm_zipvl.cache.messages import CompressionPlan
from vllm_zipvl.config import ZipVLConfig
from vllm_zipvl.core.geometry import PageGeometry, cdiv, num_compressible
from vllm_zipvl.core.probes import num_visible_probes, probe_positions
from vllm_zipvl.core.quantization import key_norm
from vllm_zipvl.core.selection import select
from vllm_zipvl.ops.decode_attention import CachedContext, DecodeRows, decode_attention
from vllm_zipvl.ops.decode_attention import reference as decode_reference
from vllm_zipvl.ops.dense_blocks import gather_kv, store_kv
from vllm_zipvl.ops.page_codec import read_pages
from vllm_zipvl.ops.page_codec import reference as codec_reference
from vllm_zipvl.ops.prefill_attention import prefill_attention
from vllm_zipvl.ops.prefill_attention import reference as prefill_reference
from vllm_zipvl.ops.probe_scores import probe_scores

DTYPE = torch.bfloat16
NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE, NUM_LAYERS = 32, 8, 128, 32
SCALE = HEAD_SIZE**-0.5
RESIDUAL = 32
PREFILL_TOKENS = (512, 1024, 2048, 4096, 8192)
PREFILL_KEPT = 0.42
DECODE_ROWS = 8
DECODE_TOKENS = (4096, 16384)
DECODE_METHODS = ((16, 0, 0.42), (4, 0, 0.42), (4, 2, 0.286), (16, 16, 1.0))
COMPRESS_SHAPES = ((2900, 8), (2900, 32), (626, 8), (626, 32))
COMPRESS_KEPT = 0.286
OPS = ("prefill", "decode", "compress")


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).to(DTYPE)


def agree(name: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    """Stop the run if an operation is off by more than a few roundings of the dtype."""
    error = float((found.float() - expected.float()).abs().max())
    budget = 4 * torch.finfo(DTYPE).eps * float(expected.abs().max())
    if not error <= budget:
        raise SystemExit(f"{name} differs from its reference by {error:.3g} > {budget:.3g}")


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


def sparse_prefill(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    slots: torch.Tensor,
    ratio: float,
) -> torch.Tensor:
    """What the backend does for one layer of a prompt in one chunk."""
    num_tokens = query.shape[0]
    config = ZipVLConfig(ratio=ratio)
    store_kv(key, value, kv_cache, slots)
    probes = probe_positions(0, 0, num_tokens, config.probe_recent, config.probe_random)
    positions = torch.cat([torch.from_numpy(part.copy()) for part in probes])
    mass = probe_scores(query[positions], positions, len(probes.random), key, SCALE)
    visible = torch.from_numpy(num_visible_probes(positions.numpy(), num_tokens).copy())
    selection = select(mass.random + mass.recent, visible, len(probes.recent), config)
    kept = selection.kept.nonzero().flatten()
    out = torch.zeros_like(query)
    out[kept] = prefill_attention(query[kept], key[kept], value[kept], SCALE)
    return out


def check_prefill() -> None:
    query, key, value = randn(100, NUM_HEADS, HEAD_SIZE), *randn(2, 300, NUM_KV_HEADS, HEAD_SIZE)
    expected = prefill_reference.prefill_attention(query, key, value, SCALE)
    agree("prefill attention", prefill_attention(query, key, value, SCALE), expected)
    cache = randn(10, NUM_KV_HEADS, BLOCK_SIZE, 2 * HEAD_SIZE)
    store_kv(key, value, cache, torch.arange(300))
    stored = gather_kv(cache, torch.arange(10), 0, 300)
    agree("dense blocks", stored, torch.cat([key, value], dim=-1))
    positions = torch.tensor([250, 299])
    mass = sum(probe_scores(query[:2], positions, 1, key, SCALE))
    scores = torch.einsum(
        "ihd,jhd->ihj", query[:2].double(), key.repeat_interleave(4, dim=1).double() * SCALE
    )
    hidden = torch.arange(300) > positions[:, None, None]
    exact = scores.masked_fill(hidden, float("-inf")).softmax(-1).sum((0, 1))
    agree("probe scores", mass, exact)


def prefill_row(num_tokens: int, repeats: int) -> dict[str, Any]:
    query = randn(num_tokens, NUM_HEADS, HEAD_SIZE)
    key, value = randn(2, num_tokens, NUM_KV_HEADS, HEAD_SIZE)
    stock = StockAttention(query, 1, num_tokens, NUM_KV_HEADS)
    num_blocks = cdiv(num_tokens, BLOCK_SIZE)
    cache = randn(num_blocks, NUM_KV_HEADS, BLOCK_SIZE, 2 * HEAD_SIZE)
    slots = torch.randperm(num_blocks)[:, None] * BLOCK_SIZE + torch.arange(BLOCK_SIZE)
    slots = slots.flatten()[:num_tokens]

    def dense() -> None:
        stock.store(key, value)
        stock.attend()

    def sparse() -> torch.Tensor:
        return sparse_prefill(query, key, value, cache, slots, PREFILL_KEPT)

    kept = float(sparse().any(dim=-1).any(dim=-1).float().mean())
    baseline, seconds = in_turns(repeats, dense, sparse)
    shape = {"tokens": num_tokens, "heads": [NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE]}
    return row("prefill", shape, "sparse", seconds, baseline, kept=kept)


def decode_case(
    num_rows: int, num_tokens: int, bits: tuple[int, int], kept: float
) -> tuple[CachedContext, DecodeRows]:
    """Rows whose prompts are compressed, in memory where pages of all rows are mixed."""
    geometry = PageGeometry(1, NUM_KV_HEADS, HEAD_SIZE, DTYPE.itemsize, BLOCK_SIZE, *bits)
    end = num_compressible(num_tokens, RESIDUAL, BLOCK_SIZE)
    mask = torch.arange(end) < round(kept * end)
    num_high, num_low = int(mask.sum()), int((~mask).sum())
    pages = geometry.num_pages(num_high, bits[0]) + geometry.num_pages(num_low, bits[1])
    blocks = torch.randperm(num_rows * geometry.num_blocks(pages)).view(num_rows, -1)
    tail = cdiv(num_tokens - end, BLOCK_SIZE)
    memory = torch.zeros(blocks.numel() * geometry.pages_per_block, geometry.page_bytes).byte()
    heap = PageHeap(memory, geometry, num_rows, num_tokens)
    block_table = torch.zeros(num_rows, cdiv(num_tokens, BLOCK_SIZE), dtype=torch.int32)
    for i in range(num_rows):
        kv = randn(end, NUM_KV_HEADS, 2 * HEAD_SIZE)
        cursor = PageCursor(blocks[i].tolist(), 0, geometry.pages_per_block)
        heap.set_key_norm(0, i, kv[..., :HEAD_SIZE])
        heap.append(0, i, 0, kv[mask], cursor)
        heap.append(0, i, 1, kv[~mask], cursor)
        block_table[i, end // BLOCK_SIZE :] = torch.arange(i * tail, (i + 1) * tail)
    kv_cache = randn(num_rows * tail, NUM_KV_HEADS, BLOCK_SIZE, 2 * HEAD_SIZE)
    context = CachedContext(
        kv_cache, memory, heap.page_table[0], heap.page_counts[0], block_table, geometry,
        heap.key_norms[0],
    )  # fmt: skip
    every = torch.arange(num_rows, dtype=torch.int32)
    ends = torch.full((num_rows,), end, dtype=torch.int32)
    return context, DecodeRows(every, every, ends, torch.full_like(ends, num_tokens))


def check_decode(bits: tuple[int, int], kept: float) -> None:
    context, rows = decode_case(2, 300, bits, kept)
    query = randn(2, NUM_HEADS, HEAD_SIZE)
    out, expected = torch.empty_like(query), torch.empty_like(query)
    decode_attention(query, context, rows, SCALE, out)
    decode_reference.decode_attention(query, context, rows, SCALE, expected)
    agree(f"decode attention at {bits}", out, expected)


def decode_row(
    num_tokens: int, bits: tuple[int, int], kept: float, stock: StockAttention, repeats: int
) -> dict[str, Any]:
    context, rows = decode_case(DECODE_ROWS, num_tokens, bits, kept)
    out = torch.empty_like(stock.query)
    baseline, seconds = in_turns(
        repeats, stock.attend, lambda: decode_attention(stock.query, context, rows, SCALE, out)
    )
    shape = {
        "rows": DECODE_ROWS, "tokens": num_tokens, "heads": [NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE],
    }  # fmt: skip
    return row("decode", shape, f"{bits[0]}/{bits[1]}", seconds, baseline, kept=kept)


def kv_bytes_ratio(num_tokens: int, num_kv_heads: int) -> float:
    """Whole dense blocks of a prompt over what is held right after its compression.

    Counted are the heap blocks of all layers with their partly filled pages, and the dense
    blocks of the tail.
    """
    geometry = PageGeometry(NUM_LAYERS, num_kv_heads, HEAD_SIZE, DTYPE.itemsize, BLOCK_SIZE, 4, 2)
    end = num_compressible(num_tokens, RESIDUAL, BLOCK_SIZE)
    high = round(COMPRESS_KEPT * end)
    pages = geometry.num_pages(high, 4) + geometry.num_pages(end - high, 2)
    held = geometry.num_blocks(NUM_LAYERS * pages) + cdiv(num_tokens - end, BLOCK_SIZE)
    return cdiv(num_tokens, BLOCK_SIZE) / held


def compress_row(num_tokens: int, num_kv_heads: int, repeats: int) -> dict[str, Any]:
    """Seconds to compress one layer of a prompt, beside its dense attention."""
    geometry = PageGeometry(1, num_kv_heads, HEAD_SIZE, DTYPE.itemsize, BLOCK_SIZE, 4, 2)
    end = num_compressible(num_tokens, RESIDUAL, BLOCK_SIZE)
    kept = torch.rand(end) < COMPRESS_KEPT
    num_blocks = geometry.num_blocks(geometry.max_new_pages(end, int(kept.sum())))
    memory = torch.zeros(num_blocks * geometry.pages_per_block, geometry.page_bytes).byte()
    heap = PageHeap(memory, geometry, 1, num_tokens)
    kv_cache = randn(end // BLOCK_SIZE, num_kv_heads, BLOCK_SIZE, 2 * HEAD_SIZE)
    plan = CompressionPlan(
        plan_id=0,
        request_id="bench",
        slot=0,
        start=0,
        end=end,
        context_len=num_tokens,
        is_prompt=True,
        dense_block_ids=list(range(len(kv_cache))),
        heap_block_ids=list(range(num_blocks)),
        first_page=0,
    )

    def run() -> None:
        heap.reset(0)
        compress(plan, [kept], [kv_cache], heap)

    run()
    check_compressed(heap, kv_cache, kept)
    stock = StockAttention(
        randn(num_tokens, NUM_HEADS, HEAD_SIZE), 1, num_tokens, num_kv_heads
    )  # fmt: skip
    baseline, seconds = in_turns(repeats, stock.attend, run)
    shape = {"tokens": num_tokens, "heads": [NUM_HEADS, num_kv_heads, HEAD_SIZE]}
    return row(
        "compress", shape, "4/2", seconds, None, kept=COMPRESS_KEPT,
        kv_bytes_ratio=kv_bytes_ratio(num_tokens, num_kv_heads),
        share_of_dense_prefill_attention=seconds / baseline,
    )  # fmt: skip


def check_compressed(heap: PageHeap, kv_cache: torch.Tensor, kept: torch.Tensor) -> None:
    """Both classes' pages decode to what the codec's reference makes of the same tokens."""
    geometry = heap.geometry
    kv = gather_kv(kv_cache, torch.arange(len(kv_cache)), 0, len(kept))
    norm = key_norm(kv[..., :HEAD_SIZE])
    table = heap.page_table[0, 0]
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


def row(
    op: str,
    shape: dict[str, Any],
    method: str,
    seconds: float,
    baseline: float | None,
    **more: float,
) -> dict[str, Any]:
    found: dict[str, Any] = {"op": op, "shape": shape, "method": method, "seconds": seconds}
    if baseline is not None:
        found |= {
            "baseline": "vLLM CPU attention", "baseline_seconds": baseline,
            "ratio": baseline / seconds,
        }  # fmt: skip
    return found | more


def measure(ops: list[str], repeats: int) -> Iterator[dict[str, Any]]:
    if "prefill" in ops:
        check_prefill()
        for num_tokens in PREFILL_TOKENS:
            yield prefill_row(num_tokens, repeats)
    if "decode" in ops:
        for high, low, kept in DECODE_METHODS:
            check_decode((high, low), kept)
        for num_tokens in DECODE_TOKENS:
            query = randn(DECODE_ROWS, NUM_HEADS, HEAD_SIZE)
            stock = StockAttention(query, DECODE_ROWS, num_tokens, NUM_KV_HEADS)
            for high, low, kept in DECODE_METHODS:
                yield decode_row(num_tokens, (high, low), kept, stock, repeats)
    if "compress" in ops:
        for num_tokens, num_kv_heads in COMPRESS_SHAPES:
            yield compress_row(num_tokens, num_kv_heads, repeats)


COLUMNS = (
    ("kept", "kept", "{:.3f}"),
    ("stock ms", "baseline_seconds", "{:.2f}"),
    ("ours ms", "seconds", "{:.2f}"),
    ("ratio", "ratio", "{:.2f}x"),
    ("KV bytes", "kv_bytes_ratio", "{:.2f}x"),
    ("of prefill", "share_of_dense_prefill_attention", "{:.1%}"),
)


def heading() -> str:
    titles = "".join(f"{title:>11}" for title, _, _ in COLUMNS)
    return f"{'op':<9}{'rows':>5}{'tokens':>8}{'heads':>12}{'bits':>8}{titles}"


def line(found: dict[str, Any]) -> str:
    """A row of the table; what does not apply is left blank."""
    shape = found["shape"]
    heads = "/".join(map(str, shape["heads"]))
    text = f"{found['op']:<9}{shape.get('rows', 1):>5}{shape['tokens']:>8}{heads:>12}"
    text += f"{found['method']:>8}"
    for _, key, form in COLUMNS:
        factor = 1000 if key.endswith("seconds") else 1
        text += f"{form.format(found[key] * factor) if key in found else '':>11}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu"], default="cpu")
    parser.add_argument("--json", type=Path, required=True, help="where the rows are written")
    parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS))
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    about = {
        "device": arguments.device, "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(), "vllm": vllm.__version__, "torch": torch.__version__,
        "dtype": str(DTYPE), "block_size": BLOCK_SIZE, "repeats": arguments.repeats,
        "baseline": "vLLM CPU attention kernel, same process, in turns",
    }  # fmt: skip
    print(", ".join(f"{key} {value}" for key, value in about.items()), end="\n\n")
    print(heading())
    rows = []
    for found in measure(arguments.ops, arguments.repeats):
        print(line(found), flush=True)
        rows.append(found)
    arguments.json.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
