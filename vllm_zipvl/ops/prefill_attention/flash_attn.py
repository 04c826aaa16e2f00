"""FlashAttention (arXiv 2307.08691, 2407.08608): vLLM's own build, or the flash-attn package.

Both are looked up by name, as operations do without vLLM.
"""

from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from typing import Any, NamedTuple

import torch

from vllm_zipvl.core.packed import PackedAttention, kept_queries
from vllm_zipvl.core.sequences import Chunks, Sequences

DTYPES = (torch.float16, torch.bfloat16)


class VarlenAttention(NamedTuple):
    """A `flash_attn_varlen_func`.

    Attributes:
        function: What is called.
        version: FlashAttention's, if it is vLLM's build.
        lse_option: The argument that asks for log-sum-exp.
    """

    function: Callable[..., Any]
    version: int | None
    lse_option: str


@cache
def find_varlen() -> VarlenAttention | None:
    """Version 3 or 2 of vLLM's build, else the package's."""
    try:
        vllms = import_module("vllm.vllm_flash_attn")
    except ImportError:
        try:
            package = import_module("flash_attn")
        except ImportError:
            return None
        return VarlenAttention(package.flash_attn_varlen_func, None, "return_attn_probs")
    for version in (3, 2):
        if vllms.is_fa_version_supported(version):
            function = partial(vllms.flash_attn_varlen_func, fa_version=version)
            return VarlenAttention(function, version, "return_softmax_lse")
    return None


def why_not(device: str, dtype: torch.dtype, head_size: int) -> str | None:
    """What keeps this kernel from running, on devices of a type and queries of a dtype and size."""
    if device != "cuda":
        return f"it runs on CUDA devices, not on {device}"
    if dtype not in DTYPES:
        return f"it takes float16 and bfloat16, not {dtype}"
    if find_varlen() is None:
        return "neither vLLM's FlashAttention nor flash-attn runs here"
    return None


def prefill_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, chunks: Chunks, scale: float
) -> torch.Tensor:
    """See `api.prefill_attention`."""
    if len(query) == 0:
        return torch.empty_like(query, memory_format=torch.contiguous_format)
    cu_seqlens = chunks.queries.cu_seqlens, chunks.contexts.cu_seqlens
    return _attend(query, key, value, chunks, *cu_seqlens, scale)


def attend_among_kept(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kept: torch.Tensor,
    chunks: Chunks,
    scale: float,
) -> PackedAttention:
    """Attention of the kept queries among the kept tokens.

    Waits for nothing on the device: all rows are gathered, the kept ones first, chunk by chunk. How
    many those are only the device knows, and the kernel reads it there.
    """
    if len(query) == 0:
        return PackedAttention(torch.empty_like(query), query.new_empty(query.shape[:2]).float())
    tokens, cu_tokens = _kept_first(kept, chunks.contexts)
    queries, cu_queries = tokens, cu_tokens
    if not chunks.are_whole:
        queries, cu_queries = _kept_first(kept_queries(kept, chunks), chunks.queries)
    rows = query[queries], key[tokens], value[tokens]
    out, lse = _attend(*rows, chunks, cu_queries, cu_tokens, scale, with_lse=True)
    return PackedAttention(out, lse.t())


def _kept_first(kept: torch.Tensor, rows: Sequences) -> tuple[torch.Tensor, torch.Tensor]:
    """All rows, the kept ones first, and where those of each sequence begin, int32 [len + 1]."""
    order = torch.argsort(~kept, stable=True)
    return order, rows.at_starts(kept.cumsum(0)).int()


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    chunks: Chunks,
    cu_queries: torch.Tensor,
    cu_tokens: torch.Tensor,
    scale: float,
    with_lse: bool = False,
) -> Any:
    """Causal attention of chunks whose rows `cu_queries` and `cu_tokens` name, [num_chunks + 1].

    With `with_lse` its output and float32 [num_heads, num_queries].
    """
    found = find_varlen()
    assert found is not None
    returned = found.function(
        query,
        key,
        value,
        max_seqlen_q=chunks.queries.max_length,
        cu_seqlens_q=cu_queries,
        max_seqlen_k=chunks.contexts.max_length,
        cu_seqlens_k=cu_tokens,
        softmax_scale=scale,
        causal=True,
        **({found.lse_option: True} if with_lse else {}),
    )
    # The package adds what only its tests use.
    return returned[:2] if with_lse else returned
