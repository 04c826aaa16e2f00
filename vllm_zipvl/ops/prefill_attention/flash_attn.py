"""FlashAttention (arXiv 2307.08691, 2407.08608): vLLM's own build, or the flash-attn package.

Both are looked up by name, as operations do without vLLM.
"""

from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from typing import NamedTuple

import torch

from vllm_zipvl.core.sequences import Chunks, Sequences

DTYPES = (torch.float16, torch.bfloat16)


class VarlenAttention(NamedTuple):
    """A `flash_attn_varlen_func`, and FlashAttention's version if it is vLLM's."""

    function: Callable[..., torch.Tensor]
    version: int | None


@cache
def find_varlen() -> VarlenAttention | None:
    """Version 3 or 2 of vLLM's build, else the package's."""
    try:
        vllms = import_module("vllm.vllm_flash_attn")
    except ImportError:
        try:
            return VarlenAttention(import_module("flash_attn").flash_attn_varlen_func, None)
        except ImportError:
            return None
    for version in (3, 2):
        if vllms.is_fa_version_supported(version):
            function = partial(vllms.flash_attn_varlen_func, fa_version=version)
            return VarlenAttention(function, version)
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


def attend_chunks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    chunks: Chunks,
    kept: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """See `api.sparse_prefill_attention`; all tokens are kept if `kept` is None.

    Waits for nothing on the device: all rows are gathered, the kept ones first, chunk by chunk. How
    many those are only the device knows, and the kernel reads it there.
    """
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    if len(query) == 0:
        return out
    if kept is None:
        cu_seqlens = chunks.queries.cu_seqlens, chunks.contexts.cu_seqlens
        return _attend(query, key, value, chunks, *cu_seqlens, scale)
    tokens, cu_tokens = _kept_first(kept, chunks.contexts)
    if chunks.are_whole:
        is_kept_query, queries, cu_queries = kept, tokens, cu_tokens
    else:
        is_kept_query = kept[chunks.places]
        queries, cu_queries = _kept_first(is_kept_query, chunks.queries)
    rows = query[queries], key[tokens], value[tokens]
    packed = _attend(*rows, chunks, cu_queries, cu_tokens, scale)
    # The kernel leaves the other rows as they were.
    out[queries] = torch.where(is_kept_query[queries][:, None, None], packed, 0)
    return out


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
) -> torch.Tensor:
    """Causal attention of chunks whose rows `cu_queries` and `cu_tokens` name, [num_chunks + 1]."""
    found = find_varlen()
    assert found is not None
    return found.function(
        query,
        key,
        value,
        max_seqlen_q=chunks.queries.max_length,
        cu_seqlens_q=cu_queries,
        max_seqlen_k=chunks.contexts.max_length,
        cu_seqlens_k=cu_tokens,
        softmax_scale=scale,
        causal=True,
    )
