"""Key statistics of requests' first tokens."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from vllm_zipvl.core.quantization import MIN_KEY_SCALE
from vllm_zipvl.core.sequences import Sequences
from vllm_zipvl.core.transfer import to_device
from vllm_zipvl.ops.layers import Layers
from vllm_zipvl.ops.page_codec.tables import PageTables
from vllm_zipvl.ops.tiles import padded, places_of

TILE_TOKENS = 32
_MIN_KEY_SCALE = tl.constexpr(MIN_KEY_SCALE)


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
                place = places_of(
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
        tl.store(target + channels, mean.to(tl.float16), mask=is_channel)
        target += tl.num_programs(1) * head_size
        tl.store(target + channels, deviation.to(tl.float16), mask=is_channel)


def take_norms(
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
