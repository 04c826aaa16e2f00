from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from vllm_zipvl.backend.runs import runs_of


@given(st.lists(st.integers(1, 50), max_size=12), st.integers(1, 80), st.booleans())
def test_runs_hold_everything_and_stay_within_the_limit(
    sizes: list[int], limit: int, is_padded: bool
) -> None:
    runs = list(runs_of(sizes, int, limit, is_padded))
    assert [size for run in runs for size in run] == sizes

    def taken(run: list[int]) -> int:
        return max(run) * len(run) if is_padded else sum(run)

    assert all(len(run) == 1 or taken(run) <= limit for run in runs)
    # None is shorter than it had to be.
    assert all(taken([*run, following[0]]) > limit for run, following in pairwise(runs))
