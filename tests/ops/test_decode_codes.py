"""How the decode kernel expands codes: what assembly does, and what multiples of 2^-24 are."""

import re

import numpy as np
import pytest
import torch

from vllm_zipvl.core.codes import byte_to_scale

RNG = np.random.default_rng(0)
WORDS = RNG.integers(0, 2**32, (2, 1000), dtype=np.uint32)


def prmt(a: np.ndarray, b: np.ndarray, selector: int) -> np.ndarray:
    """PTX's `prmt.b32` without sign bits: byte i is that of b:a that the i-th digit names."""
    pool = [(x >> np.uint32(8 * i)) & np.uint32(255) for x in (a, b) for i in range(4)]
    found = np.zeros_like(a)
    for i in range(4):
        found |= pool[(selector >> 4 * i) & 7] << np.uint32(8 * i)
    return found


def test_halves_side_by_side() -> None:
    """What an interpreter does in place of the assembly of `triton_codes._beside`."""
    a, b = WORDS
    half = np.uint32(0xFFFF)
    np.testing.assert_array_equal(prmt(a, b, 0x5410), (a & half) | (b << np.uint32(16)))
    np.testing.assert_array_equal(prmt(a, b, 0x7632), (a >> np.uint32(16)) | (b & ~half))


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_masked_halves_are_multiples_of_codes(bits: int) -> None:
    """Exact in float16, whatever the place of the code in its byte."""
    for place in range(8 // bits):
        mask = np.uint16((2**bits - 1) << (bits * place))
        halves = np.arange(256, dtype=np.uint16) & mask
        codes = (np.arange(256) >> (bits * place)) & (2**bits - 1)
        worth = 2.0 ** (bits * place - 24)
        np.testing.assert_array_equal(halves.view(np.float16).astype(float), codes * worth)


def run(assembly: str, given: dict[str, int]) -> dict[str, np.float32]:
    """What a few of PTX's instructions leave in registers that numbers are converted to."""
    registers, found = dict(given), {}
    instructions = {
        "and.b32": lambda x, y: x & y,
        "shr.u32": lambda x, y: x >> y,
        "shl.b32": lambda x, y: (x << y) % 2**32,
    }
    for line in assembly.split(";")[:-1]:
        name, operands = line.strip(" {\n").split(maxsplit=1)
        if name == ".reg":
            continue
        target, source, *more = re.findall(r"{[^}]*}|[$\w]+", operands)
        value = registers[source]
        if name in ("mov.b64", "mov.b32"):
            width = int(name[-2:]) // 2
            lower, upper = re.findall(r"\w+", target)
            registers |= {lower: value % 2**width, upper: value >> width}
        elif name == "cvt.f32.f16":
            found[target] = np.float32(np.uint16(value).view(np.float16))
        else:
            registers[target] = instructions[name](value, int(more[0], 0))
    return found


def test_parameters_are_unpacked() -> None:
    """What an interpreter does in place of the assembly of `triton_parts._numbers_of`."""
    from vllm_zipvl.ops.decode_attention.triton_parts import _NUMBERS

    for key_byte, value_byte in [(0, 255), (17, 90), (200, 1)]:
        halves = np.array([0.75, -3.5, 1e-7], np.float16)
        zeros = [int(half) for half in halves.view(np.uint16)]
        packed = key_byte | value_byte << 8
        packed |= zeros[0] << 16 | zeros[1] << 32 | zeros[2] << 48
        scales = byte_to_scale(torch.tensor([key_byte, value_byte], dtype=torch.uint8))
        expected = [*scales.float().numpy(), *halves.astype(np.float32)]
        found = run(_NUMBERS.value, {"$5": packed})
        np.testing.assert_array_equal([found[f"${i}"] for i in range(5)], expected)
