"""Sequences of several requests laid end to end."""

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate, pairwise

import numpy as np
import torch

from vllm_zipvl.core.transfer import to_device


class Sequences:
    """Where each of several sequences lies in a flat tensor of their tokens.

    Lengths are the host's; what a device needs to know of them is made on first use.

    Attributes:
        lengths: Tokens of each.
        starts: Where each begins, then where the last ends.

    Args:
        lengths: Tokens of each.
        device: Of the tokens.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self.lengths = tuple(lengths)
        self.starts = tuple(accumulate(self.lengths, initial=0))
        self._device = device
        self._tiles: dict[int, torch.Tensor] = {}

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        return self.starts[-1]

    @property
    def max_length(self) -> int:
        return max(self.lengths, default=0)

    def slices(self) -> list[slice]:
        """The place of each among all tokens."""
        return [slice(start, end) for start, end in pairwise(self.starts)]

    @cached_property
    def cu_seqlens(self) -> torch.Tensor:
        """`starts` on the device, int32 [len + 1]."""
        return to_device(np.array(self.starts, dtype=np.int32), self._device)

    @cached_property
    def _offsets(self) -> torch.Tensor:
        """As `cu_seqlens`, int64: an index."""
        return self.cu_seqlens.long()

    @cached_property
    def device_lengths(self) -> torch.Tensor:
        """`lengths` on the device, int64 [len]."""
        return self._offsets.diff()

    @cached_property
    def owners(self) -> torch.Tensor:
        """Which sequence each token belongs to, int64 [num_tokens]."""
        return to_device(np.repeat(np.arange(len(self)), self.lengths), self._device)

    @cached_property
    def positions(self) -> torch.Tensor:
        """Where each token stands in its own sequence, int64 [num_tokens]."""
        every = torch.arange(self.num_tokens, device=self._device)
        return every - self._offsets[self.owners]

    def tiles(self, side: int) -> torch.Tensor:
        """Tiles of `side` tokens, none across two sequences: whose, and from which position on.

        Returns:
            int32 [num_tiles, 2].
        """
        if side not in self._tiles:
            tiles = [
                (row, first)
                for row, length in enumerate(self.lengths)
                for first in range(0, length, side)
            ]
            places = np.array(tiles, dtype=np.int32).reshape(-1, 2)
            self._tiles[side] = to_device(places, self._device)
        return self._tiles[side]

    def at_starts(self, running: torch.Tensor) -> torch.Tensor:
        """Of running sums [..., num_tokens], those before `starts`, [..., len + 1]."""
        return torch.nn.functional.pad(running, (1, 0))[..., self._offsets]

    def sums(self, values: torch.Tensor) -> torch.Tensor:
        """Sums over each sequence of finite values [..., num_tokens], float64 [..., len]."""
        return self.at_starts(values.cumsum(-1, dtype=torch.float64)).diff(dim=-1)

    def counts(self, mask: torch.Tensor) -> torch.Tensor:
        """How many tokens of each sequence are in a mask [..., num_tokens], int64 [..., len]."""
        return self.at_starts(mask.cumsum(-1)).diff(dim=-1)


class Chunks:
    """Queries of several contexts: each has the last tokens of its own.

    Attributes:
        queries: How many queries each context has.
        contexts: How many tokens.

    Args:
        num_queries: Of each context.
        num_tokens: Of each context.
        device: Of the tokens.

    Raises:
        ValueError: A context has fewer tokens than queries.
    """

    def __init__(
        self, num_queries: Sequence[int], num_tokens: Sequence[int], device: torch.device
    ) -> None:
        for m, n in zip(num_queries, num_tokens, strict=True):
            if m > n:
                raise ValueError(f"{m} queries cannot be the last of {n} keys")
        self.queries = Sequences(num_queries, device)
        self.contexts = Sequences(num_tokens, device)
        self._device = device

    @property
    def are_whole(self) -> bool:
        """Whether the queries are all of the tokens."""
        return self.queries.lengths == self.contexts.lengths

    @cached_property
    def places(self) -> torch.Tensor:
        """Where each query is among the tokens of all contexts, int64 [num_queries]."""
        ends = np.array(self.contexts.starts[1:]) - np.array(self.queries.starts[1:])
        places = np.arange(self.queries.num_tokens) + np.repeat(ends, self.queries.lengths)
        return to_device(places, self._device)
