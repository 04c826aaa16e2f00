"""Probe scores in torch, one KV head at a time so that memory stays bounded.

for each probe i and head h:  A'[i] = softmax(q_i K^T * scale) over keys 0..position_i
mass[j] = sum over i, h of A'[i, j]
"""

import torch


def probe_scores(
    queries: torch.Tensor,
    positions: torch.Tensor,
    num_random: int,
    keys: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `api.probe_scores`; returns the mass of random and of recent probes."""
    num_tokens, num_kv_heads, _ = keys.shape
    num_probes, num_heads, _ = queries.shape
    group = num_heads // num_kv_heads
    q = (queries.float() * scale).unflatten(1, (num_kv_heads, group))
    q = q.permute(1, 2, 0, 3).flatten(1, 2)
    hidden = torch.arange(num_tokens, device=keys.device) > positions[:, None]
    visibility = torch.zeros_like(hidden, dtype=torch.float32).masked_fill_(hidden, float("-inf"))
    visibility = visibility.repeat(group, 1)
    is_random = torch.arange(num_probes, device=keys.device) < num_random
    classes = torch.stack([is_random, ~is_random]).float().repeat(1, group)
    mass = torch.zeros(2, num_tokens, dtype=torch.float32, device=keys.device)
    for head in range(num_kv_heads):
        scores = torch.addmm(visibility, q[head], keys[:, head].float().t())
        mass += classes @ torch.softmax(scores, dim=-1)
    return mass[0], mass[1]
