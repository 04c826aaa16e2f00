"""The attention of one layer: prompts on their selected tokens, decode over pages and tail."""

from typing import Any

import torch
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionImpl, AttentionLayer, AttentionType

from vllm_zipvl.backend.connector import ZipVLConnector
from vllm_zipvl.backend.metadata import DecodeBatch, PromptRows, ZipVLMetadata
from vllm_zipvl.backend.requirements import check_layer, check_same_scale
from vllm_zipvl.backend.tail import TailProbes
from vllm_zipvl.backend.worker import ZipVLWorker
from vllm_zipvl.cache.heap import HeapTables
from vllm_zipvl.cache.spec import make_tables, max_gathered_tokens, rules_of_layers
from vllm_zipvl.config import ZipVLConfig
from vllm_zipvl.core.geometry import PAGE_TOKENS
from vllm_zipvl.ops.decode_attention import decode_attention, workspace_bytes
from vllm_zipvl.ops.dense_blocks import gather_kv, store_kv
from vllm_zipvl.ops.prefill_attention import (
    find_kernel,
    prefill_attention,
    sparse_prefill_attention,
)

logger = init_logger("vllm.zipvl")

AUTO_LENGTH = -1
"""What `--max-model-len auto` comes down to."""


def _worker() -> ZipVLWorker | None:
    """This rank's worker; None before it has memory, as in profiling runs."""
    if not has_kv_transfer_group():
        return None
    connector = get_kv_transfer_group()
    assert isinstance(connector, ZipVLConnector)
    worker = connector.worker
    return worker if worker is not None and worker.heap is not None else None


def _earlier_layer(vllm_config: VllmConfig) -> "ZipVLAttentionImpl | None":
    """A layer of this engine that was made before."""
    layers = vllm_config.compilation_config.static_forward_context.values()
    impls = (getattr(layer, "impl", None) for layer in layers)
    return next((impl for impl in impls if isinstance(impl, ZipVLAttentionImpl)), None)


class ZipVLAttentionImpl(AttentionImpl[ZipVLMetadata]):
    """Sparse prefill and decode over compressed pages."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        check_layer(
            head_size=head_size,
            num_kv_heads=num_kv_heads or num_heads,
            alibi_slopes=alibi_slopes,
            sliding_window=sliding_window,
            kv_cache_dtype=kv_cache_dtype,
            logits_soft_cap=logits_soft_cap,
            attn_type=attn_type,
            kv_sharing_target_layer_name=kv_sharing_target_layer_name,
            sinks=sinks,
            **kwargs,
        )
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.kv_cache_dtype = kv_cache_dtype
        vllm_config = get_current_vllm_config()
        config = ZipVLConfig.from_additional_config(vllm_config.additional_config)
        dtype, device = vllm_config.model_config.dtype, torch.device(current_platform.device_type)
        self.tables: HeapTables | None = None
        self.tail_probes: TailProbes | None = None
        if earlier := _earlier_layer(vllm_config):
            check_same_scale(self.scale, earlier.scale)
            self.tables, self.tail_probes = earlier.tables, earlier.tail_probes
        else:
            self._make_tables(vllm_config, config, dtype, device)
        # Of a length that vLLM has yet to find nothing can be held.
        self.gathered_tokens = max_gathered_tokens(vllm_config) if self.tables else 0
        self.decode_bytes = workspace_bytes(
            vllm_config.scheduler_config.max_num_seqs,
            num_heads,
            self.num_kv_heads,
            head_size,
            device,
        )
        self.prefill_kernel = find_kernel(config.prefill_kernel, device.type, dtype, head_size)
        logger.info_once("zipvl: prefill attention by %s", self.prefill_kernel)

    def _make_tables(
        self, vllm_config: VllmConfig, config: ZipVLConfig, dtype: torch.dtype, device: torch.device
    ) -> None:
        """What all layers share."""
        # The tables do not depend on the size of a block, which may not be known yet.
        shape = (self.num_kv_heads, self.head_size, PAGE_TOKENS)
        rules = rules_of_layers(vllm_config, *shape, dtype)
        if vllm_config.model_config.original_max_model_len != AUTO_LENGTH:
            self.tables = make_tables(rules, vllm_config, device)
        if config.compress:
            num_slots = vllm_config.scheduler_config.max_num_seqs + 1
            num_layers = rules.geometry.num_layers
            queries = (num_layers, num_slots, self.num_heads, self.head_size)
            self.tail_probes = TailProbes(queries, dtype, device)

    def do_kv_cache_update(
        self,
        layer: AttentionLayer,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        store_kv(key, value, kv_cache, slot_mapping)

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: ZipVLMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend; the step's keys and values are in the dense blocks already.

        Args:
            layer: The attention layer, for its name.
            query: [num_tokens, num_heads, head_size].
            key: [num_tokens, num_kv_heads, head_size].
            value: As `key`.
            kv_cache: [num_blocks, num_kv_heads, block_size, 2 * head_size].
            attn_metadata: The step's rows; None in profiling runs.
            output: Written in place, [num_tokens, num_heads, head_size].
            output_scale: Not supported.
            output_block_scale: Not supported.

        Raises:
            NotImplementedError: Fused output quantisation was asked for.
        """
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("zipvl does not fuse output quantisation")
        worker = _worker()
        if attn_metadata is None and worker is None:
            self._take_scratch(query)
        if attn_metadata is None or worker is None:
            return output.zero_()
        if worker.plan is None and attn_metadata.max_queries > 1:
            # A warm-up on no request. One of single queries may be the capture of a CUDA graph.
            return output.zero_()
        layer_index = worker.layer_index(layer.layer_name)
        batch = attn_metadata.resolve(worker, kv_cache.shape[2])
        out = output.view(-1, self.num_heads, self.head_size)
        for rows in batch.prompts:
            self._attend_prompts(worker, layer_index, rows, query, key, value, kv_cache, out)
        if batch.decodes is not None:
            table = attn_metadata.block_table
            self._attend_decodes(worker, layer_index, batch.decodes, table, query, out)
        return output

    def _take_scratch(self, query: torch.Tensor) -> None:
        """Hold for a moment what a step may take, so that memory profiling sees it.

        Of prompts, keys and values of their contexts, gathered from blocks, and the kept ones of
        them; queries in the same order and two states of the output. Then, of decode rows, what
        their kernel works in.
        """
        contexts = 2 * 2 * self.gathered_tokens * self.num_kv_heads * self.head_size
        prompt_bytes = (contexts + 3 * query.numel()) * query.element_size()
        query.new_empty(max(prompt_bytes, self.decode_bytes), dtype=torch.uint8)

    def _attend_prompts(
        self,
        worker: ZipVLWorker,
        layer_index: int,
        rows: PromptRows,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        batch, tokens = rows.batch, rows.tokens
        chunks, kernel = batch.rows, self.prefill_kernel
        q = query[tokens]
        if chunks.are_whole:
            k, v = key[tokens], value[tokens]
        else:
            # The step's own are in the blocks already.
            k, v = gather_kv(kv_cache, rows.block_table, chunks.contexts).chunk(2, dim=-1)
        kept = worker.prompts.select(layer_index, batch, q, k, self.scale)
        if kept is None:
            out[tokens] = prefill_attention(q, k, v, self.scale, kernel, chunks)
        else:
            near = worker.config.window, worker.config.sinks
            out[tokens] = sparse_prefill_attention(q, k, v, kept, self.scale, *near, kernel, chunks)

    def _attend_decodes(
        self,
        worker: ZipVLWorker,
        layer_index: int,
        decodes: DecodeBatch,
        block_table: torch.Tensor,
        query: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        context = worker.context(layer_index, block_table)
        q, tokens = query[decodes.tokens], decodes.tokens
        result = out[tokens] if isinstance(tokens, slice) else torch.empty_like(q)
        lse = decode_attention(q, context, decodes.rows, self.scale, result)
        if not isinstance(tokens, slice):
            out[tokens] = result
        if self.tail_probes is not None and worker.notes_queries:
            last = decodes.last
            self.tail_probes.note(layer_index, decodes.rows.slots[last], q[last], lse[last])
