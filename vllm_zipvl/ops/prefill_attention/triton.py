"""Causal flash attention in Triton (arXiv 2307.08691), queries the last tokens of the keys.

Kept tokens are read where they lie: how many they are is known on the device alone, so launches are
sized for all tokens and superfluous programs end at once.
"""

import torch
import triton
import triton.language as tl

from vllm_zipvl.core.packed import PackedAttention, kept_queries
from vllm_zipvl.core.sequences import Chunks
from vllm_zipvl.ops.tiles import dot, load_heads, padded, rescale, rounded, tile_side


@triton.jit
def _attend(
    query,
    key,
    value,
    out,
    lse,
    tiles,
    cu_queries,
    cu_tokens,
    cu_kept_queries,
    cu_kept_tokens,
    order,
    scale,
    query_stride,
    query_head_stride,
    key_stride,
    key_head_stride,
    value_stride,
    value_head_stride,
    is_sparse: tl.constexpr,
    group: tl.constexpr,
    head_size: tl.constexpr,
    channels_padded: tl.constexpr,
    tile: tl.constexpr,
):
    """One program per tile of a chunk's queries, the last first as they see most, and query head.

    Among kept tokens rows of the output are packed. `order` are those tokens of all contexts, one
    context after another, and `cu_kept_queries` and `cu_kept_tokens` say where each one's begin;
    all three and `lse` are ignored if all tokens are kept.
    """
    index, head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    chunk, first = tl.load(tiles + 2 * index), tl.load(tiles + 2 * index + 1)
    # From a query's place among all tokens to its row.
    shift = tl.load(cu_queries + chunk + 1) - tl.load(cu_tokens + chunk + 1)
    if is_sparse:
        first_row = tl.load(cu_kept_queries + chunk)
        num_queries = tl.load(cu_kept_queries + chunk + 1) - first_row
        first_token = tl.load(cu_kept_tokens + chunk)
        num_tokens = tl.load(cu_kept_tokens + chunk + 1) - first_token
    else:
        first_row = tl.load(cu_queries + chunk)
        num_queries = tl.load(cu_queries + chunk + 1) - first_row
        first_token = tl.load(cu_tokens + chunk)
        num_tokens = tl.load(cu_tokens + chunk + 1) - first_token
    queries = first + tl.arange(0, tile)
    if first < num_queries:
        is_query = queries < num_queries
        last = num_tokens - num_queries + queries
        if is_sparse:
            order += first_token
            rows = tl.load(order + last, mask=is_query, other=0) + shift
        else:
            key += first_token.to(tl.int64) * key_stride
            value += first_token.to(tl.int64) * value_stride
            rows = first_token + last + shift
        q = load_heads(
            query, rows, is_query, head, query_stride, query_head_stride, head_size,
            channels_padded,
        )  # fmt: skip
        top = tl.full([tile], float("-inf"), tl.float32)
        total = tl.zeros([tile], tl.float32)
        sums = tl.zeros([tile, channels_padded], tl.float32)
        end = tl.minimum(num_tokens, num_tokens - num_queries + first + tile)
        for start in range(0, end, tile):
            ranks = start + tl.arange(0, tile)
            is_token = ranks < end
            tokens = ranks
            if is_sparse:
                tokens = tl.load(order + ranks, mask=is_token, other=0)
            k = load_heads(
                key, tokens, is_token, head // group, key_stride, key_head_stride, head_size,
                channels_padded,
            )  # fmt: skip
            scores = dot(q, tl.trans(k)) * scale
            is_seen = (ranks[None, :] <= last[:, None]) & is_token[None, :]
            top, past, weights = rescale(top, tl.where(is_seen, scores, float("-inf")))
            v = load_heads(
                value, tokens, is_token, head // group, value_stride, value_head_stride,
                head_size, channels_padded,
            )  # fmt: skip
            total = total * past + tl.sum(weights, axis=1)
            sums = sums * past[:, None] + dot(rounded(weights, v.dtype), v)
        channels = tl.arange(0, channels_padded)
        place = (first_row + queries).to(tl.int64) * tl.num_programs(1) + head
        tl.store(
            out + place[:, None] * head_size + channels[None, :],
            rounded(sums / total[:, None], out.dtype.element_ty),
            mask=is_query[:, None] & (channels < head_size)[None, :],
        )
        if is_sparse:
            tl.store(lse + place, top + tl.log(total), mask=is_query)


def prefill_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, chunks: Chunks, scale: float
) -> torch.Tensor:
    """See `api.prefill_attention`."""
    return _launch(query, key, value, None, chunks, scale).out


def attend_among_kept(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kept: torch.Tensor,
    chunks: Chunks,
    scale: float,
) -> PackedAttention:
    """Attention of the kept queries among the kept tokens; waits for nothing on the device."""
    return _launch(query, key, value, kept, chunks, scale)


def _launch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kept: torch.Tensor | None,
    chunks: Chunks,
    scale: float,
) -> PackedAttention:
    num_queries, num_heads, head_size = query.shape
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = out.new_empty(0 if kept is None else num_queries, num_heads, dtype=torch.float32)
    if num_queries == 0:
        return PackedAttention(out, lse)
    cu_kept_queries = cu_kept_tokens = order = None
    if kept is not None:
        cu_kept_tokens = cu_kept_queries = chunks.contexts.at_starts(kept.cumsum(0)).int()
        if not chunks.are_whole:
            is_kept = kept_queries(kept, chunks)
            cu_kept_queries = chunks.queries.at_starts(is_kept.cumsum(0)).int()
        order = torch.argsort(~kept, stable=True).int()
    tile = tile_side(head_size, query.element_size())
    tiles = chunks.queries.tiles(tile)
    _attend[(len(tiles), num_heads)](
        query,
        key,
        value,
        out,
        lse,
        tiles,
        chunks.queries.cu_seqlens,
        chunks.contexts.cu_seqlens,
        cu_kept_queries,
        cu_kept_tokens,
        order,
        scale,
        *query.stride()[:2],
        *key.stride()[:2],
        *value.stride()[:2],
        is_sparse=kept is not None,
        group=num_heads // key.shape[1],
        head_size=head_size,
        channels_padded=padded(head_size),
        tile=tile,
        # A dot of float32 keeps its operands in registers, of which more threads have more.
        num_warps=8 if query.element_size() == 4 else 4,
    )
    return PackedAttention(out, lse)
