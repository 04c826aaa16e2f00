"""Probe scores in torch, one KV head at a time so that memory stays bounded.

for each probe i and head h:  A'[i] = softmax(q_i K^T * scale) over keys 0..position_i
mass[j] = sum over i, h of A'[i, j]
"""

from typing import TYPE_CHECKING

import torch

from vllm_zipvl.core.sequences import Sequences

if TYPE_CHECKING:
    from vllm_zipvl.ops.probe_scores.api import ProbePlaces


def probe_scores(
    queries: torch.Tensor,
    probes: "ProbePlaces",
    keys: torch.Tensor,
    contexts: Sequences,
    scale: float,
) -> torch.Tensor:
    """See `api.probe_scores`."""
    mass = torch.zeros(2, len(keys), dtype=torch.float32, device=keys.device)
    for own, tokens in zip(probes.contexts.slices(), contexts.slices(), strict=True):
        mass[:, tokens] = _of_one_context(
            queries[own], probes.positions[own], probes.is_random[own], keys[tokens], scale
        )
    return mass


def _of_one_context(
    queries: torch.Tensor,
    positions: torch.Tensor,
    is_random: torch.Tensor,
    keys: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Mass of random and of recent probes [2, num_tokens]."""
    num_tokens, num_kv_heads, _ = keys.shape
    group = queries.shape[1] // num_kv_heads
    q = (queries.float() * scale).unflatten(1, (num_kv_heads, group))
    q = q.permute(1, 2, 0, 3).flatten(1, 2)
    hidden = torch.arange(num_tokens, device=keys.device) > positions[:, None]
    visibility = torch.zeros_like(hidden, dtype=torch.float32).masked_fill_(hidden, float("-inf"))
    visibility = visibility.repeat(group, 1)
    classes = torch.stack([is_random, ~is_random]).float().repeat(1, group)
    mass = torch.zeros(2, num_tokens, dtype=torch.float32, device=keys.device)
    for head in range(num_kv_heads):
        scores = torch.addmm(visibility, q[head], keys[:, head].float().t())
        mass += classes @ torch.softmax(scores, dim=-1)
    return mass
