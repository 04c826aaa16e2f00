"""Causal attention by the kernel that vLLM's CPU build registers with torch.

Keys and values are packed into a scratch cache in that kernel's own layout; the copy is
small beside the attention. Using the same kernel as stock vLLM makes dense prefill equal to
stock and leaves the gain of sparse prefill to sparsity alone.
"""

import platform

import torch

BLOCK_SIZE = 32
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEAD_SIZES = (32, 64, 96, 128, 160, 192, 224, 256, 512)
_OPS = ("cpu_attn_reshape_and_cache", "get_scheduler_metadata", "cpu_attention_with_kv_cache")
_X86 = platform.machine() in ("x86_64", "AMD64")


def why_not(device: str, dtype: torch.dtype, head_size: int) -> str | None:
    """What keeps this kernel from running, on devices of a type and queries of a dtype and size."""
    if not (_X86 and device == "cpu"):
        return "it runs on x86-64 CPUs"
    if dtype not in DTYPES or head_size not in HEAD_SIZES:
        return f"it takes none of {dtype} and head size {head_size}"
    if not all(hasattr(torch.ops._C, name) for name in _OPS):
        return "vLLM's CPU build has not loaded it"
    return None


def _isa(dtype: torch.dtype) -> str:
    amx = dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported()
    return "amx" if amx else "vec"


def prefill_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> torch.Tensor:
    """See `api.prefill_attention`."""
    num_queries, num_heads, head_size = query.shape
    num_tokens, num_kv_heads, _ = key.shape
    if num_queries == 0:
        return torch.empty_like(query)
    num_blocks = -(-num_tokens // BLOCK_SIZE)
    isa, kv_cache_dtype = _isa(query.dtype), "auto"
    cache = query.new_empty(num_blocks, num_kv_heads, 2 * BLOCK_SIZE, head_size)
    # The kernel multiplies what lies past the last token with weights of 0.
    cache[-1].zero_()
    key_cache, value_cache = cache.chunk(2, dim=2)
    slots = torch.arange(num_tokens)
    torch.ops._C.cpu_attn_reshape_and_cache(
        key, value, key_cache, value_cache, slots, isa, 1.0, 1.0, kv_cache_dtype
    )
    query_start_loc = torch.tensor([0, num_queries], dtype=torch.int32)
    seq_lens = torch.tensor([num_tokens], dtype=torch.int32)
    block_table = torch.arange(num_blocks, dtype=torch.int32)[None]
    plan = torch.ops._C.get_scheduler_metadata(
        1, num_heads, num_kv_heads, head_size, seq_lens, query.dtype, query_start_loc,
        True, -1, isa, True, None, kv_cache_dtype,
    )  # fmt: skip
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    torch.ops._C.cpu_attention_with_kv_cache(
        query, key_cache, value_cache, out, query_start_loc, seq_lens, scale, True, None, -1,
        block_table, 0.0, plan, None, None, 1.0, 1.0, kv_cache_dtype,
    )  # fmt: skip
    return out
