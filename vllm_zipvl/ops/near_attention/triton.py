"""The neighbourhood in Triton: one kernel that goes on from attention among kept tokens.

A kept query starts its online softmax with what it has got already, and every row of the output is
written once.
"""

import torch
import triton
import triton.language as tl

from vllm_zipvl.core.packed import PackedAttention, kept_queries
from vllm_zipvl.core.sequences import Chunks
from vllm_zipvl.ops.tiles import MIN_DOT, dot, load_heads, padded, rescale, rounded, tile_side


@triton.jit
def _attend_tile(
    top, total, sums, q, positions, is_kept_query, key, value, kept, tokens, is_token, head,
    key_stride, key_head_stride, value_stride, value_head_stride, scale, window: tl.constexpr,
    is_window: tl.constexpr, head_size: tl.constexpr, channels_padded: tl.constexpr,
):  # fmt: skip
    """Go on with a tile of tokens: those in the window, or those that are not."""
    k = load_heads(
        key, tokens, is_token, head, key_stride, key_head_stride, head_size, channels_padded
    )
    is_kept = tl.load(kept + tokens, mask=is_token, other=0) != 0
    ahead = positions[:, None] - tokens[None, :]
    is_near = (ahead >= 0) & (ahead < window) if is_window else ahead >= window
    is_seen = is_near & is_token[None, :] & ((is_kept_query[:, None] & is_kept[None, :]) == 0)
    scores = tl.where(is_seen, dot(q, tl.trans(k)) * scale, float("-inf"))
    top, past, weights = rescale(top, scores)
    v = load_heads(
        value, tokens, is_token, head, value_stride, value_head_stride, head_size, channels_padded
    )
    total = total * past + tl.sum(weights, axis=1)
    sums = sums * past[:, None] + dot(rounded(weights, v.dtype), v)
    return top, total, sums


@triton.jit(do_not_specialize=["lse_stride", "lse_head_stride"])
def _attend_near(
    query,
    key,
    value,
    kept,
    rows_among_kept,
    out_among_kept,
    lse_among_kept,
    out,
    tiles,
    cu_queries,
    cu_tokens,
    scale,
    query_stride,
    query_head_stride,
    key_stride,
    key_head_stride,
    value_stride,
    value_head_stride,
    lse_stride,
    lse_head_stride,
    window: tl.constexpr,
    sinks: tl.constexpr,
    group: tl.constexpr,
    head_size: tl.constexpr,
    channels_padded: tl.constexpr,
    tile: tl.constexpr,
    sinks_padded: tl.constexpr,
):
    """One program per tile of a chunk's queries and query head.

    `rows_among_kept` says where a kept query's row is in what is packed.
    """
    index, head = tl.program_id(0), tl.program_id(1)
    num_heads = tl.num_programs(1)
    chunk, first = tl.load(tiles + 2 * index), tl.load(tiles + 2 * index + 1)
    first_query, first_token = tl.load(cu_queries + chunk), tl.load(cu_tokens + chunk)
    num_queries = tl.load(cu_queries + chunk + 1) - first_query
    num_tokens = tl.load(cu_tokens + chunk + 1) - first_token
    key += first_token.to(tl.int64) * key_stride
    value += first_token.to(tl.int64) * value_stride
    kept += first_token
    queries = first + tl.arange(0, tile)
    is_query = queries < num_queries
    rows = first_query + queries
    positions = num_tokens - num_queries + queries
    is_kept_query = tl.load(kept + positions, mask=is_query, other=0) != 0
    q = load_heads(
        query, rows, is_query, head, query_stride, query_head_stride, head_size, channels_padded
    )
    packed = tl.load(rows_among_kept + rows, mask=is_kept_query, other=0)
    place = lse_among_kept + packed.to(tl.int64) * lse_stride + head * lse_head_stride
    top = tl.load(place, mask=is_kept_query, other=float("-inf"))
    total = tl.where(is_kept_query, 1.0, 0.0)
    sums = load_heads(
        out_among_kept, packed, is_kept_query, head, num_heads * head_size, head_size, head_size,
        channels_padded,
    ).to(tl.float32)  # fmt: skip
    start = num_tokens - num_queries + first
    end = tl.minimum(num_tokens, start + tile)
    if window > 0:
        for token in range(tl.maximum(start - window + 1, 0), end, tile):
            tokens = token + tl.arange(0, tile)
            top, total, sums = _attend_tile(
                top, total, sums, q, positions, is_kept_query, key, value, kept, tokens,
                tokens < end, head // group, key_stride, key_head_stride, value_stride,
                value_head_stride, scale, window, True, head_size, channels_padded,
            )  # fmt: skip
    if sinks > 0:
        for token in range(0, tl.minimum(sinks, end), sinks_padded):
            tokens = token + tl.arange(0, sinks_padded)
            top, total, sums = _attend_tile(
                top, total, sums, q, positions, is_kept_query, key, value, kept, tokens,
                (tokens < sinks) & (tokens < end), head // group, key_stride, key_head_stride,
                value_stride, value_head_stride, scale, window, False, head_size, channels_padded,
            )  # fmt: skip
    channels = tl.arange(0, channels_padded)
    place = (rows.to(tl.int64) * num_heads + head) * head_size
    tl.store(
        out + place[:, None] + channels[None, :],
        # Sums of what sees nothing are 0.
        rounded(sums / tl.where(total > 0, total, 1.0)[:, None], out.dtype.element_ty),
        mask=is_query[:, None] & (channels < head_size)[None, :],
    )


def near_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kept: torch.Tensor,
    among_kept: PackedAttention,
    chunks: Chunks,
    scale: float,
    window: int,
    sinks: int,
) -> torch.Tensor:
    """See `api.near_attention`; waits for nothing on the device."""
    num_queries, num_heads, head_size = query.shape
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    if num_queries == 0:
        return out
    tile = tile_side(head_size, query.element_size())
    tiles = chunks.queries.tiles(tile)
    _attend_near[(len(tiles), num_heads)](
        query,
        key,
        value,
        kept,
        kept_queries(kept, chunks).cumsum(0) - 1,
        among_kept.out,
        among_kept.lse,
        out,
        tiles,
        chunks.queries.cu_seqlens,
        chunks.contexts.cu_seqlens,
        scale,
        *query.stride()[:2],
        *key.stride()[:2],
        *value.stride()[:2],
        *among_kept.lse.stride(),
        window=window,
        sinks=sinks,
        group=num_heads // key.shape[1],
        head_size=head_size,
        channels_padded=padded(head_size),
        tile=tile,
        sinks_padded=min(tile, max(MIN_DOT, triton.next_power_of_2(sinks))),
        # A dot of float32 keeps its operands in registers, of which more threads have more.
        num_warps=8 if query.element_size() == 4 else 4,
    )
    return out
