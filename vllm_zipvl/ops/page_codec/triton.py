"""The page codec in Triton: tokens straight from dense blocks into pages, all layers at once."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from vllm_zipvl.core.codes import NORMAL_HALF_RANGE, scale_rounding
from vllm_zipvl.core.geometry import UNQUANTISED, PageGeometry
from vllm_zipvl.core.quantization import KEY_ZEROS, KeyNorm, hadamard
from vllm_zipvl.core.sequences import Sequences
from vllm_zipvl.core.transfer import to_device
from vllm_zipvl.ops.layers import Layers, find_layers
from vllm_zipvl.ops.page_codec.tables import PageTables
from vllm_zipvl.ops.page_codec.triton_norms import take_norms
from vllm_zipvl.ops.page_codec.triton_quantise import encode_side
from vllm_zipvl.ops.tiles import padded, places_of

TILE_TOKENS = 32
TILE_CHANNELS = 16
_KEY_ZEROS = tl.constexpr(KEY_ZEROS)


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
    rounding: tl.constexpr,
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
        source = dense + places_of(
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
                x = tl.load(
                    source[:, None] + side * head_size + channels[None, :], mask=mask, other=0
                )
                target = start + side * capacity * head_size
                tl.store(elements + target[:, None] + channels[None, :], x, mask=mask)
        else:
            own_norms = norms + layer * norm_layer_stride + tl.load(slots + row) * norm_slot_stride
            own_norms += head * head_size
            parameter = (base + 2 * capacity * code_bytes) // 2 + slot
            for side in tl.static_range(2):
                encode_side(
                    source + side * head_size, own_norms, rotation,
                    heap + base + (side * capacity + slot) * code_bytes,
                    heap + 2 * parameter + side,
                    parameters + parameter + (1 + side * _KEY_ZEROS) * capacity, is_token,
                    head_size, channels_padded, tile_channels, bits, code_bytes, bytes_padded,
                    capacity, half_range, rounding, _KEY_ZEROS if side == 0 else 1,
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
        "rounding": scale_rounding(bits),
        "head_size": geometry.head_size,
        "channels_padded": padded(geometry.head_size),
        "tile_tokens": TILE_TOKENS,
        "tile_channels": TILE_CHANNELS,
    }


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
    norms = torch.stack(norm) if norm else kv.new_empty(3, 0, dtype=torch.float16)
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
        take_norms(layers, block_table, contexts, tables, is_first)
    num_kept = contexts.counts(kept)
    counts = torch.stack([num_kept, contexts.device_lengths - num_kept], dim=-1).int()
    order = torch.argsort((2 * contexts.owners).int() + ~kept, dim=1, stable=True).int()
    rows = Rows(layers, block_table, contexts, order, counts)
    for precision, bits in enumerate(tables.geometry.bits):
        if bits:
            _write_class(rows, tables, precision, bits, normalises=bits != UNQUANTISED)
