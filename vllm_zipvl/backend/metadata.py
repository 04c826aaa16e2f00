"""The step's batch, resolved once for all layers."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_zipvl.backend.prompts import PromptBatch
from vllm_zipvl.backend.worker import ZipVLWorker
from vllm_zipvl.core.transfer import to_device
from vllm_zipvl.ops.decode_attention import DecodeRows
from vllm_zipvl.plan import ChunkPlan


class PromptRows(NamedTuple):
    """Chunks of one kind, their tokens' places in the step and their blocks.

    Attributes:
        batch: The chunks.
        tokens: Places of their queries, keys and values, chunk by chunk, an index.
        block_table: int32 [num_chunks, max_blocks].
    """

    batch: PromptBatch
    tokens: torch.Tensor | slice
    block_table: torch.Tensor


class DecodeBatch(NamedTuple):
    """All queries that attend to all of their context: decode steps, and chunks of one token.

    Attributes:
        tokens: Their places in the batch, an index.
        rows: Where their contexts lie.
        last: Which of them are their rows' last ones, an index.
    """

    tokens: torch.Tensor | slice
    rows: DecodeRows
    last: torch.Tensor | slice


class Batch(NamedTuple):
    """A step's rows by kind."""

    prompts: list[PromptRows]
    decodes: DecodeBatch | None


@dataclass
class ZipVLMetadata(AttentionMetadata):
    """What the layers of one step share.

    Attributes:
        query_starts: Where each row's queries begin, then where the last end, the host's, int32
            [num_rows + 1].
        seq_lens: int32 [num_rows], tokens of each row after this step.
        block_table: int32 [num_rows, max_blocks].
        num_tokens: Of all rows in this step.
        max_queries: Of any row.
        batch: The rows by kind; resolved by the first layer, when the plan is bound.
    """

    query_starts: np.ndarray
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    num_tokens: int
    max_queries: int
    batch: Batch | None = None

    def resolve(self, worker: ZipVLWorker, block_size: int) -> Batch:
        """The rows by kind; rows that end in a block that no plan named attend to nothing."""
        if self.batch is None:
            self.batch = _resolve(self, worker, block_size)
        return self.batch


def _resolve(metadata: ZipVLMetadata, worker: ZipVLWorker, block_size: int) -> Batch:
    """Waits for nothing on a GPU, if the worker was told whose rows they are."""
    last_index = (metadata.seq_lens.long() - 1).clamp(min=0) // block_size
    last_blocks = metadata.block_table.gather(1, last_index[:, None])[:, 0]
    slots = worker.slot_of_block[last_blocks]
    slots = torch.where((slots >= 0) & (metadata.seq_lens > 0), slots, worker.nobody)
    is_uniform = metadata.max_queries == 1 and metadata.num_tokens == len(slots)
    if is_uniform and not worker.chunks:
        return Batch([], _single_queries(metadata, worker, slots))
    num_queries = np.diff(metadata.query_starts)
    chunks = worker.chunks_of_rows(last_blocks) if worker.chunks else {}
    chunks = {row: chunk for row, chunk in chunks.items() if num_queries[row]}
    for row, chunk in chunks.items():
        assert chunk.end - chunk.start == num_queries[row], chunk
    decodes = [row for row in num_queries.nonzero()[0].tolist() if row not in chunks]
    decode_batch = None
    if decodes:
        decode_batch = _decode_batch(metadata, worker, np.array(decodes), num_queries, slots)
    return Batch(_prompt_batches(metadata, worker, chunks), decode_batch)


def _index(places: np.ndarray, device: torch.device) -> torch.Tensor | slice:
    """An index of ascending places: a slice where they are one after another."""
    if len(places) == places[-1] - places[0] + 1:
        return slice(int(places[0]), int(places[-1]) + 1)
    return to_device(places, device)


def _prompt_batches(
    metadata: ZipVLMetadata, worker: ZipVLWorker, chunks: dict[int, ChunkPlan]
) -> list[PromptRows]:
    device, starts = metadata.seq_lens.device, metadata.query_starts
    row_of_slot = {chunk.slot: row for row, chunk in chunks.items()}
    batches = []
    for batch in worker.prompts.batches(list(chunks.values()), device):
        rows = [row_of_slot[chunk.slot] for chunk in batch.chunks]
        tokens = np.concatenate([np.arange(starts[row], starts[row + 1]) for row in rows])
        block_table = metadata.block_table[_index(np.array(rows), device)]
        batches.append(PromptRows(batch, _index(tokens, device), block_table))
    return batches


def _rows(
    worker: ZipVLWorker, slots: torch.Tensor, rows: torch.Tensor, context_lens: torch.Tensor
) -> DecodeRows:
    """Rows that are nobody's attend to nothing."""
    assert worker.heap is not None
    tail_starts = worker.heap.tables.compressed_lens[slots]
    return DecodeRows(
        slots=slots,
        rows=rows,
        head_lens=tail_starts.clamp(max=worker.rules.head_len),
        tail_starts=tail_starts,
        context_lens=torch.where(slots != worker.nobody, context_lens, 0),
    )


def _single_queries(
    metadata: ZipVLMetadata, worker: ZipVLWorker, slots: torch.Tensor
) -> DecodeBatch:
    """A query of every row, none of which computes a longer chunk."""
    every = torch.arange(len(slots), dtype=torch.int32, device=slots.device)
    rows = _rows(worker, slots, every, metadata.seq_lens)
    return DecodeBatch(slice(0, len(slots)), rows, slice(None))


def _decode_batch(
    metadata: ZipVLMetadata,
    worker: ZipVLWorker,
    rows: np.ndarray,
    num_queries: np.ndarray,
    slots: torch.Tensor,
) -> DecodeBatch:
    """The queries of `rows`, most of which have one; `slots` are those of the whole batch."""
    device, counts = slots.device, num_queries[rows]
    ends = counts.cumsum()
    # How many queries of its row come after each.
    ahead = np.repeat(ends, counts) - 1 - np.arange(ends[-1])
    tokens = np.repeat(metadata.query_starts[rows + 1], counts) - 1 - ahead
    own = to_device(np.repeat(rows, counts), device)
    context_lens = metadata.seq_lens[own] - to_device(ahead, device, torch.int32)
    decode_rows = _rows(worker, slots[own], own.int(), context_lens)
    return DecodeBatch(_index(tokens, device), decode_rows, _index(ends - 1, device))


class ZipVLMetadataBuilder(AttentionMetadataBuilder[ZipVLMetadata]):
    """Builds one `ZipVLMetadata` per step."""

    _cudagraph_support = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
        **kwargs: Any,
    ) -> ZipVLMetadata:
        return ZipVLMetadata(
            query_starts=common_attn_metadata.query_start_loc_cpu.numpy(),
            seq_lens=common_attn_metadata.seq_lens,
            block_table=common_attn_metadata.block_table_tensor,
            num_tokens=common_attn_metadata.num_actual_tokens,
            max_queries=common_attn_metadata.max_query_len,
        )
