"""Which positions of a chunk probe its context (section 3.2 of arXiv 2410.08584)."""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


class Probes(NamedTuple):
    """Positions that probe, ascending, int64 arrays of absolute positions.

    Attributes:
        random: Drawn without replacement from the chunk, `recent` excluded.
        recent: The chunk's last positions.
    """

    random: np.ndarray
    recent: np.ndarray


def _splitmix64(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014) on uint64, modulo 2^64."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


@lru_cache(maxsize=64)
def probe_positions(seed: int, start: int, end: int, num_recent: int, num_random: int) -> Probes:
    """Choose the probes of the chunk [start, end).

    A pure function of its arguments, the same in every layer and every implementation:
    position i of the chunk has the key splitmix64(h + i * golden), h a hash of seed, start
    and end, and the `num_random` positions with the smallest keys are drawn.

    Args:
        seed: Seed of the draw.
        start: First position of the chunk.
        end: Position after the chunk's last; the context length once it is computed.
        num_recent: Last positions that always probe, at most.
        num_random: Positions to draw from the rest, at most.
    """
    first_recent = max(start, end - num_recent)
    recent = np.arange(first_recent, end, dtype=np.int64)
    rest = np.arange(start, first_recent, dtype=np.int64)
    if len(rest) > num_random:
        state = np.zeros(1, dtype=np.uint64)
        for word in (seed, start, end):
            state = _splitmix64(state + np.uint64((word + _GOLDEN) & _MASK))
        with np.errstate(over="ignore"):
            keys = _splitmix64(state + rest.astype(np.uint64) * np.uint64(_GOLDEN))
        rest = np.sort(rest[np.argsort(keys, kind="stable")[:num_random]])
    for positions in (rest, recent):
        positions.flags.writeable = False
    return Probes(rest, recent)


def num_visible_probes(positions: np.ndarray, num_tokens: int) -> np.ndarray:
    """For every token j < `num_tokens`, the number of probe `positions` at or after j (int64)."""
    hits = np.bincount(positions, minlength=num_tokens)[:num_tokens]
    return np.cumsum(hits[::-1])[::-1].copy()


def num_far_probes(positions: np.ndarray, num_tokens: int, window: int, sinks: int) -> np.ndarray:
    """As `num_visible_probes`, of those alone in whose neighbourhood the token is not."""
    far = np.zeros(num_tokens, dtype=np.int64)
    if window < num_tokens:
        far[: num_tokens - window] = num_visible_probes(positions, num_tokens)[window:]
    far[:sinks] = 0
    return far
