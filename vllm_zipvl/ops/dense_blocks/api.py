"""Reads and writes of dense blocks [num_blocks, num_kv_heads, block_size, 2 * head_size].

A token's key and value lie side by side. Blocks of several layers may be interleaved: only
the last three dimensions need be contiguous.
"""

from types import ModuleType

import torch

from vllm_zipvl.core.sequences import Sequences
from vllm_zipvl.ops.dense_blocks import reference
from vllm_zipvl.ops.lazy import numba_module, triton_module


def _implementation(kv_cache: torch.Tensor) -> ModuleType:
    device = kv_cache.device.type
    return (
        triton_module("vllm_zipvl.ops.dense_blocks.triton", device)
        or (device == "cpu" and numba_module("vllm_zipvl.ops.dense_blocks.cpu"))
        or reference
    )


def store_kv(
    key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    """Write one key and value per token into its slot.

    Args:
        key: [num_tokens, num_kv_heads, head_size]; rows past `slot_mapping` are padding.
        value: As `key`.
        kv_cache: One layer's blocks, written in place.
        slot_mapping: block * block_size + offset per token, int64 [num_slots]; negative
            slots are padding.
    """
    _implementation(kv_cache).store_kv(key, value, kv_cache, slot_mapping)


def gather_kv(
    kv_cache: torch.Tensor, block_table: torch.Tensor, contexts: Sequences
) -> torch.Tensor:
    """Copy contexts out of their blocks, one after another.

    Args:
        kv_cache: One layer's blocks.
        block_table: Blocks of each context from its first token on, integers [len(contexts), any].
        contexts: How many tokens each has.

    Returns:
        [contexts.num_tokens, num_kv_heads, 2 * head_size], contiguous.
    """
    return _implementation(kv_cache).gather_kv(kv_cache, block_table, contexts)
