"""Causal attention on CPUs: to all tokens by vLLM's kernel, among kept ones by torch's.

Using the same kernel as stock vLLM makes dense prefill equal to stock. It does not say its
log-sum-exp, by which attention among kept tokens is merged with that to near ones; torch's flash
attention does.
"""

import platform

import torch

from vllm_zipvl.core.packed import PackedAttention, kept_queries
from vllm_zipvl.core.sequences import Chunks

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
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, chunks: Chunks, scale: float
) -> torch.Tensor:
    """See `api.prefill_attention`."""
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    for own, tokens in zip(chunks.queries.slices(), chunks.contexts.slices(), strict=True):
        if own.stop > own.start:
            _attend_to_all(query[own], key[tokens], value[tokens], out[own], scale)
    return out


def _attend_to_all(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor, scale: float
) -> None:
    """One context by vLLM's kernel.

    Keys and values are packed into a scratch cache in that kernel's own layout; the copy is small
    beside the attention.
    """
    num_queries, num_heads, head_size = query.shape
    num_tokens, num_kv_heads, _ = key.shape
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
    torch.ops._C.cpu_attention_with_kv_cache(
        query, key_cache, value_cache, out, query_start_loc, seq_lens, scale, True, None, -1,
        block_table, 0.0, plan, None, None, 1.0, 1.0, kv_cache_dtype,
    )  # fmt: skip


def attend_among_kept(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kept: torch.Tensor,
    chunks: Chunks,
    scale: float,
) -> PackedAttention:
    """See `api`."""
    is_kept = kept_queries(kept, chunks)
    num_rows, num_heads, head_size = int(is_kept.sum()), *query.shape[1:]
    out, lse = query.new_empty(num_rows, num_heads, head_size), torch.empty(num_rows, num_heads)
    first = 0
    for own, tokens in zip(chunks.queries.slices(), chunks.contexts.slices(), strict=True):
        queries = own.start + is_kept[own].nonzero()[:, 0]
        seen = tokens.start + kept[tokens].nonzero()[:, 0]
        rows = slice(first, first + len(queries))
        first = rows.stop
        if len(queries):
            out[rows], lse[rows] = _flash_attend(query[queries], key[seen], value[seen], scale)
    return PackedAttention(out, lse)


def _flash_attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """One context by torch's kernel: output, and log-sum-exp float32 [num_queries, num_heads].

    The kernel's causal mask wants as many queries as keys, so tokens before a chunk are a part of
    their own.
    """
    num_kv_heads, num_before = key.shape[1], len(key) - len(query)
    q = query.unflatten(1, (num_kv_heads, -1)).permute(1, 2, 0, 3)
    group = q.shape[1]
    k, v = (x.transpose(0, 1)[:, None].expand(-1, group, -1, -1) for x in (key, value))

    def attend(part: slice, is_causal: bool) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k[:, :, part], v[:, :, part], is_causal=is_causal, scale=scale
        )

    out, lse = attend(slice(num_before, None), True)
    if num_before:
        before, lse_before = attend(slice(0, num_before), False)
        weight = torch.sigmoid(lse_before - lse)[..., None]
        out = torch.lerp(out.float(), before.float(), weight)
        lse = torch.logaddexp(lse, lse_before)
    return out.permute(2, 0, 1, 3).flatten(1, 2), lse.permute(2, 0, 1).flatten(1, 2)
