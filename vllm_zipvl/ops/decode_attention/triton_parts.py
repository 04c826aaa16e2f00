"""Parts of a row's context, for the decode kernel: pages at any precision, and plain tokens.

Scores count in powers of two. Tiles have their tokens before their heads, of which there are few:
[tokens, heads] of scores, [channels, heads] of outputs.
"""

import triton
import triton.language as tl

from vllm_zipvl.core.codes import SCALE_DROPPED_BITS
from vllm_zipvl.ops.decode_attention.triton_codes import (
    key_channels,
    key_operand,
    key_words,
    value_channels,
    value_operand,
    value_words,
)
from vllm_zipvl.ops.tiles import INTERPRETED, dot, rounded, scale_of

FACTOR, ROUNDED_OFF, EARLY, LATE, OFFSET = (tl.constexpr(i) for i in range(5))
"""What `folded_sums` hold of a query."""
NUM_SUMS = tl.constexpr(5)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _load_query(
    query, heads, is_member, channels, exponents, head_size: tl.constexpr, dtype: tl.constexpr
):
    """Queries [channels, heads], divided by powers of two, as operands.

    Loaded flat, and so laid out with a head's channels beside each other, by which operands are
    whole registers.
    """
    mask = is_member[:, None] & (channels < head_size)[None, :]
    places = query + heads[:, None] * head_size + channels[None, :]
    size: tl.constexpr = heads.shape[0] * channels.shape[0]
    q = tl.load(places.reshape([size]), mask=mask.reshape([size]), other=0)
    q = q.reshape([heads.shape[0], channels.shape[0]]).to(tl.float32)
    return tl.trans((q * tl.exp2(-exponents.to(tl.float32))[None, :]).to(dtype))


@triton.jit
def _rescale(top, scores):
    """One step of the online softmax over columns of `scores`, powers of two.

    Returns the running maximum `top` with the new scores in it, what sums under the earlier one
    are worth now, and the new scores' weights.
    """
    new_top = tl.maximum(top, tl.max(scores, axis=0))
    # A column that has seen nothing yet has no maximum.
    finite = tl.where(new_top == float("-inf"), 0.0, new_top)
    return new_top, tl.exp2(top - finite), tl.exp2(scores - finite[None, :])


@triton.jit
def _pages(table, table_step, tile, num_pages, layout: tl.constexpr):
    """Numbers of a tile's pages; of those that there are not, 0."""
    place = tile * layout.pages
    page = tl.load(table + place * table_step, mask=place < num_pages, other=0)
    other = page
    if layout.pages == 2:
        place += 1
        other = tl.load(table + place * table_step, mask=place < num_pages, other=0)
    return page, other


@triton.jit
def _page_starts(pages, head, layout: tl.constexpr):
    """Words of the heap at which a head's part of the pages starts."""
    even, odd = pages
    own = head * (layout.head_page_bytes // 4)
    page_words: tl.constexpr = layout.page_bytes // 4
    return even.to(tl.int64) * page_words + own, odd.to(tl.int64) * page_words + own


@triton.jit
def _parameters(parameters, starts, tile, num_tokens, layout: tl.constexpr):
    """Of a tile's tokens: which there are, and their parameters as one number.

    From the lowest bits on scales of both sides, both zeros of keys, zeros of values.
    """
    capacity: tl.constexpr = layout.capacity
    tokens: tl.constexpr = layout.pages * layout.slots
    slot = tl.arange(0, layout.slots)[None, :]
    page = tile * layout.pages + tl.arange(0, layout.pages)[:, None]
    is_token = (slot < capacity) & (page * capacity + slot < num_tokens)
    start, other = starts
    if layout.pages == 2:
        start = tl.where(tl.arange(0, 2) == 0, start, other)[:, None]
    param = parameters + start * 2 + (slot + capacity * layout.code_bytes)
    lower = tl.load(param, mask=is_token, other=0).to(tl.uint32)
    lower |= tl.load(param + capacity, mask=is_token, other=0).to(tl.uint32) << 16
    upper = tl.load(param + 2 * capacity, mask=is_token, other=0).to(tl.uint32)
    upper |= tl.load(param + 3 * capacity, mask=is_token, other=0).to(tl.uint32) << 16
    both = lower.to(tl.uint64) | (upper.to(tl.uint64) << 32)
    return is_token.reshape([tokens]), both.reshape([tokens])


_NUMBERS = tl.constexpr(
    """{
    .reg .b32 scales, upper, key_scale, value_scale;
    .reg .b16 key_scale_half, value_scale_half, early, late, zero, none;
    mov.b64 {scales, upper}, $5;
    and.b32 key_scale, scales, 0xFF;
    shl.b32 key_scale, key_scale, DROPPED_BITS;
    mov.b32 {key_scale_half, none}, key_scale;
    shr.u32 value_scale, scales, 8;
    and.b32 value_scale, value_scale, 0xFF;
    shl.b32 value_scale, value_scale, DROPPED_BITS;
    mov.b32 {value_scale_half, none}, value_scale;
    mov.b32 {none, early}, scales;
    mov.b32 {late, zero}, upper;
    cvt.f32.f16 $0, key_scale_half;
    cvt.f32.f16 $1, value_scale_half;
    cvt.f32.f16 $2, early;
    cvt.f32.f16 $3, late;
    cvt.f32.f16 $4, zero;
    }""".replace("DROPPED_BITS", str(SCALE_DROPPED_BITS))
)
_FLOATS = tl.constexpr((tl.float32,) * 5)


@triton.jit
def _zero(word):
    return word.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _numbers_of(params, scores):
    """What parameters of tokens stand for, one for each of the scores [tokens, heads].

    They are the scales of both sides, both zeros of keys, and zeros of values. Assembly, and one
    that has scores as an operand that it does nothing with, since a compiler would take each
    number by itself to the threads whose scores it belongs to, instead of all as they are packed.
    """
    if INTERPRETED:
        lower, upper = params.to(tl.uint32), (params >> 32).to(tl.uint32)
        key_scale, value_scale = scale_of(lower)[:, None], scale_of(lower >> 8)[:, None]
        early, late = _zero(lower >> 16)[:, None], _zero(upper)[:, None]
        zero = _zero(upper >> 16)[:, None]
    else:
        each = tl.broadcast_to(params[:, None], scores.shape)
        key_scale, value_scale, early, late, zero = tl.inline_asm_elementwise(
            _NUMBERS, "=f,=f,=f,=f,=f,l,f", [each, scores], _FLOATS, is_pure=True, pack=1
        )
    return key_scale, value_scale, early, late, zero


@triton.jit
def _power(exponent):
    """2 to the power of an integer above -127."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _attend_codes(
    folded, folded_sums, heap, parameters, table, table_step, num_tokens, first, last, head, heads,
    is_member, target, layout: tl.constexpr, head_size: tl.constexpr, dtype: tl.constexpr,
    ahead: tl.constexpr, centres: tl.constexpr,
):  # fmt: skip
    """Attend over tiles [first, last) of quantised pages; returns the maximum and the total.

    Codes count from the middle of their range, those of values if `centres` says so: queries and
    weights that are rounded err in proportion to what they are multiplied by. Weights times scales
    of values fit float16 since they are divided by a power of two that no scale so far is above.
    What a tile needs first, its keys, is loaded before the tile ahead is done, and so are its
    values if `ahead` says so.
    """
    channels, exponents = key_channels(layout)
    q = _load_query(folded, heads, is_member, channels, exponents, head_size, dtype)
    own = folded_sums + heads * NUM_SUMS
    factor = tl.load(own + FACTOR, mask=is_member, other=0)
    middle: tl.constexpr = (2**layout.bits - 1) / 2
    query_off = middle * tl.load(own + ROUNDED_OFF, mask=is_member, other=0)
    early_sum = tl.load(own + EARLY, mask=is_member, other=0)
    late_sum = tl.load(own + LATE, mask=is_member, other=0)
    offset = tl.load(own + OFFSET, mask=is_member, other=0)
    tokens: tl.constexpr = layout.pages * layout.slots
    top = tl.full([heads.shape[0]], float("-inf"), tl.float32)
    total = tl.zeros([tokens, heads.shape[0]], tl.float32)
    extra = tl.zeros([tokens, heads.shape[0]], tl.float32)
    sums = tl.zeros([exponents.shape[0], heads.shape[0]], tl.float32)
    largest = tl.full([], 0, tl.int32)
    num_pages = tl.cdiv(num_tokens, layout.capacity)
    pages = _pages(table, table_step, first, num_pages, layout)
    starts = _page_starts(pages, head, layout)
    is_token, params = _parameters(parameters, starts, first, num_tokens, layout)
    keys = key_words(heap, starts, layout)
    even, odd = value_words(heap, starts, layout)
    pages = _pages(table, table_step, first + 1, num_pages, layout)
    for tile in tl.range(first, last, num_stages=1):
        next_starts = _page_starts(pages, head, layout)
        pages = _pages(table, table_step, tile + 2, num_pages, layout)
        if not ahead:
            even, odd = value_words(heap, starts, layout)
        next_is_token, next_params = _parameters(
            parameters, next_starts, tile + 1, num_tokens, layout
        )
        codes = dot(key_operand(keys, layout, dtype), q)
        keys = key_words(heap, next_starts, layout)
        value_codes = value_operand(even, odd, layout, dtype)
        if ahead:
            even, odd = value_words(heap, next_starts, layout)
        new_largest = tl.maximum(largest, tl.max((params.to(tl.int32) >> 8) & 255, axis=0) >> 3)
        key_scale, value_scale, early, late, zero = _numbers_of(params, codes)
        scores = (codes * factor[None, :] + query_off[None, :]) * key_scale
        scores += early * early_sum[None, :] + offset[None, :]
        scores += late * late_sum[None, :]
        scores = tl.where(is_token[:, None], scores, float("-inf"))
        top, past, weights = _rescale(top, scores)
        scaled = weights * (value_scale * _power(14 - new_largest))
        worth = scaled.to(dtype)
        past_worth = (past * _power(largest - new_largest))[None, :]
        sums = sums * past_worth + dot(value_codes, worth)
        total = total * past[None, :] + weights
        extra = extra * past[None, :] + weights * zero
        if centres:
            extra += (scaled - worth.to(tl.float32)) * (middle * _power(new_largest - 14))
        starts, is_token, params, largest = next_starts, next_is_token, next_params, new_largest
    channels, exponents = value_channels(layout)
    # What the operands' unit is worth.
    unit = tl.exp2(24.0 - exponents.to(tl.float32)) * _power(largest - 14)
    sums = sums * unit[:, None] + tl.sum(extra, axis=0)[None, :]
    mask = (channels < head_size)[:, None] & is_member[None, :]
    tl.store(target[None, :] + channels[:, None], sums, mask=mask)
    return top, tl.sum(total, axis=0)


@triton.jit
def _begin_plain(query, heads, is_member, head_size: tl.constexpr, channels_padded: tl.constexpr):
    """Queries [channels, heads], their mask and channels; maximum, total and sums before tokens."""
    channels = tl.arange(0, channels_padded)
    mask = (channels < head_size)[:, None] & is_member[None, :]
    q = tl.load(query + heads[None, :] * head_size + channels[:, None], mask=mask, other=0)
    top = tl.full([heads.shape[0]], float("-inf"), tl.float32)
    total = tl.zeros([heads.shape[0]], tl.float32)
    sums = tl.zeros([channels_padded, heads.shape[0]], tl.float32)
    return q, mask, channels, top, total, sums


@triton.jit
def _attend_plain(
    q, scale, memory, keys, values, is_token, top, total, sums, head_size: tl.constexpr
):
    """Attend over one tile of unquantised tokens, whose keys and values start at these elements."""
    channels = tl.arange(0, sums.shape[0])
    mask = is_token[:, None] & (channels < head_size)[None, :]
    key = tl.load(memory + keys[:, None] + channels[None, :], mask=mask, other=0)
    scores = dot(key, q) * (scale * LOG2_E)
    scores = tl.where(is_token[:, None], scores, float("-inf"))
    top, past, weights = _rescale(top, scores)
    value = tl.load(memory + values[:, None] + channels[None, :], mask=mask, other=0)
    sums = sums * past[None, :] + dot(tl.trans(value), rounded(weights, value.dtype))
    return top, total * past + tl.sum(weights, axis=0), sums


@triton.jit
def attend_dense(
    query, scale, cache, blocks, cache_block_stride, head_len, tail_start, num_dense, first, last,
    head, heads, is_member, target, head_size: tl.constexpr, channels_padded: tl.constexpr,
    block_size: tl.constexpr, tile_tokens: tl.constexpr,
):  # fmt: skip
    """Attend over tiles [first, last) of dense head and tail; returns the maximum and the total."""
    q, mask, channels, top, total, sums = _begin_plain(
        query, heads, is_member, head_size, channels_padded
    )
    for tile in tl.range(first, last, num_stages=1):
        # Of head and tail as if they were one.
        dense = tile * tile_tokens + tl.arange(0, tile_tokens)
        is_token = dense < num_dense
        tokens = tl.where(dense < head_len, dense, dense + tail_start - head_len)
        block = tl.load(blocks + tokens // block_size, mask=is_token, other=0).to(tl.int64)
        keys = block * cache_block_stride + head * block_size * 2 * head_size
        keys += tokens % block_size * 2 * head_size
        top, total, sums = _attend_plain(
            q, scale, cache, keys, keys + head_size, is_token, top, total, sums, head_size
        )
    tl.store(target[None, :] + channels[:, None], sums, mask=mask)
    return top, total


@triton.jit
def num_tiles(num_tokens, layout: tl.constexpr, tile_tokens: tl.constexpr):
    """Tiles of the pages of one precision."""
    if layout.bits == 16:
        return tl.cdiv(num_tokens, tile_tokens)
    return tl.cdiv(num_tokens, layout.pages * layout.capacity)


@triton.jit
def attend_pages(
    queries, scale, pools, table, table_step, num_tokens, first, last, head, heads, is_member,
    target, layout: tl.constexpr, head_size: tl.constexpr, channels_padded: tl.constexpr,
    tile_tokens: tl.constexpr, ahead: tl.constexpr,
):  # fmt: skip
    """Attend over tiles [first, last) of the pages of one precision; returns maximum and total.

    `queries` are the query, and what `fold` makes of it. `pools` are the heap's words, and the same
    as 16-bit words and as the cache's dtype. `layout` is a `PageLayout`.
    """
    query, folded, folded_sums = queries
    heap, parameters, elements = pools
    if layout.bits == 16:
        q, mask, channels, top, total, sums = _begin_plain(
            query, heads, is_member, head_size, channels_padded
        )
        itemsize: tl.constexpr = layout.code_bytes // head_size
        for tile in tl.range(first, last, num_stages=1):
            tokens = tile * tile_tokens + tl.arange(0, tile_tokens)
            is_token = tokens < num_tokens
            page = tl.load(table + tokens // layout.capacity * table_step, mask=is_token, other=0)
            base = page.to(tl.int64) * layout.page_bytes + head * layout.head_page_bytes
            keys = base // itemsize + tokens % layout.capacity * head_size
            values = keys + layout.capacity * head_size
            top, total, sums = _attend_plain(
                q, scale, elements, keys, values, is_token, top, total, sums, head_size
            )
        tl.store(target[None, :] + channels[:, None], sums, mask=mask)
    else:
        top, total = _attend_codes(
            folded, folded_sums, heap, parameters, table, table_step, num_tokens, first, last, head,
            heads, is_member, target, layout, head_size, folded.dtype.element_ty, ahead,
            query.dtype.element_ty == tl.float16,
        )  # fmt: skip
    return top, total
