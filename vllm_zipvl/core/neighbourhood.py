"""Which pairs of a query and a key a sparse prefill attends to: kept ones and near ones."""

import torch


def visible_pairs(
    positions: torch.Tensor, kept: torch.Tensor, window: int, sinks: int
) -> torch.Tensor:
    """Query i sees key j <= i where both are kept, or j > i - `window`, or j < `sinks`.

    Kept tokens are global, and every query keeps its neighbourhood. With `window` and `sinks` 0,
    the rule of arXiv 2410.08584, a query that is not kept sees nothing.

    Args:
        positions: The queries' in their context, int64 [num_queries].
        kept: Bool mask [num_tokens].
        window: Newest tokens that every query sees, itself among them.
        sinks: First tokens that every query sees.

    Returns:
        Bool [num_queries, num_tokens].
    """
    tokens = torch.arange(len(kept), device=kept.device)
    ahead = positions[:, None] - tokens
    is_near = (ahead < window) | (tokens < sinks)
    return (ahead >= 0) & (is_near | (kept[positions][:, None] & kept))
