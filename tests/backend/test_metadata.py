"""Which queries of a step attend to what; steps of single queries as a CUDA graph replays them."""

from types import SimpleNamespace
from typing import Any

import torch
from torch.fx.experimental.proxy_tensor import make_fx

from vllm_zipvl.backend.metadata import DecodeBatch, ZipVLMetadata

BLOCK_SIZE, NUM_ROWS, NUM_SLOTS, NOBODY = 16, 4, 3, 3


def make_metadata(seq_lens: torch.Tensor, block_table: torch.Tensor) -> ZipVLMetadata:
    starts = torch.arange(NUM_ROWS + 1, dtype=torch.int32)
    return ZipVLMetadata(starts, seq_lens, block_table, NUM_ROWS, max_queries=1)


def make_worker(slot_of_block: torch.Tensor, compressed_lens: torch.Tensor) -> Any:
    return SimpleNamespace(
        slot_of_block=slot_of_block,
        chunk_of_block={},
        heap=SimpleNamespace(compressed_lens=compressed_lens),
        nobody=NOBODY,
    )


def single_queries(
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    slot_of_block: torch.Tensor,
    compressed_lens: torch.Tensor,
) -> DecodeBatch:
    worker = make_worker(slot_of_block, compressed_lens)
    batch = make_metadata(seq_lens, block_table).resolve(worker, 0, BLOCK_SIZE)
    assert not batch.prompts and batch.decodes is not None
    return batch.decodes


def ints(*values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def test_a_captured_step_follows_its_buffers() -> None:
    # At capture the rows are nobody's; tracing fails where Python needs a tensor's value.
    nobodys = torch.full((8,), -1, dtype=torch.int32)
    captured = make_fx(lambda *buffers: tuple(single_queries(*buffers).rows))(
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


def test_the_first_layer_resolves_anew() -> None:
    slot_of_block = ints(0, 1, 2, 0)
    worker = make_worker(slot_of_block, ints(0, 0, 0, 0))
    metadata = make_metadata(ints(5, 5, 5, 5), torch.arange(NUM_ROWS)[:, None].int())
    warm_up = metadata.resolve(worker, 0, BLOCK_SIZE)
    captured = metadata.resolve(worker, 0, BLOCK_SIZE)
    assert captured is not warm_up
    assert metadata.resolve(worker, 1, BLOCK_SIZE) is captured
