import math

import pytest
import torch

from vllm_zipvl.core.quantization import (
    KEY_ZEROS,
    fold_key_norm,
    hadamard,
    key_norm,
    normalise_keys,
    places,
    restore_keys,
    rotate,
    through,
)


def test_folding_a_key_norm_gives_the_scores_of_the_keys() -> None:
    keys = 5 * torch.randn(200, 2, 64) * torch.rand(64) + torch.randn(64)
    norm = key_norm(keys)
    queries = torch.randn(2, 3, 64)
    stored = rotate(normalise_keys(keys, norm))
    folded, offsets = fold_key_norm(queries, norm)
    scores = folded @ stored.permute(1, 2, 0) + offsets[..., None]
    exact = queries.double() @ keys.double().permute(1, 2, 0)
    same = queries @ keys.permute(1, 2, 0)
    rounding = 64 * torch.finfo(torch.float32).eps * keys.abs().max()
    assert (scores - exact).abs().max() <= 4 * (same - exact).abs().max() + rounding


def test_a_channel_that_never_varies_has_a_usable_norm() -> None:
    norm = key_norm(torch.full((10, 1, 4), 3.0))
    assert torch.equal(norm.mean, torch.full((1, 4), 3.0))
    # As if it strayed by a tenth of itself.
    assert torch.allclose(norm.scale.float()[0, [1, 3]], torch.tensor(0.3**0.5), rtol=1e-3)


@pytest.mark.parametrize("value", [0.0, 1e-7])
def test_keys_of_hardly_any_size_have_a_usable_norm(value: float) -> None:
    norm = key_norm(torch.full((10, 2, 64), value))
    later = torch.randn(50, 2, 64)
    assert torch.allclose(restore_keys(normalise_keys(later, norm), norm), later, atol=1e-3)
    assert normalise_keys(later, norm).abs().max() < 60000


def test_keys_come_back_in_their_channels() -> None:
    keys = torch.randn(30, 3, 64) * torch.rand(64)
    norm = key_norm(keys)
    assert (norm.order[:, 0] != 0).any()
    assert torch.allclose(restore_keys(normalise_keys(keys, norm), norm), keys, atol=1e-5)


@pytest.mark.parametrize("partner", [1, 16, 32, 64])
def test_the_largest_pair_lies_where_the_zeros_take_it_up(partner: int) -> None:
    size = torch.rand(5, 128)
    size[:, 37], size[:, 37 ^ partner], size[:, 99] = 100, 50, 70
    order = places(size)
    assert (order[:, 0] == 37).all() and (order[:, 64] == 37 ^ partner).all()
    assert torch.equal(order.sort(-1).values, torch.arange(128).expand(5, -1))
    x = torch.zeros(128)
    x[[37, 37 ^ partner]] = torch.tensor([3.0, -8.0])
    halves = rotate(x[order[0]]).unflatten(0, (2, -1))
    assert torch.allclose(halves, halves[:, :1].expand_as(halves), atol=1e-5)


def turned(x: torch.Tensor, pair: tuple[int, int], wavelength: float) -> torch.Tensor:
    """`x` [num_tokens, num_kv_heads, head_size] with one pair turned by position, as RoPE does."""
    angles = torch.arange(len(x))[:, None] * (2 * math.pi / wavelength)
    first, second = x[..., pair[0]], x[..., pair[1]]
    x = x.clone()
    x[..., pair[0]] = first * angles.cos() - second * angles.sin()
    x[..., pair[1]] = second * angles.cos() + first * angles.sin()
    return x


def score_error(keys: torch.Tensor, num_first: int, bits: int) -> torch.Tensor:
    """Root mean square error of the scores of unit queries, for each of the last 4 quarters."""
    norm = key_norm(keys[:num_first])
    back = restore_keys(through(normalise_keys(keys, norm), bits, KEY_ZEROS), norm)
    error = (back - keys)[num_first:].double().square().mean((1, 2))
    return torch.stack([part.mean() for part in error.chunk(4)]).sqrt()


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("num_first", [16, 64, 1000])
@pytest.mark.parametrize("pair", [(5, 69), (6, 7), (5, 21)], ids=["NeoX", "GPT-J", "partial"])
@pytest.mark.parametrize("wavelength", [10, 1000, 6000, 10**6])
def test_keys_that_turn_away_from_their_statistics_keep_their_error(
    wavelength: float, pair: tuple[int, int], num_first: int, bits: int
) -> None:
    torch.manual_seed(0)
    content = torch.randn(num_first + 2000, 2, 128)
    bias = torch.zeros(2, 128)
    bias[:, pair[0]], bias[:, pair[1]] = torch.tensor([300.0, -20.0]), torch.tensor([30.0, 600.0])
    error = score_error(turned(content + bias, pair, wavelength), num_first, bits)
    # Their own rounding to float16 is all that the bias may cost, at 8 bits.
    expected = score_error(content, num_first, bits) * (2 if bits == 8 else 1.1)
    assert (error <= expected).all(), (error, expected)


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("norm", [0, 300])
def test_keys_after_one_repeated_token_keep_their_error(norm: float, bits: int) -> None:
    torch.manual_seed(0)
    pair = (30, 94)
    content = torch.randn(2080, 2, 128)
    expected = score_error(content, 80, bits)
    content[:80] = content[0]
    bias = torch.zeros(2, 128)
    bias[:, 30] = norm
    error = score_error(turned(content + bias, pair, 6000), 80, bits)
    assert (error <= 3 * expected).all(), (error, expected)


@pytest.mark.parametrize("size", [64, 80, 96, 128])
def test_rotation_is_orthonormal_and_its_own_inverse(size: int) -> None:
    matrix = hadamard(size).double()
    assert torch.allclose(matrix @ matrix, torch.eye(size).double(), atol=1e-6)
    assert torch.equal(matrix, matrix.t())
    x = torch.randn(5, size)
    assert torch.allclose(rotate(rotate(x)), x, atol=1e-5)


def test_rotation_spreads_an_outlier() -> None:
    x = torch.zeros(128)
    x[17] = 100.0
    assert torch.allclose(rotate(x).abs(), torch.full((128,), 100 / 128**0.5))
