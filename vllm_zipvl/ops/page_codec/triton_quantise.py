"""Quantising one side of a tile's tokens: rotation, clipping, rounding and packing."""

import torch
import triton
import triton.language as tl

from vllm_zipvl.core.codes import MAX_SCALE, SCALE_DROPPED_BITS
from vllm_zipvl.ops.tiles import scale_of

_HALF_LIMIT = tl.constexpr(torch.finfo(torch.float16).max)
_MAX_SCALE = tl.constexpr(MAX_SCALE)
_DROPPED_BITS = tl.constexpr(SCALE_DROPPED_BITS)


@triton.jit
def _rotated(
    source,
    norms,
    rotation,
    is_token,
    columns,
    is_column,
    head_size: tl.constexpr,
    channels_padded: tl.constexpr,
    tile_channels: tl.constexpr,
    normalises: tl.constexpr,
):
    """Some columns of one side of a tile's tokens after the rotation.

    In tiles of channels, since a thread cannot hold its part of the whole rotation.
    """
    sums = tl.zeros([is_token.shape[0], columns.shape[0]], tl.float32)
    for first in range(0, channels_padded, tile_channels):
        channels = first + tl.arange(0, tile_channels)
        is_channel = channels < head_size
        mask = is_token[:, None] & is_channel[None, :]
        if normalises:
            # Mean, scale and order of the channels follow one another, each of all heads.
            apart = tl.num_programs(1) * head_size
            mean = tl.load(norms + channels, mask=is_channel, other=0).to(tl.float32)
            scale = tl.load(norms + apart + channels, mask=is_channel, other=1).to(tl.float32)
            order = tl.load(norms + 2 * apart + channels, mask=is_channel, other=0).to(tl.int32)
            x = tl.load(source[:, None] + order[None, :], mask=mask, other=0).to(tl.float32)
            x = tl.where(mask, (x - mean[None, :]) / scale[None, :], 0.0)
        else:
            x = tl.load(source[:, None] + channels[None, :], mask=mask, other=0).to(tl.float32)
        square = channels[:, None] * head_size + columns[None, :]
        mask = is_channel[:, None] & is_column[None, :]
        turn = tl.load(rotation + square, mask=mask, other=0)
        # As exact as float32, on tensor cores: each factor is a sum of two of tf32.
        sums += tl.dot(x, turn, input_precision="tf32x3")
    return sums


@triton.jit
def _part_range(
    source,
    norms,
    rotation,
    is_token,
    part: tl.constexpr,
    part_size: tl.constexpr,
    part_padded: tl.constexpr,
    head_size: tl.constexpr,
    channels_padded: tl.constexpr,
    tile_channels: tl.constexpr,
    normalises: tl.constexpr,
):
    """Of one part of each rotated vector: smallest, largest, mean, squared distances from it.

    The last of the results is how many are not numbers.
    """
    columns = tl.arange(0, part_padded)
    is_own = columns < part_size
    y = _rotated(
        source, norms, rotation, is_token, columns + part * part_size, is_own, head_size,
        channels_padded, tile_channels, normalises,
    )  # fmt: skip
    own = is_own[None, :]
    low = tl.min(tl.where(own, y, float("inf")), axis=1)
    high = tl.max(tl.where(own, y, float("-inf")), axis=1)
    mean = tl.sum(tl.where(own, y, 0.0), axis=1) / part_size
    away = tl.where(own, y - mean[:, None], 0.0)
    num_wrong = tl.sum(tl.where(own & (y != y), 1, 0), axis=1)
    return low, high, mean, tl.sum(away * away, axis=1), num_wrong


@triton.jit
def _ranges(
    source,
    norms,
    rotation,
    is_token,
    part_padded: tl.constexpr,
    head_size: tl.constexpr,
    channels_padded: tl.constexpr,
    tile_channels: tl.constexpr,
    half_range: tl.constexpr,
    num_zeros: tl.constexpr,
    normalises: tl.constexpr,
):
    """Smallest and largest of the first and of the last part of each vector after clipping.

    The parts are the same where there is one zero. NaN where the vector has none.
    """
    part_size: tl.constexpr = head_size // num_zeros
    low, high, mean, squares, num_wrong = _part_range(
        source, norms, rotation, is_token, 0, part_size, part_padded, head_size, channels_padded,
        tile_channels, normalises,
    )  # fmt: skip
    last_low, last_high, last_mean = low, high, mean
    if num_zeros > 1:
        last_low, last_high, last_mean, last_squares, last_wrong = _part_range(
            source, norms, rotation, is_token, 1, part_size, part_padded, head_size,
            channels_padded, tile_channels, normalises,
        )  # fmt: skip
        squares += last_squares
        num_wrong += last_wrong
    has_range = num_wrong == 0
    if half_range > 0:
        reach = half_range * tl.sqrt(squares / head_size)
        low, high = tl.maximum(low, mean - reach), tl.minimum(high, mean + reach)
        last_low = tl.maximum(last_low, last_mean - reach)
        last_high = tl.minimum(last_high, last_mean + reach)
        has_range = reach == reach
    nan = float("nan")
    low, high = tl.where(has_range, low, nan), tl.where(has_range, high, nan)
    return low, high, tl.where(has_range, last_low, nan), tl.where(has_range, last_high, nan)


@triton.jit
def _to_half(x, limit: tl.constexpr):
    """Rounded to float16 within +- `limit`; NaN stays."""
    bounded = tl.minimum(tl.maximum(x, -limit), limit)
    return tl.where(x == x, bounded, x).to(tl.float16)


@triton.jit
def _scale_to_byte(scale, rounding: tl.constexpr):
    word = _to_half(scale, _MAX_SCALE).to(tl.int16, bitcast=True).to(tl.int32) & 0x7FFF
    return (word + rounding) >> _DROPPED_BITS


@triton.jit
def encode_side(
    source,
    norms,
    rotation,
    heap,
    scales,
    zeros,
    is_token,
    head_size: tl.constexpr,
    channels_padded: tl.constexpr,
    tile_channels: tl.constexpr,
    bits: tl.constexpr,
    code_bytes: tl.constexpr,
    bytes_padded: tl.constexpr,
    capacity: tl.constexpr,
    half_range: tl.constexpr,
    rounding: tl.constexpr,
    num_zeros: tl.constexpr,
    normalises: tl.constexpr,
):
    """Write codes to `heap`, scales to bytes and zeros to float16, pointers [tile_tokens] each."""
    part_padded: tl.constexpr = channels_padded // num_zeros
    low, high, last_low, last_high = _ranges(
        source, norms, rotation, is_token, part_padded, head_size, channels_padded, tile_channels,
        half_range, num_zeros, normalises,
    )  # fmt: skip
    levels: tl.constexpr = 2**bits - 1
    zero, last_zero = _to_half(low, _HALF_LIMIT), _to_half(last_low, _HALF_LIMIT)
    tl.store(zeros, zero, mask=is_token)
    if num_zeros > 1:
        tl.store(zeros + capacity, last_zero, mask=is_token)
    zero, last_zero = zero.to(tl.float32), last_zero.to(tl.float32)
    scale = tl.maximum(high - zero, last_high - last_zero) / levels
    byte = _scale_to_byte(tl.where(scale < 0, 0.0, scale), rounding)
    tl.store(scales, byte.to(tl.uint8), mask=is_token)
    step = scale_of(byte)
    per_step = tl.where(step > 0, 1 / tl.where(step > 0, step, 1.0), 0.0)
    # Byte j holds the codes of channels j, j + code_bytes, ...: one product for each.
    places = tl.arange(0, bytes_padded)
    packed = tl.zeros([is_token.shape[0], bytes_padded], tl.int32)
    for part in tl.static_range(8 // bits):
        columns = part * code_bytes + places
        y = _rotated(
            source, norms, rotation, is_token, columns, places < code_bytes,
            head_size, channels_padded, tile_channels, normalises,
        )  # fmt: skip
        least, most, start = low[:, None], high[:, None], zero[:, None]
        if num_zeros > 1 and bits == 8:
            is_last = (columns >= head_size // 2)[None, :]
            least = tl.where(is_last, last_low[:, None], least)
            most = tl.where(is_last, last_high[:, None], most)
            start = tl.where(is_last, last_zero[:, None], start)
        elif num_zeros > 1 and 2 * part >= 8 // bits:
            least, most, start = last_low[:, None], last_high[:, None], last_zero[:, None]
        code = tl.minimum(tl.maximum(y, least), most) - start
        code = code * per_step[:, None]
        # To the nearest, ties to even as torch rounds: adding 1.5 * 2^23 drops the fraction.
        code = (code + 12582912.0) - 12582912.0
        code = tl.where(code == code, tl.minimum(tl.maximum(code, 0.0), levels), 0.0)
        packed |= code.to(tl.int32) << (bits * part)
    mask = is_token[:, None] & (places < code_bytes)[None, :]
    tl.store(heap[:, None] + places[None, :], packed.to(tl.uint8), mask=mask)
