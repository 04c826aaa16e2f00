"""The page codec in Triton: tokens straight from dense blocks into pages, all layers at once."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from vllm_zipvl.core.geometry import UNQUANTISED, PageGeometry
from vllm_zipvl.core.quantization import MIN_KEY_SCALE, NORMAL_HALF_RANGE, KeyNorm, hadamard
from vllm_zipvl.core.sequences import Sequences
from vllm_zipvl.core.transfer import to_device
from vllm_zipvl.ops.layers import Layers, find_layers
from vllm_zipvl.ops.page_codec.tables import PageTables
from vllm_zipvl.ops.tiles import padded

TILE_TOKENS = 32
TILE_CHANNELS = 16
_MIN_KEY_SCALE = tl.constexpr(MIN_KEY_SCALE)
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
def _places(
    layer_starts, block_table, row, layer, head, positions, is_token, table_stride, block_stride,
    head_stride, token_stride, block_size: tl.constexpr,
):  # fmt: skip
    """Elements of the layer that comes first from which on the row's tokens have their keys."""
    entry = block_table + row * table_stride + positions // block_size
    block = tl.load(entry, mask=is_token, other=0).to(tl.int64)
    place = tl.load(layer_starts + layer) + block * block_stride + head * head_stride
    return place + positions % block_size * token_stride


@triton.jit(do_not_specialize=["table_stride"])
def _key_norms(
    dense,
    layer_starts,
    block_table,
    cu_seqlens,
    slots,
    is_first,
    norms,
    table_stride,
    block_stride,
    head_stride,
    token_stride,
    norm_layer_stride,
    norm_slot_stride,
    block_size: tl.constexpr,
    head_size: tl.constexpr,
    channels_padded: tl.constexpr,
    tile_tokens: tl.constexpr,
):
    """Mean and deviation of a row's keys; one program per row, KV head and layer."""
    row, head, layer = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    if tl.load(is_first + row) != 0:
        num_tokens = tl.load(cu_seqlens + row + 1) - tl.load(cu_seqlens + row)
        channels = tl.arange(0, channels_padded)
        is_channel = channels < head_size
        mean = tl.zeros([channels_padded], tl.float32)
        squares = tl.zeros([channels_padded], tl.float32)
        for turn in tl.static_range(2):
            sums = tl.zeros([channels_padded], tl.float32)
            for first in range(0, num_tokens, tile_tokens):
                positions = first + tl.arange(0, tile_tokens)
                is_token = positions < num_tokens
                place = _places(
                    layer_starts, block_table, row, layer, head, positions, is_token, table_stride,
                    block_stride, head_stride, token_stride, block_size,
                )  # fmt: skip
                mask = is_token[:, None] & is_channel[None, :]
                x = tl.load(dense + place[:, None] + channels[None, :], mask=mask, other=0)
                x = x.to(tl.float32)
                if turn == 1:
                    x = tl.where(mask, x - mean[None, :], 0.0)
                    x = x * x
                sums += tl.sum(x, axis=0)
            if turn == 0:
                mean = sums / num_tokens
            else:
                squares = sums / num_tokens
        deviation = tl.sqrt(squares)
        deviation = tl.where(deviation < _MIN_KEY_SCALE, _MIN_KEY_SCALE, deviation)
        slot = tl.load(slots + row)
        target = norms + layer * norm_layer_stride + slot * norm_slot_stride + head * head_size
        tl.store(target + channels, mean.to(tl.float16).to(tl.float32), mask=is_channel)
        target += tl.num_programs(1) * head_size
        tl.store(target + channels, deviation.to(tl.float16).to(tl.float32), mask=is_channel)


@triton.jit(do_not_specialize=["num_tokens", "num_rows", "block_table_stride"])
def _encode(
    dense,
    heap,
    parameters,
    elements,
    rotation,
    norms,
    layer_starts,
    block_table,
    tiles,
    cu_seqlens,
    order,
    counts,
    before,
    slots,
    page_table,
    num_tokens,
    num_rows,
    first_entry,
    block_table_stride,
    block_stride,
    head_stride,
    token_stride,
    page_layer_stride,
    page_slot_stride,
    norm_layer_stride,
    norm_slot_stride,
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
    """One program per tile of a row's tokens of one precision, KV head and layer.

    `order` has the kept tokens of every row before its others, row by row.
    """
    head, layer = tl.program_id(1), tl.program_id(2).to(tl.int64)
    tile = tiles + 2 * tl.program_id(0)
    row, first = tl.load(tile), tl.load(tile + 1)
    counted = counts + (layer * num_rows + row) * 2
    num_own = tl.load(counted + precision)
    if first < num_own:
        index = first + tl.arange(0, tile_tokens)
        is_token = index < num_own
        start = tl.load(cu_seqlens + row)
        place = start + index + (tl.load(counted) if precision == 1 else 0)
        token = tl.load(order + layer * num_tokens + place, mask=is_token, other=0)
        source = dense + _places(
            layer_starts, block_table, row, layer, head, token - start, is_token,
            block_table_stride, block_stride, head_stride, token_stride, block_size,
        )  # fmt: skip

        held = tl.load(before + (layer * num_rows + row) * 2 + precision) + index
        own = layer * page_layer_stride + tl.load(slots + row) * page_slot_stride
        entry = own + first_entry + held // capacity * table_step
        page = tl.load(page_table + entry, mask=is_token, other=0).to(tl.int64)
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
            own_norms = norms + layer * norm_layer_stride + tl.load(slots + row) * norm_slot_stride
            own_norms += head * head_size
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
    num_tokens, device = len(kv), kv.device
    if num_tokens == 0:
        return
    norms = torch.stack(norm) if norm else kv.new_empty(2, 0, dtype=torch.float32)
    first = to_device([(first_slot, 0)], device, torch.int32)
    # Tokens one after another are blocks of one token, and the table is one of one slot.
    tables = PageTables(
        heap, page_ids[None, None], to_device([0], device), first[None], norms[None, None], geometry
    )
    every = torch.arange(num_tokens, dtype=torch.int32, device=device)
    rows = Rows(
        find_layers([kv[:, :, None]]), every[None], Sequences([num_tokens], device), every[None],
        to_device([(num_tokens, 0)], device, torch.int32)[None],
    )  # fmt: skip
    _write_class(rows, tables, 0, bits, normalises=bits != UNQUANTISED and norm is not None)


class Rows(NamedTuple):
    """Tokens of several requests that are written.

    Attributes:
        layers: Their dense blocks.
        block_table: Blocks of each row, [num_rows, any].
        contexts: How many tokens each has.
        order: Of each layer, every row's kept tokens before its others, [num_layers, num_tokens].
        counts: How many tokens each row keeps and does not, int32 [num_layers, num_rows, 2].
    """

    layers: Layers
    block_table: torch.Tensor
    contexts: Sequences
    order: torch.Tensor
    counts: torch.Tensor


def _write_class(
    rows: Rows, tables: PageTables, precision: int, bits: int, normalises: bool
) -> None:
    """All rows' and layers' tokens of one precision."""
    dense, geometry = rows.layers.first, tables.geometry
    num_layers, num_tokens = rows.order.shape
    tiles = rows.contexts.tiles(TILE_TOKENS)
    _encode[(len(tiles), geometry.num_kv_heads, num_layers)](
        dense,
        tables.heap,
        tables.heap.view(torch.float16),
        tables.heap.view(dense.dtype),
        hadamard(geometry.head_size, dense.device),
        tables.key_norms,
        rows.layers.starts,
        rows.block_table,
        tiles,
        rows.contexts.cu_seqlens,
        rows.order,
        rows.counts,
        tables.before,
        tables.slots,
        tables.page_table,
        num_tokens,
        len(rows.contexts),
        0 if precision == 0 else tables.page_table.shape[2] - 1,
        rows.block_table.stride(0),
        *dense.stride()[:3],
        *tables.page_table.stride()[:2],
        *tables.key_norms.stride()[:2],
        precision=precision,
        table_step=1 if precision == 0 else -1,
        block_size=dense.shape[2],
        normalises=normalises,
        **_page_arguments(bits, geometry),
    )


def _take_norms(
    layers: Layers,
    block_table: torch.Tensor,
    contexts: Sequences,
    tables: PageTables,
    is_first: Sequence[bool],
) -> None:
    """Take key statistics of the rows that have none yet."""
    dense, geometry = layers.first, tables.geometry
    _key_norms[(len(contexts), geometry.num_kv_heads, len(layers.starts))](
        dense,
        layers.starts,
        block_table,
        contexts.cu_seqlens,
        tables.slots,
        to_device(list(is_first), dense.device),
        tables.key_norms,
        block_table.stride(0),
        *dense.stride()[:3],
        *tables.key_norms.stride()[:2],
        block_size=dense.shape[2],
        head_size=geometry.head_size,
        channels_padded=padded(geometry.head_size),
        tile_tokens=TILE_TOKENS,
    )


def write_tokens(
    kv_caches: Sequence[torch.Tensor],
    block_table: torch.Tensor,
    contexts: Sequences,
    kept: torch.Tensor,
    tables: PageTables,
    is_first: Sequence[bool],
) -> None:
    """See `api.write_tokens`: one launch per precision for all rows and layers."""
    layers = find_layers(kv_caches)
    if any(is_first):
        _take_norms(layers, block_table, contexts, tables, is_first)
    num_kept = contexts.counts(kept)
    counts = torch.stack([num_kept, contexts.cu_seqlens.diff() - num_kept], dim=-1).int()
    order = torch.argsort(2 * contexts.owners + ~kept, dim=1, stable=True).int()
    rows = Rows(layers, block_table, contexts, order, counts)
    for precision, bits in enumerate(tables.geometry.bits):
        if bits:
            _write_class(rows, tables, precision, bits, normalises=bits != UNQUANTISED)
