"""Methods that leave out pairs of tokens in the prefill alone, here as masks: no time is saved."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from decoder import Asked, Decoder, Outcome
from transformers import AttentionInterface, DynamicCache

NAME = "lab_masked"
Pattern = Callable[[torch.Tensor], torch.Tensor]
"""Causal softmax weights [num_heads, n, n] to a bool mask of the pairs that stay."""


class _Run:
    """One prompt under a pattern: transformers calls `attend` in each layer."""

    def __init__(self, pattern: Pattern) -> None:
        self.pattern = pattern
        self.flops: list[float] = []

    def attend(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """Full attention for one query, the pattern over the pairs for a prompt; batch 1."""
        groups = query.shape[1] // key.shape[1]
        key, value = (x[0].repeat_interleave(groups, 0) for x in (key, value))
        scores = query[0] @ key.transpose(1, 2) * scaling
        n = scores.shape[1]
        if n > 1:
            causal = torch.ones(n, n, dtype=torch.bool).tril()
            scores = scores.masked_fill(~causal, -torch.inf)
            kept = self.pattern(scores.softmax(-1)) & causal
            self.flops.append(float(kept.sum() / (causal.sum() * kept.shape[0])))
            scores = scores.masked_fill(~kept, -torch.inf)
        # A query without any pair gives zeros.
        out = scores.softmax(-1).nan_to_num() @ value
        return out.transpose(0, 1)[None], None


@dataclass(frozen=True)
class MaskedPrefill:
    """Prefill on a pattern of pairs, a whole 16-bit cache in decode."""

    pattern: Pattern

    def __call__(self, decoder: Decoder, asked: Asked) -> Outcome:
        run, cache = _Run(self.pattern), DynamicCache()
        AttentionInterface.register(NAME, run.attend)
        with decoder.attending(NAME):
            hidden = decoder.run(asked.embeddings, torch.arange(asked.num_tokens), cache)
            answer = decoder.answer(hidden, asked.num_tokens, cache)
        # As the share of tokens whose pairs would be as many.
        shares = [math.sqrt(share) for share in run.flops]
        return Outcome(answer, shares, sum(run.flops) / len(run.flops), 1.0)


@dataclass(frozen=True)
class QKSparse:
    """Each head drops queries and keys (arXiv 2306.01160); dropped queries give zeros.

    That paper drops at random or as the model was trained to. Here a head drops the tokens that
    carry least attention per query that may see them, as keys and as queries; the last ones stay,
    since the answer comes from them. It looks at all pairs to find them.

    Attributes:
        kept: Share of the tokens that each head keeps.
        num_last: Tokens that stay in any case.
    """

    kept: float
    num_last: int = 16

    def __call__(self, weights: torch.Tensor) -> torch.Tensor:
        n = weights.shape[1]
        visible = torch.arange(n, 0, -1)
        order = (weights.sum(1) / visible).sort(descending=True, stable=True).indices
        stays = torch.zeros(weights.shape[:2], dtype=torch.bool)
        stays.scatter_(1, order[:, : math.ceil(self.kept * n)], True)
        stays[:, -self.num_last :] = True
        return stays[:, :, None] & stays[:, None, :]


@dataclass(frozen=True)
class VerticalSlash:
    """The columns and diagonals that the last queries use most: MInference (arXiv 2407.02490).

    Its counts are for long prompts; these are for short ones.

    Attributes:
        vertical: Share of the columns.
        slash: Share of the diagonals.
        num_last: Queries that decide.
        num_first: Columns, from the first on, that stay whatever these queries use.
        num_nearest: Diagonals, from the nearest on, that stay.
    """

    vertical: float
    slash: float
    num_last: int = 16
    num_first: int = 2
    num_nearest: int = 4

    def __call__(self, weights: torch.Tensor) -> torch.Tensor:
        num_heads, n, _ = weights.shape
        last = weights[:, -self.num_last :]
        columns = last.sum(1)
        columns[:, : self.num_first] = torch.inf
        offsets = torch.arange(n)[:, None] - torch.arange(n)
        of_last = offsets[-self.num_last :].clamp(min=0).expand(num_heads, -1, -1).flatten(1)
        diagonals = torch.zeros(num_heads, n).scatter_add_(1, of_last, last.flatten(1))
        diagonals[:, : self.num_nearest] = torch.inf
        top_columns = torch.zeros(num_heads, n, dtype=torch.bool)
        top_columns.scatter_(1, columns.topk(math.ceil(self.vertical * n)).indices, True)
        top_diagonals = torch.zeros(num_heads, n, dtype=torch.bool)
        top_diagonals.scatter_(1, diagonals.topk(math.ceil(self.slash * n)).indices, True)
        return top_columns[:, None, :] | top_diagonals[:, offsets.clamp(min=0)]
