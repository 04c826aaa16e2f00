"""Decode attention in Triton: split-K flash decoding over kept pages, the rest's pages and tail.

A program attends with all query heads of one KV head over one share of a row's context, so that
every page is read once per KV head; a second kernel puts the shares together. Codes are expanded
in registers. Queries are folded and outputs rotated back as in `reference`.
"""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from vllm_zipvl.core.geometry import UNQUANTISED, PageGeometry
from vllm_zipvl.core.quantization import KeyNorm, fold_key_norm, hadamard
from vllm_zipvl.ops.tiles import dot, padded, rescale, rounded, tile_side

if TYPE_CHECKING:
    from vllm_zipvl.ops.decode_attention.api import CachedContext, DecodeRows

MAX_SHARES = 32
PROGRAMS_PER_PROCESSOR = 4
INTERPRETED_SHARES = 3


@triton.jit
def _attend_codes(
    top,
    total,
    plain,
    rotated,
    q,
    offset,
    heap,
    parameters,
    table,
    table_step,
    first,
    last,
    head,
    page_bytes: tl.constexpr,
    head_page_bytes: tl.constexpr,
    capacity: tl.constexpr,
    code_bytes: tl.constexpr,
    bits: tl.constexpr,
    head_size: tl.constexpr,
    tile_tokens: tl.constexpr,
):
    """Attend over tokens [first, last) of quantised pages; q is folded and scaled.

    Codes count from the middle of their range: a query rounded to its dtype errs in proportion to
    what it is multiplied by.
    """
    channels = tl.arange(0, plain.shape[1])
    is_channel = channels < head_size
    byte, shift = channels % code_bytes, channels // code_bytes * bits
    param_offset: tl.constexpr = 2 * capacity * code_bytes
    q_sum = tl.sum(q.to(tl.float32), axis=1)
    middle: tl.constexpr = 2 ** (bits - 1)
    for start in range(first, last, tile_tokens):
        tokens = start + tl.arange(0, tile_tokens)
        is_token = tokens < last
        slot = tokens % capacity
        page = tl.load(table + tokens // capacity * table_step, mask=is_token, other=0)
        base = page.to(tl.int64) * page_bytes + head * head_page_bytes
        code = base[:, None] + (slot * code_bytes)[:, None] + byte[None, :]
        is_code = is_token[:, None] & is_channel[None, :]
        param = (base + param_offset) // 2 + slot
        key_scale = tl.load(parameters + param, mask=is_token, other=0).to(tl.float32)
        key_zero = tl.load(parameters + param + capacity, mask=is_token, other=0).to(tl.float32)
        value_scale = tl.load(parameters + param + 2 * capacity, mask=is_token, other=0).to(
            tl.float32
        )
        value_zero = tl.load(parameters + param + 3 * capacity, mask=is_token, other=0).to(
            tl.float32
        )
        packed = tl.load(heap + code, mask=is_code, other=0)
        codes = (packed >> shift[None, :]) & (2**bits - 1)
        keys = (codes.to(tl.float32) - middle).to(q.dtype)
        scores = dot(q, tl.trans(keys)) * key_scale[None, :]
        scores += q_sum[:, None] * (key_zero + middle * key_scale)[None, :] + offset[:, None]
        scores = tl.where(is_token[None, :], scores, float("-inf"))
        top, past, weights = rescale(top, scores)
        packed = tl.load(heap + code + capacity * code_bytes, mask=is_code, other=0)
        codes = (packed >> shift[None, :]) & (2**bits - 1)
        values = (codes.to(tl.float32) - middle).to(q.dtype)
        scaled = rounded(weights * value_scale[None, :], q.dtype)
        rotated = rotated * past[:, None] + dot(scaled, values)
        value_middle = value_zero + middle * value_scale
        rotated += tl.sum(weights * value_middle[None, :], axis=1)[:, None]
        plain *= past[:, None]
        total = total * past + tl.sum(weights, axis=1)
    return top, total, plain, rotated


@triton.jit
def _attend_plain(
    top, total, plain, rotated, q, scale, memory, keys, values, is_token, head_size: tl.constexpr
):
    """Attend over one tile of unquantised tokens, whose keys and values start at these elements."""
    channels = tl.arange(0, plain.shape[1])
    mask = is_token[:, None] & (channels < head_size)[None, :]
    key = tl.load(memory + keys[:, None] + channels[None, :], mask=mask, other=0)
    scores = dot(q, tl.trans(key)) * scale
    scores = tl.where(is_token[None, :], scores, float("-inf"))
    top, past, weights = rescale(top, scores)
    value = tl.load(memory + values[:, None] + channels[None, :], mask=mask, other=0)
    plain = plain * past[:, None] + dot(rounded(weights, value.dtype), value)
    return top, total * past + tl.sum(weights, axis=1), plain, rotated * past[:, None]


@triton.jit
def _share(num_tokens, index, num_shares: tl.constexpr, tile_tokens: tl.constexpr):
    """Tokens [first, last) of one share, whole tiles but for the last."""
    per_share = tl.cdiv(tl.cdiv(num_tokens, tile_tokens), num_shares) * tile_tokens
    first = tl.minimum(index * per_share, num_tokens)
    return first, tl.minimum(first + per_share, num_tokens)


@triton.jit
def _attend_pages(
    top,
    total,
    plain,
    rotated,
    q,
    folded,
    offset,
    scale,
    heap,
    parameters,
    elements,
    table,
    table_step,
    num_tokens,
    index,
    head,
    page_bytes: tl.constexpr,
    head_page_bytes: tl.constexpr,
    capacity: tl.constexpr,
    code_bytes: tl.constexpr,
    bits: tl.constexpr,
    head_size: tl.constexpr,
    num_shares: tl.constexpr,
    tile_tokens: tl.constexpr,
):
    """Attend over one share of the pages of one precision."""
    first, last = _share(num_tokens, index, num_shares, tile_tokens)
    if bits == 16:
        itemsize: tl.constexpr = code_bytes // head_size
        for start in range(first, last, tile_tokens):
            tokens = start + tl.arange(0, tile_tokens)
            is_token = tokens < last
            page = tl.load(table + tokens // capacity * table_step, mask=is_token, other=0)
            base = page.to(tl.int64) * page_bytes + head * head_page_bytes
            keys = base // itemsize + tokens % capacity * head_size
            values = keys + capacity * head_size
            top, total, plain, rotated = _attend_plain(
                top, total, plain, rotated, q, scale, elements, keys, values, is_token, head_size
            )
    else:
        top, total, plain, rotated = _attend_codes(
            top,
            total,
            plain,
            rotated,
            folded,
            offset,
            heap,
            parameters,
            table,
            table_step,
            first,
            last,
            head,
            page_bytes,
            head_page_bytes,
            capacity,
            code_bytes,
            bits,
            head_size,
            tile_tokens,
        )
    return top, total, plain, rotated


@triton.jit
def _attend(
    query,
    folded,
    offsets,
    scale,
    cache,
    heap,
    parameters,
    elements,
    page_table,
    page_counts,
    block_table,
    slots,
    table_rows,
    tail_starts,
    context_lens,
    partial_plain,
    partial_rotated,
    partial_top,
    partial_total,
    cache_block_stride,
    block_table_stride,
    page_table_width,
    num_kv_heads: tl.constexpr,
    group: tl.constexpr,
    group_padded: tl.constexpr,
    head_size: tl.constexpr,
    channels_padded: tl.constexpr,
    block_size: tl.constexpr,
    page_bytes: tl.constexpr,
    head_page_bytes: tl.constexpr,
    high_bits: tl.constexpr,
    high_capacity: tl.constexpr,
    high_code_bytes: tl.constexpr,
    low_bits: tl.constexpr,
    low_capacity: tl.constexpr,
    low_code_bytes: tl.constexpr,
    num_shares: tl.constexpr,
    tile_tokens: tl.constexpr,
):
    """One program per query row, KV head and share of the context."""
    row, head, index = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    slot, table_row = tl.load(slots + row).to(tl.int64), tl.load(table_rows + row).to(tl.int64)
    tail_start, context_len = tl.load(tail_starts + row), tl.load(context_lens + row)

    members, channels = tl.arange(0, group_padded), tl.arange(0, channels_padded)
    is_member = members < group
    heads = (row * num_kv_heads + head).to(tl.int64) * group + members
    mask = is_member[:, None] & (channels < head_size)[None, :]
    places = heads[:, None] * head_size + channels[None, :]
    q = tl.load(query + places, mask=mask, other=0)
    top = tl.full([group_padded], float("-inf"), tl.float32)
    total = tl.zeros([group_padded], tl.float32)
    plain = tl.zeros([group_padded, channels_padded], tl.float32)
    rotated = tl.zeros([group_padded, channels_padded], tl.float32)
    folded_q = rounded(tl.load(folded + places, mask=mask, other=0), q.dtype)
    offset = tl.load(offsets + heads, mask=is_member, other=0)

    table = page_table + slot * page_table_width
    top, total, plain, rotated = _attend_pages(
        top,
        total,
        plain,
        rotated,
        q,
        folded_q,
        offset,
        scale,
        heap,
        parameters,
        elements,
        table,
        1,
        tl.load(page_counts + slot * 2),
        index,
        head,
        page_bytes,
        head_page_bytes,
        high_capacity,
        high_code_bytes,
        high_bits,
        head_size,
        num_shares,
        tile_tokens,
    )
    if low_bits > 0:
        # The rest's pages lie from the right end towards the left.
        top, total, plain, rotated = _attend_pages(
            top,
            total,
            plain,
            rotated,
            q,
            folded_q,
            offset,
            scale,
            heap,
            parameters,
            elements,
            table + page_table_width - 1,
            -1,
            tl.load(page_counts + slot * 2 + 1),
            index,
            head,
            page_bytes,
            head_page_bytes,
            low_capacity,
            low_code_bytes,
            low_bits,
            head_size,
            num_shares,
            tile_tokens,
        )

    first, last = _share(tl.maximum(context_len - tail_start, 0), index, num_shares, tile_tokens)
    for start in range(tail_start + first, tail_start + last, tile_tokens):
        tokens = start + tl.arange(0, tile_tokens)
        is_token = tokens < tail_start + last
        blocks = block_table + table_row * block_table_stride + tokens // block_size
        block = tl.load(blocks, mask=is_token, other=0).to(tl.int64)
        keys = block * cache_block_stride + head * block_size * 2 * head_size
        keys += tokens % block_size * 2 * head_size
        top, total, plain, rotated = _attend_plain(
            top, total, plain, rotated, q, scale, cache, keys, keys + head_size, is_token, head_size
        )

    share = heads * num_shares + index
    tl.store(partial_top + share, top, mask=is_member)
    tl.store(partial_total + share, total, mask=is_member)
    places = share[:, None] * head_size + channels[None, :]
    tl.store(partial_plain + places, plain, mask=mask)
    tl.store(partial_rotated + places, rotated, mask=mask)


@triton.jit
def _combine(
    partial_plain,
    partial_rotated,
    partial_top,
    partial_total,
    rotation,
    out,
    log_total,
    head_size: tl.constexpr,
    channels_padded: tl.constexpr,
    num_shares: tl.constexpr,
    shares_padded: tl.constexpr,
):
    """Put the shares of one query head together; one program each."""
    head = tl.program_id(0).to(tl.int64)
    shares, channels = tl.arange(0, shares_padded), tl.arange(0, channels_padded)
    is_share, is_channel = shares < num_shares, channels < head_size
    tops = tl.load(partial_top + head * num_shares + shares, mask=is_share, other=float("-inf"))
    totals = tl.load(partial_total + head * num_shares + shares, mask=is_share, other=0)
    top = tl.max(tops, axis=0)
    worth = tl.exp(tops - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(worth * totals, axis=0)
    places = (head * num_shares + shares)[:, None] * head_size + channels[None, :]
    mask = is_share[:, None] & is_channel[None, :]
    plain = tl.load(partial_plain + places, mask=mask, other=0)
    rotated = tl.load(partial_rotated + places, mask=mask, other=0)
    plain = tl.sum(worth[:, None] * plain, axis=0)
    rotated = tl.sum(worth[:, None] * rotated, axis=0)
    square = channels[:, None] * head_size + channels[None, :]
    turn = tl.load(rotation + square, mask=is_channel[:, None] & is_channel[None, :], other=0)
    plain += tl.sum(rotated[:, None] * turn, axis=0)
    # A row without context: zeros.
    result = plain / tl.where(total > 0, total, 1.0)
    result = rounded(result, out.dtype.element_ty)
    tl.store(out + head * head_size + channels, result, mask=is_channel)
    tl.store(log_total + head, top + tl.log(total))


def _num_shares(num_programs: int, device: torch.device) -> int:
    """Shares of a row's context, so that all processors have work; fixed by the batch's size.

    A power of two: each number is a kernel of its own.
    """
    if device.type != "cuda":
        return INTERPRETED_SHARES
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    wanted = max(1, PROGRAMS_PER_PROCESSOR * processors // num_programs)
    return min(MAX_SHARES, 1 << (wanted.bit_length() - 1))


def _page_arguments(geometry: PageGeometry) -> dict[str, int]:
    found = {"page_bytes": geometry.page_bytes, "head_page_bytes": geometry.head_page_bytes}
    for name, bits in (("high", geometry.high_bits), ("low", geometry.low_bits)):
        layout = geometry.layout(bits or UNQUANTISED)
        found[f"{name}_bits"] = bits
        found[f"{name}_capacity"] = layout.capacity
        found[f"{name}_code_bytes"] = layout.code_bytes
    return found


def decode_attention(
    query: torch.Tensor,
    context: "CachedContext",
    rows: "DecodeRows",
    scale: float,
    out: torch.Tensor,
) -> torch.Tensor:
    """See `api.decode_attention`."""
    geometry, device = context.geometry, query.device
    num_queries, num_heads, head_size = query.shape
    num_kv_heads = geometry.num_kv_heads
    group = num_heads // num_kv_heads
    norm = KeyNorm(*context.key_norms[rows.slots.long()].unbind(1))
    grouped = query.float().view(num_queries, num_kv_heads, group, head_size) * scale
    folded, offsets = fold_key_norm(grouped, norm)
    num_shares = _num_shares(num_queries * num_kv_heads, device)
    floats = {"dtype": torch.float32, "device": device}
    partial = torch.empty(2, num_queries, num_heads, num_shares, head_size, **floats)
    sums = torch.empty(2, num_queries, num_heads, num_shares, **floats)
    log_total = torch.empty(num_queries, num_heads, **floats)
    if num_queries == 0:
        return log_total
    channels_padded = padded(head_size)
    kv_cache = context.kv_cache
    _attend[(num_queries, num_kv_heads, num_shares)](
        query.contiguous(),
        folded.contiguous(),
        offsets.contiguous(),
        scale,
        kv_cache,
        context.heap,
        context.heap.view(torch.float16),
        context.heap.view(kv_cache.dtype),
        context.page_table,
        context.page_counts,
        context.block_table,
        *rows,
        *partial,
        *sums,
        kv_cache.stride(0),
        context.block_table.stride(0),
        context.page_table.shape[1],
        num_kv_heads=num_kv_heads,
        group=group,
        group_padded=padded(group),
        head_size=head_size,
        channels_padded=channels_padded,
        block_size=kv_cache.shape[2],
        num_shares=num_shares,
        tile_tokens=tile_side(head_size, kv_cache.element_size()),
        **_page_arguments(geometry),
    )
    _combine[(num_queries * num_heads,)](
        *partial,
        *sums,
        hadamard(head_size, device),
        out,
        log_total,
        head_size=head_size,
        channels_padded=channels_padded,
        num_shares=num_shares,
        shares_padded=triton.next_power_of_2(num_shares),
    )
    return log_total
