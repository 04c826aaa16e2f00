"""One layer on a GPU: prefill, decode and compression against the best dense attention there.

Every run empties the L2 cache first (`triton.testing.do_bench`), on random data. A dry run goes
through the same code on the CPU with the kernels interpreted, at sizes that mean nothing. vLLM's
kernels are left out of it unless `tests/interpreted_triton` is on `PYTHONPATH`.
"""

import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
from attention_cases import (
    DTYPE,
    Layer,
    check_decode,
    check_prefill,
    decode_case,
    moves_of,
    prefill_kept,
    probe_mass,
    randn,
    sparse_prefill,
)
from attention_rows import absent, row
from decode_baselines import BASELINES, DecodeBaseline, wrong
from dense_attention import DenseAttention, vllm_version
from whole_model_timing import Clock

from vllm_zipvl.cache.heap import HeapTables, PageHeap
from vllm_zipvl.core.geometry import cdiv
from vllm_zipvl.ops.decode_attention import decode_attention
from vllm_zipvl.ops.dense_blocks import store_kv
from vllm_zipvl.ops.prefill_attention import find_kernel

LAYERS = {
    "LongVA-7B": Layer(num_heads=28, num_kv_heads=4, head_size=128, block_size=16),
    "LLaVA-NeXT-7B": Layer(num_heads=32, num_kv_heads=32, head_size=128, block_size=16),
}
PREFILL_TOKENS = (1024, 2048, 4096, 8192, 32768, 131072)
PREFILL_KEPT = 0.42
DECODE_SHAPES = [(rows, tokens) for tokens in (4096, 16384, 131072) for rows in (1, 8, 64)]
DECODE_METHODS = ((16, 0, 0.42), (4, 0, 0.42), (4, 2, 0.286), (16, 16, 1.0))
COMPRESS_TOKENS, COMPRESS_KEPT = 16384, 0.286
DECODE_BYTES = 48 * 2**30
"""Of a dense cache; larger ones are left out."""
COPIED_BYTES = 2**30
DRY_TOKENS, DRY_ROWS = 96, 2
DRY_KV_HEADS = 1
"""Of vLLM's kernels, one program of which stores one head of one token."""
CHECKED_ROWS, CHECKED_TOKENS, DRY_CHECKED_TOKENS = 5, 111, 23
"""Of vLLM's kernels; for 5 rows its Triton backend splits contexts of 4 KV heads, not of 32."""
MILLISECOND = 1e-3


def milliseconds(run: Callable[[], object], is_dry: bool) -> float:
    """Median of a run."""
    if is_dry:
        run()
        return 1.0
    return triton.testing.do_bench(run, warmup=50, rep=800, return_mode="median")


def replayed_milliseconds(run: Callable[[], object], is_dry: bool) -> float:
    """Median of a run that engines replay from a CUDA graph."""
    if is_dry:
        return milliseconds(run, is_dry)
    graphed = Clock(torch.device("cuda")).captured(run)
    if graphed.not_captured:
        raise RuntimeError(f"not captured: {graphed.not_captured}")
    return milliseconds(graphed.step, is_dry)


def copied_bytes_per_second(is_dry: bool) -> float:
    """Read and written by a large copy: the ceiling of any kernel that only reads."""
    source = torch.randint(256, (1024 if is_dry else COPIED_BYTES,), dtype=torch.uint8)
    target = torch.empty_like(source)
    taken = milliseconds(lambda: target.copy_(source), is_dry)
    return 2 * source.numel() / (taken * MILLISECOND)


def prefill_row(name: str, layer: Layer, num_tokens: int, is_dry: bool) -> dict[str, Any]:
    query = randn(num_tokens, layer.num_heads, layer.head_size)
    key, value = randn(2, num_tokens, layer.num_kv_heads, layer.head_size)
    num_blocks = cdiv(num_tokens, layer.block_size)
    cache = randn(num_blocks, layer.num_kv_heads, layer.block_size, 2 * layer.head_size)
    slots = torch.randperm(num_blocks)[:, None] * layer.block_size + torch.arange(layer.block_size)
    slots = slots.flatten()[:num_tokens]
    dense = DenseAttention(layer)
    attend = dense.prefill(query, key, value)

    def stored_and_attended() -> torch.Tensor:
        store_kv(key, value, cache, slots)
        return attend()

    baseline = milliseconds(stored_and_attended, is_dry)

    def sparse() -> torch.Tensor:
        return sparse_prefill(layer, query, key, value, cache, slots, PREFILL_KEPT)

    kept = prefill_kept(layer, query, key, PREFILL_KEPT)
    seconds = milliseconds(sparse, is_dry) * MILLISECOND
    probes = milliseconds(lambda: probe_mass(layer, query, key), is_dry)
    shape = {"model": name, "tokens": num_tokens, "heads": layer.heads}
    return row(
        "prefill", shape, "sparse", seconds, dense.name, baseline * MILLISECOND, kept=kept,
        share_of_probes=probes / baseline,
        kernel=find_kernel("auto", query.device.type, DTYPE, layer.head_size),
    )  # fmt: skip


def narrowed(layer: Layer) -> Layer:
    group = layer.num_heads // layer.num_kv_heads
    return layer._replace(num_heads=group * DRY_KV_HEADS, num_kv_heads=DRY_KV_HEADS)


def refusal(baseline: DecodeBaseline, layer: Layer, is_dry: bool) -> str | None:
    """What keeps a baseline from being measured; it is checked here."""
    num_tokens = DRY_CHECKED_TOKENS if is_dry else CHECKED_TOKENS
    layer = narrowed(layer) if is_dry else layer
    try:
        return baseline.why_not() or wrong(baseline.rows(layer, CHECKED_ROWS, num_tokens))
    # Code that is not ours fails in its own ways, and the other rows do not depend on it.
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def baseline_row(
    baseline: DecodeBaseline,
    layer: Layer,
    shape: dict[str, Any],
    is_dry: bool,
    copy_rate: float,
    dense: tuple[str, float],
) -> dict[str, Any]:
    layer = narrowed(layer) if is_dry else layer
    try:
        rows = baseline.rows(layer, shape["rows"], shape["tokens"])
        seconds = replayed_milliseconds(rows, is_dry) * MILLISECOND
    except Exception as error:
        return absent("decode", shape, baseline.name, f"{type(error).__name__}: {error}")
    rate = rows.read_bytes / seconds
    return row(
        "decode", shape, baseline.name, seconds, *dense, kernel=rows.kernel,
        bytes_per_second=rate, share_of_copy=rate / copy_rate,
    )  # fmt: skip


def decode_rows(
    name: str,
    layer: Layer,
    num_rows: int,
    num_tokens: int,
    is_dry: bool,
    copy_rate: float,
    refusals: dict[str, str | None],
) -> Iterator[dict[str, Any]]:
    """First over dense attention and vLLM's quantised caches, then over ours."""
    shape = {"model": name, "rows": num_rows, "tokens": num_tokens, "heads": layer.heads}
    dense_bytes = 2 * num_rows * num_tokens * layer.num_kv_heads * layer.head_size * DTYPE.itemsize
    if dense_bytes > DECODE_BYTES:
        sizes = f"{dense_bytes / 2**30:.0f} GiB, more than {DECODE_BYTES / 2**30:.0f} GiB"
        yield absent("decode", shape, "all", f"a dense cache takes {sizes}")
        return
    query = randn(num_rows, layer.num_heads, layer.head_size)
    dense = DenseAttention(layer)
    baseline = replayed_milliseconds(dense.decode(query, num_tokens), is_dry) * MILLISECOND
    rate = dense_bytes / baseline
    yield row(
        "decode", shape, dense.name, baseline, dense.name, baseline, bytes_per_second=rate,
        share_of_copy=rate / copy_rate,
    )  # fmt: skip
    quantised = {}
    for other in BASELINES:
        if reason := refusals[other.name]:
            found = absent("decode", shape, other.name, reason)
        else:
            found = baseline_row(other, layer, shape, is_dry, copy_rate, (dense.name, baseline))
        if "seconds" in found:
            quantised[other.name] = found["seconds"]
        yield found
    for high, low, kept in DECODE_METHODS:
        geometry = layer.geometry(high, low)
        context, rows = decode_case(layer, num_rows, num_tokens, (high, low), kept)
        out = torch.empty_like(query)

        def ours(context=context, rows=rows, out=out) -> None:
            decode_attention(query, context, rows, layer.scale, out)

        seconds = replayed_milliseconds(ours, is_dry) * MILLISECOND
        end = int(rows.tail_starts[0])
        num_high = round(kept * end)
        read = num_high * geometry.token_head_bytes(high)
        read += (end - num_high) * geometry.token_head_bytes(low)
        read += (num_tokens - end) * geometry.token_head_bytes(16)
        read *= num_rows * layer.num_kv_heads
        yield row(
            "decode", shape, f"{high}/{low}", seconds, dense.name, baseline, kept=kept,
            bytes_per_second=read / seconds, share_of_copy=read / seconds / copy_rate,
            speed_up_over={other: taken / seconds for other, taken in quantised.items()},
        )  # fmt: skip


def compress_row(name: str, layer: Layer, is_dry: bool) -> dict[str, Any]:
    """A layer of a prompt, beside its dense attention."""
    num_tokens = DRY_TOKENS if is_dry else COMPRESS_TOKENS
    geometry = layer.geometry(4, 2)
    kept = torch.rand(num_tokens) < COMPRESS_KEPT
    num_blocks = geometry.num_blocks(geometry.max_new_pages(num_tokens, int(kept.sum())))
    memory = torch.zeros(
        num_blocks * geometry.pages_per_block, geometry.page_bytes, dtype=torch.uint8
    )
    heap = PageHeap(memory, geometry, HeapTables(geometry, 1, num_tokens))
    num_dense = num_tokens // layer.block_size
    cache = randn(num_dense, layer.num_kv_heads, layer.block_size, 2 * layer.head_size)
    block_ids = torch.randperm(num_dense)

    def run() -> None:
        heap.reset(0)
        moves = moves_of(0, block_ids, num_tokens, list(range(num_blocks)))
        heap.move(moves, [cache], kept[None])

    seconds = milliseconds(run, is_dry) * MILLISECOND
    query = randn(num_tokens, layer.num_heads, layer.head_size)
    key, value = randn(2, num_tokens, layer.num_kv_heads, layer.head_size)
    prefill = DenseAttention(layer).prefill(query, key, value)
    baseline = milliseconds(prefill, is_dry) * MILLISECOND
    shape = {"model": name, "tokens": num_tokens, "heads": layer.heads}
    return row(
        "compress", shape, "4/2", seconds, kept=COMPRESS_KEPT,
        share_of_dense_prefill_attention=seconds / baseline,
    )  # fmt: skip


def measure(ops: list[str], is_dry: bool) -> Iterator[dict[str, Any]]:
    """Rows of all layers; the kernels must run here.

    Raises:
        SystemExit: There is no GPU, or a dry run without the interpreter.
    """
    if is_dry and os.environ.get("TRITON_INTERPRET") != "1":
        raise SystemExit("a dry run interprets the kernels: set TRITON_INTERPRET=1")
    if not is_dry:
        if not torch.cuda.is_available():
            raise SystemExit("there is no GPU; --dry-run goes through the code without one")
        torch.set_default_device("cuda")
    copy_rate = copied_bytes_per_second(is_dry)
    prefill_tokens = (DRY_TOKENS,) if is_dry else PREFILL_TOKENS
    decode_shapes = [(DRY_ROWS, DRY_TOKENS)] if is_dry else DECODE_SHAPES
    for name, layer in LAYERS.items():
        if "prefill" in ops:
            check_prefill(layer)
            for num_tokens in prefill_tokens:
                yield prefill_row(name, layer, num_tokens, is_dry)
        if "decode" in ops:
            for high, low, kept in DECODE_METHODS:
                check_decode(layer, (high, low), kept)
            refusals = {other.name: refusal(other, layer, is_dry) for other in BASELINES}
            for num_rows, num_tokens in decode_shapes:
                yield from decode_rows(
                    name, layer, num_rows, num_tokens, is_dry, copy_rate, refusals
                )
        if "compress" in ops:
            yield compress_row(name, layer, is_dry)


def about() -> dict[str, Any]:
    found = {"triton": triton.__version__, "vllm": vllm_version()}
    if torch.cuda.is_available():
        found |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return found
