"""Key statistics of requests' first tokens."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from vllm_zipvl.core.quantization import norm_of
from vllm_zipvl.core.sequences import Sequences
from vllm_zipvl.core.transfer import to_device
from vllm_zipvl.ops.layers import Layers
from vllm_zipvl.ops.page_codec.tables import PageTables
from vllm_zipvl.ops.tiles import padded, places_of

TILE_TOKENS = 32


@triton.jit(do_not_specialize=["table_stride"])
def _key_statistics(
    dense,
    layer_starts,
    block_table,
    cu_seqlens,
    rows,
    statistics,
    table_stride,
    block_stride,
    head_stride,
    token_stride,
    block_size: tl.constexpr,
    head_size: tl.constexpr,
    channels_padded: tl.constexpr,
    tile_tokens: tl.constexpr,
):
    """Mean and variance of a row's keys; one program per row, KV head and layer."""
    row, head, layer = tl.load(rows + tl.program_id(0)), tl.program_id(1), tl.program_id(2)
    num_tokens = tl.load(cu_seqlens + row + 1) - tl.load(cu_seqlens + row)
    channels = tl.arange(0, channels_padded)
    is_channel = channels < head_size
    mean = tl.zeros([channels_padded], tl.float32)
    own = layer.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    target = statistics + (own * 2 * tl.num_programs(1) + head) * head_size + channels
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
        mean = sums / num_tokens
        tl.store(target + turn * tl.num_programs(1) * head_size, mean, mask=is_channel)


def take_norms(
    layers: Layers,
    block_table: torch.Tensor,
    contexts: Sequences,
    tables: PageTables,
    is_first: Sequence[bool],
) -> None:
    """Take key statistics of the rows that have none yet."""
    dense, geometry = layers.first, tables.geometry
    rows = to_device([row for row, first in enumerate(is_first) if first], dense.device)
    num_layers, num_heads, head_size = (
        len(layers.starts), geometry.num_kv_heads, geometry.head_size,
    )  # fmt: skip
    statistics = torch.empty(
        num_layers, len(rows), 2, num_heads, head_size, dtype=torch.float32, device=dense.device
    )
    _key_statistics[(len(rows), num_heads, num_layers)](
        dense,
        layers.starts,
        block_table,
        contexts.cu_seqlens,
        rows,
        statistics,
        block_table.stride(0),
        *dense.stride()[:3],
        block_size=dense.shape[2],
        head_size=head_size,
        channels_padded=padded(head_size),
        tile_tokens=TILE_TOKENS,
    )
    norm = norm_of(*statistics.unbind(2))
    tables.key_norms[:, tables.slots[rows]] = torch.stack(norm, dim=2)
