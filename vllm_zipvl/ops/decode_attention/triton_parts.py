"""Shares of a row's context, for the decode kernel: pages at any precision, and plain tokens."""

from typing import NamedTuple

import triton
import triton.language as tl

from vllm_zipvl.ops.tiles import INTERPRETED, dot, rescale, rounded, scale_of


class PageLayout(NamedTuple):
    """What a kernel is compiled for, of the pages of one precision; bits 0 for evicted tokens."""

    page_bytes: int
    head_page_bytes: int
    bits: int
    capacity: int
    code_bytes: int
    bytes_padded: int


@triton.jit
def _numbers(packed, bits: tl.constexpr, dtype: tl.constexpr):
    """Codes [tokens, bytes] of `bits` as numbers from the middle of their range.

    Returns [tokens, codes]: those of one byte beside each other, the lowest bits first.
    """
    packed = packed.to(tl.uint16)
    if bits == 8:
        codes = packed
    elif bits == 4:
        codes = tl.join(packed & 15, packed >> 4)
    else:
        even, odd = tl.join(packed & 3, (packed >> 4) & 3), tl.join((packed >> 2) & 3, packed >> 6)
        codes = tl.join(even, odd)
    codes = tl.reshape(codes, [packed.shape[0], packed.shape[1] * (8 // bits)])
    middle: tl.constexpr = 2 ** (bits - 1)
    # The interpreter does not add in bfloat16.
    if bits == 8 or dtype == tl.float32 or (INTERPRETED and dtype == tl.bfloat16):
        return (codes.to(tl.float32) - middle).to(dtype)
    # In place of the lowest bits of a power of two, a code adds itself: no conversion.
    power: tl.constexpr = 128 if dtype == tl.bfloat16 else 1024
    pattern: tl.constexpr = 0x4300 if dtype == tl.bfloat16 else 0x6400
    shifted = (codes | pattern).to(dtype, bitcast=True)
    return shifted - tl.full([], power + middle, dtype)


@triton.jit
def _attend_codes(
    folded, offsets, heap, parameters, table, table_step, first, last, head, heads, is_member,
    partial, share, layout: tl.constexpr, head_size: tl.constexpr, tile_tokens: tl.constexpr,
    dtype: tl.constexpr,
):  # fmt: skip
    """Attend over tokens [first, last) of quantised pages; returns the maximum and the total.

    Codes count from the middle of their range: a query rounded to its dtype errs in proportion to
    what it is multiplied by.
    """
    bits: tl.constexpr = layout.bits
    capacity: tl.constexpr = layout.capacity
    code_bytes: tl.constexpr = layout.code_bytes
    offset = tl.load(offsets + heads, mask=is_member, other=0)
    in_byte: tl.constexpr = 8 // bits
    order = tl.arange(0, layout.bytes_padded * in_byte)
    byte, bytes = order // in_byte, tl.arange(0, layout.bytes_padded)
    # A byte holds channels that lie `code_bytes` apart.
    channels = order % in_byte * code_bytes + byte
    mask = is_member[:, None] & (byte < code_bytes)[None, :]
    q = tl.load(folded + heads[:, None] * head_size + channels[None, :], mask=mask, other=0)
    # What the zeros of a key are multiplied by; not rounded, for they may be large.
    is_early = (channels < head_size // 2)[None, :]
    early_sum = tl.sum(tl.where(is_early, q, 0.0), axis=1)
    late_sum = tl.sum(tl.where(is_early, 0.0, q), axis=1)
    q = rounded(q, dtype)
    top = tl.full([heads.shape[0]], float("-inf"), tl.float32)
    total = tl.zeros([heads.shape[0]], tl.float32)
    sums = tl.zeros([heads.shape[0], layout.bytes_padded * in_byte], tl.float32)
    param_offset: tl.constexpr = 2 * capacity * code_bytes
    middle: tl.constexpr = 2 ** (bits - 1)
    for start in range(first, last, tile_tokens):
        tokens = start + tl.arange(0, tile_tokens)
        is_token = tokens < last
        slot = tokens % capacity
        page = tl.load(table + tokens // capacity * table_step, mask=is_token, other=0)
        base = page.to(tl.int64) * layout.page_bytes + head * layout.head_page_bytes
        code = base[:, None] + (slot * code_bytes)[:, None] + bytes[None, :]
        is_code = is_token[:, None] & (bytes < code_bytes)[None, :]
        param = parameters + (base + param_offset) // 2 + slot
        scales = tl.load(param, mask=is_token, other=0).to(tl.int16, bitcast=True)
        key_scale, value_scale = scale_of(scales), scale_of(scales >> 8)
        early_zero = tl.load(param + capacity, mask=is_token, other=0).to(tl.float32)
        late_zero = tl.load(param + 2 * capacity, mask=is_token, other=0).to(tl.float32)
        value_zero = tl.load(param + 3 * capacity, mask=is_token, other=0).to(tl.float32)
        keys = _numbers(tl.load(heap + code, mask=is_code, other=0), bits, dtype)
        scores = dot(q, tl.trans(keys)) * key_scale[None, :]
        scores += early_sum[:, None] * (early_zero + middle * key_scale)[None, :]
        scores += late_sum[:, None] * (late_zero + middle * key_scale)[None, :] + offset[:, None]
        scores = tl.where(is_token[None, :], scores, float("-inf"))
        top, past, weights = rescale(top, scores)
        packed = tl.load(heap + code + capacity * code_bytes, mask=is_code, other=0)
        values = _numbers(packed, bits, dtype)
        sums = sums * past[:, None] + dot(rounded(weights * value_scale[None, :], dtype), values)
        value_middle = value_zero + middle * value_scale
        sums += tl.sum(weights * value_middle[None, :], axis=1)[:, None]
        total = total * past + tl.sum(weights, axis=1)
    tl.store(partial + share[:, None] * head_size + channels[None, :], sums, mask=mask)
    return top, total


@triton.jit
def attend_plain(
    q, scale, memory, keys, values, is_token, top, total, sums, head_size: tl.constexpr
):
    """Attend over one tile of unquantised tokens, whose keys and values start at these elements."""
    channels = tl.arange(0, sums.shape[1])
    mask = is_token[:, None] & (channels < head_size)[None, :]
    key = tl.load(memory + keys[:, None] + channels[None, :], mask=mask, other=0)
    scores = dot(q, tl.trans(key)) * scale
    scores = tl.where(is_token[None, :], scores, float("-inf"))
    top, past, weights = rescale(top, scores)
    value = tl.load(memory + values[:, None] + channels[None, :], mask=mask, other=0)
    sums = sums * past[:, None] + dot(rounded(weights, value.dtype), value)
    return top, total * past + tl.sum(weights, axis=1), sums


@triton.jit
def share_of(num_tokens, index, num_shares: tl.constexpr, tile_tokens: tl.constexpr):
    """Tokens [first, last) of one share, whole tiles but for the last."""
    per_share = tl.cdiv(tl.cdiv(num_tokens, tile_tokens), num_shares) * tile_tokens
    first = tl.minimum(index * per_share, num_tokens)
    return first, tl.minimum(first + per_share, num_tokens)


@triton.jit
def load_query(query, heads, is_member, head_size: tl.constexpr, channels_padded: tl.constexpr):
    """Queries [heads, channels_padded], with their mask and channels."""
    channels = tl.arange(0, channels_padded)
    mask = is_member[:, None] & (channels < head_size)[None, :]
    q = tl.load(query + heads[:, None] * head_size + channels[None, :], mask=mask, other=0)
    return q, mask, channels


@triton.jit
def attend_pages(
    query, folded, offsets, scale, pools, table, table_step, num_tokens, index, head, heads,
    is_member, partial, share, layout: tl.constexpr, head_size: tl.constexpr,
    channels_padded: tl.constexpr, num_shares: tl.constexpr, tile_tokens: tl.constexpr,
):  # fmt: skip
    """Attend over one share of the pages of one precision; returns the maximum and the total.

    `pools` are the heap's bytes, and the same as float16 and as the cache's dtype. `layout` is a
    `PageLayout`.
    """
    heap, parameters, elements = pools
    first, last = share_of(num_tokens, index, num_shares, tile_tokens)
    if layout.bits == 16:
        q, mask, channels = load_query(query, heads, is_member, head_size, channels_padded)
        top = tl.full([heads.shape[0]], float("-inf"), tl.float32)
        total = tl.zeros([heads.shape[0]], tl.float32)
        sums = tl.zeros([heads.shape[0], channels_padded], tl.float32)
        itemsize: tl.constexpr = layout.code_bytes // head_size
        for start in range(first, last, tile_tokens):
            tokens = start + tl.arange(0, tile_tokens)
            is_token = tokens < last
            page = tl.load(table + tokens // layout.capacity * table_step, mask=is_token, other=0)
            base = page.to(tl.int64) * layout.page_bytes + head * layout.head_page_bytes
            keys = base // itemsize + tokens % layout.capacity * head_size
            values = keys + layout.capacity * head_size
            top, total, sums = attend_plain(
                q, scale, elements, keys, values, is_token, top, total, sums, head_size
            )
        tl.store(partial + share[:, None] * head_size + channels[None, :], sums, mask=mask)
    else:
        top, total = _attend_codes(
            folded, offsets, heap, parameters, table, table_step, first, last, head, heads,
            is_member, partial, share, layout, head_size, tile_tokens, query.dtype.element_ty,
        )  # fmt: skip
    return top, total
