"""The neighbourhood by matrix products of tiles of queries with the keys that some of them see."""

import torch

from vllm_zipvl.core.packed import PackedAttention, kept_queries
from vllm_zipvl.core.sequences import Chunks

TILE = 64
"""Queries whose keys are gathered together."""
MAX_PAIRS = 2**16
"""Of queries and keys that are computed at once, about, for each head: their scores stay in the
processor's caches."""
HIDDEN = -1e30
"""Added to scores of pairs that are not seen: a row of nothing but those has no weight beside any
other, and is finite."""


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
    """See `api.near_attention`."""
    is_kept = kept_queries(kept, chunks)
    rows = is_kept.nonzero()[:, 0]
    if not window and not sinks:
        out = torch.zeros_like(query, memory_format=torch.contiguous_format)
        return out.index_copy_(0, rows, among_kept.out[: len(rows)])
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = torch.empty(query.shape[:2])
    for own, tokens in zip(chunks.queries.slices(), chunks.contexts.slices(), strict=True):
        num_tokens, num_queries = tokens.stop - tokens.start, own.stop - own.start
        # As far as the context reaches.
        near = min(window, num_tokens), min(sinks, num_tokens)
        step = max(1, MAX_PAIRS // (TILE + sum(near)) // TILE) * TILE
        for first in range(0, num_queries, step):
            part = slice(own.start + first, own.start + min(first + step, num_queries))
            start = num_tokens - num_queries + first
            out[part], lse[part] = _attend_tiles(
                query[part], key[tokens], value[tokens], kept[tokens], start, scale, *near
            )
    weight = torch.sigmoid(among_kept.lse[: len(rows)] - lse[rows])[..., None]
    merged = torch.lerp(out[rows].float(), among_kept.out[: len(rows)].float(), weight)
    return out.index_copy_(0, rows, merged.to(out.dtype))


def _attend_tiles(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kept: torch.Tensor,
    start: int,
    scale: float,
    window: int,
    sinks: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries from position `start` of one context on: output and log-sum-exp of the near pairs."""
    num_queries, num_heads, head_size = query.shape
    num_kv_heads = key.shape[1]
    num_tiles = -(-num_queries // TILE)
    q = query.new_zeros(num_tiles * TILE, num_heads, head_size)
    q[:num_queries] = query
    positions = (start + torch.arange(num_tiles * TILE)).view(num_tiles, TILE)
    tokens, mask = _near_keys(positions, kept, window, sinks)
    # Query heads that share keys and values are further queries of theirs.
    q = q.view(num_tiles, TILE, num_kv_heads, -1, head_size).permute(0, 2, 3, 1, 4)
    group = q.shape[2]
    dtype = torch.promote_types(query.dtype, torch.float32)
    q, k, v = (x.to(dtype) for x in (q.flatten(2, 3), *(x[tokens] for x in (key, value))))
    scores = (q @ k.permute(0, 2, 3, 1)).mul_(scale)
    scores.unflatten(2, (group, TILE)).add_(mask[:, None, None])
    top = scores.amax(-1, keepdim=True)
    weights = scores.sub_(top).exp_()
    total = weights.sum(-1, keepdim=True)
    out = (weights @ v.transpose(1, 2)).div_(total)
    lse = (top + total.log())[..., 0]
    out = out.unflatten(2, (group, TILE)).permute(0, 3, 1, 2, 4).reshape(-1, num_heads, head_size)
    lse = lse.unflatten(2, (group, TILE)).permute(0, 3, 1, 2).reshape(-1, num_heads)
    return out[:num_queries].to(query.dtype), lse[:num_queries]


def _near_keys(
    positions: torch.Tensor, kept: torch.Tensor, window: int, sinks: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens that some query of a tile sees, int64 [num_tiles, any], and what hides pairs.

    Args:
        positions: Of the queries, [num_tiles, TILE]; past the context's end there are none.
        kept: Bool mask of the context.
        window: As in the settings.
        sinks: As in the settings.
    """
    num_tokens, num_tiles = len(kept), len(positions)
    firsts = torch.arange(min(sinks, num_tokens)).expand(num_tiles, -1)
    nearest = positions[:, :1] + torch.arange(1 - window, TILE if window else 1 - window)
    tokens = torch.cat([firsts, nearest], dim=1)
    ahead = positions[:, :, None] - tokens[:, None]
    is_first = torch.arange(tokens.shape[1]) < firsts.shape[1]
    # A first token inside of the window counts there.
    is_near = torch.where(is_first, ahead >= window, (ahead >= 0) & (ahead < window))
    is_token = (tokens >= 0) & (tokens < num_tokens)
    tokens = tokens.clamp(0, num_tokens - 1)
    is_kept_query = kept[positions.clamp(max=num_tokens - 1)]
    is_counted = is_kept_query[:, :, None] & kept[tokens][:, None]
    seen = is_near & is_token[:, None] & ~is_counted
    return tokens, torch.zeros(seen.shape).masked_fill_(~seen, HIDDEN)
