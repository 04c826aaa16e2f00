"""Parts of the lab on pretrained weights, each against what is known of it."""

import pytest
import real_report
import torch
from real_attention import Everything, Neighbourhood
from real_baselines import FastV, VerticalSlash
from real_cache import BLOCK_SIZE, Cache, Stored
from real_prefill import FULL, Layer, Sparse, View
from real_probes import Probing, Tally
from real_rules import Rule, num_for_rest

from vllm_zipvl.core.neighbourhood import visible_pairs

HEADS, KV_HEADS, SIZE = 6, 2, 16


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def qkv(num_queries: int, num_tokens: int) -> tuple[torch.Tensor, ...]:
    query = 3 * torch.randn(HEADS, num_queries, SIZE)
    return query, *torch.randn(2, KV_HEADS, num_tokens, SIZE)


def plain(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pairs: torch.Tensor
) -> torch.Tensor:
    """Attention over bool pairs [num_heads, num_queries, num_tokens] in float64."""
    key, value = (x.double().repeat_interleave(HEADS // KV_HEADS, 0) for x in (key, value))
    scores = query.double() @ key.transpose(1, 2) * SIZE**-0.5
    weights = scores.masked_fill(~pairs, -torch.inf).softmax(-1).nan_to_num(0)
    return (weights @ value).float()


@pytest.mark.parametrize("num_sets", [1, KV_HEADS, HEADS])
@pytest.mark.parametrize(("window", "sinks"), [(0, 0), (1, 0), (0, 3), (50, 4), (700, 0)])
@pytest.mark.parametrize("num_queries", [600, 130])
def test_a_neighbourhood_is_the_visible_pairs(num_sets, window, sinks, num_queries):
    num_tokens = 600
    query, key, value = qkv(num_queries, num_tokens)
    kept = torch.rand(num_sets, num_tokens) < 0.3
    rows = torch.arange(num_tokens - num_queries, num_tokens)
    pairs = torch.stack([visible_pairs(rows, own, window, sinks) for own in kept])
    pairs = pairs.repeat_interleave(HEADS // num_sets, 0)
    found = Neighbourhood(kept, window, sinks).attend(query, key, value, SIZE**-0.5)
    torch.testing.assert_close(found.out, plain(query, key, value, pairs), atol=1e-5, rtol=1e-5)
    causal = (torch.arange(num_tokens) <= rows[:, None]).sum()
    assert found.pairs == pytest.approx(float(pairs.sum() / HEADS / causal))


@pytest.mark.parametrize("num_queries", [300, 100])
def test_everything_is_causal(num_queries):
    query, key, value = qkv(num_queries, 300)
    rows = torch.arange(300 - num_queries, 300)
    pairs = (torch.arange(300) <= rows[:, None]).expand(HEADS, -1, -1)
    found = Everything().attend(query, key, value, SIZE**-0.5)
    torch.testing.assert_close(found.out, plain(query, key, value, pairs), atol=1e-5, rtol=1e-5)
    assert found.pairs == 1


def test_near_mass_and_mass_outside_are_all_mass():
    query, key, _ = qkv(200, 200)
    near = Tally(Probing(16, 16, 0, 30, 4)).add(query, key, SIZE**-0.5)
    assert float(near.mass.sum()) == pytest.approx(32 * HEADS, rel=1e-5)
    assert near.num_probes == 32
    assert bool((near.outside <= near.mass).all()) and not near.outside[:, :4].any()
    # From the last 16 positions on, every token lies in the window of all that see it.
    assert not near.outside[:, 170:].any() and not near.num_outside[170:].any()
    alone = Tally(Probing(16, 16, 0, 0, 0)).add(query, key, SIZE**-0.5)
    torch.testing.assert_close(alone.outside, alone.mass)
    assert torch.equal(alone.num_outside, alone.num_visible)


def test_random_probes_stay_from_chunk_to_chunk():
    query, key, _ = qkv(200, 200)
    tally = Tally(Probing(8, 8, 0, 0, 0))
    for end in (120, 200):
        start = 0 if end == 120 else 120
        seen = tally.add(query[:, start:end], key[:, :end], SIZE**-0.5)
    assert seen.num_probes == 24
    assert float(seen.mass.sum()) == pytest.approx(24 * HEADS, rel=1e-5)


def test_the_rest_is_counted_from_what_is_covered():
    outside = torch.tensor([[1.0, 4.0, 0.0, 2.0, 1.0]])
    # 8 of 20 lie outside, so 12 are covered.
    for tau, expected in ((0.5, 0), (0.6, 0), (0.7, 1), (0.8, 1), (0.85, 2), (0.92, 3), (0.99, 4)):
        assert int(num_for_rest(outside, tau, 20)) == expected


def test_with_no_neighbourhood_both_counts_are_one():
    query, key, _ = qkv(300, 300)
    seen = Tally(Probing(32, 32, 0, 0, 0)).add(query, key, SIZE**-0.5)
    for tau in (0.5, 0.9, 1.0):
        now, outside = (Rule(tau, outside=x).choose(seen, KV_HEADS) for x in (False, True))
        assert torch.equal(now, outside)


@pytest.mark.parametrize("sets", [("layer", 1), ("kv_head", KV_HEADS), ("head", HEADS)])
def test_sets_have_the_recent_and_what_was_asked_for(sets):
    query, key, _ = qkv(300, 300)
    seen = Tally(Probing(32, 32, 0, 16, 2)).add(query, key, SIZE**-0.5)
    name, num = sets
    for rule in (Rule(ratio=0.3, sets=name), Rule(ratio=0.3, sets=name, order="random")):
        kept = rule.choose(seen, KV_HEADS)
        assert kept.shape == (num, 300) and bool(kept[:, -32:].all())
        assert bool((kept.sum(1) >= 90).all()) and bool((kept.sum(1) <= 122).all())


def view_of(num_tokens: int, kept: torch.Tensor) -> View:
    return View(Everything(), kept[None])


@pytest.mark.parametrize("head", [0, 4])
def test_a_cache_changes_what_is_due_and_nothing_else(head):
    n = 5 * BLOCK_SIZE + 7
    key, value = torch.randn(2, KV_HEADS, n, SIZE)
    kept = torch.rand(n) < 0.5
    end = 4 * BLOCK_SIZE
    cache = Cache(16, 4, head=head)
    (after,) = cache.after([Stored.of(key, value, None)], [view_of(n, kept)])
    is_due = ~kept & (torch.arange(n) < end) & (torch.arange(n) >= head)
    for old, new in ((key, after.key), (value, after.value)):
        assert torch.equal(new[:, ~is_due], old[:, ~is_due])
        error = (new - old)[:, is_due].norm() / old[:, is_due].norm()
        assert 0.01 < error < 0.2
    evicting = Cache(16, 0, head=head)
    (after,) = evicting.after([Stored.of(key, value, None)], [view_of(n, kept)])
    assert torch.equal(after.key, key[:, ~is_due]) and after.num_prompt == n - int(is_due.sum())
    share, high = evicting.share([Stored.of(key, value, None)], [view_of(n, kept)])
    assert share == pytest.approx(1 - float(is_due.float().mean()))
    assert high == pytest.approx(float(kept.float().mean()))


def test_fp8_is_half_and_near():
    key = torch.randn(2, KV_HEADS, 40, SIZE)
    cache = Cache(fp8=True)
    (stored,) = cache.before([Stored.of(key[0], key[1], None)])
    assert 0.01 < float((stored.key - key[0]).norm() / key[0].norm()) < 0.04
    kept = torch.ones(40, dtype=torch.bool)
    assert cache.share([stored], [view_of(40, kept)])[0] == 0.5


def test_fastv_drops_after_its_layer():
    method = FastV(dropped=0.5, layer=2, num_last=8)
    chooser, views = method.chooser(), []
    for i in range(4):
        query, key, _ = qkv(100, 100)
        views.append(chooser.view(Layer(i, 4, query, key, SIZE**-0.5)))
    assert [view.there is None for view in views] == [True, True, False, False]
    assert int(views[2].there.sum()) == 50 and bool(views[2].there[-8:].all())
    assert torch.equal(views[2].there, views[3].there)


@pytest.mark.parametrize("share", [0.1, 1.0])
def test_lines_are_columns_and_diagonals(share):
    query, key, value = qkv(300, 300)
    view = VerticalSlash(share, num_nearest=8).view(Layer(0, 1, query, key, SIZE**-0.5))
    lines = view.sight
    ahead = torch.arange(300)[:, None] - torch.arange(300)
    pairs = lines.columns[:, None] | lines.diagonals[:, ahead.clamp(min=0)]
    pairs &= ahead >= 0
    found = lines.attend(query, key, value, SIZE**-0.5)
    torch.testing.assert_close(found.out, plain(query, key, value, pairs), atol=1e-5, rtol=1e-5)
    assert found.pairs == pytest.approx(float(pairs.sum()) / HEADS / (300 * 301 / 2))
    assert bool(lines.diagonals[:, :8].all()) and bool(lines.columns[:, :4].all())


def test_prompts_are_cut_as_the_engine_cuts_them():
    assert list(FULL.chunks(700)) == [slice(0, 700)]
    assert list(Sparse(chunk=256).chunks(700)) == [slice(0, 256), slice(256, 512), slice(512, 700)]
    # A token alone would be taken for one of the answer.
    assert list(Sparse(chunk=256).chunks(513)) == [slice(0, 256), slice(256, 513)]


def test_intervals_are_students():
    for freedom, expected in ((1, 12.706), (5, 2.571), (11, 2.201), (23, 2.069)):
        assert real_report.quantile(freedom) == pytest.approx(expected, rel=3e-3)
    assert real_report.interval([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 2) == "3.50 ± 1.96"
