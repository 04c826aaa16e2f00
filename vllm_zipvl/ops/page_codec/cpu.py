"""Writing pages on the CPU: a few hundred tokens at a time go through one numba kernel."""

import numba
import numpy as np
import torch

from vllm_zipvl.core.codes import (
    MAX_SCALE,
    NORMAL_HALF_RANGE,
    SCALE_DROPPED_BITS,
    scale_rounding,
)
from vllm_zipvl.core.geometry import UNQUANTISED, PageGeometry
from vllm_zipvl.core.quantization import KEY_ZEROS, KeyNorm, normalise_keys, rotate
from vllm_zipvl.ops.halves import float_to_half, half_to_float
from vllm_zipvl.ops.threads import match_num_threads

CHUNK_TOKENS = 256
"""Tokens whose float32 vectors stay in the cache between the steps."""
_LIMIT = np.float32(torch.finfo(torch.float16).max)
_MAX_SCALE = np.float32(MAX_SCALE)


@numba.njit(cache=True, fastmath={"nsz", "reassoc"})
def _mean(x):
    total = 0.0
    for i in range(len(x)):
        total += x[i]
    return total / len(x)


@numba.njit(cache=True, fastmath={"nsz", "reassoc"})
def _reach(x, num_zeros, half_range):
    """`half_range` standard deviations of a vector around the means of its parts."""
    squares, width = 0.0, len(x) // num_zeros
    for first in range(0, len(x), width):
        mean = _mean(x[first : first + width])
        for i in range(first, first + width):
            squares += (x[i] - mean) ** 2
    return half_range * np.float32(np.sqrt(squares / len(x)))


@numba.njit(cache=True, fastmath={"nsz", "reassoc"})
def _range(x, half_range, reach):
    """Least and largest value of a part, within `reach` of its mean if `half_range` is not 0.

    Both are NaN where the vector is, which the rotation makes NaN throughout.
    """
    low, high = x[0], x[0]
    for i in range(len(x)):
        low, high = min(low, x[i]), max(high, x[i])
    if half_range == 0:
        return low, high
    mean = np.float32(_mean(x))
    return max(mean - reach, low), min(mean + reach, high)


@numba.njit(cache=True)
def _pack(x, zeros, highs, per_step, bits, out):
    """Codes of a vector, packed as `core.codes.pack` does."""
    levels = np.float32((1 << bits) - 1)
    width, part = len(out), len(x) // len(zeros)
    for j in range(width):
        packed = np.uint8(0)
        for i in range(8 // bits):
            channel = j + i * width
            value = min(x[channel], highs[channel // part])
            code = np.rint((value - zeros[channel // part]) * per_step)
            packed |= np.uint8(min(max(np.float32(0), code), levels)) << np.uint8(bits * i)
        out[j] = packed


@numba.njit(cache=True)
def _zeros(x, num_zeros, half_range, halves, at, stride):
    """The zero of each part, also written to `halves`, and the largest value."""
    reach, width = _reach(x, num_zeros, half_range), len(x) // num_zeros
    zeros, highs = np.empty(num_zeros, np.float32), np.empty(num_zeros, np.float32)
    for part in range(num_zeros):
        low, highs[part] = _range(x[part * width : (part + 1) * width], half_range, reach)
        zero = float_to_half(min(max(low, -_LIMIT), _LIMIT))
        halves[at + part * stride] = zero
        zeros[part] = half_to_float(zero)
    return zeros, highs


@numba.njit(cache=True, parallel=True)
def _write(x, heap, halves, page_ids, first_slot, bits, rounding, layout, head_bytes, half_range):
    """Quantise vectors [num_tokens, num_kv_heads, 2, head_size] into their pages."""
    levels = np.float32((1 << bits) - 1)
    capacity, code_bytes, value_offset, param_offset = layout
    for token in numba.prange(x.shape[0]):
        slot = first_slot + token
        page, slot = page_ids[slot // capacity], slot % capacity
        for head in range(x.shape[1]):
            start = head * head_bytes
            params = (start + param_offset) // 2 + slot
            for side in range(2):
                vector = x[token, head, side]
                num_zeros = 1 if side else KEY_ZEROS
                at = params + (1 + side * KEY_ZEROS) * capacity
                zeros, highs = _zeros(vector, num_zeros, half_range, halves[page], at, capacity)
                step = (highs - zeros).max() / levels
                word = np.int32(float_to_half(min(max(step, np.float32(0)), _MAX_SCALE)))
                scale = ((word & 0x7FFF) + rounding) >> SCALE_DROPPED_BITS
                heap[page, 2 * params + side] = scale
                step = half_to_float(np.uint16(scale << SCALE_DROPPED_BITS))
                per_step = np.float32(1) / step if step > 0 else np.float32(0)
                codes = start + side * value_offset + slot * code_bytes
                _pack(vector, zeros, highs, per_step, bits, heap[page, codes : codes + code_bytes])


def write_pages(
    kv: torch.Tensor,
    heap: torch.Tensor,
    page_ids: torch.Tensor,
    first_slot: int,
    bits: int,
    geometry: PageGeometry,
    norm: KeyNorm | None,
) -> None:
    """See `api.write_pages`; `bits` is not 16."""
    assert bits != UNQUANTISED
    pages = heap.numpy()
    match_num_threads()
    for start in range(0, kv.shape[0], CHUNK_TOKENS):
        chunk = kv[start : start + CHUNK_TOKENS]
        key, value = chunk.chunk(2, dim=-1)
        key = key if norm is None else normalise_keys(key, norm)
        vectors = rotate(torch.stack([key.float(), value.float()], dim=-2))
        _write(
            vectors.numpy(),
            pages,
            pages.view(np.uint16),
            page_ids.long().numpy(),
            first_slot + start,
            bits,
            scale_rounding(bits),
            geometry.layout(bits),
            geometry.head_page_bytes,
            np.float32(NORMAL_HALF_RANGE.get(bits, 0)),
        )
