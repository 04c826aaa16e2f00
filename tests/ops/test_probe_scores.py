import pytest
import torch
from kernels import DEVICE, INTERPRETED, seed

from vllm_zipvl.core.sequences import Sequences
from vllm_zipvl.ops.probe_scores import ProbePlaces, probe_scores


def truth(
    queries: torch.Tensor, positions: torch.Tensor, keys: torch.Tensor, scale: float,
    dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    """Mass per probe and token [num_probes, num_tokens], summed over heads."""
    group = queries.shape[1] // keys.shape[1]
    k = keys.to(dtype).repeat_interleave(group, dim=1)
    scores = torch.einsum("ihd,jhd->hij", queries.to(dtype), k) * scale
    hidden = torch.arange(len(keys)) > positions[:, None]
    return scores.masked_fill(hidden, float("-inf")).softmax(-1).sum(0)


def lengths(*num_tokens: int) -> Sequences:
    return Sequences(num_tokens, torch.device(DEVICE))


def places(positions: torch.Tensor, num_random: int) -> ProbePlaces:
    """Of one context, random ones first."""
    is_random = torch.arange(len(positions)) < num_random
    return ProbePlaces(positions, is_random, lengths(len(positions)))


def check_mass(
    num_tokens: int,
    heads: tuple[int, int],
    head_size: int,
    dtype: torch.dtype,
    num_probes: tuple[int, int],
    window: int = 7,
    sinks: int = 2,
) -> None:
    """Of so many random and recent probes, or fewer where there are not as many tokens."""
    seed(num_tokens)
    recent = torch.arange(max(0, num_tokens - num_probes[1]), num_tokens)
    random = torch.randperm(int(recent[0]))[: num_probes[0]].sort().values
    positions = torch.cat([random, recent])
    queries = torch.randn(len(positions), heads[0], head_size).to(dtype)
    keys = torch.randn(num_tokens, heads[1], head_size).to(dtype)
    probes, scale = places(positions, len(random)), head_size**-0.5
    found = probe_scores(queries, probes, keys, lengths(num_tokens), scale, window, sinks)
    tokens = torch.arange(num_tokens)
    near = (positions[:, None] - tokens < window) | (tokens < sinks)
    exact = truth(queries, positions, keys, scale, torch.float64)
    same = truth(queries, positions, keys, scale, torch.float32)
    assert found.dtype == torch.float32
    for of_class, part in zip(found, (slice(len(random)), slice(len(random), None)), strict=True):
        for mass, pairs in zip(of_class, (~near, near), strict=True):
            expected = (exact * pairs)[part].sum(0)
            rounding = torch.finfo(torch.float32).eps * len(positions) * heads[0]
            error = ((same * pairs)[part].sum(0) - expected).abs().max()
            budget = 4 * error + rounding * expected.max()
            assert ((mass.double() - expected).abs() <= budget).all()
            assert not mass[~pairs[part].any(0)].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("heads", [(28, 4), (8, 8), (32, 8)][: 2 if INTERPRETED else 3], ids=str)
@pytest.mark.parametrize("num_tokens", [1, 63, 111, 300 if INTERPRETED else 1000])
def test_mass_matches_fp64(num_tokens: int, heads: tuple[int, int], dtype: torch.dtype) -> None:
    check_mass(num_tokens, heads, 64, dtype, (7, 10))


@pytest.mark.parametrize(("window", "sinks"), [(0, 0), (1, 0), (0, 5), (40, 3), (400, 0), (3, 400)])
@pytest.mark.parametrize("num_tokens", [5, 150])
def test_mass_of_any_neighbourhood(num_tokens: int, window: int, sinks: int) -> None:
    check_mass(num_tokens, (6, 2), 32, torch.float32, (9, 12), window, sinks)


def test_contexts_side_by_side_are_as_each_alone() -> None:
    """Some longer than a tile, one with a single token, one without random probes."""
    seed(0)
    contexts, num_probes = (150, 1, 70, 9), (20, 1, 12, 5)
    num_random = (12, 0, 3, 0)
    queries = torch.randn(sum(num_probes), 6, 32)
    keys = torch.randn(sum(contexts), 2, 32)
    alone = [
        places(torch.randperm(n)[:m].sort().values, r)
        for n, m, r in zip(contexts, num_probes, num_random, strict=True)
    ]
    together = ProbePlaces(
        torch.cat([one.positions for one in alone]),
        torch.cat([one.is_random for one in alone]),
        lengths(*num_probes),
    )
    found = probe_scores(queries, together, keys, lengths(*contexts), 0.2, 7, 2)
    own = zip(
        alone, queries.split(num_probes), keys.split(contexts), found.split(contexts, dim=2),
        strict=True,
    )  # fmt: skip
    for probes, q, k, mass in own:
        expected = probe_scores(q, probes, k, lengths(len(k)), 0.2, 7, 2)
        assert torch.allclose(mass, expected, rtol=1e-5, atol=1e-6)


def test_a_probe_sees_nothing_after_itself() -> None:
    keys = torch.full((100, 2, 16), 1e4)
    keys[:41] = torch.randn(41, 2, 16)
    probes = places(torch.tensor([20, 40]), 1)
    mass = probe_scores(torch.rand(2, 4, 16), probes, keys, lengths(100), 0.25, 7, 2)
    random, recent = mass.sum(1)
    assert not random[21:].any()
    assert not recent[41:].any()
    assert torch.allclose(random.sum(), torch.tensor(4.0))


def test_heads_must_share_kv_heads_evenly() -> None:
    with pytest.raises(ValueError, match="num_heads 6 must be a multiple of num_kv_heads 4"):
        probes = places(torch.tensor([0]), 0)
        probe_scores(torch.rand(1, 6, 16), probes, torch.rand(1, 4, 16), lengths(1), 1.0, 7, 2)
