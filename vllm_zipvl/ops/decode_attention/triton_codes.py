"""Codes of pages as operands of tensor cores: which thread loads what, and what it makes of it.

A code is never converted. As the lowest bits of a float16 it is that many times 2^-24, and as the
bits above them that many times 2^-24 times what its place is worth, both exact. So two codes are
expanded at once by masking a word, and the power of two is the query's, or the output's.

Operands hold their channels in an order of their own, in which a thread that loaded whole words
holds what tensor cores want of it: of keys [tokens, places] pairs of channels of one token, and of
values [places, tokens] pairs of tokens of one channel.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from vllm_zipvl.ops.tiles import INTERPRETED

UNIT = tl.constexpr(2.0**-24)
"""What a code of 1 in the lowest bits of an operand is worth."""


class PageLayout(NamedTuple):
    """What a kernel is compiled for, of the pages of one precision; bits 0 for evicted tokens.

    Attributes:
        page_bytes: Bytes of a page.
        head_page_bytes: Bytes of one KV head in it.
        bits: Of a code.
        capacity: Tokens of a page.
        code_bytes: Of a token's key.
        slots: The power of two that a page's tokens are padded to.
        pages: Of a tile.
        words: The power of two that a token's 32-bit words of codes are padded to.
    """

    page_bytes: int
    head_page_bytes: int
    bits: int
    capacity: int
    code_bytes: int
    slots: int
    pages: int
    words: int


@triton.jit
def _masked(words, mask: tl.constexpr):
    """Words with the bits of a mask alone.

    Assembly, since a compiler that sees the mask of a word makes of it one for each half.
    """
    if INTERPRETED:
        masked = words & mask
    else:
        masks = tl.full([], mask, tl.uint32)
        masked = tl.inline_asm_elementwise(
            "and.b32 $0, $1, $2;", "=r,r,r", [words, masks], tl.uint32, is_pure=True, pack=1
        )
    return masked


@triton.jit
def _fields(words, bits: tl.constexpr):
    """The codes at each place of 16-bit halves, apart in a new last dimension."""
    if bits == 8:
        fields = _masked(words, 0x00FF00FF)
    elif bits == 4:
        fields = tl.join(_masked(words, 0x000F000F), _masked(words, 0x00F000F0))
    else:
        even = tl.join(_masked(words, 0x00030003), _masked(words, 0x00300030))
        odd = tl.join(_masked(words, 0x000C000C), _masked(words, 0x00C000C0))
        fields = tl.join(even, odd)
    return fields


@triton.jit
def _numbers(words, dtype: tl.constexpr):
    """The halves of words, apart in a new last dimension, as multiples of `UNIT`."""
    halves = tl.join(words & 0xFFFF, words >> 16)
    if dtype == tl.float32:
        numbers = halves.to(tl.float32) * UNIT
    else:
        numbers = halves.to(tl.uint16).to(dtype, bitcast=True)
    return numbers


@triton.jit
def _odd_bytes(words):
    """Words with their odd bytes at the places of the even ones.

    Assembly, since a compiler that sees a shift before a mask takes halves of words apart.
    """
    if INTERPRETED:
        odd = words >> 8
    else:
        odd = tl.inline_asm_elementwise(
            "shr.b32 $0, $1, 8;", "=r,r", [words], tl.uint32, is_pure=True, pack=1
        )
    return odd


@triton.jit
def _beside(a, b):
    """Lower halves of `a` and `b` as one word, and their upper halves as another."""
    if INTERPRETED:
        lower, upper = (a & 0xFFFF) | (b << 16), (a >> 16) | (b & 0xFFFF0000)
    else:
        lower = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, 0x5410;", "=r,r,r", [a, b], tl.uint32, is_pure=True, pack=1
        )
        upper = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, 0x7632;", "=r,r,r", [a, b], tl.uint32, is_pure=True, pack=1
        )
    return lower, upper


@triton.jit
def key_words(heap, starts, layout: tl.constexpr):
    """Words of keys of pages that start there, [threads, words, 2, ...], as `_load_all` has them.

    Of eight tokens a load has one vector of each for each of four threads.
    """
    parts: tl.constexpr = max(1, layout.words // 16)
    quarters: tl.constexpr = min(4, layout.words)
    width: tl.constexpr = layout.words // (parts * quarters)
    thread = tl.arange(0, 8 * quarters)[:, None]
    word = _spread(thread % quarters, quarters) * width + tl.arange(0, width)[None, :]
    loads: tl.constexpr = layout.pages * (layout.slots // 8) * parts
    return _load_all(heap, starts, thread // quarters, word, layout, 8, 1, parts, 0, loads, 1)


@triton.jit
def key_operand(words, layout: tl.constexpr, dtype: tl.constexpr):
    """Keys [tokens, places] of `key_words`."""
    parts: tl.constexpr = max(1, layout.words // 16)
    quarters: tl.constexpr = min(4, layout.words)
    width: tl.constexpr = layout.words // (parts * quarters)
    count: tl.constexpr = 8 // layout.bits
    tokens: tl.constexpr = layout.pages * layout.slots
    words = words.to(tl.uint32, bitcast=True)
    x = _numbers(_fields(tl.join(words, _odd_bytes(words)), layout.bits), dtype)
    x = x.reshape([8, quarters, width, tokens // 8, parts, 2, count, 2])
    x = x.permute(3, 0, 4, 2, 6, 1, 5, 7)
    return x.reshape([tokens, 4 * layout.words * count])


@triton.jit
def key_channels(layout: tl.constexpr):
    """Which channel is at each place of keys, and what its codes are multiplied by, as an exponent.

    Where there is none, the number is not below the head size.
    """
    parts: tl.constexpr = max(1, layout.words // 16)
    quarters: tl.constexpr = min(4, layout.words)
    width: tl.constexpr = layout.words // (parts * quarters)
    count: tl.constexpr = 8 // layout.bits
    place = tl.arange(0, 4 * layout.words * count)
    half, rest = place % 2, place // 2
    shift, rest = rest % 2, rest // 2
    quarter, rest = rest % quarters, rest // quarters
    field, rest = rest % count, rest // count
    word, part = rest % width, rest // width
    word += (part * quarters + _spread(quarter, quarters)) * width
    return _channel(word, half * 2 + shift, field, layout)


@triton.jit
def value_words(heap, starts, layout: tl.constexpr):
    """Words of values of even and of odd tokens, each as `_load_all` has them.

    Of eight tokens, every second of 16 unless a page has 8, a load has one vector for each thread.
    """
    chunks: tl.constexpr = min(8, layout.words)
    width: tl.constexpr = layout.words // chunks
    pairs: tl.constexpr = min(2, layout.slots // 8)
    thread = tl.arange(0, 4 * chunks)[:, None]
    slot = thread % 4 * (2 * pairs)
    word = _spread(thread // 4, chunks) * width + tl.arange(0, width)[None, :]
    heap += layout.capacity * (layout.code_bytes // 4)
    loads: tl.constexpr = layout.pages * (layout.slots // 8)
    even = _load_all(heap, starts, slot, word, layout, 2, pairs, 1, 0, loads, 1)
    return even, _load_all(heap, starts, slot + 1, word, layout, 2, pairs, 1, 0, loads, 1)


@triton.jit
def value_operand(even, odd, layout: tl.constexpr, dtype: tl.constexpr):
    """Values [places, tokens] of `value_words`."""
    chunks: tl.constexpr = min(8, layout.words)
    width: tl.constexpr = layout.words // chunks
    pairs: tl.constexpr = min(2, layout.slots // 8)
    count: tl.constexpr = 8 // layout.bits
    tokens: tl.constexpr = layout.pages * layout.slots
    lower, upper = _beside(even.to(tl.uint32, bitcast=True), odd.to(tl.uint32, bitcast=True))
    words = tl.join(lower, upper)
    x = _numbers(_fields(tl.join(words, _odd_bytes(words)), layout.bits), dtype)
    x = x.reshape([chunks, 4, width, tokens // (8 * pairs), pairs, 2, 2, count, 2])
    x = x.permute(7, 2, 5, 6, 0, 3, 1, 4, 8)
    return x.reshape([4 * layout.words * count, tokens])


@triton.jit
def value_channels(layout: tl.constexpr):
    """As `key_channels`, of values."""
    chunks: tl.constexpr = min(8, layout.words)
    width: tl.constexpr = layout.words // chunks
    count: tl.constexpr = 8 // layout.bits
    place = tl.arange(0, 4 * layout.words * count)
    chunk, rest = place % chunks, place // chunks
    shift, rest = rest % 2, rest // 2
    half, rest = rest % 2, rest // 2
    word, field = rest % width, rest // width
    word += _spread(chunk, chunks) * width
    return _channel(word, half * 2 + shift, field, layout)


@triton.jit
def _spread(chunk, chunks: tl.constexpr):
    """The order in which threads take chunks, so that no thread finds it could load two at once."""
    if chunks > 1:
        chunk = chunk % 2 * (chunks // 2) + chunk // 2
    return chunk


@triton.jit
def _load_all(
    heap, starts, slot, word, layout: tl.constexpr, apart: tl.constexpr, pairs: tl.constexpr,
    parts: tl.constexpr, first: tl.constexpr, loads: tl.constexpr, step: tl.constexpr,
):  # fmt: skip
    """Words of all loads from the first on, apart in new last dimensions of 2.

    A load takes of each thread one vector of neighbouring words and nothing else, so that there is
    one way alone to lay it out, whichever dimension a compiler goes through first. Loads are of
    parts of tokens, of tokens `apart` from each other, and of pages, the last dimension first.
    """
    if loads > 1:
        even = _load_all(
            heap, starts, slot, word, layout, apart, pairs, parts, first, loads // 2, step * 2
        )
        odd = _load_all(
            heap, starts, slot, word, layout, apart, pairs, parts, first + step, loads // 2,
            step * 2,
        )  # fmt: skip
        words = tl.join(even, odd)
    else:
        part: tl.constexpr = first % parts
        pair: tl.constexpr = first // parts % pairs
        groups: tl.constexpr = layout.slots // (8 * pairs)
        group: tl.constexpr = first // (parts * pairs) % groups
        page: tl.constexpr = first // (parts * pairs * groups)
        slots: tl.constexpr = group * 8 * pairs + pair * apart
        word += part * (layout.words // parts)
        words = _load_words(heap + starts[page], slot, slots, word, layout)
    return words


@triton.jit
def _load_words(heap, slot, slots: tl.constexpr, word, layout: tl.constexpr):
    """Of codes of a page, `slots` after each slot; those beyond its tokens hold anything."""
    stride: tl.constexpr = layout.code_bytes // 4
    if (layout.capacity + layout.slots) * layout.code_bytes > layout.head_page_bytes:
        places = heap + (tl.minimum(slot + slots, layout.capacity - 1) * stride + word)
    else:
        places = heap + slots * stride + (slot * stride + word)
    if layout.words == stride:
        words = tl.load(places)
    else:
        words = tl.load(places, mask=word < stride, other=0)
    return words


@triton.jit
def _channel(word, byte, field, layout: tl.constexpr):
    """The channel whose code is in this byte of this word, and the exponent of its field."""
    stride: tl.constexpr = layout.code_bytes // 4
    channel = field * layout.code_bytes + 4 * word + byte
    return tl.where(word < stride, channel, layout.code_bytes * 8), field * layout.bits
