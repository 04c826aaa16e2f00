from pathlib import Path
from types import SimpleNamespace

import pytest

BENCH = Path(__file__).parents[2] / "scripts" / "bench"


@pytest.fixture(scope="module")
def bench():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCH)
        import key_norms
        import key_statistics

        patch.setattr(key_statistics, "NUM_DECODED", 800)
        yield SimpleNamespace(**vars(key_norms) | vars(key_statistics))


def test_what_is_stored_keeps_its_error_where_deviations_do_not(bench):
    case = bench.Case(64, 1e4, 16, 300, (20,))
    inputs = bench.sample(case)
    found = {
        name: bench.errors(inputs, case.prompt_len, bench.RULES[name](), (4, 2)).sqrt()
        for name in ("deviation", "stored")
    }
    # Queries of four hundreds are those of 16 tokens: the third hundred, and the last.
    third, last = (found["stored"][i, 0].mean() for i in (slice(8, 12), slice(-4, None)))
    assert last <= 1.1 * third
    assert found["deviation"][-4:, 0].mean() > 5 * last
    assert found["deviation"][-4:, 1].mean() > 2 * found["stored"][-4:, 1].mean()


def test_every_rule_stores_keys_without_bias(bench):
    case = bench.Case(64, 1e4, 80, 0, (0,))
    inputs = bench.sample(case)
    for name, make in bench.RULES.items():
        logits = bench.errors(inputs, case.prompt_len, make(), (8, 8))[8:, 0].sqrt()
        assert 0 < float(logits.min()) <= float(logits.max()) < 0.02, name


def test_tails_follow_the_prompt_as_in_the_engine(bench):
    assert list(bench.compressions(80, 500)) == [
        (0, 48, 80), (48, 176, 208), (176, 304, 336), (304, 432, 464)
    ]  # fmt: skip
