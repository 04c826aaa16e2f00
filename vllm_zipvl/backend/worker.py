"""The worker's side of a step: whose rows they are, what was selected, what to compress."""

from collections.abc import Callable, Iterator, Sequence

import torch

from vllm_zipvl.backend.prompts import ProbeQueries, PromptSelector
from vllm_zipvl.backend.tail import TailProbes
from vllm_zipvl.cache.compression import Compression, compress
from vllm_zipvl.cache.heap import HeapTables, PageHeap
from vllm_zipvl.cache.messages import ChunkPlan, CompressionPlan, StepPlan, StepReport
from vllm_zipvl.cache.spec import CacheRules
from vllm_zipvl.core.selection import num_to_keep, top_mask
from vllm_zipvl.ops.decode_attention import CachedContext, DecodeRows, decode_attention
from vllm_zipvl.ops.dense_blocks import gather_kv, store_kv
from vllm_zipvl.ops.page_codec import PageTables, write_tokens
from vllm_zipvl.ops.probe_scores import probe_scores
from vllm_zipvl.ops.transfer import to_device


class ZipVLWorker:
    """State of one rank. Bound to the memory by `register`, steered by the plans."""

    def __init__(
        self,
        rules: CacheRules,
        sum_over_ranks: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        self.rules = rules
        self.config = rules.config
        self.geometry = rules.geometry
        self.heap: PageHeap | None = None
        self.plan: StepPlan | None = None
        self.chunk_of_block: dict[int, ChunkPlan] = {}
        self.notes_queries = True
        self.slot_of_block = torch.empty(0, dtype=torch.int32)
        self._sum_over_ranks = sum_over_ranks
        self.prompts = PromptSelector(rules, sum_over_ranks)
        self._layer_index: dict[str, int] = {}
        self._kv_caches: list[torch.Tensor] = []
        self._tail_probes: Sequence[TailProbes] = ()
        self.reports_late = False
        self._launched: dict[int, Compression] = {}
        self._launched_before: dict[int, Compression] = {}

    def register(
        self,
        kv_caches: dict[str, torch.Tensor],
        tables: HeapTables,
        tail_probes: Sequence[TailProbes],
    ) -> None:
        """Take over the KV cache that vLLM allocated.

        Args:
            kv_caches: Blocks by layer.
            tables: With one slot more than there are, which stays empty.
            tail_probes: Of the same layers; none where nothing is compressed.

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

    def warm_up(self, num_heads: int, max_rows: int) -> None:
        """Run the operations whose kernels compile on first use, on next to nothing.

        Args:
            num_heads: Of queries.
            max_rows: Requests of a step at most.
        """
        assert self.heap is not None
        kv_cache, geometry = self._kv_caches[0], self.geometry
        zeros = torch.zeros(max_rows, dtype=torch.int32, device=kv_cache.device)
        zero = zeros[:1]
        query = kv_cache.new_zeros(max_rows, num_heads, geometry.head_size)
        # On a GPU there is a kernel for every power of two of rows, elsewhere one.
        counts = {min(2**i, max_rows) for i in range(max_rows.bit_length() + 1)}
        for num_rows in counts if kv_cache.is_cuda else (1,):
            rows = DecodeRows(*[zeros[:num_rows]] * len(DecodeRows._fields))
            out = torch.empty_like(query[:num_rows])
            decode_attention(query[:num_rows], self.context(0, zero[None]), rows, 1.0, out)
        kv = gather_kv(kv_cache, zero, 0, 1)
        key, value = kv.chunk(2, dim=-1)
        store_kv(key, value, kv_cache, zero[:0].long())
        probe_scores(query[:1], zero.long(), 0, key, 1.0)
        # The null block, into a page of nobody's.
        page = torch.zeros_like(self.heap.memory[:1])
        pages = self.heap.tables.page_table[:, self.nobody]
        norms = self.heap.tables.key_norms[:, self.nobody]
        before = pages.new_zeros(geometry.num_layers, 2)
        kept = torch.arange(geometry.block_size, device=page.device) < 1
        kept = kept.repeat(geometry.num_layers, 1)
        target = PageTables(page, pages, before, norms, geometry)
        write_tokens(self._kv_caches, zero, kept, target, takes_norms=True)
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
        self._launched_before |= self._launched
        self._launched = {}
        if plan.new_slots:
            # A sleep of level 2 loses what is nobody's with all that is made with the layers.
            self.heap.reset(self.nobody)
        for slot in plan.new_slots:
            self.heap.reset(slot)
            self.prompts.forget(slot)
        many = [chunk for chunk in plan.chunks if not chunk.is_single_token]
        self.chunk_of_block = {chunk.last_block_id: chunk for chunk in many}
        is_tail_due = any(not compression.is_prompt for compression in plan.compressions)
        self.notes_queries = is_tail_due or len(many) < len(plan.chunks)
        if plan.slot_of_block:
            named = to_device(list(plan.slot_of_block.items()), self.heap.memory.device)
            self.slot_of_block[named[:, 0]] = named[:, 1].int()

    def end_step(self) -> None:
        self.plan = None
        self.chunk_of_block = {}
        # A CUDA graph that is captured between steps does what any step may need.
        self.notes_queries = True

    # After the forward pass.

    def compress_planned(self) -> None:
        """Run the step's compressions."""
        assert self.plan is not None and self.heap is not None
        for chunk in self.plan.chunks:
            if chunk.is_single_token:
                self.prompts.take_single(chunk, self._queries_of(chunk.slot))
            self.prompts.finish_chunk(chunk)
        for plan in self.plan.compressions:
            block_ids = to_device(plan.dense_block_ids, self.heap.memory.device)
            of_kind = self._kept_of_prompt if plan.is_prompt else self._kept_of_tail
            kept = of_kind(plan, block_ids)
            launched = compress(plan, kept, self._kv_caches, block_ids, self.heap)
            self._launched[plan.plan_id] = launched

    def take_report(self) -> StepReport:
        """What earlier steps compressed, and this one unless a GPU would have to be waited for."""
        done = self._launched_before
        if not self.reports_late:
            done = done | self._launched
            self._launched = {}
        self._launched_before = {}
        return StepReport({plan_id: launched.report() for plan_id, launched in done.items()})

    def _queries_of(self, slot: int) -> Iterator[ProbeQueries]:
        """The newest query of each layer."""
        for probes in self._tail_probes:
            yield ProbeQueries(probes.queries[slot, None].clone(), probes.scale)

    def _kept_of_prompt(self, plan: CompressionPlan, block_ids: torch.Tensor) -> list[torch.Tensor]:
        def keys(layer: int) -> torch.Tensor:
            return self._keys(layer, block_ids, plan.context_len - plan.start)

        masks = self.prompts.take_masks(plan.slot, self.geometry.num_layers, keys)
        return [mask[: plan.end] for mask in masks]

    def _keys(self, layer: int, block_ids: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """Of the first tokens in dense blocks, [num_tokens, num_kv_heads, head_size]."""
        kv = gather_kv(self._kv_caches[layer], block_ids, 0, num_tokens)
        return kv[..., : self.geometry.head_size]

    def _kept_of_tail(self, plan: CompressionPlan, block_ids: torch.Tensor) -> list[torch.Tensor]:
        return [
            self._kept_of_tail_layer(plan, layer, block_ids)
            for layer in range(self.geometry.num_layers)
        ]

    def _kept_of_tail_layer(
        self, plan: CompressionPlan, layer: int, block_ids: torch.Tensor
    ) -> torch.Tensor:
        """The count rule within the tail, on this step's attention over the whole context."""
        keys = self._keys(layer, block_ids, plan.end - plan.start)
        mass = self._sum_over_ranks(self._tail_probes[layer].mass(plan.slot, keys))
        return top_mask(mass, num_to_keep(mass, self.config))
