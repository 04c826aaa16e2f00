"""Probe scores in Triton: denominators of the softmax first, then column sums.

Both passes read the keys once per tile of probes; no [num_probes, num_tokens] matrix is kept.
"""

import torch
import triton
import triton.language as tl

from vllm_zipvl.ops.tiles import dot, padded, rescale, tile_side

PROGRAMS_PER_PROCESSOR = 4
MAX_SHARES = 64
INTERPRETED_SHARES = 3


@triton.jit
def _load_queries(
    queries,
    positions,
    rows,
    head,
    num_probes,
    num_kv_heads: tl.constexpr,
    group: tl.constexpr,
    head_size: tl.constexpr,
    channels_padded: tl.constexpr,
):
    """A tile of queries of one KV head, what each sees up to, its place in [num_probes, num_heads].

    Padding sees nothing: up to -1.
    """
    probes = rows // group
    is_row = probes < num_probes
    places = probes * num_kv_heads * group + head * group + rows % group
    channels = tl.arange(0, channels_padded)
    q = tl.load(
        queries + places.to(tl.int64)[:, None] * head_size + channels[None, :],
        mask=is_row[:, None] & (channels < head_size)[None, :],
        other=0,
    )
    return q, tl.load(positions + probes, mask=is_row, other=-1), places, is_row


@triton.jit
def _load_keys(
    keys, tokens, num_tokens, head, token_stride, head_stride, head_size: tl.constexpr,
    channels_padded: tl.constexpr,
):  # fmt: skip
    channels = tl.arange(0, channels_padded)
    start = tokens.to(tl.int64) * token_stride + head * head_stride
    mask = (tokens < num_tokens)[:, None] & (channels < head_size)[None, :]
    return tl.load(keys + start[:, None] + channels[None, :], mask=mask, other=0)


@triton.jit
def _denominators(
    queries,
    positions,
    keys,
    scale,
    tops,
    totals,
    num_probes,
    num_tokens,
    tokens_per_share,
    token_stride,
    head_stride,
    num_kv_heads: tl.constexpr,
    group: tl.constexpr,
    head_size: tl.constexpr,
    channels_padded: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_tokens: tl.constexpr,
):
    """One program per tile of queries, KV head and share of the tokens."""
    rows = tl.program_id(0) * tile_rows + tl.arange(0, tile_rows)
    head, share = tl.program_id(1), tl.program_id(2)
    q, last, places, is_row = _load_queries(
        queries, positions, rows, head, num_probes, num_kv_heads, group, head_size, channels_padded
    )
    top = tl.full([tile_rows], float("-inf"), tl.float32)
    total = tl.zeros([tile_rows], tl.float32)
    first = share * tokens_per_share
    end = tl.minimum(tl.minimum(first + tokens_per_share, num_tokens), tl.max(last) + 1)
    for start in range(first, end, tile_tokens):
        tokens = start + tl.arange(0, tile_tokens)
        k = _load_keys(
            keys, tokens, num_tokens, head, token_stride, head_stride, head_size, channels_padded
        )
        scores = dot(q, tl.trans(k)) * scale
        scores = tl.where(tokens[None, :] <= last[:, None], scores, float("-inf"))
        top, past, weights = rescale(top, scores)
        total = total * past + tl.sum(weights, axis=1)
    place = share * num_probes * num_kv_heads * group + places
    tl.store(tops + place, top, mask=is_row)
    tl.store(totals + place, total, mask=is_row)


@triton.jit
def _column_sums(
    queries,
    positions,
    keys,
    scale,
    log_totals,
    mass,
    num_probes,
    num_random,
    num_tokens,
    token_stride,
    head_stride,
    num_kv_heads: tl.constexpr,
    group: tl.constexpr,
    head_size: tl.constexpr,
    channels_padded: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_tokens: tl.constexpr,
):
    """One program per tile of tokens and KV head: its part of the mass, of either class."""
    tokens = tl.program_id(0) * tile_tokens + tl.arange(0, tile_tokens)
    head = tl.program_id(1)
    k = _load_keys(
        keys, tokens, num_tokens, head, token_stride, head_stride, head_size, channels_padded
    )
    random = tl.zeros([tile_tokens], tl.float32)
    recent = tl.zeros([tile_tokens], tl.float32)
    for start in range(0, num_probes * group, tile_rows):
        rows = start + tl.arange(0, tile_rows)
        q, last, places, is_row = _load_queries(
            queries, positions, rows, head, num_probes, num_kv_heads, group, head_size,
            channels_padded,
        )  # fmt: skip
        log_total = tl.load(log_totals + places, mask=is_row, other=0)
        weights = tl.exp(dot(q, tl.trans(k)) * scale - log_total[:, None])
        weights = tl.where(tokens[None, :] <= last[:, None], weights, 0.0)
        is_random = rows // group < num_random
        random += tl.sum(tl.where(is_random[:, None], weights, 0.0), axis=0)
        recent += tl.sum(tl.where(is_random[:, None], 0.0, weights), axis=0)
    is_token = tokens < num_tokens
    place = head.to(tl.int64) * num_tokens + tokens
    tl.store(mass + place, random, mask=is_token)
    tl.store(mass + num_kv_heads * num_tokens + place, recent, mask=is_token)


def _num_shares(num_programs: int, num_tiles: int, device: torch.device) -> int:
    """Into how many the tokens are cut, so that all processors have work."""
    if device.type != "cuda":
        return INTERPRETED_SHARES
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    wanted = PROGRAMS_PER_PROCESSOR * processors // num_programs
    return max(1, min(wanted, MAX_SHARES, num_tiles))


def probe_scores(
    queries: torch.Tensor,
    positions: torch.Tensor,
    num_random: int,
    keys: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `api.probe_scores`; returns the mass of random and of recent probes."""
    num_tokens, num_kv_heads, head_size = keys.shape
    num_probes, num_heads, _ = queries.shape
    keys = keys if keys.stride(-1) == 1 else keys.contiguous()
    group = num_heads // num_kv_heads
    tile = tile_side(head_size, keys.element_size())
    num_tiles = triton.cdiv(num_probes * group, tile)
    num_shares = _num_shares(num_tiles * num_kv_heads, num_tokens // tile, keys.device)
    tokens_per_share = triton.cdiv(num_tokens, num_shares * tile) * tile
    inputs = (queries.contiguous(), positions, keys, scale)
    sizes = {
        "num_kv_heads": num_kv_heads,
        "group": group,
        "head_size": head_size,
        "channels_padded": padded(head_size),
        "tile_rows": tile,
        "tile_tokens": tile,
    }
    tops = torch.empty(2, num_shares, num_probes, num_heads, device=keys.device)
    _denominators[(num_tiles, num_kv_heads, num_shares)](
        *inputs, tops[0], tops[1], num_probes, num_tokens, tokens_per_share, *keys.stride()[:2],
        **sizes,
    )  # fmt: skip
    log_totals = torch.logsumexp(tops[0] + tops[1].log(), dim=0)
    mass = torch.empty(2, num_kv_heads, num_tokens, device=keys.device)
    _column_sums[(triton.cdiv(num_tokens, tile), num_kv_heads)](
        *inputs, log_totals, mass, num_probes, num_random, num_tokens, *keys.stride()[:2], **sizes
    )
    random, recent = mass.sum(1)
    return random, recent
