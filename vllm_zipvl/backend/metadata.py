"""The step's batch, resolved once for all layers."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_zipvl.backend.worker import ZipVLWorker
from vllm_zipvl.cache.messages import ChunkPlan
from vllm_zipvl.ops.decode_attention import DecodeRows


class PromptRow(NamedTuple):
    """A row that computes prompt tokens: its plan, its place in the batch and its blocks."""

    chunk: ChunkPlan
    first_token: int
    block_ids: torch.Tensor


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

    prompts: list[PromptRow]
    decodes: DecodeBatch | None


@dataclass
class ZipVLMetadata(AttentionMetadata):
    """What the layers of one step share.

    Attributes:
        query_start_loc: int32 [num_rows + 1].
        seq_lens: int32 [num_rows], tokens of each row after this step.
        block_table: int32 [num_rows, max_blocks].
        num_tokens: Of all rows in this step.
        max_queries: Of any row.
        batch: The rows by kind; resolved by the first layer, when the plan is bound.
    """

    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    num_tokens: int
    max_queries: int
    batch: Batch | None = None

    def resolve(self, worker: ZipVLWorker, block_size: int) -> Batch:
        """The rows by kind; rows that end in a block that no plan named are left out."""
        if self.batch is None:
            self.batch = _resolve(self, worker, block_size)
        return self.batch


def _resolve(metadata: ZipVLMetadata, worker: ZipVLWorker, block_size: int) -> Batch:
    starts, table = metadata.query_start_loc, metadata.block_table
    last_index = (metadata.seq_lens.long() - 1).clamp(min=0) // block_size
    last_blocks = table.gather(1, last_index[:, None])
    slots = worker.slot_of_block[last_blocks[:, 0]]
    is_uniform = metadata.max_queries == 1 and metadata.num_tokens == len(slots)
    if is_uniform and not worker.chunk_of_block:
        return Batch([], _single_queries(metadata, worker, slots))
    num_queries = starts[1:] - starts[:-1]
    is_decode = (num_queries > 0) & (metadata.seq_lens > 0) & (slots >= 0)
    prompts = []
    for row, block_id in enumerate(last_blocks[:, 0].tolist() if worker.chunk_of_block else ()):
        chunk = worker.chunk_of_block.get(block_id)
        if chunk is not None and is_decode[row]:
            assert chunk.end == metadata.seq_lens[row], chunk
            assert chunk.end - chunk.start == num_queries[row], chunk
            prompts.append(PromptRow(chunk, int(starts[row]), table[row]))
            is_decode[row] = False
    rows = is_decode.nonzero()[:, 0]
    return Batch(prompts, _decode_batch(metadata, worker, rows, slots) if len(rows) else None)


def _single_queries(
    metadata: ZipVLMetadata, worker: ZipVLWorker, slots: torch.Tensor
) -> DecodeBatch:
    """A query of every row, none of which computes a longer chunk; waits for nothing on a GPU.

    Rows that are nobody's attend to nothing.
    """
    assert worker.heap is not None
    is_somebodys = (slots >= 0) & (metadata.seq_lens > 0)
    slots = torch.where(is_somebodys, slots, worker.nobody)
    every = torch.arange(len(slots), dtype=torch.int32, device=slots.device)
    rows = DecodeRows(
        slots=slots,
        rows=every,
        tail_starts=worker.heap.tables.compressed_lens[slots],
        context_lens=torch.where(is_somebodys, metadata.seq_lens, 0),
    )
    return DecodeBatch(slice(0, len(slots)), rows, slice(None))


def _decode_batch(
    metadata: ZipVLMetadata, worker: ZipVLWorker, rows: torch.Tensor, slots: torch.Tensor
) -> DecodeBatch:
    """The queries of `rows`, most of which have one; `slots` are those of the whole batch."""
    assert worker.heap is not None
    starts, ends = metadata.query_start_loc[rows], metadata.query_start_loc[rows + 1]
    num_queries = ends - starts
    last_token = torch.repeat_interleave(ends, num_queries) - 1
    ahead = num_queries.cumsum(0).repeat_interleave(num_queries) - 1
    ahead -= torch.arange(len(ahead), device=ahead.device)
    rows = torch.repeat_interleave(rows, num_queries)
    slots = slots[rows]
    decode_rows = DecodeRows(
        slots=slots,
        rows=rows.int(),
        tail_starts=worker.heap.tables.compressed_lens[slots],
        context_lens=metadata.seq_lens[rows] - ahead,
    )
    return DecodeBatch(last_token - ahead, decode_rows, num_queries.cumsum(0) - 1)


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
            query_start_loc=common_attn_metadata.query_start_loc,
            seq_lens=common_attn_metadata.seq_lens,
            block_table=common_attn_metadata.block_table_tensor,
            num_tokens=common_attn_metadata.num_actual_tokens,
            max_queries=common_attn_metadata.max_query_len,
        )
