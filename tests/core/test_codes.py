import pytest
import torch

from vllm_zipvl.core.codes import (
    MAX_SCALE,
    byte_to_scale,
    clip,
    dequantise,
    quantise,
    scale_to_byte,
)

ROUNDING = 1 / 16
"""Of a scale of 4 significant bits."""


@pytest.mark.parametrize("num_zeros", [1, 2])
@pytest.mark.parametrize("size", [1e-2, 1.0, 1e3])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_error_is_at_most_half_a_step(bits: int, size: float, num_zeros: int) -> None:
    x = size * torch.randn(500, 64)
    x[:, :32] += 50 * size * (num_zeros - 1)
    quantised = quantise(x, bits, num_zeros)
    levels = 2**bits - 1
    assert int(quantised.codes.max()) <= levels
    # Zeros are rounded to float16: the ends of the range may lie outside by that.
    largest = x.abs().amax(-1)
    slack = 2 * torch.finfo(torch.float16).eps * largest + torch.finfo(torch.float16).tiny
    scale = quantised.scale.float()
    error = (dequantise(quantised) - x).abs()
    beyond = x.unflatten(-1, (num_zeros, -1)) - quantised.zero.float()[..., None]
    inside = (beyond <= levels * scale[:, None, None]).flatten(-2)
    assert (error <= scale[:, None] / 2 + slack[:, None]).masked_fill(~inside, True).all()
    # A scale that was rounded down leaves out the largest elements, by no more than it lost.
    assert (error <= scale[:, None] * (0.5 + ROUNDING * levels) + slack[:, None]).all()
    assert inside.float().mean() > (0.999 if bits == 8 else 0.9)


def test_every_scale_has_a_byte() -> None:
    byte = torch.arange(248, dtype=torch.uint8)
    assert torch.equal(scale_to_byte(byte_to_scale(byte)), byte)
    assert byte_to_scale(byte[-1:]).item() == MAX_SCALE
    assert byte_to_scale(scale_to_byte(torch.tensor([torch.nan]))).isnan().all()


@pytest.mark.parametrize(("bits", "expected"), [(8, 1.125), (4, 1.0), (2, 1.0)])
def test_scales_are_rounded_up_at_8_bits_and_to_the_nearest_below(
    bits: int, expected: float
) -> None:
    assert byte_to_scale(scale_to_byte(torch.tensor([1.05]), bits)).item() == expected


def test_each_part_has_its_zero() -> None:
    quantised = quantise(torch.tensor([[100.0, 101.0, -50.0, -47.0]]), 2, num_zeros=2)
    assert quantised.zero.tolist() == [[100.0, -50.0]]
    assert quantised.codes.tolist() == [[0, 1, 0, 3]]
    assert torch.equal(dequantise(quantised), torch.tensor([[100.0, 101.0, -50.0, -47.0]]))


def test_codes_span_the_range() -> None:
    quantised = quantise(torch.tensor([[-1.0, 0.0, 1.0, 2.0]]), 2)
    assert quantised.codes.tolist() == [[0, 1, 2, 3]]
    assert (quantised.scale.item(), quantised.zero.item()) == (1.0, -1.0)


@pytest.mark.parametrize("value", [0.0, -3.0, 1e-9, 65504.0])
def test_constant_vectors(value: float) -> None:
    restored = dequantise(quantise(torch.full((2, 8), value), 4))
    assert torch.allclose(restored, torch.full((2, 8), value), atol=1e-7)


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_values_beyond_float16_stay_finite(bits: int) -> None:
    x = torch.tensor([[-1e9, -1e6, 0.0, 1e6], [1e9, 1e9, 1e9, 1e9]])
    assert dequantise(quantise(x, bits)).isfinite().all()


def test_clipping_is_for_two_bits_and_bounds_by_deviations() -> None:
    x = torch.randn(50, 128)
    x[:, 3] = 40.0
    assert torch.equal(clip(x, 4), x)
    std, mean = torch.std_mean(x.double(), dim=-1, correction=0, keepdim=True)
    clipped = clip(x, 2)
    assert ((clipped - mean).abs() <= 1.4936 * std).all()
    inside = (x - mean).abs() <= 1.4935 * std
    assert torch.equal(clipped[inside], x[inside])


def test_parts_are_clipped_around_their_own_means() -> None:
    x = torch.randn(50, 128)
    moved = x.clone()
    moved[:, 64:] += 1000
    assert torch.allclose(clip(moved, 2, 2)[:, 64:] - 1000, clip(x, 2, 2)[:, 64:], atol=1e-3)
    assert torch.allclose(clip(moved, 2, 2)[:, :64], clip(x, 2, 2)[:, :64], atol=1e-4)
