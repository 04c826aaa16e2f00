"""The page codec in Triton: tokens straight from dense blocks into pages, all layers at once."""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from vllm_zipvl.core.geometry import UNQUANTISED, PageGeometry
from vllm_zipvl.core.quantization import NORMAL_HALF_RANGE, KeyNorm, hadamard
from vllm_zipvl.ops.tiles import padded
from vllm_zipvl.ops.transfer import to_device

if TYPE_CHECKING:
    from vllm_zipvl.ops.page_codec.api import PageTables

TILE_TOKENS = 32
TILE_CHANNELS = 16
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
            mean = tl.load(norms + channels, mask=is_channel, other=0)
            scale = norms + tl.num_programs(1) * head_size
            scale = tl.load(scale + channels, mask=is_channel, other=1)
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
def _encode_side(
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


@triton.jit
def _encode(
    dense,
    heap,
    parameters,
    elements,
    rotation,
    norms,
    layer_starts,
    block_ids,
    order,
    counts,
    before,
    table,
    num_tokens,
    first_entry,
    block_stride,
    head_stride,
    token_stride,
    table_stride,
    norm_stride,
    precision: tl.constexpr,
    table_step: tl.constexpr,
    block_size: tl.constexpr,
    head_size: tl.constexpr,
    channels_padded: tl.constexpr,
    bits: tl.constexpr,
    capacity: tl.constexpr,
    code_bytes: tl.constexpr,
    bytes_padded: tl.constexpr,
    page_bytes: tl.constexpr,
    head_page_bytes: tl.constexpr,
    half_range: tl.constexpr,
    normalises: tl.constexpr,
    tile_tokens: tl.constexpr,
    tile_channels: tl.constexpr,
):
    """One program per tile of a layer's tokens of one precision, KV head and layer."""
    tile, head, layer = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    num_own = tl.load(counts + 2 * layer + precision)
    if tile * tile_tokens < num_own:
        index = tile * tile_tokens + tl.arange(0, tile_tokens)
        is_token = index < num_own
        place = index + (tl.load(counts + 2 * layer) if precision == 1 else 0)
        token = tl.load(order + layer * num_tokens + place, mask=is_token, other=0)
        block = tl.load(block_ids + token // block_size, mask=is_token, other=0).to(tl.int64)
        source = dense + tl.load(layer_starts + layer) + block * block_stride
        source += head * head_stride + token % block_size * token_stride

        held = tl.load(before + 2 * layer + precision) + index
        entry = layer * table_stride + first_entry + held // capacity * table_step
        page = tl.load(table + entry, mask=is_token, other=0).to(tl.int64)
        base, slot = page * page_bytes + head * head_page_bytes, held % capacity
        channels = tl.arange(0, channels_padded)
        if bits == 16:
            mask = is_token[:, None] & (channels < head_size)[None, :]
            start = base * head_size // code_bytes + slot * head_size
            for side in tl.static_range(2):
                x = tl.load(source[:, None] + side * head_size + channels[None, :], mask=mask)
                target = start + side * capacity * head_size
                tl.store(elements + target[:, None] + channels[None, :], x, mask=mask)
        else:
            own_norms = norms + layer * norm_stride + head * head_size
            parameter = parameters + (base + 2 * capacity * code_bytes) // 2 + slot
            for side in tl.static_range(2):
                _encode_side(
                    source + side * head_size, own_norms, rotation,
                    heap + base + (side * capacity + slot) * code_bytes,
                    parameter + 2 * side * capacity, is_token, head_size, channels_padded,
                    tile_channels, bits, code_bytes, bytes_padded, capacity, half_range,
                    normalises and side == 0,
                )  # fmt: skip


def _page_arguments(bits: int, geometry: PageGeometry) -> dict[str, int | float]:
    layout = geometry.layout(bits)
    return {
        "bits": bits,
        "capacity": layout.capacity,
        "code_bytes": layout.code_bytes,
        "bytes_padded": padded(layout.code_bytes),
        "page_bytes": geometry.page_bytes,
        "head_page_bytes": geometry.head_page_bytes,
        "half_range": NORMAL_HALF_RANGE.get(bits, 0.0),
        "head_size": geometry.head_size,
        "channels_padded": padded(geometry.head_size),
        "tile_tokens": TILE_TOKENS,
        "tile_channels": TILE_CHANNELS,
    }


def write_pages(
    kv: torch.Tensor,
    heap: torch.Tensor,
    page_ids: torch.Tensor,
    first_slot: int,
    bits: int,
    geometry: PageGeometry,
    norm: KeyNorm | None,
) -> None:
    """See `api.write_pages`."""
    num_tokens, num_kv_heads, _ = kv.shape
    if num_tokens == 0:
        return
    device = kv.device
    order = torch.arange(num_tokens, dtype=torch.int32, device=device)
    norms = torch.stack(norm) if norm else kv.new_empty(0, dtype=torch.float32)
    # Tokens one after another are blocks of one token.
    _encode[(triton.cdiv(num_tokens, TILE_TOKENS), num_kv_heads, 1)](
        kv,
        heap,
        heap.view(torch.float16),
        heap.view(kv.dtype),
        hadamard(geometry.head_size, device),
        norms,
        torch.zeros(1, dtype=torch.int64, device=device),
        order,
        order,
        to_device([(num_tokens, 0)], device, torch.int32),
        to_device([(first_slot, 0)], device, torch.int32),
        page_ids,
        num_tokens,
        0,
        kv.stride(0),
        kv.stride(1),
        0,
        0,
        0,
        precision=0,
        table_step=1,
        block_size=1,
        normalises=bits != UNQUANTISED and norm is not None,
        **_page_arguments(bits, geometry),
    )


def write_tokens(
    kv_caches: list[torch.Tensor], block_ids: torch.Tensor, kept: torch.Tensor, tables: "PageTables"
) -> None:
    """See `api.write_tokens`: one launch per precision for all layers."""
    num_layers, num_tokens = kept.shape
    heap, pages, before, norms, geometry = tables
    # All layers lie in one storage, at different places.
    first = min(kv_caches, key=torch.Tensor.storage_offset)
    starts = [cache.storage_offset() - first.storage_offset() for cache in kv_caches]
    num_kept = kept.sum(1)
    counts = torch.stack([num_kept, num_tokens - num_kept], dim=1).int()
    order = torch.argsort(~kept, dim=1, stable=True).int()
    width, starts_there = pages.shape[1], to_device(starts, kept.device)
    for precision, bits in enumerate(geometry.bits):
        if bits == 0:
            continue
        _encode[(triton.cdiv(num_tokens, TILE_TOKENS), geometry.num_kv_heads, num_layers)](
            first,
            heap,
            heap.view(torch.float16),
            heap.view(first.dtype),
            hadamard(geometry.head_size, kept.device),
            norms,
            starts_there,
            block_ids,
            order,
            counts,
            before,
            pages,
            num_tokens,
            0 if precision == 0 else width - 1,
            first.stride(0),
            first.stride(1),
            first.stride(2),
            pages.stride(0),
            norms.stride(0),
            precision=precision,
            table_step=1 if precision == 0 else -1,
            block_size=first.shape[2],
            normalises=bits != UNQUANTISED,
            **_page_arguments(bits, geometry),
        )
