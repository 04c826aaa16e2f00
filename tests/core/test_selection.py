import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_zipvl.config import ZipVLConfig
from vllm_zipvl.core.selection import (
    Selection,
    cap_selections,
    num_for_mass,
    num_to_keep,
    select,
    top_mask,
)

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
        ([0, 0, 0], 0.9, 1),
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
    assert num == 1 or sum(largest[: num - 1]) < goal


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
    selection = select(mass, num_visible, 1, ZipVLConfig(tau=0.7))
    assert selection.num_by_score == 2
    assert selection.kept.tolist() == [False, False, True, True]
    assert torch.equal(selection.scores, torch.tensor([0.5, 0.25, 1.0, 3.0]))


def test_recent_positions_are_kept_beyond_the_count() -> None:
    selection = select(torch.tensor([9.0, 1, 1, 1]), torch.ones(4), 2, ZipVLConfig(ratio=0.25))
    assert selection.num_by_score == 1
    assert selection.kept.tolist() == [True, False, True, True]


def make_selection(scores: torch.Tensor, num: int, num_recent: int) -> Selection:
    kept = top_mask(scores, num)
    kept[len(scores) - num_recent :] = True
    return Selection(kept, scores, torch.tensor(num))


def test_a_cap_that_holds_changes_nothing() -> None:
    selections = [make_selection(torch.rand(20), num, 2) for num in (3, 5)]
    masks = cap_selections(selections, 2, 0.9)
    assert all(torch.equal(m, s.kept) for m, s in zip(masks, selections, strict=True))


def test_a_cap_scales_every_layer_by_the_same_factor() -> None:
    scores = torch.arange(100, 0, -1).float()
    masks = cap_selections([make_selection(scores, num, 0) for num in (80, 40)], 0, 0.3)
    assert [int(mask.sum()) for mask in masks] == [40, 20]
    assert masks[0][:40].all()


@given(st.lists(st.integers(1, 50), min_size=1, max_size=6), st.integers(0, 8), st.floats(0.05, 1))
def test_capped_sets_shrink_and_keep_recent_ones(
    nums: list[int], num_recent: int, max_kept: float
) -> None:
    generator = torch.Generator().manual_seed(len(nums))
    selections = [make_selection(torch.rand(50, generator=generator), n, num_recent) for n in nums]
    masks = cap_selections(selections, num_recent, max_kept)
    for mask, selection in zip(masks, selections, strict=True):
        assert not (mask & ~selection.kept).any()
        assert mask[50 - num_recent :].all()
    excess = len(nums) * num_recent
    assert sum(int(mask.sum()) for mask in masks) <= max_kept * 50 * len(nums) + excess
