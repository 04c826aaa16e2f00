"""Dense block access by torch indexing."""

import torch

from vllm_zipvl.core.sequences import Sequences


def store_kv(
    key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    """See `api.store_kv`."""
    num_slots = slot_mapping.shape[0]
    block_size = kv_cache.shape[2]
    kv = torch.cat([key[:num_slots], value[:num_slots]], dim=-1)
    if num_slots and int(slot_mapping.min()) < 0:
        valid = slot_mapping >= 0
        kv, slot_mapping = kv[valid], slot_mapping[valid]
    kv_cache[slot_mapping // block_size, :, slot_mapping % block_size] = kv


def gather_kv(
    kv_cache: torch.Tensor, block_table: torch.Tensor, contexts: Sequences
) -> torch.Tensor:
    """See `api.gather_kv`."""
    block_size = kv_cache.shape[2]
    parts = [
        kv_cache[blocks[: -(-length // block_size)].long()].transpose(1, 2).flatten(0, 1)[:length]
        for blocks, length in zip(block_table, contexts.lengths, strict=True)
    ]
    return torch.cat(parts)
