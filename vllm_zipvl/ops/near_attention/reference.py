"""The neighbourhood in plain torch, one context at a time.

s_ij = q_i k_j * scale over the pairs of i's neighbourhood that are not both kept
z_near = sum_j exp s_ij,  o_near = sum_j exp(s_ij) v_j / z_near
o_i = (z_kept o_kept + z_near o_near) / (z_kept + z_near)
"""

import torch

from vllm_zipvl.core.neighbourhood import visible_pairs
from vllm_zipvl.core.packed import PackedAttention, kept_queries
from vllm_zipvl.core.sequences import Chunks


def near_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kept: torch.Tensor,
    among_kept: PackedAttention,
    chunks: Chunks,
    scale: float,
    window: int,
    sinks: int,
) -> torch.Tensor:
    """See `api.near_attention`."""
    is_kept = kept_queries(kept, chunks)
    num_kept = int(is_kept.sum())
    merged = torch.zeros(query.shape, device=query.device)
    merged[is_kept] = among_kept.out[:num_kept].float()
    lse = torch.full(query.shape[:2], -torch.inf, device=query.device)
    lse[is_kept] = among_kept.lse[:num_kept]
    for own, tokens in zip(chunks.queries.slices(), chunks.contexts.slices(), strict=True):
        pairs = _near_pairs(kept[tokens], own.stop - own.start, window, sinks)
        near, near_lse = _attend(query[own], key[tokens], value[tokens], pairs, scale)
        total = torch.logaddexp(lse[own], near_lse)
        # A query that sees nothing has no weights.
        weight = (lse[own] - total).exp().nan_to_num(0)[..., None]
        near_weight = (near_lse - total).exp().nan_to_num(0)[..., None]
        merged[own] = weight * merged[own] + near_weight * near
    return merged.to(query.dtype)


def _near_pairs(kept: torch.Tensor, num_queries: int, window: int, sinks: int) -> torch.Tensor:
    """Pairs of the last queries of one context that its neighbourhood adds, bool."""
    positions = torch.arange(len(kept) - num_queries, len(kept), device=kept.device)
    pairs = visible_pairs(positions, torch.zeros_like(kept), window, sinks)
    return pairs & ~(kept[positions][:, None] & kept)


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pairs: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output float32 [num_queries, num_heads, head_size] and log-sum-exp [num_queries, num_heads].

    Zeros and minus infinity where a query has no pair.
    """
    group = query.shape[1] // key.shape[1]
    k, v = (x.float().repeat_interleave(group, dim=1).transpose(0, 1) for x in (key, value))
    scores = query.float().transpose(0, 1) @ k.transpose(1, 2) * scale
    scores = scores.masked_fill(~pairs, -torch.inf)
    out = scores.softmax(-1).nan_to_num(0) @ v
    return out.transpose(0, 1), scores.logsumexp(-1).t()
