"""Probe scores in torch, one KV head at a time so that memory stays bounded.

for each probe i and head h:  A'[i] = softmax(q_i K^T * scale) over keys 0..position_i
mass[j] = sum over i, h of A'[i, j], of the near pairs and of the others
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
    window: int,
    sinks: int,
) -> torch.Tensor:
    """See `api.probe_scores`."""
    mass = torch.empty(2, 2, len(keys), dtype=torch.float32, device=keys.device)
    for own, tokens in zip(probes.contexts.slices(), contexts.slices(), strict=True):
        mass[..., tokens] = _of_one_context(
            queries[own],
            probes.positions[own],
            probes.is_random[own],
            keys[tokens],
            scale,
            window,
            sinks,
        )
    return mass


def _of_one_context(
    queries: torch.Tensor,
    positions: torch.Tensor,
    is_random: torch.Tensor,
    keys: torch.Tensor,
    scale: float,
    window: int,
    sinks: int,
) -> torch.Tensor:
    """As `api.probe_scores`."""
    num_tokens, num_kv_heads, _ = keys.shape
    group = queries.shape[1] // num_kv_heads
    q = (queries.float() * scale).unflatten(1, (num_kv_heads, group))
    q = q.permute(1, 2, 0, 3).flatten(1, 2)
    hidden = torch.arange(num_tokens, device=keys.device) > positions[:, None]
    visibility = torch.zeros_like(hidden, dtype=torch.float32).masked_fill_(hidden, float("-inf"))
    visibility = visibility.repeat(group, 1)
    classes = torch.stack([is_random, ~is_random]).float().repeat(1, group)
    near_keys, is_near = _near_keys(positions, num_tokens, window, sinks)
    near_rows = near_keys.repeat(group, 1)
    far_mass = torch.zeros(2, num_tokens, dtype=torch.float32, device=keys.device)
    near_weights = torch.zeros(near_keys.shape, dtype=torch.float32, device=keys.device)
    for head in range(num_kv_heads):
        scores = torch.addmm(visibility, q[head], keys[:, head].float().t())
        weights = torch.softmax(scores, dim=-1)
        near_weights += weights.gather(1, near_rows).unflatten(0, (group, -1)).sum(0)
        far_mass += classes @ weights.scatter_(1, near_rows, 0)
    near_weights *= is_near
    near_mass = torch.zeros_like(far_mass)
    for own, of_class in zip(near_mass, (is_random, ~is_random), strict=True):
        own.index_add_(0, near_keys.flatten(), (near_weights * of_class[:, None]).flatten())
    return torch.stack([far_mass, near_mass], dim=1)


def _near_keys(
    positions: torch.Tensor, num_tokens: int, window: int, sinks: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys of each probe's neighbourhood, int64 [num_probes, any], and which of them count.

    Those that do not are near keys that are there already.
    """
    offsets = torch.arange(min(window, num_tokens), device=positions.device)
    firsts = torch.arange(min(sinks, num_tokens), device=positions.device)
    own = positions[:, None]
    nearest, firsts = own - offsets, firsts.expand(len(positions), -1)
    is_near = torch.cat([nearest >= 0, own - firsts >= window], dim=1)
    near_keys = torch.cat([nearest, firsts], dim=1)
    return torch.where(is_near, near_keys, own if window else 0), is_near
