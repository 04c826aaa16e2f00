"""xformers' memory-efficient attention."""

from functools import cache
from importlib import import_module
from types import ModuleType

import torch

DTYPES = (torch.float16, torch.bfloat16)


@cache
def _fmha() -> ModuleType | None:
    try:
        return import_module("xformers.ops.fmha")
    except (ImportError, OSError, RuntimeError):  # the last two of a build for another torch
        return None


def why_not(device: str, dtype: torch.dtype, head_size: int) -> str | None:
    """What keeps this kernel from running, on devices of a type and queries of a dtype and size."""
    if device != "cuda":
        return f"it runs on CUDA devices, not on {device}"
    if dtype not in DTYPES or torch.cuda.get_device_capability() < (8, 0):
        return f"not all GPUs have it for {dtype}; float16 and bfloat16 from Ampere on do"
    return "xformers is not installed" if _fmha() is None else None


def prefill_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> torch.Tensor:
    """See `api.prefill_attention`."""
    if len(query) == 0:
        return torch.empty_like(query, memory_format=torch.contiguous_format)
    fmha = _fmha()
    assert fmha is not None
    num_kv_heads = key.shape[1]
    # Query heads that share keys and values are a dimension of their own.
    grouped = query[None].unflatten(2, (num_kv_heads, -1))
    k, v = (x[None, :, :, None].expand(-1, -1, -1, grouped.shape[3], -1) for x in (key, value))
    out = fmha.memory_efficient_attention_forward(
        grouped, k, v, attn_bias=fmha.attn_bias.LowerTriangularFromBottomRightMask(), scale=scale
    )
    return out[0].flatten(1, 2)
