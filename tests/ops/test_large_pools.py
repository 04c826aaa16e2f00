"""Blocks and pages beyond what int32 counts, against the same ones at the start of a small pool."""

import torch
from kernels import DEVICE, seed

from vllm_zipvl.core.geometry import PageGeometry
from vllm_zipvl.core.sequences import Sequences
from vllm_zipvl.ops.dense_blocks import gather_kv, store_kv
from vllm_zipvl.ops.page_codec import PageTables, write_tokens
from vllm_zipvl.ops.tail_scores import tail_scores

NUM_BLOCKS, NUM_LAYERS, BLOCK_SIZE = 8, 2, 16
DTYPE = torch.bfloat16
GEOMETRY = PageGeometry(NUM_LAYERS, 2, 64, DTYPE.itemsize, BLOCK_SIZE, 4, 2)


def results(pool: torch.Tensor, first_block: int) -> list[torch.Tensor]:
    """Of every operation on the pool's last blocks, and these."""
    shape = (-1, NUM_LAYERS, 2, BLOCK_SIZE, 128)
    kv_caches = list(pool.view(DTYPE).view(shape).unbind(1))
    contexts = Sequences([30, 9], torch.device(DEVICE))
    table = torch.tensor([[0, 3], [2, 0]], dtype=torch.int32) + first_block
    torch.manual_seed(1)
    key, value = torch.randn(2, 4, 2, 64).to(DTYPE)
    slots = (first_block + 3) * BLOCK_SIZE + torch.arange(4)
    store_kv(key, value, kv_caches[1], slots)
    gathered = [gather_kv(kv_cache, table, contexts) for kv_cache in kv_caches]
    queries, lse = torch.randn(NUM_LAYERS, 2, 6, 64).to(DTYPE), torch.rand(NUM_LAYERS, 2, 6)
    scores = tail_scores(queries, lse, kv_caches, table, contexts, 0.125)
    pages = (first_block + 4) * GEOMETRY.pages_per_block + torch.arange(24).view(2, 2, 6)
    norms = torch.zeros(NUM_LAYERS, 2, 3, 2, 64).half()
    before = torch.zeros(NUM_LAYERS, 2, 2, dtype=torch.int32)
    heap = pool.view(-1, GEOMETRY.page_bytes)
    tables = PageTables(heap, pages.int(), torch.tensor([1, 0]), before, norms, GEOMETRY)
    kept = torch.rand(NUM_LAYERS, 39) < 0.5
    write_tokens(kv_caches, table, contexts, kept, tables, [True, True])
    return [*gathered, scores, norms, pool[first_block:]]


def test_a_pool_of_more_elements_than_int32_counts() -> None:
    seed(0)
    # What is never touched needs no memory on a CPU.
    first_block = 2**31 * DTYPE.itemsize // GEOMETRY.block_bytes + 1
    large = torch.empty(first_block + NUM_BLOCKS, GEOMETRY.block_bytes, dtype=torch.uint8)
    numbers = torch.randn(NUM_BLOCKS, GEOMETRY.block_bytes // DTYPE.itemsize).to(DTYPE)
    small = numbers.view(torch.uint8)
    large[first_block:] = small
    unwritten = small.clone()
    for found, expected in zip(results(large, first_block), results(small, 0), strict=True):
        assert torch.equal(found, expected)
    assert not torch.equal(small, unwritten)
