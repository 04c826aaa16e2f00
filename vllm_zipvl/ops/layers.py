"""Blocks of all layers, for kernels that serve all of them in one launch."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from vllm_zipvl.core.transfer import to_device


class Layers(NamedTuple):
    """Layers of one KV cache, which lie at different places of one memory.

    Attributes:
        first: The layer that comes first, [num_blocks, num_kv_heads, block_size, 2 * head_size].
        starts: Where each layer's elements start from there, int64 [num_layers].
    """

    first: torch.Tensor
    starts: torch.Tensor


def find_layers(kv_caches: Sequence[torch.Tensor]) -> Layers:
    """All layers have the same shape and strides."""
    first = min(kv_caches, key=torch.Tensor.storage_offset)
    starts = [int(cache.storage_offset() - first.storage_offset()) for cache in kv_caches]
    return Layers(first, to_device(starts, first.device))
