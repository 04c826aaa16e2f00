"""Dense block access in Triton, one program per token."""

import torch
import triton
import triton.language as tl

from vllm_zipvl.core.sequences import Sequences


@triton.jit
def _heads(
    start, head_stride, num_kv_heads: tl.constexpr, heads_padded: tl.constexpr,
    width: tl.constexpr, width_padded: tl.constexpr,
):  # fmt: skip
    """Places of one token's heads from `start` on, and which of them exist."""
    heads, channels = tl.arange(0, heads_padded), tl.arange(0, width_padded)
    mask = (heads < num_kv_heads)[:, None] & (channels < width)[None, :]
    return start + heads[:, None].to(tl.int64) * head_stride + channels[None, :], mask


@triton.jit
def _store(
    key,
    value,
    kv_cache,
    slot_mapping,
    key_stride,
    key_head_stride,
    value_stride,
    value_head_stride,
    block_stride,
    num_kv_heads: tl.constexpr,
    heads_padded: tl.constexpr,
    head_size: tl.constexpr,
    channels_padded: tl.constexpr,
    block_size: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token).to(tl.int64)
    if slot >= 0:
        target = slot // block_size * block_stride + slot % block_size * 2 * head_size
        head_stride: tl.constexpr = block_size * 2 * head_size
        out, mask = _heads(
            target, head_stride, num_kv_heads, heads_padded, head_size, channels_padded
        )
        place, _ = _heads(
            token * key_stride, key_head_stride, num_kv_heads, heads_padded, head_size,
            channels_padded,
        )  # fmt: skip
        tl.store(kv_cache + out, tl.load(key + place, mask=mask), mask=mask)
        place, _ = _heads(
            token * value_stride, value_head_stride, num_kv_heads, heads_padded, head_size,
            channels_padded,
        )  # fmt: skip
        tl.store(kv_cache + out + head_size, tl.load(value + place, mask=mask), mask=mask)


@triton.jit(do_not_specialize=["table_stride"], do_not_specialize_on_alignment=["block_table"])
def _gather(
    kv_cache,
    block_table,
    owners,
    cu_seqlens,
    out,
    block_stride,
    table_stride,
    num_kv_heads: tl.constexpr,
    heads_padded: tl.constexpr,
    width: tl.constexpr,
    width_padded: tl.constexpr,
    block_size: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    owner = tl.load(owners + token)
    position = token - tl.load(cu_seqlens + owner)
    block = tl.load(block_table + owner * table_stride + position // block_size).to(tl.int64)
    source = block * block_stride + position % block_size * width
    place, mask = _heads(
        source, block_size * width, num_kv_heads, heads_padded, width, width_padded
    )
    target, _ = _heads(
        token * num_kv_heads * width, width, num_kv_heads, heads_padded, width, width_padded
    )
    tl.store(out + target, tl.load(kv_cache + place, mask=mask), mask=mask)


def _heads_arguments(kv_cache: torch.Tensor) -> dict[str, int]:
    num_kv_heads, block_size = kv_cache.shape[1:3]
    return {
        "num_kv_heads": num_kv_heads,
        "heads_padded": triton.next_power_of_2(num_kv_heads),
        "block_size": block_size,
    }


def store_kv(
    key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    """See `api.store_kv`."""
    if len(slot_mapping) == 0:
        return
    key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (key, value))
    head_size = key.shape[-1]
    _store[(len(slot_mapping),)](
        key,
        value,
        kv_cache,
        slot_mapping,
        *key.stride()[:2],
        *value.stride()[:2],
        kv_cache.stride(0),
        head_size=head_size,
        channels_padded=triton.next_power_of_2(head_size),
        **_heads_arguments(kv_cache),
    )


def gather_kv(
    kv_cache: torch.Tensor, block_table: torch.Tensor, contexts: Sequences
) -> torch.Tensor:
    """See `api.gather_kv`."""
    _, num_kv_heads, _, width = kv_cache.shape
    out = kv_cache.new_empty(contexts.num_tokens, num_kv_heads, width)
    if contexts.num_tokens == 0:
        return out
    block_table = block_table if block_table.stride(-1) == 1 else block_table.contiguous()
    _gather[(contexts.num_tokens,)](
        kv_cache,
        block_table,
        contexts.owners,
        contexts.cu_seqlens,
        out,
        kv_cache.stride(0),
        block_table.stride(0),
        width=width,
        width_padded=triton.next_power_of_2(width),
        **_heads_arguments(kv_cache),
    )
    return out
