import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_zipvl.config import ZipVLConfig
from vllm_zipvl.core.selection import (
    Selection,
    cap_selection,
    num_for_mass,
    num_to_keep,
    recent_mask,
    select,
    select_for_prefill,
    top_mask,
)
from vllm_zipvl.core.sequences import Sequences

MASSES = st.lists(st.integers(0, 50), min_size=1, max_size=60)


@pytest.mark.parametrize(
    ("mass", "tau", "expected"),
    [
        ([4, 3, 2, 1], 0.4, 1),
        ([1, 2, 3, 4], 0.7, 2),
        ([1, 2, 3, 4], 0.71, 3),
        ([4, 3, 2, 1], 1.0, 4),
        ([4, 3, 0, 0], 1.0, 4),
        ([4, 3, 0, 0], 0.99, 2),
        ([0, 0, 0], 0.9, 0),
        ([5], 0.01, 1),
    ],
)
def test_fewest_tokens_that_reach_the_mass(mass: list[int], tau: float, expected: int) -> None:
    assert num_for_mass(torch.tensor(mass).float(), tau) == expected


@given(MASSES, st.floats(0.01, 0.999))
def test_count_is_the_smallest(mass: list[int], tau: float) -> None:
    num = num_for_mass(torch.tensor(mass).float(), tau)
    largest = sorted(mass, reverse=True)
    goal = torch.tensor(float(sum(mass))) * tau
    assert sum(largest[:num]) >= goal
    assert num == 0 or sum(largest[: num - 1]) < goal


@given(MASSES, st.integers(0, 3000), st.floats(0.01, 0.999))
def test_what_is_covered_counts_towards_tau(mass: list[int], near: int, tau: float) -> None:
    covered = torch.tensor([float(near)], dtype=torch.float64)
    num = num_for_mass(torch.tensor(mass).float(), tau, covered=covered)
    largest, total = sorted(mass, reverse=True), sum(mass) + near
    slack = 1e-9 * total
    assert near + sum(largest[:num]) >= tau * total - slack
    assert num == 0 or near + sum(largest[: num - 1]) < tau * total + slack


def test_prefill_chooses_by_far_mass_what_neighbourhoods_leave() -> None:
    far, near = torch.tensor([1.0, 3.0, 0.0, 2.0, 0.0]), torch.tensor([50.0, 0, 24, 0, 20])
    is_recent = torch.arange(5) == 4
    num_far = torch.tensor([1, 3, 0, 1, 0])
    for tau, kept in ((0.9, [4]), (0.95, [3, 4]), (0.96, [3, 4]), (0.98, [0, 3, 4])):
        chosen = select_for_prefill(
            torch.stack([far, near]), num_far, is_recent, ZipVLConfig(tau=tau)
        )
        assert chosen.kept.nonzero().flatten().tolist() == kept


@pytest.mark.parametrize(("ratio", "expected"), [(0.1, 1), (0.42, 5), (0.5, 5), (1.0, 10)])
def test_a_fixed_ratio_rounds_up(ratio: float, expected: int) -> None:
    assert num_to_keep(torch.rand(10), ZipVLConfig(ratio=ratio)) == expected


@given(MASSES, st.integers(0, 70))
def test_kept_tokens_are_the_top_scores(scores: list[int], num: int) -> None:
    kept = top_mask(torch.tensor(scores).float(), num)
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    assert kept.nonzero().flatten().tolist() == sorted(order[:num])


def test_among_equals_the_lower_position_is_kept() -> None:
    assert top_mask(torch.tensor([1.0, 2, 1, 2, 1]), 3).tolist() == [True, True, False, True, False]


def test_count_comes_from_mass_and_identity_from_scores() -> None:
    mass = torch.tensor([6.0, 1.0, 2.0, 3.0])
    num_visible = torch.tensor([12, 4, 2, 1])
    selection = select(mass, num_visible, torch.arange(4) >= 3, ZipVLConfig(tau=0.7))
    assert selection.num_by_score == 2
    assert selection.kept.tolist() == [False, False, True, True]
    assert torch.equal(selection.scores, torch.tensor([0.5, 0.25, 1.0, 3.0]))


def test_recent_positions_are_kept_beyond_the_count() -> None:
    is_recent = recent_mask(2, 4, torch.device("cpu"))
    mass = torch.tensor([9.0, 1, 1, 1])
    selection = select(mass, torch.ones(4), is_recent, ZipVLConfig(ratio=0.25))
    assert selection.num_by_score == 1
    assert selection.kept.tolist() == [True, False, True, True]


def make_selection(scores: torch.Tensor, nums: list[int], is_recent: torch.Tensor) -> Selection:
    """Of one context, a row of `scores` for each layer."""
    wanted = torch.tensor(nums)[:, None]
    return Selection(top_mask(scores, wanted) | is_recent, scores, wanted)


def recent(num_recent: int, num_tokens: int) -> torch.Tensor:
    return recent_mask(num_recent, num_tokens, torch.device("cpu"))


def test_a_cap_that_holds_changes_nothing() -> None:
    selection = make_selection(torch.rand(2, 20), [3, 5], recent(2, 20))
    assert torch.equal(cap_selection(selection, recent(2, 20), 0.9), selection.kept)


def test_a_cap_scales_every_layer_by_the_same_factor() -> None:
    scores = torch.arange(100, 0, -1).float().repeat(2, 1)
    selection = make_selection(scores, [80, 40], recent(0, 100))
    masks = cap_selection(selection, recent(0, 100), 0.3)
    assert masks.sum(1).tolist() == [40, 20]
    assert masks[0][:40].all()


@given(st.lists(st.integers(1, 50), min_size=1, max_size=6), st.integers(0, 8), st.floats(0.05, 1))
def test_capped_sets_shrink_and_keep_recent_ones(
    nums: list[int], num_recent: int, max_kept: float
) -> None:
    generator = torch.Generator().manual_seed(len(nums))
    scores, is_recent = torch.rand(len(nums), 50, generator=generator), recent(num_recent, 50)
    selection = make_selection(scores, nums, is_recent)
    masks = cap_selection(selection, is_recent, max_kept)
    assert not (masks & ~selection.kept).any()
    assert masks[:, is_recent].all()
    excess = len(nums) * num_recent
    assert int(masks.sum()) <= max_kept * 50 * len(nums) + excess


@pytest.mark.parametrize("settings", [{"tau": 0.7}, {"tau": 1.0}, {"ratio": 0.4}], ids=str)
@pytest.mark.parametrize("max_kept", [1.0, 0.3])
@given(st.lists(st.integers(1, 30), min_size=1, max_size=5), st.integers(0, 2**31))
def test_contexts_side_by_side_choose_as_each_alone(
    max_kept: float, settings: dict[str, float], lengths: list[int], seed: int
) -> None:
    """Three layers; scores tie."""
    generator, config = torch.Generator().manual_seed(seed), ZipVLConfig(**settings)
    num_tokens = sum(lengths)
    mass = torch.randint(0, 9, (3, num_tokens), generator=generator).float()
    num_visible = torch.randint(1, 4, (num_tokens,), generator=generator)
    is_recent = torch.cat([recent(2, length) for length in lengths])
    contexts = Sequences(lengths, torch.device("cpu"))
    together = select(mass, num_visible, is_recent, config, contexts)
    capped = cap_selection(together, is_recent, max_kept, contexts)
    for place, own in enumerate(contexts.slices()):
        alone = select(mass[:, own], num_visible[own], is_recent[own], config)
        assert torch.equal(together.kept[:, own], alone.kept)
        assert torch.equal(together.num_by_score[:, place, None], alone.num_by_score)
        assert torch.equal(capped[:, own], cap_selection(alone, is_recent[own], max_kept))
    prefilled = select_for_prefill(mass[:2], num_visible, is_recent, config, contexts)
    for own in contexts.slices():
        alone = select_for_prefill(mass[:2, own], num_visible[own], is_recent[own], config)
        assert torch.equal(prefilled.kept[own], alone.kept)


@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf])
def test_a_context_without_sums_leaves_the_others_theirs(bad: float) -> None:
    generator, config = torch.Generator().manual_seed(0), ZipVLConfig(tau=0.9)
    mass = torch.rand(3, 40, generator=generator)
    mass[1, 7] = bad
    contexts, every = Sequences([40] * 3, torch.device("cpu")), torch.ones(120)
    is_recent = recent(1, 40).repeat(3)
    together = select(mass.flatten(), every, is_recent, config, contexts)
    for place in (0, 2):
        own = contexts.slices()[place]
        alone = select(mass[place], every[own], is_recent[own], config)
        assert torch.equal(together.kept[own], alone.kept)
    far = torch.rand(120, generator=generator)
    mass = torch.stack([far, mass.flatten()])
    together = select_for_prefill(mass, every, is_recent, config, contexts)
    for place in (0, 2):
        own = contexts.slices()[place]
        alone = select_for_prefill(mass[:, own], every[own], is_recent[own], config)
        assert torch.equal(together.kept[own], alone.kept)
