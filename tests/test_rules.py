"""How much memory a request may need, before there is one."""

import pytest

from vllm_zipvl.config import ZipVLConfig
from vllm_zipvl.core.geometry import PageGeometry, cdiv
from vllm_zipvl.rules import CacheRules

BLOCK_SIZE = 16


def make_rules(high_bits: int, low_bits: int, **settings: float) -> CacheRules:
    geometry = PageGeometry(32, 8, 128, 2, BLOCK_SIZE, high_bits, low_bits)
    return CacheRules(ZipVLConfig(high_bits=high_bits, low_bits=low_bits, **settings), geometry)


@pytest.mark.parametrize("bits", [(16, 0), (8, 0), (4, 0), (4, 2), (16, 2)])
@pytest.mark.parametrize("max_kept", [0.01, 0.3, 1.0])
@pytest.mark.parametrize(("interval", "max_len"), [(128, 160), (512, 544), (128, 1184)])
def test_the_bound_covers_a_tail_that_is_kept_whole(
    bits: tuple[int, int], max_kept: float, interval: int, max_len: int
) -> None:
    rules = make_rules(*bits, max_kept=max_kept, interval=interval)
    geometry = rules.geometry
    bound = cdiv(max_len, BLOCK_SIZE) + rules.max_heap_blocks(max_len)
    compressed, num_pages = 0, 0
    for num_tokens in range(1, max_len + 1):
        end = rules.interval_end(compressed, num_tokens)
        if end is None:
            continue
        new_pages = geometry.max_new_pages(end - compressed, max_high=end - compressed)
        dense = cdiv(num_tokens, BLOCK_SIZE) - compressed // BLOCK_SIZE
        assert dense + geometry.num_blocks(num_pages + new_pages) <= bound
        num_pages = geometry.num_layers * geometry.num_pages(end, geometry.high_bits)
        compressed = end
    assert compressed > 0
