import pytest
import torch
from kernels import DEVICE, seed

from vllm_zipvl.core.sequences import Sequences
from vllm_zipvl.ops.tail_scores import tail_scores

NUM_LAYERS, BLOCK_SIZE = 3, 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("heads", [(28, 4), (3, 3)], ids=str)
@pytest.mark.parametrize("head_size", [64, 80])
def test_scores_match_fp64(head_size: int, heads: tuple[int, int], dtype: torch.dtype) -> None:
    check_scores(head_size, heads, dtype, (100, 1, 32, 17))


def check_scores(
    head_size: int, heads: tuple[int, int], dtype: torch.dtype, lengths: tuple[int, ...]
) -> None:
    """Tails of several lengths, in blocks of all layers side by side, some of them NaN."""
    seed(sum(heads) + head_size)
    num_heads, num_kv_heads = heads
    blocks = torch.full(
        (40, NUM_LAYERS, num_kv_heads, BLOCK_SIZE, 2 * head_size), torch.nan, dtype=dtype
    )
    kv_caches = list(blocks.unbind(1))
    table = torch.randperm(40)[: 4 * 9].view(4, 9)
    scale, queries = head_size**-0.5, torch.randn(NUM_LAYERS, 4, num_heads, head_size).to(dtype)
    lse = torch.rand(NUM_LAYERS, 4, num_heads) * 5
    expected, rounded = [], []
    for row, length in enumerate(lengths):
        keys = torch.randn(length, NUM_LAYERS, num_kv_heads, head_size).to(dtype)
        tokens = torch.arange(length)
        blocks[table[row, tokens // BLOCK_SIZE], :, :, tokens % BLOCK_SIZE, :head_size] = keys
        for exact, found in ((torch.float64, expected), (torch.float32, rounded)):
            k = keys.to(exact).repeat_interleave(num_heads // num_kv_heads, dim=2)
            scores = torch.einsum("lhd,nlhd->lhn", queries[:, row].to(exact), k) * scale
            found.append((scores - lse[:, row, :, None].to(exact)).exp().sum(1))
    found = tail_scores(
        queries, lse, kv_caches, table, Sequences(lengths, torch.device(DEVICE)), scale
    )
    exact, same = torch.cat(expected, dim=1), torch.cat(rounded, dim=1)
    assert found.dtype == torch.float32
    budget = 4 * (same - exact).abs().max() + torch.finfo(torch.float32).eps * exact.max()
    assert ((found.double() - exact).abs() <= budget).all()
