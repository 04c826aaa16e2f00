"""How keys and values are stored: what keys are normalised by, and the Hadamard rotation.

A request's statistics are taken once, with its first tokens, and serve all later ones. But keys are
cached rotated by their position (RoPE), and a constant part of a key, as biases of hundreds in
Qwen2.5, turns in the plane of its pair of channels: what the first tokens saw says little about
where it is later. Three things keep the error of later tokens what it is at first.

- The pair of channels that is largest is laid where the two zeros of a key take it up, whatever it
  is: rows 0 and head_size / 2 of the Hadamard matrix are constant on each half of the channels.
- A channel's scale is the square root of how far it may stray, not the deviation itself: of the
  scales that do not know the queries, these leave the smallest error, and the error grows with the
  root only where a channel strays farther than its scale tells.
- How far it may stray counts what its pair would bring if it turned.
"""

from functools import lru_cache
from typing import NamedTuple

import torch

from vllm_zipvl.core.codes import clip, dequantise, quantise

KEY_ZEROS = 2
"""Zeros of a stored key, one for each half of its rotated channels."""

MIN_KEY_SCALE = 1e-4
"""Float16 can hold it."""

TURNING_SHARE = 0.1
"""How much of its pair's size a channel is expected to stray by."""

LEAST_SCALE = 1 / 8
"""Of a channel that hardly varies, in terms of its head's mean scale."""

LARGEST_PAIR_SCALE = 1 / 2
"""Of the pair that the zeros take up, in the same terms: it need not share its noise evenly."""


class KeyNorm(NamedTuple):
    """Channel statistics of a request's keys in one layer, float16 [num_kv_heads, head_size] each.

    Keys are stored as (k[order] - mean) / scale. Order and scale fold into the query, and the mean
    adds the same to every score of a query: q k = (q[order] scale) ((k[order] - mean) / scale) +
    q[order] mean.

    Attributes:
        mean: Mean of the channel at each place.
        scale: Scale of the channel at each place.
        order: The channel at each place.
    """

    mean: torch.Tensor
    scale: torch.Tensor
    order: torch.Tensor


def plain_norm(
    num_kv_heads: int, head_size: int, device: torch.device | str | None = None
) -> KeyNorm:
    """The norm that leaves keys as they are."""
    mean = torch.zeros(num_kv_heads, head_size, dtype=torch.float16, device=device)
    order = torch.arange(head_size, device=device).half().expand_as(mean)
    return KeyNorm(mean, torch.ones_like(mean), order)


def key_norm(keys: torch.Tensor) -> KeyNorm:
    """The norm of keys [num_tokens, num_kv_heads, head_size]."""
    keys = keys.to(torch.float32, copy=True)
    mean = keys.mean(0)
    return norm_of(mean, keys.sub_(mean).square_().mean(0))


def norm_of(mean: torch.Tensor, variance: torch.Tensor) -> KeyNorm:
    """The norm of channels with this mean and variance, float32 [..., num_kv_heads, head_size]."""
    size = mean.square() + variance
    order, head_size = places(size), mean.shape[-1]
    takes_up = _has_constant_halves(head_size)
    if takes_up:
        pair = order[..., :: head_size // 2]
        size, variance = size.scatter(-1, pair, 0), variance.scatter(-1, pair, 0)
    scale = (variance + TURNING_SHARE**2 * _largest_partner(size)).sqrt().sqrt()
    typical = scale.mean(-1, keepdim=True)
    scale = torch.maximum(scale, LEAST_SCALE * typical).gather(-1, order)
    if takes_up:
        scale[..., :: head_size // 2] = LARGEST_PAIR_SCALE * typical
    # Keys that are all 0 have no scale.
    scale = scale.masked_fill_(scale == 0, 1).clamp_(min=MIN_KEY_SCALE)
    return KeyNorm(mean.gather(-1, order).half(), scale.half(), order.half())


def _has_constant_halves(head_size: int) -> bool:
    """Whether rows 0 and head_size / 2 of the Hadamard matrix are constant on each half."""
    return head_size & (head_size - 1) == 0


def _largest_partner(size: torch.Tensor) -> torch.Tensor:
    """The largest of a channel and those that RoPE may turn into it, in its two layouts.

    Pairs lie half a head apart (NeoX) or side by side (GPT-J).
    """
    apart = size.roll(size.shape[-1] // 2, -1)
    beside = size.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return torch.maximum(size, torch.maximum(apart, beside))


def places(size: torch.Tensor) -> torch.Tensor:
    """The channel at each place, int64 as `size` [..., head_size].

    The largest channel comes to place 0 and its partner to place head_size / 2. As partners differ
    in one bit of their index in every layout, that is the largest one among those that do.
    """
    head_size = size.shape[-1]
    place = torch.arange(head_size, device=size.device)
    if not _has_constant_halves(head_size):
        return place.expand(size.shape)
    largest = size.argmax(-1, keepdim=True)
    exponents = place[: head_size.bit_length() - 1]
    bits = torch.ones_like(exponents) << exponents
    bit = bits[size.gather(-1, largest ^ bits).argmax(-1, keepdim=True)]
    top = head_size // 2
    # Both bits of the place change where they differ: they change places.
    differ = ((place & bit) > 0) != ((place & top) > 0)
    return place ^ torch.where(differ, bit | top, 0) ^ largest


def normalise_keys(keys: torch.Tensor, norm: KeyNorm) -> torch.Tensor:
    """Keys [num_tokens, num_kv_heads, head_size] as they are rotated and stored; float32."""
    keys = keys.float().gather(-1, norm.order.long().expand_as(keys))
    return keys.sub_(norm.mean).div_(norm.scale)


def restore_keys(stored: torch.Tensor, norm: KeyNorm) -> torch.Tensor:
    """The float32 keys that normalised ones [num_tokens, num_kv_heads, head_size] stand for."""
    keys = stored * norm.scale + norm.mean
    return torch.empty_like(keys).scatter_(-1, norm.order.long().expand_as(keys), keys)


def fold_key_norm(queries: torch.Tensor, norm: KeyNorm) -> tuple[torch.Tensor, torch.Tensor]:
    """What stands for queries before stored keys, and what adds to their scores.

    Args:
        queries: float32 [..., num_kv_heads, num_queries, head_size].
        norm: Statistics [..., num_kv_heads, head_size] of the keys.

    Returns:
        Rotated queries as `queries`, and score offsets [..., num_kv_heads, num_queries].
    """
    mean, scale, order = (part[..., None, :] for part in norm)
    queries = queries.gather(-1, order.long().expand_as(queries))
    return rotate(queries * scale), (queries * mean).sum(-1)


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


def through(x: torch.Tensor, bits: int, num_zeros: int = 1) -> torch.Tensor:
    """What is left of float32 vectors [..., head_size] after storing them at `bits`."""
    return rotate(dequantise(quantise(clip(rotate(x), bits, num_zeros), bits, num_zeros)))


def keys_through(keys: torch.Tensor, norm: KeyNorm, bits: int) -> torch.Tensor:
    """As `through`, of keys [num_tokens, num_kv_heads, head_size]."""
    return restore_keys(through(normalise_keys(keys, norm), bits, KEY_ZEROS), norm)
