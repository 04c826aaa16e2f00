"""What keys may be normalised by before they are stored: what `key_statistics.py` compares.

A rule takes its statistics from a request's first tokens and stores all later ones with them.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch

from vllm_zipvl.core.quantization import (
    KEY_ZEROS,
    KeyNorm,
    key_norm,
    normalise_keys,
    restore_keys,
    through,
)

SMALLEST = 1e-4
WINDOW = 128
"""Tokens of a compression in decoding."""


class Rule(Protocol):
    """How keys [num_tokens, num_kv_heads, head_size] of one request are stored."""

    def begin(self, keys: torch.Tensor) -> None:
        """Take what there is to take from the first tokens."""

    def follow(self, keys: torch.Tensor) -> None:
        """Take what there is to take from the tokens of a later compression."""

    def store(self, keys: torch.Tensor, bits: int) -> torch.Tensor:
        """What is left of keys after storing them at `bits`."""


class Spread(NamedTuple):
    """Mean and variance of channels, float32 [num_kv_heads, head_size]."""

    mean: torch.Tensor
    variance: torch.Tensor

    @property
    def size(self) -> torch.Tensor:
        return self.mean.square() + self.variance

    def of_pairs(self, figure: torch.Tensor) -> torch.Tensor:
        """The mean of a figure over each rotary pair (NeoX)."""
        return (figure + figure.roll(figure.shape[-1] // 2, -1)) / 2


def spread_of(keys: torch.Tensor) -> Spread:
    mean = keys.mean(0)
    return Spread(mean, (keys - mean).square().mean(0))


Scale = Callable[[Spread], torch.Tensor]
"""Scale of each channel."""


def deviation(spread: Spread) -> torch.Tensor:
    return spread.variance.sqrt().clamp(min=SMALLEST)


def floored(share: float) -> Scale:
    """The deviation, but no less than a share of the pair's mean and of a typical deviation."""

    def scale(spread: Spread) -> torch.Tensor:
        turning = 2 * spread.of_pairs(spread.mean.square()) * share**2
        typical = spread.variance.median(-1, keepdim=True).values / 100
        return (spread.variance + turning + typical).sqrt().clamp(min=SMALLEST)

    return scale


def pair_size(spread: Spread) -> torch.Tensor:
    """Root mean square of the rotary pair, which turning leaves as it is."""
    return spread.of_pairs(spread.size).sqrt().clamp(min=SMALLEST)


def root(scale: Scale) -> Scale:
    return lambda spread: scale(spread).sqrt()


class Normalised:
    """Keys less a mean over a scale.

    Args:
        scale: The scale's rule.
        recentres: Whether each later compression has a mean of its own.
        rescales: Whether it has a scale of its own.
    """

    def __init__(self, scale: Scale, recentres: bool = False, rescales: bool = False) -> None:
        self._scale, self._recentres, self._rescales = scale, recentres, rescales

    def begin(self, keys: torch.Tensor) -> None:
        spread = spread_of(keys)
        self.mean, self.scale = spread.mean.half(), self._scale(spread).half()

    def follow(self, keys: torch.Tensor) -> None:
        spread = spread_of(keys)
        if self._recentres:
            self.mean = spread.mean.half()
        if self._rescales:
            self.scale = self._scale(spread).half()

    def store(self, keys: torch.Tensor, bits: int) -> torch.Tensor:
        return through((keys - self.mean) / self.scale, bits) * self.scale + self.mean


class Extracted(Normalised):
    """Keys over the root of their deviation, but for the largest pair, which is stored whole."""

    def __init__(self) -> None:
        super().__init__(root(floored(0)))

    def begin(self, keys: torch.Tensor) -> None:
        super().begin(keys)
        spread = spread_of(keys)
        largest = spread.of_pairs(spread.size).argmax(-1, keepdim=True)
        partner = (largest + keys.shape[-1] // 2) % keys.shape[-1]
        self.is_whole = torch.zeros(keys.shape[1:], dtype=torch.bool)
        self.is_whole.scatter_(-1, torch.cat([largest, partner], -1), True)

    def store(self, keys: torch.Tensor, bits: int) -> torch.Tensor:
        rest = keys.masked_fill(self.is_whole, 0)
        mean = self.mean.masked_fill(self.is_whole, 0)
        stored = through((rest - mean) / self.scale, bits) * self.scale + mean
        return torch.where(self.is_whole, keys.half().float(), stored)


class Stored:
    """What the engine does: the largest pair goes into the two zeros of a key."""

    norm: KeyNorm

    def begin(self, keys: torch.Tensor) -> None:
        self.norm = key_norm(keys)

    def follow(self, keys: torch.Tensor) -> None:
        pass

    def store(self, keys: torch.Tensor, bits: int) -> torch.Tensor:
        return restore_keys(through(normalise_keys(keys, self.norm), bits, KEY_ZEROS), self.norm)


RULES: dict[str, Callable[[], Rule]] = {
    "deviation": lambda: Normalised(deviation),
    "floor 0.03": lambda: Normalised(floored(0.03)),
    "floor 0.1": lambda: Normalised(floored(0.1)),
    "pair": lambda: Normalised(pair_size),
    "root of pair": lambda: Normalised(root(pair_size)),
    "means": lambda: Normalised(floored(0.03), recentres=True),
    "means, root": lambda: Normalised(root(floored(0.03)), recentres=True),
    "means, scales": lambda: Normalised(floored(0), recentres=True, rescales=True),
    "whole pair": Extracted,
    "stored": Stored,
}
"""By name. deviation: what the engine stored before. floor: the deviation with a floor relative to
the pair's mean. pair: one scale for both channels of a pair, which turning leaves as it is. root:
the root of that. means: each compression has its own mean (and scale). whole pair: the largest pair
at 16 bits. stored: what the engine stores."""
