"""Asymmetric min/max quantisation, packing into bytes, and the Hadamard rotation."""

from functools import lru_cache
from typing import NamedTuple

import torch


class Quantised(NamedTuple):
    """Codes with one scale and zero per vector.

    Attributes:
        codes: uint8 [..., head_size], each below 2^bits.
        scale: float16 [...].
        zero: float16 [...]; the value that code 0 stands for.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor


def quantise(x: torch.Tensor, bits: int) -> Quantised:
    """Quantise each vector [head_size] of float32 `x` over its own range.

    code = round((x - zero) * (1 / scale)), zero = min, scale = (max - min) / (2^bits - 1), both
    rounded to float16 before the codes are taken, so that what is stored is what is used.
    """
    levels = 2**bits - 1
    low, high = torch.aminmax(x, dim=-1)
    limit = torch.finfo(torch.float16).max
    zero = low.clamp(-limit, limit).half()
    scale = ((high - zero.float()) / levels).clamp(0, limit).half()
    # A vector whose range rounds to nothing has no step: its codes are 0.
    per_step = torch.where(scale > 0, 1 / scale.float(), 0.0)
    codes = (x - zero.float()[..., None]).mul_(per_step[..., None]).round_().clamp_(0, levels)
    return Quantised(codes.to(torch.uint8), scale, zero)


def dequantise(quantised: Quantised) -> torch.Tensor:
    """The float32 values that the codes stand for."""
    codes, scale, zero = quantised
    return codes.float() * scale.float()[..., None] + zero.float()[..., None]


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


def clip(x: torch.Tensor, bits: int) -> torch.Tensor:
    """At 2 bits, clamp each vector to the range that is best for a normal variable.

    A rotated vector is nearly normal, and four levels from its minimum to its maximum would
    leave most elements to the inner two. At more bits min/max is as good, and this does nothing.
    """
    if bits not in NORMAL_HALF_RANGE:
        return x
    # In float64, so that implementations agree whatever the order of their sums.
    std, mean = torch.std_mean(x.double(), dim=-1, correction=0, keepdim=True)
    std, mean = std.float(), mean.float()
    half_range = NORMAL_HALF_RANGE[bits] * std
    return x.clamp(mean - half_range, mean + half_range)


MIN_KEY_SCALE = 1e-4
"""Of a channel that hardly varies: float16 can hold it."""


class KeyNorm(NamedTuple):
    """Channel statistics of a request's keys in one layer, float16 [num_kv_heads, head_size] each.

    Keys are stored as (k - mean) / scale. The scale folds into the query, and the mean adds
    q mean to every score of a query: q k = (q scale) ((k - mean) / scale) + q mean.

    Attributes:
        mean: Mean of each channel.
        scale: Standard deviation of each channel.
    """

    mean: torch.Tensor
    scale: torch.Tensor


def key_norm(keys: torch.Tensor) -> KeyNorm:
    """Statistics of keys [num_tokens, num_kv_heads, head_size]."""
    keys = keys.to(torch.float32, copy=True)
    mean = keys.mean(0)
    std = keys.sub_(mean).square_().mean(0).sqrt()
    return KeyNorm(mean.half(), std.clamp(min=MIN_KEY_SCALE).half())


def normalise_keys(kv: torch.Tensor, norm: KeyNorm) -> torch.Tensor:
    """Normalise the keys of [num_tokens, num_kv_heads, 2 * head_size]; returns float32."""
    kv = kv.to(torch.float32, copy=True)
    kv.chunk(2, dim=-1)[0].sub_(norm.mean).div_(norm.scale)
    return kv


def fold_key_norm(queries: torch.Tensor, norm: KeyNorm) -> tuple[torch.Tensor, torch.Tensor]:
    """What stands for queries before stored keys, and what adds to their scores.

    Args:
        queries: float32 [..., num_kv_heads, num_queries, head_size].
        norm: Statistics [..., num_kv_heads, head_size] of the keys.

    Returns:
        Rotated queries as `queries`, and score offsets [..., num_kv_heads, num_queries].
    """
    scaled = rotate(queries * norm.scale[..., None, :])
    return scaled, (queries * norm.mean[..., None, :]).sum(-1)


@lru_cache(maxsize=16)
def hadamard(size: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """The orthonormal block-diagonal Hadamard matrix of `size`, float32 [size, size].

    Its blocks have the largest power of two that divides `size`. It is symmetric, hence its
    own inverse.
    """
    block = size & -size
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < block:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return torch.block_diag(*[matrix / block**0.5] * (size // block)).to(device)


def rotate(x: torch.Tensor) -> torch.Tensor:
    """Rotate the last dimension of `x` by the Hadamard matrix; returns float32."""
    return x.float() @ hadamard(x.shape[-1], x.device)
