"""How many tokens a layer keeps, and which (section 3.2 of arXiv 2410.08584).

Counts stay tensors, so that nothing here waits for a GPU.
"""

import math
from typing import NamedTuple

import torch

from vllm_zipvl.config import ZipVLConfig


class Selection(NamedTuple):
    """The tokens that one layer keeps of a context of n tokens.

    Attributes:
        kept: Bool mask [n].
        scores: Normalised scores [n], float32.
        num_by_score: How many tokens the count rule asked for, int64 []; `kept` may hold more,
            since the chunk's recent positions are always kept.
    """

    kept: torch.Tensor
    scores: torch.Tensor
    num_by_score: torch.Tensor


def num_for_mass(mass: torch.Tensor, tau: float) -> torch.Tensor:
    """Fewest tokens, largest first, whose mass reaches `tau` of the whole, int64 [].

    Args:
        mass: Attention mass per token, float32 [n], not negative.
        tau: Share to reach; 1 keeps all n.
    """
    if tau >= 1:
        return _count(mass.numel(), mass)
    # A GPU adds up in an order that varies: in float64, ranks that hold the same mass still count
    # the same.
    ordered = torch.sort(mass, descending=True, stable=True).values
    running = ordered.cumsum(0, dtype=torch.float64)
    reached = torch.searchsorted(running, running[-1:] * tau)[0]
    return (reached + 1).clamp(max=mass.numel())


def num_to_keep(mass: torch.Tensor, config: ZipVLConfig) -> torch.Tensor:
    """The count rule: by mass, or by a fixed ratio where one is set; int64 []."""
    if config.ratio is not None:
        return _count(math.ceil(config.ratio * mass.numel()), mass)
    return num_for_mass(mass, config.tau)


def keep_all(like: torch.Tensor) -> Selection:
    """Every token of a context of as many as `like` [n] has, without scores."""
    kept = torch.ones_like(like, dtype=torch.bool)
    return Selection(kept, kept.float(), _count(kept.numel(), like))


def _count(num: int, like: torch.Tensor) -> torch.Tensor:
    return torch.full((), num, dtype=torch.int64, device=like.device)


def top_mask(scores: torch.Tensor, num: torch.Tensor | int) -> torch.Tensor:
    """Bool mask [n] of the `num` largest scores; among equals the lower position first."""
    order = torch.sort(scores, descending=True, stable=True).indices
    is_top = torch.arange(scores.numel(), device=scores.device) < num
    return torch.empty_like(is_top).scatter_(0, order, is_top)


def select(
    mass: torch.Tensor, num_visible: torch.Tensor, num_recent: int, config: ZipVLConfig
) -> Selection:
    """Choose the kept tokens of one layer.

    The count comes from the raw mass; the identity from the mass per probe that may see a
    token, since early tokens are seen by more probes. The chunk's recent positions are kept
    in any case: the logits come from them.

    Args:
        mass: Column sums of the probes' attention over probes and heads, float32 [n].
        num_visible: Probes that may see each token, [n], at least 1 each.
        num_recent: Last positions that are always kept.
        config: The count rule.
    """
    num = num_to_keep(mass, config)
    scores = mass / num_visible.to(mass.dtype)
    kept = top_mask(scores, num)
    kept[mass.numel() - num_recent :] = True
    return Selection(kept, scores, num)


def cap_selections(
    selections: list[Selection], num_recent: int, max_kept: float
) -> list[torch.Tensor]:
    """Bound the mean kept share over layers; returns one bool mask [n] per layer.

    If all layers together keep more than `max_kept` of their tokens, every layer's count is
    scaled by the same factor, smallest scores first to go; the last `num_recent` tokens stay.
    """
    if max_kept >= 1:
        return [selection.kept for selection in selections]
    num_tokens = selections[0].kept.numel()
    counts = torch.stack([selection.num_by_score for selection in selections]).double()
    total = torch.stack([selection.kept.sum() for selection in selections]).sum()
    budget = max_kept * num_tokens * len(selections)
    capped = (counts * (budget / counts.sum()).clamp(max=1)).floor().long()
    masks = []
    for selection, num in zip(selections, capped, strict=True):
        kept = top_mask(selection.scores, num)
        kept[num_tokens - num_recent :] = True
        masks.append(torch.where(total > budget, kept, selection.kept))
    return masks
