"""Quantising one side of a tile's tokens: rotation, clipping, rounding and packing."""

import torch
import triton
import triton.language as tl

_HALF_LIMIT = tl.constexpr(torch.finfo(torch.float16).max)


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
        x = tl.load(source[:, None] + channels[None, :], mask=mask, other=0).to(tl.float32)
        if normalises:
            mean = tl.load(norms + channels, mask=is_channel, other=0).to(tl.float32)
            scale = norms + tl.num_programs(1) * head_size
            scale = tl.load(scale + channels, mask=is_channel, other=1).to(tl.float32)
            x = tl.where(mask, (x - mean[None, :]) / scale[None, :], 0.0)
        square = channels[:, None] * head_size + columns[None, :]
        mask = is_channel[:, None] & is_column[None, :]
        turn = tl.load(rotation + square, mask=mask, other=0)
        # As exact as float32, on tensor cores: each factor is a sum of two of tf32.
        sums += tl.dot(x, turn, input_precision="tf32x3")
    return sums


@triton.jit
def _range(y, is_channel, head_size: tl.constexpr, half_range: tl.constexpr):
    """Smallest and largest of each vector after clipping; NaN where the vector has none."""
    low = tl.min(tl.where(is_channel[None, :], y, float("inf")), axis=1)
    high = tl.max(tl.where(is_channel[None, :], y, float("-inf")), axis=1)
    if half_range > 0:
        mean = tl.sum(tl.where(is_channel[None, :], y, 0.0), axis=1) / head_size
        away = tl.where(is_channel[None, :], y - mean[:, None], 0.0)
        reach = half_range * tl.sqrt(tl.sum(away * away, axis=1) / head_size)
        low, high = tl.maximum(low, mean - reach), tl.minimum(high, mean + reach)
        is_range = mean - reach == mean - reach
    else:
        is_range = tl.sum(tl.where(is_channel[None, :] & (y != y), 1, 0), axis=1) == 0
    nan = float("nan")
    return tl.where(is_range, low, nan), tl.where(is_range, high, nan)


@triton.jit
def _to_half(x):
    """Rounded to float16 within its finite range; NaN stays."""
    bounded = tl.minimum(tl.maximum(x, -_HALF_LIMIT), _HALF_LIMIT)
    return tl.where(x == x, bounded, x).to(tl.float16)


@triton.jit
def encode_side(
    source,
    norms,
    rotation,
    heap,
    parameters,
    is_token,
    head_size: tl.constexpr,
    channels_padded: tl.constexpr,
    tile_channels: tl.constexpr,
    bits: tl.constexpr,
    code_bytes: tl.constexpr,
    bytes_padded: tl.constexpr,
    capacity: tl.constexpr,
    half_range: tl.constexpr,
    normalises: tl.constexpr,
):
    """Write codes to `heap` and scale and zero to `parameters`, pointers [tile_tokens] each."""
    channels = tl.arange(0, channels_padded)
    is_channel = channels < head_size
    y = _rotated(
        source, norms, rotation, is_token, channels, is_channel, head_size, channels_padded,
        tile_channels, normalises,
    )  # fmt: skip
    low, high = _range(y, is_channel, head_size, half_range)
    levels: tl.constexpr = 2**bits - 1
    zero = _to_half(low)
    scale = _to_half(tl.maximum((high - zero.to(tl.float32)) / levels, 0.0))
    tl.store(parameters, scale, mask=is_token)
    tl.store(parameters + capacity, zero, mask=is_token)
    step = scale.to(tl.float32)
    per_step = tl.where(step > 0, 1 / tl.where(step > 0, step, 1.0), 0.0)
    # Byte j holds the codes of channels j, j + code_bytes, ...: one product for each.
    places = tl.arange(0, bytes_padded)
    packed = tl.zeros([is_token.shape[0], bytes_padded], tl.int32)
    for part in tl.static_range(8 // bits):
        y = _rotated(
            source, norms, rotation, is_token, part * code_bytes + places, places < code_bytes,
            head_size, channels_padded, tile_channels, normalises,
        )  # fmt: skip
        y = tl.minimum(tl.maximum(y, low[:, None]), high[:, None])
        code = (y - zero.to(tl.float32)[:, None]) * per_step[:, None]
        # To the nearest, ties to even as torch rounds: adding 1.5 * 2^23 drops the fraction.
        code = (code + 12582912.0) - 12582912.0
        code = tl.where(code == code, tl.minimum(tl.maximum(code, 0.0), levels), 0.0)
        packed |= code.to(tl.int32) << (bits * part)
    mask = is_token[:, None] & (places < code_bytes)[None, :]
    tl.store(heap[:, None] + places[None, :], packed.to(tl.uint8), mask=mask)
