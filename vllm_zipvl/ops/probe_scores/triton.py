"""Probe scores in Triton: denominators of the softmax first, then column sums.

Both passes read the keys once per tile of probes; no [num_probes, num_tokens] matrix is kept. All
contexts are done in one launch of each.
"""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from vllm_zipvl.core.sequences import Sequences
from vllm_zipvl.ops.tiles import dot, padded, rescale, tile_side

if TYPE_CHECKING:
    from vllm_zipvl.ops.probe_scores.api import ProbePlaces

PROGRAMS_PER_PROCESSOR = 4
MAX_SHARES = 64
INTERPRETED_SHARES = 3


@triton.jit
def _load_queries(
    queries,
    positions,
    rows,
    first_probe,
    end_probe,
    head,
    num_kv_heads: tl.constexpr,
    group: tl.constexpr,
    head_size: tl.constexpr,
    channels_padded: tl.constexpr,
):
    """A tile of one context's queries of one KV head, all heads of a probe beside each other.

    Returns what each sees up to, its place in [num_probes, num_heads], and its probe. Padding sees
    nothing: up to -1.
    """
    probes = first_probe + rows // group
    is_row = probes < end_probe
    places = probes * num_kv_heads * group + head * group + rows % group
    channels = tl.arange(0, channels_padded)
    q = tl.load(
        queries + places.to(tl.int64)[:, None] * head_size + channels[None, :],
        mask=is_row[:, None] & (channels < head_size)[None, :],
        other=0,
    )
    return q, tl.load(positions + probes, mask=is_row, other=-1), places, probes, is_row


@triton.jit
def _load_keys(
    keys, tokens, end, head, token_stride, head_stride, head_size: tl.constexpr,
    channels_padded: tl.constexpr,
):  # fmt: skip
    channels = tl.arange(0, channels_padded)
    start = tokens.to(tl.int64) * token_stride + head * head_stride
    mask = (tokens < end)[:, None] & (channels < head_size)[None, :]
    return tl.load(keys + start[:, None] + channels[None, :], mask=mask, other=0)


@triton.jit(do_not_specialize=["num_probes", "tiles_per_context"])
def _denominators(
    queries,
    positions,
    probe_starts,
    keys,
    starts,
    scale,
    tops,
    totals,
    num_probes,
    tiles_per_context,
    token_stride,
    head_stride,
    num_kv_heads: tl.constexpr,
    group: tl.constexpr,
    head_size: tl.constexpr,
    channels_padded: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_tokens: tl.constexpr,
):
    """One program per tile of a context's queries, KV head and share of its tokens."""
    context, tile = tl.program_id(0) // tiles_per_context, tl.program_id(0) % tiles_per_context
    head, share = tl.program_id(1), tl.program_id(2)
    start, end = tl.load(starts + context), tl.load(starts + context + 1)
    first_probe, end_probe = tl.load(probe_starts + context), tl.load(probe_starts + context + 1)
    q, last, places, _, is_row = _load_queries(
        queries, positions, tile * tile_rows + tl.arange(0, tile_rows), first_probe, end_probe,
        head, num_kv_heads, group, head_size, channels_padded,
    )  # fmt: skip
    top = tl.full([tile_rows], float("-inf"), tl.float32)
    total = tl.zeros([tile_rows], tl.float32)
    length = end - start
    per_share = tl.cdiv(tl.cdiv(length, tile_tokens), tl.num_programs(2)) * tile_tokens
    first = share * per_share
    seen = tl.minimum(length, tl.max(last).to(tl.int32) + 1)
    for token in range(first, tl.minimum(first + per_share, seen), tile_tokens):
        tokens = token + tl.arange(0, tile_tokens)
        k = _load_keys(
            keys, start + tokens, end, head, token_stride, head_stride, head_size, channels_padded
        )
        scores = dot(q, tl.trans(k)) * scale
        scores = tl.where(tokens[None, :] <= last[:, None], scores, float("-inf"))
        top, past, weights = rescale(top, scores)
        total = total * past + tl.sum(weights, axis=1)
    place = share * num_probes * num_kv_heads * group + places
    tl.store(tops + place, top, mask=is_row)
    tl.store(totals + place, total, mask=is_row)


@triton.jit(do_not_specialize=["num_tokens"])
def _column_sums(
    queries,
    positions,
    is_random,
    probe_starts,
    keys,
    starts,
    tiles,
    scale,
    log_totals,
    mass,
    num_tokens,
    token_stride,
    head_stride,
    num_kv_heads: tl.constexpr,
    group: tl.constexpr,
    head_size: tl.constexpr,
    channels_padded: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_tokens: tl.constexpr,
    window: tl.constexpr,
    sinks: tl.constexpr,
):
    """One program per tile of a context's tokens and KV head: its part of the mass.

    That is of random and of recent probes, far and near.
    """
    place, head = tiles + 2 * tl.program_id(0), tl.program_id(1)
    context, first = tl.load(place), tl.load(place + 1)
    start, end = tl.load(starts + context), tl.load(starts + context + 1)
    first_probe, end_probe = tl.load(probe_starts + context), tl.load(probe_starts + context + 1)
    tokens = first + tl.arange(0, tile_tokens)
    k = _load_keys(
        keys, start + tokens, end, head, token_stride, head_stride, head_size, channels_padded
    )
    random = tl.zeros([tile_tokens], tl.float32)
    recent = tl.zeros([tile_tokens], tl.float32)
    random_near = tl.zeros([tile_tokens], tl.float32)
    recent_near = tl.zeros([tile_tokens], tl.float32)
    for row in range(0, (end_probe - first_probe) * group, tile_rows):
        q, last, places, probes, is_row = _load_queries(
            queries, positions, row + tl.arange(0, tile_rows), first_probe, end_probe, head,
            num_kv_heads, group, head_size, channels_padded,
        )  # fmt: skip
        log_total = tl.load(log_totals + places, mask=is_row, other=0)
        weights = tl.exp(dot(q, tl.trans(k)) * scale - log_total[:, None])
        weights = tl.where(tokens[None, :] <= last[:, None], weights, 0.0)
        of_random = (tl.load(is_random + probes, mask=is_row, other=0) != 0)[:, None]
        # Most tiles lie far from all of their probes.
        nearest = tl.min(tl.where(is_row, last, num_tokens)) - first - tile_tokens
        if nearest < window or first < sinks:
            is_near = (last[:, None] - tokens[None, :] < window) | (tokens < sinks)[None, :]
            near = tl.where(is_near, weights, 0.0)
            random_near += tl.sum(tl.where(of_random, near, 0.0), axis=0)
            recent_near += tl.sum(tl.where(of_random, 0.0, near), axis=0)
            weights = tl.where(is_near, 0.0, weights)
        random += tl.sum(tl.where(of_random, weights, 0.0), axis=0)
        recent += tl.sum(tl.where(of_random, 0.0, weights), axis=0)
    is_token = start + tokens < end
    place = mass + head.to(tl.int64) * num_tokens + start + tokens
    apart = num_kv_heads * num_tokens.to(tl.int64)
    tl.store(place, random, mask=is_token)
    tl.store(place + apart, random_near, mask=is_token)
    tl.store(place + 2 * apart, recent, mask=is_token)
    tl.store(place + 3 * apart, recent_near, mask=is_token)


def _num_shares(num_programs: int, num_tiles: int, device: torch.device) -> int:
    """Into how many a context's tokens are cut, so that all processors have work."""
    if device.type != "cuda":
        return INTERPRETED_SHARES
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    wanted = PROGRAMS_PER_PROCESSOR * processors // num_programs
    return max(1, min(wanted, MAX_SHARES, num_tiles))


def probe_scores(
    queries: torch.Tensor,
    probes: "ProbePlaces",
    keys: torch.Tensor,
    contexts: Sequences,
    scale: float,
    window: int,
    sinks: int,
) -> torch.Tensor:
    """See `api.probe_scores`."""
    num_tokens, num_kv_heads, head_size = keys.shape
    num_probes, num_heads, _ = queries.shape
    keys = keys if keys.stride(-1) == 1 else keys.contiguous()
    group = num_heads // num_kv_heads
    tile = tile_side(head_size, keys.element_size())
    tiles_per_context = triton.cdiv(probes.contexts.max_length * group, tile)
    num_programs = len(contexts) * tiles_per_context * num_kv_heads
    num_shares = _num_shares(num_programs, contexts.max_length // tile, keys.device)
    queries, probe_starts = queries.contiguous(), probes.contexts.cu_seqlens
    sizes = {
        "num_kv_heads": num_kv_heads,
        "group": group,
        "head_size": head_size,
        "channels_padded": padded(head_size),
        "tile_rows": tile,
        "tile_tokens": tile,
    }
    tops = torch.empty(2, num_shares, num_probes, num_heads, device=keys.device)
    _denominators[(len(contexts) * tiles_per_context, num_kv_heads, num_shares)](
        queries, probes.positions, probe_starts, keys, contexts.cu_seqlens, scale, tops[0],
        tops[1], num_probes, tiles_per_context, *keys.stride()[:2], **sizes,
    )  # fmt: skip
    log_totals = torch.logsumexp(tops[0] + tops[1].log(), dim=0)
    mass = torch.empty(2, 2, num_kv_heads, num_tokens, device=keys.device)
    tiles = contexts.tiles(tile)
    _column_sums[(len(tiles), num_kv_heads)](
        queries, probes.positions, probes.is_random, probe_starts, keys, contexts.cu_seqlens,
        tiles, scale, log_totals, mass, num_tokens, *keys.stride()[:2], **sizes, window=window,
        sinks=sinks,
    )  # fmt: skip
    return mass.sum(2)
