"""Calls after which every kernel that an occasion times is compiled.

Kernels are compiled for sizes that only real calls have, so these are the real calls, on what is
quickly made: rows without pages, and a model of two thin layers.
"""

from collections.abc import Callable
from functools import partial

import torch
from attention_cases import randn
from dense_attention import DenseAttention
from gpu_cases import (
    DECODE_TOKENS,
    DRY_TOKENS,
    MODELS,
    CompressCase,
    DecodeCase,
    DecodeShape,
    PrefillCase,
    decode_shapes,
    layer_of,
)
from gpu_variants import Variant, applied, variants

from vllm_zipvl.core.sequences import Sequences
from vllm_zipvl.ops.tail_scores import tail_scores

TAIL_TOKENS = 128
MODEL_TOKENS, MODEL_REQUESTS = 1024, 64
Cases = dict[str, Callable[[bool], None]]
"""By name; each takes whether it is a dry run."""


def _num_tokens(is_dry: bool) -> int:
    return DRY_TOKENS if is_dry else DECODE_TOKENS


def _decode(shape: DecodeShape, is_dry: bool) -> None:
    layer = layer_of(shape.model, is_dry)
    DecodeCase(layer, shape.num_rows, _num_tokens(is_dry), is_filled=False).run()


def _variant(shape: DecodeShape, variant: Variant, is_dry: bool) -> None:
    with applied(variant):
        _decode(shape, is_dry)


def _compress(model: str, is_dry: bool) -> None:
    CompressCase(layer_of(model, is_dry), _num_tokens(is_dry)).run()


def _prefill(model: str, is_dry: bool) -> None:
    case = PrefillCase(layer_of(model, is_dry), _num_tokens(is_dry))
    case.dense()
    case.sparse()


def _tail(model: str, is_dry: bool) -> None:
    layer = layer_of(model, is_dry)
    num_blocks = TAIL_TOKENS // layer.block_size
    queries = randn(1, 1, layer.num_heads, layer.head_size)
    cache = randn(num_blocks, layer.num_kv_heads, layer.block_size, 2 * layer.head_size)
    tail, table = Sequences([TAIL_TOKENS], cache.device), torch.arange(num_blocks)[None]
    tail_scores(queries, torch.zeros(queries.shape[:3]), [cache], table, tail, layer.scale)


def _check(is_dry: bool) -> None:
    from whole_model_check import check

    with torch.inference_mode():
        check(DenseAttention(layer_of(MODELS[0], is_dry)))


def _model(op: str, is_dry: bool) -> None:
    from whole_model import thin_bench
    from whole_model_measure import decode_rows, prefill_rows

    num_tokens, num_requests = (DRY_TOKENS, 2) if is_dry else (MODEL_TOKENS, MODEL_REQUESTS)
    with torch.inference_mode():
        bench = thin_bench(is_dry, num_tokens, num_requests)
        list(decode_rows(bench) if op == "decode" else prefill_rows(bench, num_tokens))


def layer_cases(is_dry: bool) -> Cases:
    """What one layer of either model launches."""
    found: Cases = {f"decode {shape}": partial(_decode, shape) for shape in decode_shapes(is_dry)}
    for model in MODELS:
        label = layer_of(model, is_dry).label
        found[f"compress {label}"] = partial(_compress, model)
        found[f"prefill {label}"] = partial(_prefill, model)
        found[f"tail {label}"] = partial(_tail, model)
    return found


def tuning_cases(is_dry: bool) -> Cases:
    """Every launch of decode attention that is tried; how contexts are cut changes no kernel."""
    shapes = {shape.model: shape for shape in decode_shapes(is_dry)}
    tried = {
        variant.launch: variant for shape in shapes.values() for variant in variants(shape, is_dry)
    }
    return {
        f"decode {shape}, {variant}": partial(_variant, shape, variant)
        for shape in shapes.values()
        for variant in tried.values()
    }


def model_cases(is_dry: bool) -> Cases:
    """What a whole decoder launches, and the check before it."""
    found: Cases = {"prefill": partial(_model, "prefill")}
    if is_dry:
        # These take long to interpret, and a dry run of the model itself goes through them.
        return found
    return found | {"decode": partial(_model, "decode"), "check": _check}


GROUPS = {"layer": layer_cases, "tuning": tuning_cases, "model": model_cases}
