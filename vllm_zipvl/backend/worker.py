"""The worker's side of a step: whose rows they are, what was selected, what to compress."""

from collections.abc import Callable, Sequence

import torch

from vllm_zipvl.backend.prompts import PromptSelector
from vllm_zipvl.backend.runs import runs_of
from vllm_zipvl.backend.tail import TailProbes
from vllm_zipvl.cache.compression import CompressionPass, compress, moves_of_plans
from vllm_zipvl.cache.heap import HeapTables, Moves, PageHeap
from vllm_zipvl.core.selection import num_to_keep, top_mask
from vllm_zipvl.core.sequences import Sequences
from vllm_zipvl.core.transfer import table_to_device, to_device
from vllm_zipvl.ops.decode_attention import CachedContext, DecodeRows, decode_attention
from vllm_zipvl.ops.dense_blocks import gather_kv, store_kv
from vllm_zipvl.ops.page_codec import PageTables, write_tokens
from vllm_zipvl.ops.prefill_attention import prefill_attention, sparse_prefill_attention
from vllm_zipvl.ops.probe_scores import ProbePlaces, probe_scores
from vllm_zipvl.ops.tail_scores import tail_scores
from vllm_zipvl.plan import (
    ChunkPlan,
    CompressionPlan,
    CompressionReport,
    StepPlan,
    StepReport,
)
from vllm_zipvl.rules import CacheRules


class ZipVLWorker:
    """State of one rank. Bound to the memory by `register`, steered by the plans.

    Args:
        rules: Settings and shapes.
        sum_over_ranks: Sums a tensor over tensor-parallel ranks.
        max_tokens: Of contexts that are worked on at once.
    """

    def __init__(
        self,
        rules: CacheRules,
        sum_over_ranks: Callable[[torch.Tensor], torch.Tensor],
        max_tokens: int,
    ) -> None:
        self.rules = rules
        self.config = rules.config
        self.geometry = rules.geometry
        self.heap: PageHeap | None = None
        self.plan: StepPlan | None = None
        self.chunks: list[ChunkPlan] = []
        self.notes_queries = True
        self.slot_of_block = torch.empty(0, dtype=torch.int32)
        self._sum_over_ranks = sum_over_ranks
        self._max_tokens = max_tokens
        self.prompts = PromptSelector(rules, sum_over_ranks, max_tokens)
        self._request_ids: list[str] | None = None
        self._layer_index: dict[str, int] = {}
        self._kv_caches: list[torch.Tensor] = []
        self._tail_probes: TailProbes | None = None
        self._scale = 1.0
        self.reports_late = False
        self._launched: list[CompressionPass] = []
        self._launched_before: list[CompressionPass] = []

    def register(
        self,
        kv_caches: dict[str, torch.Tensor],
        tables: HeapTables,
        tail_probes: TailProbes | None,
        scale: float,
    ) -> None:
        """Take over the KV cache that vLLM allocated.

        Args:
            kv_caches: Blocks by layer.
            tables: With one slot more than there are, which stays empty.
            tail_probes: Of the same layers; None where the cache does not choose.
            scale: Softmax scale of all layers.

        Raises:
            RuntimeError: A second engine of this process comes along: vLLM has one connector, and
                with it one worker, for all engines of a process.
            ValueError: Its memory is not laid out as blocks of all layers, one after another.
        """
        if self.heap is not None:
            raise RuntimeError(
                "zipvl serves one engine at a time in a process: shut the other one down, or give "
                "each a process of its own (VLLM_ENABLE_V1_MULTIPROCESSING=1)"
            )
        self._layer_index = {name: i for i, name in enumerate(kv_caches)}
        self._kv_caches = list(kv_caches.values())
        self._tail_probes = tail_probes
        self._scale = scale
        first = min(self._kv_caches, key=torch.Tensor.storage_offset)
        block_stride = first.stride(0) * first.element_size()
        if block_stride != self.geometry.block_bytes or len(kv_caches) != self.geometry.num_layers:
            raise ValueError(
                f"zipvl expects blocks of {self.geometry.block_bytes} bytes for "
                f"{self.geometry.num_layers} layers, got {block_stride} bytes for {len(kv_caches)}"
            )
        raw = torch.empty(0, dtype=torch.uint8, device=first.device)
        raw.set_(first.untyped_storage())
        base = first.storage_offset() * first.element_size()
        num_bytes = first.shape[0] * block_stride
        memory = raw[base : base + num_bytes].view(-1, self.geometry.page_bytes)
        self.heap = PageHeap(memory, self.geometry, tables)
        self.reports_late = memory.is_cuda
        # No request ends in a block that no plan named: the null block, and those of dummy runs.
        self.slot_of_block = torch.full(
            (first.shape[0],), -1, dtype=torch.int32, device=first.device
        )

    def warm_up(self, num_heads: int, prefill_kernel: str) -> None:
        """Run the operations whose kernels compile on first use, on next to nothing.

        Args:
            num_heads: Of queries.
            prefill_kernel: What computes prefill attention.
        """
        assert self.heap is not None
        kv_cache, geometry = self._kv_caches[0], self.geometry
        zero = torch.zeros(1, dtype=torch.int32, device=kv_cache.device)
        query = kv_cache.new_zeros(1, num_heads, geometry.head_size)
        rows = DecodeRows(*[zero] * len(DecodeRows._fields))
        out = torch.empty_like(query)
        decode_attention(query, self.context(0, zero[None]), rows, 1.0, out)
        one = Sequences([1], zero.device)
        key, value = gather_kv(kv_cache, zero[None], one).chunk(2, dim=-1)
        store_kv(key, value, kv_cache, zero[:0].long())
        probe = ProbePlaces(zero.long(), zero.bool(), one)
        near = self.config.window, self.config.sinks
        probe_scores(query, probe, key, one, 1.0, *near)
        prefill_attention(query, key, value, 1.0, prefill_kernel)
        sparse_prefill_attention(query, key, value, zero == 0, 1.0, *near, prefill_kernel)
        if self._tail_probes is not None:
            queries, lse = self._tail_probes.queries[:, :1], self._tail_probes.lse[:, :1]
            tail_scores(queries, lse, self._kv_caches, zero[None], one, 1.0)
        # The null block, into a page of nobody's.
        tables, nobody = self.heap.tables, to_device([self.nobody], zero.device)
        page_tables = PageTables(
            torch.zeros_like(self.heap.memory[:1]), tables.page_table, nobody,
            tables.page_counts[:, nobody], tables.key_norms, geometry,
        )  # fmt: skip
        kept = torch.arange(geometry.block_size, device=zero.device) < 1
        block = Sequences([geometry.block_size], zero.device)
        kept = kept.repeat(geometry.num_layers, 1)
        write_tokens(self._kv_caches, zero[None], block, kept, page_tables, [True])
        self.heap.reset(self.nobody)

    def context(self, layer: int, block_table: torch.Tensor) -> CachedContext:
        """What a layer caches, for decode attention.

        Args:
            layer: Index of the layer.
            block_table: int32 [num_rows, max_blocks].
        """
        assert self.heap is not None
        tables = self.heap.tables
        return CachedContext(
            kv_cache=self._kv_caches[layer],
            heap=self.heap.memory,
            page_table=tables.page_table[layer],
            page_counts=tables.page_counts[layer],
            block_table=block_table,
            geometry=self.geometry,
            key_norms=tables.key_norms[layer],
        )

    @property
    def nobody(self) -> int:
        """The slot that holds nothing, for rows that are nobody's."""
        assert self.heap is not None
        return self.heap.tables.compressed_lens.shape[0] - 1

    def layer_index(self, layer_name: str) -> int:
        return self._layer_index[layer_name]

    def begin_step(self, plan: StepPlan) -> None:
        """Take over the plan of a step, before its forward pass."""
        assert self.heap is not None
        self.plan = plan
        self._launched_before += self._launched
        self._launched = []
        if plan.new_slots:
            # A sleep of level 2 loses what is nobody's with all that is made with the layers.
            self.heap.reset(self.nobody)
        for slot in plan.new_slots:
            self.heap.reset(slot)
            self.prompts.forget(slot)
        self.chunks = [chunk for chunk in plan.chunks if not chunk.is_single_token]
        is_tail_due = any(not compression.is_prompt for compression in plan.compressions)
        self.notes_queries = is_tail_due or len(self.chunks) < len(plan.chunks)
        if plan.slot_of_block:
            named = to_device(list(plan.slot_of_block.items()), self.heap.memory.device)
            self.slot_of_block[named[:, 0]] = named[:, 1].int()

    def note_rows(self, request_ids: list[str]) -> None:
        """Whose the rows of the step are, from the first on."""
        self._request_ids = request_ids

    def chunks_of_rows(self, last_blocks: torch.Tensor) -> dict[int, ChunkPlan]:
        """The chunks of more than one token, by row.

        Args:
            last_blocks: The block of each row's last token, [num_rows]. A GPU is waited for only
                if nobody said whose the rows are.
        """
        if self._request_ids is not None:
            by_id = {chunk.request_id: chunk for chunk in self.chunks}
            rows = [by_id.get(request_id) for request_id in self._request_ids]
        else:
            by_block = {chunk.last_block_id: chunk for chunk in self.chunks}
            rows = [by_block.get(block) for block in last_blocks.tolist()]
        return {row: chunk for row, chunk in enumerate(rows) if chunk is not None}

    def end_step(self) -> None:
        self.plan = None
        self.chunks = []
        self._request_ids = None
        # A CUDA graph that is captured between steps does what any step may need.
        self.notes_queries = True

    # After the forward pass.

    def compress_planned(self) -> None:
        """Run the step's compressions."""
        assert self.plan is not None and self.heap is not None
        for chunk in self.plan.chunks:
            if chunk.is_single_token and self._tail_probes is not None:
                queries = self._tail_probes.queries[:, chunk.slot].clone()
                self.prompts.take_single(chunk, queries)
            self.prompts.finish_chunk(chunk)
        prompts = [plan for plan in self.plan.compressions if plan.is_prompt]
        tails = [plan for plan in self.plan.compressions if not plan.is_prompt]
        for plans, kept_of in ((prompts, self._kept_of_prompts), (tails, self._kept_of_tails)):
            # Tables of a pass are as wide as its longest plan.
            for run in runs_of(plans, lambda plan: plan.end - plan.start, self._max_tokens, True):
                moves = moves_of_plans(run, self.heap.memory.device)
                kept = kept_of(run, moves)
                self._launched.append(compress(run, moves, kept, self._kv_caches, self.heap))

    def take_report(self) -> StepReport:
        """What earlier steps compressed, and this one unless a GPU would have to be waited for."""
        done = self._launched_before
        if not self.reports_late:
            done = done + self._launched
            self._launched = []
        self._launched_before = []
        reports: dict[int, CompressionReport] = {}
        for launched in done:
            reports |= launched.reports()
        return StepReport(reports)

    def _kept_of_prompts(self, plans: Sequence[CompressionPlan], moves: Moves) -> torch.Tensor:
        """What their selections keep of the plans' tokens, bool [num_layers, num_tokens]."""
        if not self.config.chooses_for_cache:
            return self._all_of(moves)
        blocks = {plan.slot: plan.head_block_ids + plan.dense_block_ids for plan in plans}

        def keys(slots: list[int], contexts: Sequences) -> Callable[[int], torch.Tensor]:
            table = table_to_device([blocks[slot] for slot in slots], self.slot_of_block.device)

            def of_layer(layer: int) -> torch.Tensor:
                kv = gather_kv(self._kv_caches[layer], table, contexts)
                return kv[..., : self.geometry.head_size]

            return of_layer

        self.prompts.choose_waiting(list(blocks), keys, self._scale)
        masks = [self.prompts.take_masks(plan.slot) for plan in plans]
        assert [mask.shape[1] for mask in masks] == [plan.context_len for plan in plans]
        parts = zip(masks, plans, strict=True)
        return torch.cat([mask[:, plan.start : plan.end] for mask, plan in parts], dim=1)

    def _kept_of_tails(self, plans: Sequence[CompressionPlan], moves: Moves) -> torch.Tensor:
        """The count rule within each tail, on this step's attention over its whole context."""
        if not self.config.chooses_for_cache:
            return self._all_of(moves)
        assert self._tail_probes is not None
        slots, tails = moves.slots, moves.contexts
        queries, lse = self._tail_probes.queries[:, slots], self._tail_probes.lse[:, slots]
        mass = tail_scores(queries, lse, self._kv_caches, moves.block_table, tails, self._scale)
        mass = self._sum_over_ranks(mass)
        return top_mask(mass, num_to_keep(mass, self.config, tails), tails)

    def _all_of(self, moves: Moves) -> torch.Tensor:
        """All of the moves' tokens, bool [num_layers, num_tokens]."""
        shape = (self.geometry.num_layers, moves.contexts.num_tokens)
        return torch.ones(shape, dtype=torch.bool, device=self.slot_of_block.device)
