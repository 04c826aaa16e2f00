"""What the queries of one layer see in a prefill, and attention to no more than that."""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch.nn.functional import scaled_dot_product_attention

QUERIES_AT_ONCE = {"cpu": 256, "cuda": 2048}
"""Of a block, by device: a processor gains by what it leaves out, a GPU by what it does at once."""


class Attended(NamedTuple):
    """Attention of a chunk's queries.

    Attributes:
        out: [num_heads, num_queries, head_size].
        pairs: Share of the causal pairs that were attended to, mean over heads.
    """

    out: torch.Tensor
    pairs: float


class Sight(Protocol):
    """Which pairs of a layer are attended to."""

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> Attended:
        """Attend as the last queries of a context.

        Args:
            query: [num_heads, num_queries, head_size].
            key: [num_kv_heads, num_tokens, head_size].
            value: As `key`.
            scale: Softmax scale.
        """


def masked(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pairs: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Attention over `pairs`, bool [1 or num_heads, num_queries, num_keys], none without a key."""
    out = scaled_dot_product_attention(
        query[None], key[None], value[None], attn_mask=pairs[None], scale=scale, enable_gqa=True
    )
    return out[0]


def num_causal_pairs(num_queries: int, num_tokens: int) -> int:
    """Of the last queries of a context."""
    return num_queries * (2 * num_tokens - num_queries + 1) // 2


class Everything:
    """Full causal attention."""

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> Attended:
        num_queries, num_tokens = query.shape[1], key.shape[1]
        if num_queries == num_tokens:
            # A kernel that holds no scores takes no groups of float32 queries on GPUs.
            group = query.shape[0] // key.shape[0]
            key, value = (x.repeat_interleave(group, 0) for x in (key, value))
            out = scaled_dot_product_attention(
                query[None], key[None], value[None], is_causal=True, scale=scale
            )
            return Attended(out[0], 1.0)
        rows = torch.arange(num_tokens - num_queries, num_tokens)
        causal = torch.arange(num_tokens) <= rows[:, None]
        return Attended(masked(query, key, value, causal[None], scale), 1.0)


@dataclass(frozen=True)
class Neighbourhood:
    """Kept tokens see each other, and every query the newest tokens and the first ones.

    Only keys that some query of a block may see are read, so that time follows the pairs.

    Attributes:
        kept: Bool [num_sets, num_tokens]; heads share sets evenly.
        window: Newest tokens that every query sees.
        sinks: First tokens that every query sees.
    """

    kept: torch.Tensor
    window: int
    sinks: int

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> Attended:
        num_sets, num_heads, num_kv_heads = len(self.kept), query.shape[0], key.shape[0]
        out, pairs = torch.zeros_like(query), 0
        for i, kept in enumerate(self.kept):
            heads = slice(i * num_heads // num_sets, (i + 1) * num_heads // num_sets)
            # Where sets are finer than KV heads, several of them read the same head.
            first = i * num_kv_heads // num_sets
            last = max(first + 1, (i + 1) * num_kv_heads // num_sets)
            out[heads], found = self._of_set(
                query[heads], key[first:last], value[first:last], kept, scale
            )
            pairs += found
        return Attended(out, pairs / num_sets / num_causal_pairs(query.shape[1], key.shape[1]))

    def _of_set(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kept: torch.Tensor,
        scale: float,
    ) -> tuple[torch.Tensor, int]:
        """Output and number of pairs, head by head the same."""
        num_tokens = key.shape[1]
        start = num_tokens - query.shape[1]
        out, pairs = torch.zeros_like(query), 0
        step = QUERIES_AT_ONCE[query.device.type]
        for first in range(start, num_tokens, step):
            block = torch.arange(first, min(first + step, num_tokens))
            for rows, columns in self._blocks(block, kept):
                seen = self.pairs(rows, columns, kept)
                part = masked(
                    query[:, rows - start], key[:, columns], value[:, columns], seen[None], scale
                )
                out[:, rows - start] = part
                pairs += int(seen.sum())
        return out, pairs

    def _blocks(
        self, block: torch.Tensor, kept: torch.Tensor
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Queries of a block, and the keys that they may see: kept queries, and the rest."""
        first, end = int(block[0]), int(block[-1]) + 1
        near = max(0, min(first, first - self.window + 1))
        is_near = torch.zeros(end, dtype=torch.bool)
        is_near[: self.sinks] = True
        is_near[near:] = True
        found = [(block[kept[block]], (is_near | kept[:end]).nonzero()[:, 0])]
        if self.window or self.sinks:
            found.append((block[~kept[block]], is_near.nonzero()[:, 0]))
        return [(rows, columns) for rows, columns in found if len(rows)]

    def pairs(self, rows: torch.Tensor, columns: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        """As `core.neighbourhood.visible_pairs`, of some columns."""
        ahead = rows[:, None] - columns
        is_near = (ahead < self.window) | (columns < self.sinks)
        return (ahead >= 0) & (is_near | (kept[rows][:, None] & kept[columns]))
