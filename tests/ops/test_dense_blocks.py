from types import ModuleType

import pytest
import torch
from kernels import DEVICE, INTERPRETED, implementations

from vllm_zipvl.core.sequences import Sequences

BOTH = implementations("dense_blocks")
BLOCK_SIZE, NUM_LAYERS, LAYER = 16, 3, 1


def make_cache(num_blocks: int, dtype: torch.dtype) -> torch.Tensor:
    """Blocks of three layers side by side, all NaN."""
    return torch.full((num_blocks, NUM_LAYERS, 4, BLOCK_SIZE, 32), torch.nan, dtype=dtype)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("num_tokens", [1, 63, 111, 150 if INTERPRETED else 1000])
def test_gather_gives_back_what_was_stored(
    num_tokens: int, dtype: torch.dtype, implementation: ModuleType
) -> None:
    num_blocks = -(-num_tokens // BLOCK_SIZE)
    cache = make_cache(num_blocks + 5, dtype)
    block_ids = torch.randperm(num_blocks + 5)[:num_blocks]
    key, value = torch.randn(2, num_tokens + 3, 4, 16).to(dtype)
    slots = (block_ids[:, None] * BLOCK_SIZE + torch.arange(BLOCK_SIZE)).flatten()[:num_tokens]
    implementation.store_kv(key, value, cache[:, LAYER], slots)
    expected = torch.cat([key, value], dim=-1)[:num_tokens]
    # Two contexts in the same blocks, one of which ends within a block, and one without tokens.
    lengths = [num_tokens, num_tokens // 2, 0]
    table = block_ids.int().repeat(3, 1)
    contexts = Sequences(lengths, torch.device(DEVICE))
    found = implementation.gather_kv(cache[:, LAYER], table, contexts)
    assert found.is_contiguous()
    whole, half, none = found.split(lengths)
    assert torch.equal(whole, expected)
    assert torch.equal(half, expected[: num_tokens // 2])
    assert none.shape == (0, 4, 32)


@BOTH
def test_nothing_else_is_written(implementation: ModuleType) -> None:
    cache = make_cache(4, torch.float32)
    key, value = torch.randn(2, 5, 4, 16)
    slots = torch.tensor([40, -1, 3, -1, 17])
    implementation.store_kv(key, value, cache[:, LAYER], slots)
    written = ~cache.isnan()
    assert written.sum() == 3 * 4 * 32
    for token, slot in ((0, 40), (2, 3), (4, 17)):
        stored = cache[slot // BLOCK_SIZE, LAYER, :, slot % BLOCK_SIZE]
        assert torch.equal(stored, torch.cat([key[token], value[token]], dim=-1))


@BOTH
def test_no_tokens(implementation: ModuleType) -> None:
    cache = make_cache(2, torch.float32)
    key, value = torch.randn(2, 2, 4, 16)
    implementation.store_kv(key, value, cache[:, 0], torch.empty(0).long())
    assert cache.isnan().all()
    nobodys = Sequences([0], torch.device(DEVICE))
    none = implementation.gather_kv(cache[:, 0], torch.tensor([[1, 0]]), nobodys)
    assert none.shape == (0, 4, 32)
