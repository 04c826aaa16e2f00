"""How many tokens a layer keeps, and which (section 3.2 of arXiv 2410.08584).

Prefill and cache choose by one tau: prefill counts what neighbourhoods cover, the cache does not.

Functions take the contexts of several requests laid end to end, [..., num_tokens], and choose in
each by itself; without `contexts` there is one. Counts stay tensors, so that nothing here waits for
a GPU.
"""

from typing import NamedTuple

import torch

from vllm_zipvl.config import ZipVLConfig
from vllm_zipvl.core.sequences import Sequences

_MOST_BITS = 0x7FFFFFFF


class Selection(NamedTuple):
    """The tokens that are kept of contexts.

    Attributes:
        kept: Bool mask [..., num_tokens].
        scores: Normalised scores, float32 [..., num_tokens].
        num_by_score: How many tokens of each context the count rule asked for, int64
            [..., num_contexts]; `kept` may hold more, since recent positions are always kept.
    """

    kept: torch.Tensor
    scores: torch.Tensor
    num_by_score: torch.Tensor


def _contexts(like: torch.Tensor, contexts: Sequences | None) -> Sequences:
    return Sequences([like.shape[-1]], like.device) if contexts is None else contexts


def _descending(scores: torch.Tensor, contexts: Sequences) -> torch.Tensor:
    """Tokens by score, largest first, context by context; among equals the lower position first.

    Scores of several contexts are not negative.
    """
    if len(contexts) == 1:
        return torch.sort(scores, dim=-1, descending=True, stable=True).indices
    # As integers, the bits of floats that are not negative are in the order of the floats. NaN may
    # have a sign.
    bits = scores.float().view(torch.int32) & _MOST_BITS
    keys = (contexts.owners << 32) + (_MOST_BITS - bits)
    return torch.sort(keys, dim=-1, stable=True).indices


def num_for_mass(
    mass: torch.Tensor,
    tau: float,
    contexts: Sequences | None = None,
    covered: torch.Tensor | None = None,
) -> torch.Tensor:
    """Fewest tokens, largest first, that carry `tau` of a context's mass beside what is covered.

    Args:
        mass: Attention mass per token, float32 [..., num_tokens], not negative.
        tau: Share to reach; 1 keeps all.
        contexts: Whose tokens they are.
        covered: Mass of each context that is there whatever is kept, beside `mass`, float64
            [..., num_contexts].

    Returns:
        int64 [..., num_contexts].
    """
    contexts = _contexts(mass, contexts)
    lengths = contexts.device_lengths.expand(*mass.shape[:-1], -1)
    if tau >= 1:
        return lengths
    ordered = mass.gather(-1, _descending(mass, contexts))
    # One context's NaN or infinity is not to reach the next one's sums.
    ordered = ordered.nan_to_num(nan=0, posinf=0)
    # A GPU adds up in an order that varies: in float64, ranks that hold the same mass still count
    # the same.
    running = ordered.cumsum(-1, dtype=torch.float64)
    before = contexts.at_starts(running)
    wanted = before.diff(dim=-1) * tau
    if covered is not None:
        wanted -= covered * (1 - tau)
    goals = before[..., :-1] + wanted
    is_below = running < goals[..., contexts.owners]
    return (contexts.counts(is_below) + (wanted > 0)).minimum(lengths)


def num_to_keep(
    mass: torch.Tensor,
    config: ZipVLConfig,
    contexts: Sequences | None = None,
    covered: torch.Tensor | None = None,
) -> torch.Tensor:
    """The count rule: by mass, or by a fixed ratio where one is set; as `num_for_mass`."""
    if config.ratio is None:
        return num_for_mass(mass, config.tau, contexts, covered)
    lengths = _contexts(mass, contexts).device_lengths.double()
    return (config.ratio * lengths).ceil().long().expand(*mass.shape[:-1], -1)


def top_mask(
    scores: torch.Tensor, num: torch.Tensor | int, contexts: Sequences | None = None
) -> torch.Tensor:
    """The `num` largest scores of each context; among equals the lower position first.

    Args:
        scores: [..., num_tokens].
        num: int64 [..., num_contexts], or one number for all.
        contexts: Whose tokens they are.

    Returns:
        Bool mask [..., num_tokens].
    """
    contexts = _contexts(scores, contexts)
    limits = num[..., contexts.owners] if isinstance(num, torch.Tensor) else num
    order = _descending(scores, contexts)
    is_top = (contexts.positions < limits).expand_as(order)
    return torch.empty_like(is_top, memory_format=torch.contiguous_format).scatter_(
        -1, order, is_top
    )


def recent_mask(num_recent: int, num_tokens: int, device: torch.device) -> torch.Tensor:
    """The last `num_recent` of one context's tokens, bool [num_tokens]."""
    return torch.arange(num_tokens, device=device) >= num_tokens - num_recent


def select(
    mass: torch.Tensor,
    num_probes: torch.Tensor,
    is_recent: torch.Tensor,
    config: ZipVLConfig,
    contexts: Sequences | None = None,
    covered: torch.Tensor | None = None,
) -> Selection:
    """Choose the kept tokens of a layer, or of several.

    The count comes from the raw mass; the identity from the mass per probe that it comes from,
    since early tokens are seen by more probes. The chunk's recent positions are kept in any case:
    the logits come from them.

    Args:
        mass: Column sums of the probes' attention over probes and heads, float32
            [..., num_tokens].
        num_probes: How many probes each token's may come from, [num_tokens].
        is_recent: What is always kept, bool [num_tokens].
        config: The count rule.
        contexts: Whose tokens they are.
        covered: As for `num_for_mass`.
    """
    num = num_to_keep(mass, config, contexts, covered)
    scores = mass / num_probes.clamp(min=1).to(mass.dtype)
    return Selection(top_mask(scores, num, contexts) | is_recent, scores, num)


def select_for_prefill(
    mass: torch.Tensor,
    num_far: torch.Tensor,
    is_recent: torch.Tensor,
    config: ZipVLConfig,
    contexts: Sequences | None = None,
) -> Selection:
    """Choose what a sparse prefill attends to beside every query's neighbourhood.

    What probes find in their own neighbourhood counts towards tau already; the rest is chosen by
    what they find outside of it.

    Args:
        mass: Far and near, float32 [2, num_tokens].
        num_far: Probes outside of whose neighbourhood each token is, [num_tokens].
        is_recent: As for `select`.
        config: As for `select`.
        contexts: As for `select`.
    """
    far, near = mass
    covered = _contexts(near, contexts).sums(near.nan_to_num(nan=0, posinf=0))
    return select(far, num_far, is_recent, config, contexts, covered)


def cap_selection(
    selection: Selection,
    is_recent: torch.Tensor,
    max_kept: float,
    contexts: Sequences | None = None,
) -> torch.Tensor:
    """Bound the mean kept share of each context over layers.

    If all layers together keep more than `max_kept` of a context's tokens, every layer's count is
    scaled by the same factor, smallest scores first to go; recent tokens stay.

    Args:
        selection: Of all layers, [num_layers, num_tokens].
        is_recent: What is always kept, bool [num_tokens].
        max_kept: Upper bound of the share.
        contexts: Whose tokens they are.

    Returns:
        Bool mask [num_layers, num_tokens].
    """
    if max_kept >= 1:
        return selection.kept
    contexts = _contexts(is_recent, contexts)
    wanted = selection.num_by_score.double()
    budgets = max_kept * contexts.device_lengths.double() * len(wanted)
    capped = (wanted * (budgets / wanted.sum(0)).clamp(max=1)).floor().long()
    is_over = contexts.counts(selection.kept).sum(0) > budgets
    kept = top_mask(selection.scores, capped, contexts) | is_recent
    return torch.where(is_over[contexts.owners], kept, selection.kept)
