"""Tail scores in Triton: all layers and requests in one launch, keys read where they lie."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from vllm_zipvl.core.sequences import Sequences
from vllm_zipvl.ops.layers import find_layers
from vllm_zipvl.ops.tiles import dot, padded, places_of, tile_side


@triton.jit(do_not_specialize=["num_requests", "num_tokens", "table_stride"])
def _scores(
    queries,
    lse,
    dense,
    layer_starts,
    block_table,
    tiles,
    cu_seqlens,
    out,
    scale,
    num_requests,
    num_tokens,
    table_stride,
    block_stride,
    head_stride,
    token_stride,
    block_size: tl.constexpr,
    group: tl.constexpr,
    group_padded: tl.constexpr,
    head_size: tl.constexpr,
    channels_padded: tl.constexpr,
    tile_tokens: tl.constexpr,
):
    """One program per tile of a tail's tokens, KV head and layer: its part of the sum."""
    place, head, layer = tiles + 2 * tl.program_id(0), tl.program_id(1), tl.program_id(2)
    request, first = tl.load(place), tl.load(place + 1)
    start, end = tl.load(cu_seqlens + request), tl.load(cu_seqlens + request + 1)
    positions = first + tl.arange(0, tile_tokens)
    is_token = start + positions < end
    channels, members = tl.arange(0, channels_padded), tl.arange(0, group_padded)
    is_channel, is_member = channels < head_size, members < group

    source = places_of(
        layer_starts, block_table, request, layer, head, positions, is_token, table_stride,
        block_stride, head_stride, token_stride, block_size,
    )  # fmt: skip
    mask = is_token[:, None] & is_channel[None, :]
    k = tl.load(dense + source[:, None] + channels[None, :], mask=mask, other=0)

    heads = (layer * num_requests + request).to(tl.int64) * tl.num_programs(1) + head
    heads = heads * group + members
    mask = is_member[:, None] & is_channel[None, :]
    q = tl.load(queries + heads[:, None] * head_size + channels[None, :], mask=mask, other=0)
    total = tl.load(lse + heads, mask=is_member, other=float("inf"))
    weights = tl.exp(dot(q, tl.trans(k)) * scale - total[:, None])
    target = (layer * tl.num_programs(1) + head).to(tl.int64) * num_tokens + start + positions
    tl.store(out + target, tl.sum(weights, axis=0), mask=is_token)


def tail_scores(
    queries: torch.Tensor,
    lse: torch.Tensor,
    kv_caches: Sequence[torch.Tensor],
    block_table: torch.Tensor,
    tails: Sequences,
    scale: float,
) -> torch.Tensor:
    """See `api.tail_scores`."""
    num_layers, num_requests, num_heads, head_size = queries.shape
    layers = find_layers(kv_caches)
    dense = layers.first
    _, num_kv_heads, block_size, _ = dense.shape
    group, tile = num_heads // num_kv_heads, tile_side(head_size, dense.element_size())
    tiles = tails.tiles(tile)
    out = torch.empty(num_layers, num_kv_heads, tails.num_tokens, device=dense.device)
    _scores[(len(tiles), num_kv_heads, num_layers)](
        queries.contiguous(),
        lse.contiguous(),
        dense,
        layers.starts,
        block_table,
        tiles,
        tails.cu_seqlens,
        out,
        scale,
        num_requests,
        tails.num_tokens,
        block_table.stride(0),
        *dense.stride()[:3],
        block_size=block_size,
        group=group,
        group_padded=padded(group),
        head_size=head_size,
        channels_padded=padded(head_size),
        tile_tokens=tile,
    )
    return out.sum(1)
