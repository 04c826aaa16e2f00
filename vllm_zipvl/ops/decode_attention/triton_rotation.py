"""Before and after the decode kernel: queries are folded, and outputs rotated back."""

import triton
import triton.language as tl

from vllm_zipvl.ops.decode_attention.triton_parts import (
    EARLY,
    FACTOR,
    LATE,
    LOG2_E,
    NUM_SUMS,
    OFFSET,
    ROUNDED_OFF,
)
from vllm_zipvl.ops.tiles import rounded

LARGEST_EXPONENT = tl.constexpr(14)
"""Of queries as operands: float16 holds them, and none is so small that it is cut off."""


@triton.jit
def _signs(size: tl.constexpr, block: tl.constexpr):
    """Hadamard matrices of `block`, at most 16, along the diagonal; not normalised."""
    row, column = tl.arange(0, size)[:, None], tl.arange(0, size)[None, :]
    # -1 where an odd number of bits is set in both.
    both = row & column & (block - 1)
    both ^= both >> 2
    both ^= both >> 1
    return tl.where(row // block == column // block, (1 - 2 * (both & 1)).to(tl.float32), 0.0)


@triton.jit
def rotated(x, channels_padded: tl.constexpr, block: tl.constexpr):
    """As `core.quantization.rotate`, a vector whose length has `block` as largest power of two.

    A Hadamard matrix is one of 16 in every place of one of a 16th of its size.
    """
    outer: tl.constexpr = channels_padded // 16
    x = x.reshape([outer, 16])
    x = tl.sum(x[:, :, None] * _signs(16, min(16, block))[None, :, :], axis=1)
    if block > 16:
        x = tl.sum(x[:, None, :] * _signs(outer, block // 16)[:, :, None], axis=0)
    return x.reshape([channels_padded]) / block**0.5


@triton.jit
def fold(
    query, key_norms, slots, scale, folded, folded_sums, norm_slot_stride,
    num_kv_heads: tl.constexpr, group: tl.constexpr, head_size: tl.constexpr,
    channels_padded: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Make one query head what quantised keys are multiplied by (`core.quantization.KeyNorm`).

    Rotated and rounded it is a power of two below what it was; `folded_sums` have what else its
    scores are made of, in powers of two: that power, what rounding took off, sums of both halves
    of the channels before it, and what the mean of the keys adds.
    """
    place = tl.program_id(0).to(tl.int64)
    row, head = place // (num_kv_heads * group), place % (num_kv_heads * group)
    channels = tl.arange(0, channels_padded)
    is_channel = channels < head_size
    norm = key_norms + tl.load(slots + row).to(tl.int64) * norm_slot_stride
    norm += head // group * head_size + channels
    apart: tl.constexpr = num_kv_heads * head_size
    mean = tl.load(norm, mask=is_channel, other=0).to(tl.float32)
    key_scale = tl.load(norm + apart, mask=is_channel, other=0).to(tl.float32)
    order = tl.load(norm + 2 * apart, mask=is_channel, other=0).to(tl.int32)
    x = tl.load(query + place * head_size + order, mask=is_channel, other=0).to(tl.float32)
    x *= scale * LOG2_E
    offset = tl.sum(tl.where(is_channel, x * mean, 0.0), axis=0)
    x = rotated(tl.where(is_channel, x * key_scale, 0.0), channels_padded, block)
    is_early = channels < head_size // 2
    largest = tl.max(tl.abs(x), axis=0)
    power = (largest.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    unit = tl.where(power > 0, power, 1.0) * 2.0**-LARGEST_EXPONENT
    kept = rounded(x / unit, folded.dtype.element_ty)
    tl.store(folded + place * head_size + channels, kept, mask=is_channel)
    own = folded_sums + place * NUM_SUMS
    # Codes count from 0 in units of 2^-24.
    tl.store(own + FACTOR, unit * 2.0**24)
    tl.store(own + ROUNDED_OFF, tl.sum(x - kept.to(tl.float32) * unit, axis=0))
    tl.store(own + EARLY, tl.sum(tl.where(is_early, x, 0.0), axis=0))
    tl.store(own + LATE, tl.sum(tl.where(is_early, 0.0, x), axis=0))
    tl.store(own + OFFSET, offset)


@triton.jit
def _weights(tops, totals, part: tl.constexpr, share, num_shares, top):
    """What sums of a part of these shares are multiplied by; 0 where there are none."""
    is_share = (share >= 0) & (share < num_shares)
    piece = part * num_shares + share
    total = tl.load(totals + piece, mask=is_share, other=0)
    own_top = tl.load(tops + piece, mask=is_share, other=float("-inf"))
    return tl.where(total != 0, tl.exp2(own_top - top), 0.0)


@triton.jit(do_not_specialize=["num_shares"])
def combine(
    partial, partial_top, partial_total, out, log_total, num_shares,
    head_size: tl.constexpr, channels_padded: tl.constexpr, block: tl.constexpr,
    num_parts: tl.constexpr, max_pieces: tl.constexpr, high_bits: tl.constexpr,
    low_bits: tl.constexpr, tile_places: tl.constexpr,
):  # fmt: skip
    """Put the pieces of one query head together; one program each.

    In every place are the sums of one part at most. Nothing that is loaded tells what is loaded
    next, so that nothing is waited for in between.
    """
    head = tl.program_id(0).to(tl.int64)
    num_pieces = num_parts * num_shares
    pieces, channels = tl.arange(0, max_pieces), tl.arange(0, channels_padded)
    is_piece, is_channel = pieces < num_pieces, channels < head_size
    own = head * num_pieces
    tops = tl.load(partial_top + own + pieces, mask=is_piece, other=float("-inf"))
    totals = tl.load(partial_total + own + pieces, mask=is_piece, other=0)
    top = tl.max(tops, axis=0)
    finite = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp2(tops - finite) * totals, axis=0)
    num_places = num_shares + num_parts - 1
    turned = tl.zeros([tile_places, channels_padded], tl.float32)
    plain = tl.zeros([tile_places, channels_padded], tl.float32)
    for first in tl.range(0, num_places, tile_places, loop_unroll_factor=4):
        place = first + tl.arange(0, tile_places)
        turned_weights = tl.zeros([tile_places], tl.float32)
        plain_weights = tl.zeros([tile_places], tl.float32)
        for part in tl.static_range(num_parts):
            weights = _weights(
                partial_top + own, partial_total + own, part, place - part, num_shares, finite
            )
            if (part == 0 and high_bits != 16) or (part == 2 and low_bits != 16):
                turned_weights += weights
            else:
                plain_weights += weights
        is_place = (place < num_places)[:, None] & is_channel[None, :]
        sums = partial + (head * num_places + place)[:, None] * head_size + channels[None, :]
        sums = tl.load(sums, mask=is_place, other=0)
        # What is not a number is not 0 either; where nothing was written anything may be.
        turned += tl.where((turned_weights != 0)[:, None], sums, 0.0) * turned_weights[:, None]
        plain += tl.where((plain_weights != 0)[:, None], sums, 0.0) * plain_weights[:, None]
    turned = rotated(tl.sum(turned, axis=0), channels_padded, block)
    plain = tl.sum(plain, axis=0) + turned
    # A row without context: zeros.
    result = plain / tl.where(total == 0, 1.0, total)
    result = rounded(result, out.dtype.element_ty)
    tl.store(out + head * head_size + channels, result, mask=is_channel)
    tl.store(log_total + head, (top + tl.log2(total)) / LOG2_E)
