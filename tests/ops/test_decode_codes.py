"""How the decode kernel expands codes: what assembly does, and what multiples of 2^-24 are."""

import numpy as np
import pytest

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
