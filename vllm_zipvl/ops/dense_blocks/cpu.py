"""Dense block access on the CPU: numba copies 8 bytes at a time, whatever the dtype."""

import numba
import numpy as np
import torch

from vllm_zipvl.core.sequences import Sequences
from vllm_zipvl.ops.threads import match_num_threads


def _words(x: torch.Tensor) -> np.ndarray:
    """The elements of the contiguous last dimension as int64."""
    return x.view(torch.int64).numpy()


# One signature each, so that other strides do not compile anew.
@numba.njit("void(i8[:,:,:], i8[:,:,:], i8[:,:,:,:], i8[:])", cache=True, parallel=True)
def _store(key, value, kv_cache, slot_mapping):
    block_size, width = kv_cache.shape[2], key.shape[2]
    for token in numba.prange(len(slot_mapping)):
        slot = slot_mapping[token]
        if slot < 0:
            continue
        block, offset = slot // block_size, slot % block_size
        for head in range(key.shape[1]):
            for i in range(width):
                kv_cache[block, head, offset, i] = key[token, head, i]
                kv_cache[block, head, offset, width + i] = value[token, head, i]


@numba.njit("void(i8[:,:,:,:], i8[:], i8[:,:,::1])", cache=True, parallel=True)
def _gather(kv_cache, block_ids, out):
    block_size = kv_cache.shape[2]
    for token in numba.prange(len(out)):
        block, offset = block_ids[token // block_size], token % block_size
        for head in range(out.shape[1]):
            for i in range(out.shape[2]):
                out[token, head, i] = kv_cache[block, head, offset, i]


def store_kv(
    key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    """See `api.store_kv`."""
    match_num_threads()
    _store(_words(key), _words(value), _words(kv_cache), slot_mapping.numpy())


def gather_kv(
    kv_cache: torch.Tensor, block_table: torch.Tensor, contexts: Sequences
) -> torch.Tensor:
    """See `api.gather_kv`."""
    out = kv_cache.new_empty(contexts.num_tokens, kv_cache.shape[1], kv_cache.shape[3])
    match_num_threads()
    for blocks, tokens in zip(block_table.long(), contexts.slices(), strict=True):
        _gather(_words(kv_cache), blocks.numpy(), _words(out[tokens]))
    return out
