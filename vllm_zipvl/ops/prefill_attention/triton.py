"""Causal flash attention in Triton (arXiv 2307.08691), queries the last tokens of the keys.

Sparse prefill reads the kept tokens where they lie: how many they are is known on the device
alone, so launches are sized for all tokens and superfluous programs end at once.
"""

import torch
import triton
import triton.language as tl

from vllm_zipvl.ops.tiles import dot, padded, rescale, rounded, tile_side


@triton.jit
def _load_heads(
    x, tokens, is_token, head, token_stride, head_stride, head_size: tl.constexpr,
    channels_padded: tl.constexpr,
):  # fmt: skip
    """[tokens, channels_padded] of one head."""
    channels = tl.arange(0, channels_padded)
    start = tokens.to(tl.int64) * token_stride + head * head_stride
    mask = is_token[:, None] & (channels < head_size)[None, :]
    return tl.load(x + start[:, None] + channels[None, :], mask=mask, other=0)


@triton.jit
def _attend(
    query,
    key,
    value,
    out,
    positions,
    counts,
    scale,
    all_queries,
    all_tokens,
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
    """One program per tile of queries, the last first as they see most, and query head.

    `positions` are those of the kept tokens, in order, and `counts` how many queries and tokens
    are kept; both are ignored if all are.
    """
    num_queries, num_tokens = all_queries, all_tokens
    if is_sparse:
        num_queries, num_tokens = tl.load(counts), tl.load(counts + 1)
    index, head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    queries = index * tile + tl.arange(0, tile)
    if index * tile < num_queries:
        is_query = queries < num_queries
        last = num_tokens - num_queries + queries
        rows = queries
        if is_sparse:
            rows = tl.load(positions + last, mask=is_query, other=0) - (all_tokens - all_queries)
        q = _load_heads(
            query, rows, is_query, head, query_stride, query_head_stride, head_size,
            channels_padded,
        )  # fmt: skip
        top = tl.full([tile], float("-inf"), tl.float32)
        total = tl.zeros([tile], tl.float32)
        sums = tl.zeros([tile, channels_padded], tl.float32)
        end = tl.minimum(num_tokens, num_tokens - num_queries + (index + 1) * tile)
        for start in range(0, end, tile):
            ranks = start + tl.arange(0, tile)
            is_token = ranks < end
            tokens = ranks
            if is_sparse:
                tokens = tl.load(positions + ranks, mask=is_token, other=0)
            k = _load_heads(
                key, tokens, is_token, head // group, key_stride, key_head_stride, head_size,
                channels_padded,
            )  # fmt: skip
            scores = dot(q, tl.trans(k)) * scale
            is_seen = (ranks[None, :] <= last[:, None]) & is_token[None, :]
            top, past, weights = rescale(top, tl.where(is_seen, scores, float("-inf")))
            v = _load_heads(
                value, tokens, is_token, head // group, value_stride, value_head_stride,
                head_size, channels_padded,
            )  # fmt: skip
            total = total * past + tl.sum(weights, axis=1)
            sums = sums * past[:, None] + dot(rounded(weights, v.dtype), v)
        channels = tl.arange(0, channels_padded)
        place = (rows.to(tl.int64) * tl.num_programs(1) + head) * head_size
        tl.store(
            out + place[:, None] + channels[None, :],
            rounded(sums / total[:, None], out.dtype.element_ty),
            mask=is_query[:, None] & (channels < head_size)[None, :],
        )


def _launch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    out: torch.Tensor,
    positions: torch.Tensor | None = None,
    counts: torch.Tensor | None = None,
) -> torch.Tensor:
    num_queries, num_heads, head_size = query.shape
    if num_queries == 0:
        return out
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    tile = tile_side(head_size, query.element_size())
    _attend[(triton.cdiv(num_queries, tile), num_heads)](
        query,
        key,
        value,
        out,
        positions,
        counts,
        scale,
        num_queries,
        key.shape[0],
        *query.stride()[:2],
        *key.stride()[:2],
        *value.stride()[:2],
        is_sparse=positions is not None,
        group=num_heads // key.shape[1],
        head_size=head_size,
        channels_padded=padded(head_size),
        tile=tile,
    )
    return out


def prefill_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> torch.Tensor:
    """See `api.prefill_attention`."""
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    return _launch(query, key, value, scale, out)


def sparse_prefill_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kept: torch.Tensor, scale: float
) -> torch.Tensor:
    """See `api.sparse_prefill_attention`; waits for nothing on the device."""
    out = torch.zeros_like(query, memory_format=torch.contiguous_format)
    positions = torch.argsort(~kept, stable=True).int()
    counts = torch.stack([kept[len(kept) - len(query) :].sum(), kept.sum()]).int()
    return _launch(query, key, value, scale, out, positions, counts)
