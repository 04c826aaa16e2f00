"""What the Triton kernels share: products and running maxima of tiles, places in blocks."""

import triton
import triton.language as tl

from vllm_zipvl.core.codes import SCALE_DROPPED_BITS

MIN_DOT = 16
"""Smallest side of a tile that `tl.dot` takes."""

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
_DROPPED_BITS = tl.constexpr(SCALE_DROPPED_BITS)


def padded(size: int) -> int:
    """A tile's side that holds `size` elements and that `tl.dot` takes."""
    return max(MIN_DOT, triton.next_power_of_2(size))


def tile_side(head_size: int, itemsize: int) -> int:
    """Vectors of a tile: so many that registers and shared memory hold those of three operands."""
    if itemsize == 4:
        return 32 if head_size <= 64 else 16
    return 64 if head_size <= 128 else 32


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """Float32 `x` as the nearest of `dtype`, ties to even; the interpreter cuts bfloat16 off."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def dot(a, b):
    """Exact products, float32 sums; the interpreter would multiply the bits of bfloat16."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def load_heads(
    x, tokens, is_token, head, token_stride, head_stride, head_size: tl.constexpr,
    channels_padded: tl.constexpr,
):  # fmt: skip
    """Vectors of one head, [tokens, channels_padded]."""
    channels = tl.arange(0, channels_padded)
    start = tokens.to(tl.int64) * token_stride + head * head_stride
    mask = is_token[:, None] & (channels < head_size)[None, :]
    return tl.load(x + start[:, None] + channels[None, :], mask=mask, other=0)


@triton.jit
def rescale(top, scores):
    """One step of the online softmax over rows of `scores` (arXiv 1805.02867).

    Returns the running maximum `top` with the new scores in it, what sums under the earlier one
    are worth now, and the new scores' weights.
    """
    new_top = tl.maximum(top, tl.max(scores, axis=1))
    # A row that has seen nothing yet has no maximum.
    finite = tl.where(new_top == float("-inf"), 0.0, new_top)
    return new_top, tl.exp(top - finite), tl.exp(scores - finite[:, None])


@triton.jit
def places_of(
    layer_starts, block_table, row, layer, head, positions, is_token, table_stride, block_stride,
    head_stride, token_stride, block_size: tl.constexpr,
):  # fmt: skip
    """Elements of the layer that comes first from which on the row's tokens have their keys."""
    entry = block_table + row * table_stride + positions // block_size
    block = tl.load(entry, mask=is_token, other=0).to(tl.int64)
    place = tl.load(layer_starts + layer) + block * block_stride + head * head_stride
    return place + positions % block_size * token_stride


@triton.jit
def scale_of(byte):
    """The scale that a byte stands for, as float32 (`core.codes.byte_to_scale`)."""
    word = (byte.to(tl.int32) & 255) << _DROPPED_BITS
    return word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
