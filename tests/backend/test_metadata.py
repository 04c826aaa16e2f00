"""Which queries of a step attend to what; steps of single queries as a CUDA graph replays them."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from vllm_zipvl.backend.metadata import Batch, ZipVLMetadata
from vllm_zipvl.backend.prompts import Kind
from vllm_zipvl.backend.worker import ZipVLWorker
from vllm_zipvl.config import ZipVLConfig
from vllm_zipvl.core.geometry import PageGeometry
from vllm_zipvl.plan import ChunkPlan
from vllm_zipvl.rules import CacheRules

BLOCK_SIZE, NUM_ROWS, NUM_SLOTS, NOBODY = 16, 4, 3, 3


class Worker(ZipVLWorker):
    """One that knows no more than whose rows a step may have."""

    def __init__(
        self, slot_of_block: torch.Tensor, compressed_lens: torch.Tensor, *chunks: ChunkPlan
    ) -> None:
        geometry = PageGeometry(1, 1, 32, 4, BLOCK_SIZE, 4, 2)
        config = ZipVLConfig(low_bits=2, min_tokens=512)
        super().__init__(CacheRules(config, geometry), lambda mass: mass, 2000)
        self.slot_of_block = slot_of_block
        self.chunks = list(chunks)
        tables: Any = SimpleNamespace(compressed_lens=compressed_lens)
        self.heap: Any = SimpleNamespace(tables=tables)


def resolve(
    num_queries: list[int], seq_lens: torch.Tensor, block_table: torch.Tensor, worker: Worker
) -> Batch:
    starts = np.cumsum([0, *num_queries], dtype=np.int32)
    total, most = sum(num_queries), max(num_queries)
    metadata = ZipVLMetadata(starts, seq_lens, block_table, total, max_queries=most)
    return metadata.resolve(worker, BLOCK_SIZE)


def single_queries(
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    slot_of_block: torch.Tensor,
    compressed_lens: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    worker = Worker(slot_of_block, compressed_lens)
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
    slots, tables, head_lens, tail_starts, context_lens = rows
    assert head_lens.tolist() == [min(BLOCK_SIZE, start) for start in tail_starts.tolist()]
    assert slots.tolist() == [2, 0, NOBODY, NOBODY]
    assert tables.tolist() == [0, 1, 2, 3]
    assert tail_starts.tolist() == [32, 0, 0, 0]
    assert context_lens.tolist() == [40, 16, 0, 0]


@pytest.mark.parametrize("is_told", [True, False])
def test_a_chunk_of_one_token_is_among_the_decodes_whatever_is_beside_it(is_told: bool) -> None:
    chunk = ChunkPlan("a", 0, 4, 10, 20, False, False)
    worker = Worker(ints(-1, -1, 2, -1, 0, 1, -1, -1), ints(0, 0, 16, 0), chunk)
    # A longer chunk, a single token that may end a prompt, a decode step, and nobody's row.
    table = ints([3, 4], [5, 0], [1, 2], [6, 7])
    if is_told:
        worker.note_rows(["a", "b", "c", "d"])
    batch = resolve([10, 1, 1, 1], ints(20, 9, 30, 5), table, worker)
    (prompts,) = batch.prompts
    assert prompts.batch.chunks == [chunk]
    assert prompts.tokens == slice(0, 10)
    assert prompts.block_table.tolist() == [[3, 4]]
    decodes = batch.decodes
    assert decodes is not None
    assert decodes.tokens == slice(10, 13)
    assert decodes.rows.slots.tolist() == [1, 2, NOBODY]
    assert decodes.rows.rows.tolist() == [1, 2, 3]
    assert decodes.rows.tail_starts.tolist() == [0, 16, 0]
    assert decodes.rows.context_lens.tolist() == [9, 30, 0]
    assert decodes.last == slice(0, 3)


def test_rows_that_nobody_names_attend_with_all_their_queries() -> None:
    worker = Worker(ints(-1, 0, 1, -1), ints(0, 16, 0, 0), ChunkPlan("b", 1, 2, 0, 3, False, False))
    worker.note_rows(["a", "b", "c"])
    batch = resolve([2, 3, 2], ints(20, 3, 30), ints([3, 1], [2, 0], [3, 1]), worker)
    assert batch.decodes is not None
    assert torch.as_tensor(batch.decodes.tokens).tolist() == [0, 1, 5, 6]
    assert batch.decodes.rows.slots.tolist() == [0] * 4
    assert batch.decodes.rows.context_lens.tolist() == [19, 20, 29, 30]
    assert torch.as_tensor(batch.decodes.last).tolist() == [1, 3]


def test_prompts_of_a_kind_are_one_batch() -> None:
    """Two sparse ones with another request between them, and a short dense one."""
    plans = [("a", 0, 1, 600), ("c", 2, 3, 700), ("d", 3, 4, 20)]
    chunks = [ChunkPlan(name, slot, block, 0, n, True, False) for name, slot, block, n in plans]
    worker = Worker(ints(-1, 0, 1, 2, 3), ints(0, 0, 0, 0, 0), *chunks)
    worker.note_rows(["d", "a", "b", "c"])
    table = torch.zeros(4, 50, dtype=torch.int32)
    table[[0, 1, 2, 3], [1, 37, 0, 43]] = ints(4, 1, 2, 3)
    batch = resolve([20, 600, 1, 700], ints(20, 600, 5, 700), table, worker)
    sparse, dense = batch.prompts
    assert (sparse.batch.kind, dense.batch.kind) == (Kind.SPARSE, Kind.DENSE)
    assert [chunk.request_id for chunk in sparse.batch.chunks] == ["a", "c"]
    tokens = [*range(20, 620), *range(621, 1321)]
    assert torch.as_tensor(sparse.tokens).tolist() == tokens
    assert torch.equal(sparse.block_table, table[[1, 3]])
    assert dense.tokens == slice(0, 20)
    assert batch.decodes is not None and batch.decodes.tokens == slice(620, 621)


def test_a_step_without_a_note_finds_its_rows_by_their_blocks() -> None:
    chunk = ChunkPlan("a", 0, 4, 10, 20, False, False)
    worker = Worker(ints(-1, -1, -1, -1, 0), ints(0, 0), chunk)
    assert worker.chunks_of_rows(ints(2, 4, 0)) == {1: chunk}
    worker.note_rows(["b", "c", "a"])
    assert worker.chunks_of_rows(torch.empty(0)) == {2: chunk}
    worker.end_step()
    assert worker.chunks_of_rows(ints(2, 4, 0)) == {}
