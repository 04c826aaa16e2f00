"""Asymmetric min/max quantisation, and packing into bytes."""

from typing import NamedTuple

import torch

SCALE_DROPPED_BITS = 7
"""A scale is stored as a byte: a float16 without its sign and these lowest bits of it."""

MAX_SCALE = 61440.0
"""The largest scale that a byte holds."""


class Quantised(NamedTuple):
    """Codes of vectors, each with one scale and a zero for each of its equal parts.

    Attributes:
        codes: uint8 [..., head_size], each below 2^bits.
        scale: float16 [...], of those that a byte holds.
        zero: float16 [..., num_zeros]; the values that code 0 stands for.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor


def scale_rounding(bits: int) -> int:
    """What is added to a scale's float16 bits before the lowest of them are dropped.

    At 8 bits scales are rounded up, so that no code is out of range; at fewer to the nearest, since
    the largest elements then lose less than finer steps give all others.
    """
    return (1 << SCALE_DROPPED_BITS) - 1 if bits == 8 else 1 << (SCALE_DROPPED_BITS - 1)


def scale_to_byte(scale: torch.Tensor, bits: int = 8) -> torch.Tensor:
    """The uint8 that stands for a scale, rounded as `bits` asks for."""
    word = scale.half().view(torch.int16).int() & 0x7FFF
    return ((word + scale_rounding(bits)) >> SCALE_DROPPED_BITS).to(torch.uint8)


def byte_to_scale(byte: torch.Tensor) -> torch.Tensor:
    """The float16 scale that a uint8 stands for."""
    return (byte.to(torch.int16) << SCALE_DROPPED_BITS).view(torch.float16)


def quantise(x: torch.Tensor, bits: int, num_zeros: int = 1) -> Quantised:
    """Quantise each vector [head_size] of float32 `x` over the widest range of its parts.

    code = round((x - zero) * (1 / scale)), zero = min of a part, scale = max over parts of
    (max - zero) / (2^bits - 1). Both are rounded before the codes are taken, so that what is stored
    is what is used.
    """
    levels = 2**bits - 1
    parts = x.unflatten(-1, (num_zeros, -1))
    low, high = torch.aminmax(parts, dim=-1)
    limit = torch.finfo(torch.float16).max
    zero = low.clamp(-limit, limit).half()
    step = (high - zero.float()).amax(-1) / levels
    scale = byte_to_scale(scale_to_byte(step.clamp(0, MAX_SCALE), bits))
    # A vector whose range rounds to nothing has no step: its codes are 0.
    per_step = torch.where(scale > 0, 1 / scale.float(), 0.0)
    codes = (parts - zero.float()[..., None]).mul_(per_step[..., None, None])
    codes = codes.round_().clamp_(0, levels).to(torch.uint8).flatten(-2)
    return Quantised(codes, scale, zero)


def dequantise(quantised: Quantised) -> torch.Tensor:
    """The float32 values that the codes stand for."""
    codes, scale, zero = quantised
    parts = codes.float().unflatten(-1, (zero.shape[-1], -1))
    return (parts * scale.float()[..., None, None] + zero.float()[..., None]).flatten(-2)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack codes [..., head_size] into bytes [..., head_size * bits / 8].

    A byte holds 8 / bits codes that lie a fixed distance apart: with w bytes in all, byte j
    holds codes j, j + w, j + 2w, ..., the first in its lowest bits. A kernel then unpacks
    contiguous bytes into contiguous channels with one shift and one mask.
    """
    parts = codes.chunk(8 // bits, dim=-1)
    packed = parts[0].clone()
    for i, part in enumerate(parts[1:], start=1):
        packed |= part << (bits * i)
    return packed


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of `pack`: uint8 codes [..., head_size]."""
    mask = 2**bits - 1
    return torch.cat([(packed >> shift) & mask for shift in range(0, 8, bits)], dim=-1)


NORMAL_HALF_RANGE = {2: 1.49355}
"""Half the best range of a uniform quantiser for a unit normal variable, by bits: its step
times half its number of steps (J. Max, Quantizing for minimum distortion, 1960, table II)."""


def clip(x: torch.Tensor, bits: int, num_zeros: int = 1) -> torch.Tensor:
    """At 2 bits, clamp each vector to the range that is best for a normal variable.

    A rotated vector is nearly normal, and four levels from its minimum to its maximum would
    leave most elements to the inner two. At more bits min/max is as good, and this does nothing.
    Each of `num_zeros` parts has the range around its own mean.
    """
    if bits not in NORMAL_HALF_RANGE:
        return x
    # In float64, so that implementations agree whatever the order of their sums.
    parts = x.unflatten(-1, (num_zeros, -1))
    mean = parts.double().mean(-1, keepdim=True)
    std = (parts.double() - mean).square_().mean((-2, -1), keepdim=True).sqrt_()
    half_range = NORMAL_HALF_RANGE[bits] * std.float()
    return parts.clamp(mean.float() - half_range, mean.float() + half_range).flatten(-2)
