import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_zipvl.core.probes import num_far_probes, num_visible_probes, probe_positions


@given(
    st.integers(0, 5),
    st.integers(0, 300),
    st.integers(1, 400),
    st.integers(1, 80),
    st.integers(0, 80),
)
def test_probes_lie_in_the_chunk(
    seed: int, start: int, length: int, recent: int, random: int
) -> None:
    end = start + length
    probes = probe_positions(seed, start, end, recent, random)
    assert probes.recent.tolist() == list(range(max(start, end - recent), end))
    rest = length - len(probes.recent)
    assert len(probes.random) == min(random, rest)
    assert (np.diff(probes.random) > 0).all()
    assert not len(probes.random) or start <= probes.random[0]
    assert not len(probes.random) or probes.random[-1] < probes.recent[0]


def test_the_draw_is_pinned() -> None:
    # Every implementation and every rank must draw these.
    assert probe_positions(0, 0, 1000, 4, 6).random.tolist() == [292, 445, 614, 849, 886, 900]
    assert probe_positions(1, 0, 1000, 4, 6).random.tolist() != [292, 445, 614, 849, 886, 900]
    assert probe_positions(0, 1, 1000, 4, 6).random.tolist() != [292, 445, 614, 849, 886, 900]


def test_every_position_is_as_likely() -> None:
    hits = np.zeros(100)
    for seed in range(2000):
        hits[probe_positions(seed, 0, 110, 10, 20).random] += 1
    # A binomial of 2000 draws at 0.2: five standard deviations.
    assert np.abs(hits - 400).max() < 5 * (2000 * 0.2 * 0.8) ** 0.5


def test_probes_are_shared_so_must_not_be_written() -> None:
    with pytest.raises(ValueError, match="read-only"):
        probe_positions(0, 0, 100, 4, 4).random[0] = 1


def test_visible_probes_are_counted_from_the_right() -> None:
    assert num_visible_probes(np.array([1, 3, 4]), 5).tolist() == [3, 3, 2, 2, 1]


@pytest.mark.parametrize(("window", "sinks"), [(0, 0), (1, 0), (3, 2), (0, 4), (9, 0), (2, 30)])
def test_far_probes_have_the_token_outside_of_their_neighbourhood(window: int, sinks: int) -> None:
    positions = np.array([1, 3, 4, 11])
    expected = [sum(i - j >= window and j >= sinks for i in positions) for j in range(12)]
    assert num_far_probes(positions, 12, window, sinks).tolist() == expected
