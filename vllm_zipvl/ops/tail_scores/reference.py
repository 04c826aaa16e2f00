"""Tail scores in torch, one layer and request at a time."""

from collections.abc import Sequence

import torch

from vllm_zipvl.core.sequences import Sequences
from vllm_zipvl.ops.dense_blocks import gather_kv


def tail_scores(
    queries: torch.Tensor,
    lse: torch.Tensor,
    kv_caches: Sequence[torch.Tensor],
    block_table: torch.Tensor,
    tails: Sequences,
    scale: float,
) -> torch.Tensor:
    """See `api.tail_scores`."""
    out = torch.empty(len(queries), tails.num_tokens, device=queries.device)
    for layer, kv_cache in enumerate(kv_caches):
        keys = gather_kv(kv_cache, block_table, tails)[..., : queries.shape[-1]].float()
        for row, tokens in enumerate(tails.slices()):
            key = keys[tokens].permute(1, 2, 0)
            query = queries[layer, row].float().unflatten(0, (len(key), -1))
            total = lse[layer, row].unflatten(0, (len(key), -1))[..., None]
            out[layer, tokens] = torch.exp(query @ key * scale - total).sum((0, 1))
    return out
