"""Writing pages on the CPU: a few hundred tokens at a time go through one numba kernel."""

import numba
import numpy as np
import torch

from vllm_zipvl.core.geometry import UNQUANTISED, PageGeometry
from vllm_zipvl.core.quantization import NORMAL_HALF_RANGE, KeyNorm, normalise_keys, rotate
from vllm_zipvl.ops.halves import float_to_half, half_to_float
from vllm_zipvl.ops.threads import match_num_threads

CHUNK_TOKENS = 256
"""Tokens whose float32 vectors stay in the cache between the steps."""
_LIMIT = np.float32(torch.finfo(torch.float16).max)


@numba.njit(cache=True, fastmath={"nsz", "reassoc"})
def _range(x, half_range):
    """Least and largest value of a vector, within `half_range` standard deviations if not 0.

    Both are NaN where the vector is, which the rotation makes NaN throughout.
    """
    low, high = x[0], x[0]
    for i in range(len(x)):
        low, high = min(low, x[i]), max(high, x[i])
    if half_range == 0:
        return low, high
    total, squares = 0.0, 0.0
    for i in range(len(x)):
        total += x[i]
    mean = total / len(x)
    for i in range(len(x)):
        squares += (x[i] - mean) ** 2
    reach = half_range * np.float32(np.sqrt(squares / len(x)))
    return max(np.float32(mean) - reach, low), min(np.float32(mean) + reach, high)


@numba.njit(cache=True)
def _pack(x, zero, per_step, bits, out):
    """Codes of a vector, packed as `core.quantization.pack` does."""
    levels = np.float32((1 << bits) - 1)
    width = len(out)
    for j in range(width):
        packed = np.uint8(0)
        for i in range(8 // bits):
            code = np.rint((x[j + i * width] - zero) * per_step)
            packed |= np.uint8(min(max(np.float32(0), code), levels)) << np.uint8(bits * i)
        out[j] = packed


@numba.njit(cache=True, parallel=True)
def _write(x, heap, halves, page_ids, first_slot, bits, layout, head_bytes, half_range):
    """Quantise vectors [num_tokens, num_kv_heads, 2, head_size] into their pages."""
    levels = np.float32((1 << bits) - 1)
    capacity, code_bytes, value_offset, param_offset = layout
    for token in numba.prange(x.shape[0]):
        slot = first_slot + token
        page, slot = page_ids[slot // capacity], slot % capacity
        for head in range(x.shape[1]):
            start = head * head_bytes
            params = (start + param_offset) // 2 + slot
            for part in range(2):
                vector = x[token, head, part]
                low, high = _range(vector, half_range)
                zero = float_to_half(min(max(low, -_LIMIT), _LIMIT))
                low = half_to_float(zero)
                scale = float_to_half(min(max((high - low) / levels, np.float32(0)), _LIMIT))
                step = half_to_float(scale)
                per_step = np.float32(1) / step if step > 0 else np.float32(0)
                codes = start + part * value_offset + slot * code_bytes
                _pack(vector, low, per_step, bits, heap[page, codes : codes + code_bytes])
                halves[page, params + 2 * part * capacity] = scale
                halves[page, params + (2 * part + 1) * capacity] = zero


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
        chunk = chunk if norm is None else normalise_keys(chunk, norm)
        vectors = rotate(chunk.unflatten(-1, (2, geometry.head_size)))
        _write(
            vectors.numpy(),
            pages,
            pages.view(np.uint16),
            page_ids.long().numpy(),
            first_slot + start,
            bits,
            geometry.layout(bits),
            geometry.head_page_bytes,
            np.float32(NORMAL_HALF_RANGE.get(bits, 0)),
        )
