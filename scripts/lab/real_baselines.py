"""Other ways to save in a prefill: MInference's lines, and FastV's dropped tokens."""

import math
from dataclasses import dataclass

import torch
from real_attention import QUERIES_AT_ONCE, Attended, Everything, Neighbourhood, masked
from real_attention import num_causal_pairs as causal
from real_prefill import Chooser, Layer, View, Whole
from real_probes import weights_of

from vllm_zipvl.core.selection import top_mask


@dataclass(frozen=True)
class Lines:
    """Columns and diagonals, of a whole prompt.

    Attributes:
        columns: Bool [num_heads, num_tokens], by key.
        diagonals: Bool [num_heads, num_tokens], by how far a key lies behind its query.
    """

    columns: torch.Tensor
    diagonals: torch.Tensor

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> Attended:
        out, pairs = torch.zeros_like(query), 0
        num_heads, num_tokens, _ = query.shape
        for rows in torch.arange(num_tokens).split(QUERIES_AT_ONCE[query.device.type]):
            columns = torch.arange(int(rows[-1]) + 1)
            ahead = rows[:, None] - columns
            seen = self.columns[:, None, : len(columns)] | self.diagonals[:, ahead.clamp(min=0)]
            seen &= ahead >= 0
            pairs += int(seen.sum())
            some = slice(0, len(columns))
            out[:, rows] = masked(query[:, rows], key[:, some], value[:, some], seen, scale)
        return Attended(out, pairs / num_heads / causal(num_tokens, num_tokens))


@dataclass(frozen=True)
class VerticalSlash(Whole):
    """The columns and diagonals that the last queries use most: MInference (arXiv 2407.02490).

    Attributes:
        share: Of the columns, and of the diagonals.
        num_last: Queries that decide.
        num_first: Columns, from the first on, that stay.
        num_nearest: Diagonals, from the nearest on, that stay.
    """

    share: float
    num_last: int = 64
    num_first: int = 4
    num_nearest: int = 64

    def chooser(self) -> Chooser:
        return self

    def view(self, layer: Layer) -> View:
        n, num = layer.num_tokens, math.ceil(self.share * layer.num_tokens)
        rows = torch.arange(max(0, n - self.num_last), n)
        weights = weights_of(layer.query[:, rows], layer.key, rows, layer.scale)
        columns = weights.sum(1)
        columns[:, : self.num_first] = torch.inf
        behind = (rows[:, None] - torch.arange(n)).clamp(min=0).expand_as(weights)
        diagonals = torch.zeros_like(columns)
        diagonals.scatter_add_(1, behind.flatten(1), weights.flatten(1))
        diagonals[:, : self.num_nearest] = torch.inf
        lines = Lines(top_mask(columns, num), top_mask(diagonals, num))
        return View(lines, lines.columns)


@dataclass(frozen=True)
class FastV(Whole):
    """Drops tokens by what the prompt's last one attends to (arXiv 2403.06764).

    That paper drops image tokens; a text has none, and here any token but the last ones may go.
    Later layers neither see nor cache what was dropped.

    Attributes:
        dropped: Share of the tokens.
        layer: So many layers see all tokens, and the last of them decides.
        num_last: Tokens that stay.
    """

    dropped: float = 0.5
    layer: int = 2
    num_last: int = 64

    def chooser(self) -> Chooser:
        return _Dropping(self)


class _Dropping:
    def __init__(self, method: FastV) -> None:
        self.method = method
        self.kept = torch.empty(0)

    def view(self, layer: Layer) -> View:
        method, n = self.method, layer.num_tokens
        if layer.index >= method.layer:
            return View(Neighbourhood(self.kept, 0, 0), self.kept, there=self.kept[0])
        if layer.index == method.layer - 1:
            last = torch.tensor([n - 1])
            weights = weights_of(layer.query[:, -1:], layer.key, last, layer.scale)
            scores = weights.mean((0, 1))
            scores[-method.num_last :] = torch.inf
            self.kept = top_mask(scores, n - math.floor(method.dropped * n))[None]
        return View(Everything(), torch.ones(1, n, dtype=torch.bool))
