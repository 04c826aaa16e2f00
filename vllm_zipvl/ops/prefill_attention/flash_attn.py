"""FlashAttention (arXiv 2307.08691, 2407.08608): vLLM's own build, or the flash-attn package.

Both are looked up by name, as operations do without vLLM.
"""

from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from typing import NamedTuple

import torch

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


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ends: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Causal attention of the first rows.

    `ends` is int32 [2, 2]: 0 and how many queries count, 0 and how many keys.
    """
    found = find_varlen()
    assert found is not None
    return found.function(
        query,
        key,
        value,
        max_seqlen_q=len(query),
        cu_seqlens_q=ends[0],
        max_seqlen_k=len(key),
        cu_seqlens_k=ends[1],
        softmax_scale=scale,
        causal=True,
    )


def prefill_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> torch.Tensor:
    """See `api.prefill_attention`."""
    if len(query) == 0:
        return torch.empty_like(query, memory_format=torch.contiguous_format)
    ends = torch.zeros(2, 2, dtype=torch.int32, device=query.device)
    ends[0, 1:].fill_(len(query))
    ends[1, 1:].fill_(len(key))
    return _attend(query, key, value, ends, scale)


def sparse_prefill_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kept: torch.Tensor, scale: float
) -> torch.Tensor:
    """See `api.sparse_prefill_attention`; waits for nothing on the device.

    All rows are gathered, the kept ones first. How many those are only the device knows, and the
    kernel reads it there.
    """
    if len(query) == 0:
        return torch.empty_like(query, memory_format=torch.contiguous_format)
    is_kept_query = kept[len(key) - len(query) :]
    ends = torch.zeros(2, 2, dtype=torch.int32, device=query.device)
    ends[0, 1], ends[1, 1] = is_kept_query.sum(), kept.sum()
    tokens = torch.argsort(~kept, stable=True)
    queries = torch.argsort(~is_kept_query, stable=True)
    packed = _attend(query[queries], key[tokens], value[tokens], ends, scale)
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    # The kernel leaves the other rows as they were.
    out[queries] = torch.where(is_kept_query[queries][:, None, None], packed, 0)
    return out
