"""One layer on a GPU: prefill, decode and compression against the best dense attention there.

Every run empties the L2 cache first (`triton.testing.do_bench`), on random data. A dry run goes
through the same code on the CPU with the kernels interpreted, at sizes that mean nothing. vLLM's
kernels are left out of it unless `tests/interpreted_triton` is on `PYTHONPATH`.
"""

from collections.abc import Iterator
from typing import Any

import lone_flash
import torch
from attention_cases import (
    DTYPE,
    Layer,
    check_decode,
    check_prefill,
    randn,
)
from attention_rows import absent, row
from decode_baselines import BASELINES, DecodeBaseline, wrong
from dense_attention import DenseAttention
from gpu_cases import CACHE_KEPT, LAYERS, CompressCase, DecodeCase, PrefillCase
from gpu_program import device_of, versions
from gpu_timing import (
    MILLISECOND,
    copied_bytes_per_second,
    milliseconds,
    replayed_milliseconds,
)

from vllm_zipvl.ops.prefill_attention import find_kernel

PREFILL_TOKENS = (1024, 2048, 4096, 8192, 32768, 131072)
DECODE_SHAPES = [(rows, tokens) for tokens in (4096, 16384, 131072) for rows in (1, 8, 64)]
DECODE_METHODS = ((16, 0, 0.42), (4, 0, 0.42), (4, 2, 0.286), (16, 16, 1.0))
COMPRESS_TOKENS = 16384
DECODE_BYTES = 48 * 2**30
"""Of a dense cache; larger ones are left out."""
DRY_TOKENS, DRY_ROWS = 96, 2
DRY_KV_HEADS = 1
"""Of vLLM's kernels, one program of which stores one head of one token."""
CHECKED_ROWS, CHECKED_TOKENS, DRY_CHECKED_TOKENS = 5, 111, 23
"""Of vLLM's kernels; for 5 rows its Triton backend splits contexts of 4 KV heads, not of 32."""


def prefill_row(
    name: str, layer: Layer, num_tokens: int, is_dry: bool, repeat: float = 800
) -> dict[str, Any]:
    """`repeat` is how many milliseconds each figure takes."""
    case = PrefillCase(layer, num_tokens)
    baseline = milliseconds(case.dense, is_dry, repeat)
    kept = case.kept()
    seconds = milliseconds(case.sparse, is_dry, repeat) * MILLISECOND
    probes = milliseconds(case.probe, is_dry, repeat)
    shape = {"model": name, "tokens": num_tokens, "heads": layer.heads}
    return row(
        "prefill", shape, "sparse", seconds, case.baseline.name, baseline * MILLISECOND, kept=kept,
        share_of_probes=probes / baseline,
        kernel=find_kernel("auto", case.query.device.type, DTYPE, layer.head_size),
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
        case = DecodeCase(layer, num_rows, num_tokens, (high, low), kept)
        seconds = replayed_milliseconds(case.run, is_dry) * MILLISECOND
        yield row(
            "decode", shape, f"{high}/{low}", seconds, dense.name, baseline, kept=kept,
            bytes_per_second=case.read_bytes / seconds,
            share_of_copy=case.read_bytes / seconds / copy_rate,
            speed_up_over={other: taken / seconds for other, taken in quantised.items()},
        )  # fmt: skip


def compress_row(name: str, layer: Layer, is_dry: bool) -> dict[str, Any]:
    """A layer of a prompt, beside its dense attention."""
    num_tokens = DRY_TOKENS if is_dry else COMPRESS_TOKENS
    seconds = milliseconds(CompressCase(layer, num_tokens).run, is_dry) * MILLISECOND
    query = randn(num_tokens, layer.num_heads, layer.head_size)
    key, value = randn(2, num_tokens, layer.num_kv_heads, layer.head_size)
    prefill = DenseAttention(layer).prefill(query, key, value)
    baseline = milliseconds(prefill, is_dry) * MILLISECOND
    shape = {"model": name, "tokens": num_tokens, "heads": layer.heads}
    return row(
        "compress", shape, "4/2", seconds, kept=CACHE_KEPT,
        share_of_dense_prefill_attention=seconds / baseline,
    )  # fmt: skip


def measure(
    ops: list[str], is_dry: bool, models: list[str] | None = None
) -> Iterator[dict[str, Any]]:
    """Rows of the models' layers, or of all; the kernels must run here."""
    torch.set_default_device(device_of(is_dry))
    if not is_dry:
        lone_flash.find()
    copy_rate = copied_bytes_per_second(is_dry)
    prefill_tokens = (DRY_TOKENS,) if is_dry else PREFILL_TOKENS
    decode_shapes = [(DRY_ROWS, DRY_TOKENS)] if is_dry else DECODE_SHAPES
    for name in models or LAYERS:
        layer = LAYERS[name]
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
    return versions()
