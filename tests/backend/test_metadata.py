"""Which queries of a step attend to what; steps of single queries as a CUDA graph replays them."""

from types import SimpleNamespace
from typing import Any

import torch
from torch.fx.experimental.proxy_tensor import make_fx

from vllm_zipvl.backend.metadata import Batch, ZipVLMetadata
from vllm_zipvl.cache.messages import ChunkPlan

BLOCK_SIZE, NUM_ROWS, NUM_SLOTS, NOBODY = 16, 4, 3, 3


def make_worker(
    slot_of_block: torch.Tensor, compressed_lens: torch.Tensor, *chunks: ChunkPlan
) -> Any:
    return SimpleNamespace(
        slot_of_block=slot_of_block,
        chunk_of_block={chunk.last_block_id: chunk for chunk in chunks},
        heap=SimpleNamespace(tables=SimpleNamespace(compressed_lens=compressed_lens)),
        nobody=NOBODY,
    )


def resolve(
    num_queries: list[int], seq_lens: torch.Tensor, block_table: torch.Tensor, worker: Any
) -> Batch:
    starts = torch.tensor([0, *num_queries]).cumsum(0).int()
    total, most = sum(num_queries), max(num_queries)
    metadata = ZipVLMetadata(starts, seq_lens, block_table, total, max_queries=most)
    return metadata.resolve(worker, BLOCK_SIZE)


def single_queries(
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    slot_of_block: torch.Tensor,
    compressed_lens: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    worker = make_worker(slot_of_block, compressed_lens)
    batch = resolve([1] * NUM_ROWS, seq_lens, block_table, worker)
    assert not batch.prompts and batch.decodes is not None
    assert batch.decodes.tokens == slice(0, NUM_ROWS)
    return tuple(batch.decodes.rows)


def ints(*values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def test_a_captured_step_follows_its_buffers() -> None:
    # At capture the rows are nobody's; tracing fails where Python needs a tensor's value.
    nobodys = torch.full((8,), -1, dtype=torch.int32)
    captured = make_fx(single_queries)(
        ints(64, 64, 64, 64), torch.zeros(NUM_ROWS, 4, dtype=torch.int32), nobodys, ints(0, 0, 0, 0)
    )
    slot_of_block = nobodys.clone()
    slot_of_block[[5, 6]] = ints(2, 0)
    block_table = ints([1, 2, 5, 0], [6, 0, 0, 0], [1, 3, 7, 0], [5, 5, 5, 5])
    # The third row ends in a block that no plan named; the fourth is padding.
    rows = captured(ints(40, 16, 40, 0), block_table, slot_of_block, ints(0, 8, 32, 0))
    slots, tables, tail_starts, context_lens = rows
    assert slots.tolist() == [2, 0, NOBODY, NOBODY]
    assert tables.tolist() == [0, 1, 2, 3]
    assert tail_starts.tolist() == [32, 0, 0, 0]
    assert context_lens.tolist() == [40, 16, 0, 0]


def test_a_chunk_of_one_token_is_among_the_decodes_whatever_is_beside_it() -> None:
    chunk = ChunkPlan("a", 0, 4, 10, 20, False, False)
    worker = make_worker(ints(-1, -1, 2, -1, 0, 1, -1, -1), ints(0, 0, 16, 0), chunk)
    # A longer chunk, a single token that may end a prompt, a decode step, and nobody's row.
    table = ints([3, 4], [5, 0], [1, 2], [6, 7])
    batch = resolve([10, 1, 1, 1], ints(20, 9, 30, 5), table, worker)
    (prompt,) = batch.prompts
    assert (prompt.chunk, prompt.first_token) == (chunk, 0)
    decodes = batch.decodes
    assert decodes is not None
    assert torch.as_tensor(decodes.tokens).tolist() == [10, 11]
    assert decodes.rows.slots.tolist() == [1, 2]
    assert decodes.rows.rows.tolist() == [1, 2]
    assert decodes.rows.tail_starts.tolist() == [0, 16]
    assert decodes.rows.context_lens.tolist() == [9, 30]
    assert torch.as_tensor(decodes.last).tolist() == [0, 1]
