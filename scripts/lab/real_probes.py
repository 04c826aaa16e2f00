"""What probes see of a context in one layer, chunk by chunk, as the oracle counts it."""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from vllm_zipvl.core.probes import num_visible_probes, probe_positions
from vllm_zipvl.core.selection import recent_mask


class Probing(NamedTuple):
    """Which positions probe, and what they have beside them in any case.

    Attributes:
        recent: Last positions of a chunk.
        random: Random positions of a chunk.
        seed: Of the draw.
        window: Newest tokens that count as near.
        sinks: First tokens that count as near.
        weight: As how many probes each recent one counts.
    """

    recent: int
    random: int
    seed: int
    window: int
    sinks: int
    weight: int = 1


class Seen(NamedTuple):
    """What the probes of a context saw in one layer.

    Attributes:
        mass: Attention per token, summed over probes, float32 [num_heads, num_tokens].
        outside: The same without pairs in the window or with a sink.
        num_visible: Probes that may see each token, int64 [num_tokens].
        num_outside: Those of them that are farther away than the window; 0 for sinks.
        num_probes: All of them.
        is_recent: The chunk's recent probes, bool [num_tokens].
    """

    mass: torch.Tensor
    outside: torch.Tensor
    num_visible: torch.Tensor
    num_outside: torch.Tensor
    num_probes: int
    is_recent: torch.Tensor


def weights_of(
    query: torch.Tensor, key: torch.Tensor, positions: torch.Tensor, scale: float
) -> torch.Tensor:
    """Causal softmax weights of queries at `positions`, [num_heads, num_queries, num_tokens]."""
    num_heads, num_queries, head_size = query.shape
    grouped = query.reshape(key.shape[0], -1, head_size)
    scores = (grouped @ key.transpose(1, 2) * scale).reshape(num_heads, num_queries, -1)
    ahead = torch.arange(key.shape[1]) > positions[:, None]
    return scores.masked_fill_(ahead, -torch.inf).softmax(-1)


@dataclass
class Tally:
    """The probes of one layer's context so far.

    Attributes:
        probing: Which positions probe.
        positions: Random probes of earlier chunks.
        random: Their mass and their mass outside, float32 [2, num_heads, tokens so far].
    """

    probing: Probing
    positions: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    random: torch.Tensor | None = None

    def add(self, query: torch.Tensor, key: torch.Tensor, scale: float) -> Seen:
        """Probe with a chunk, the last queries of the context: its random probes stay."""
        probing, end = self.probing, key.shape[1]
        start = end - query.shape[1]
        random, recent = probe_positions(probing.seed, start, end, probing.recent, probing.random)
        masses = self._masses(query, key, random, scale)
        if self.random is not None:
            masses[..., : self.random.shape[-1]] += self.random
        self.random = masses
        self.positions = np.concatenate([self.positions, random])
        probes = np.concatenate([self.positions, *[recent] * probing.weight])
        num_visible = torch.from_numpy(num_visible_probes(probes, end)).to(query.device)
        num_outside = torch.nn.functional.pad(num_visible, (0, probing.window))[probing.window :]
        num_outside[: probing.sinks] = 0
        mass, outside = masses + probing.weight * self._masses(query, key, recent, scale)
        is_recent = recent_mask(len(recent), end, query.device)
        return Seen(mass, outside, num_visible, num_outside, len(probes), is_recent)

    def _masses(
        self, query: torch.Tensor, key: torch.Tensor, probes: np.ndarray, scale: float
    ) -> torch.Tensor:
        """Mass and mass outside of some probes, [2, num_heads, num_tokens]."""
        num_heads, num_queries, _ = query.shape
        if len(probes) == 0:
            return torch.zeros(2, num_heads, key.shape[1])
        rows = torch.tensor(probes)
        weights = weights_of(query[:, rows - (key.shape[1] - num_queries)], key, rows, scale)
        mass = weights.sum(1)
        tokens = torch.arange(key.shape[1])
        is_near = rows[:, None] - tokens < self.probing.window
        weights.masked_fill_(is_near | (tokens < self.probing.sinks), 0)
        return torch.stack([mass, weights.sum(1)])
