"""The scheduler's account of blocks: dense ones as vLLM keeps them, and each request's heap.

A request's heap blocks are private to it and stay out of its block table. They are taken with
the prompt, chunk by chunk, as an upper bound of what compressing it can need, so that
admission counts them and compressing a prompt never waits for memory; a tail's are taken when
its compression is due. What a compression freed or left unused goes back only after the workers
reported that very compression.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec, replace_as
from vllm.v1.request import Request

from vllm_zipvl.cache.sharing import DENSE_GROUP, SPARSE_GROUP, EitherGroup
from vllm_zipvl.cache.spec import ZipVLSpec
from vllm_zipvl.core.geometry import PageGeometry, cdiv
from vllm_zipvl.plan import CompressionPlan, CompressionReport
from vllm_zipvl.rules import CacheRules

MAX_WAITS = 4
"""Steps in a row that wait for a compression: planned in the next step, reported within three."""


@dataclass
class HeapState:
    """What the scheduler knows of one request beyond its dense blocks.

    Attributes:
        slot: Its row in the workers' tables; None until admission.
        blocks: Heap blocks, in the order in which their pages fill.
        prompt_len: Tokens to compute before decoding starts; None until admission.
        prompt_end: Tokens computed when the prompt was complete; None before.
        compressed_len: Where the tokens end that reports confirmed to be in pages; 0 for none.
        prompt_is_compressed: Whether the prompt's compression is confirmed or not needed.
        num_pages: Pages in use, by the last report.
        pending: The compression whose report is awaited.
        quiet_until: A step that leaves fewer tokens computed than this stays in the block of
            the last one and makes no compression due.
    """

    slot: int | None = None
    blocks: list[KVCacheBlock] = field(default_factory=list)
    prompt_len: int | None = None
    prompt_end: int | None = None
    compressed_len: int = 0
    prompt_is_compressed: bool = False
    num_pages: int = 0
    pending: CompressionPlan | None = None
    quiet_until: int = 0


class ZipVLManager(FullAttentionManager):
    """Full attention whose compressed tokens live in heap blocks."""

    def __init__(self, kv_cache_spec: ZipVLSpec, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        # Bound by the connector before the first request; vLLM builds managers from specs alone.
        self.rules: CacheRules
        self.heaps: dict[str, HeapState] = {}
        # Requests whose prompt is complete and whose compression is not planned yet.
        self.awaiting: dict[str, HeapState] = {}
        # By plan id, the requests whose compression was planned and not reported yet.
        self.unreported: dict[int, HeapState] = {}
        # Slots that got a new owner since the last step was planned.
        self._new_slots: list[int] = []
        self._free_slots: list[int] = []
        # Steps in a row that waited for a compression, and whether this one did.
        self._num_waits = 0
        self._waits = False
        self._num_slots = 0
        self._plan_ids = count()

    def bind(self, rules: CacheRules) -> None:
        """Take over the rules of the engine."""
        self.rules, config = rules, rules.config
        # Overridden here: other settings need no call more for every request of every step.
        if config.prefix_sharing == "exact":
            self.cache_blocks = self._cache_exact_blocks
        elif config.shares_among_alike:
            self.cache_blocks = self._cache_blocks_apart
            self.find_longest_cache_hit = self._find_hit_of_alike  # type: ignore[method-assign, assignment]

    @classmethod
    def find_longest_cache_hit(
        cls, *args: Any, kv_cache_spec: ZipVLSpec, **kwargs: Any
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        dense = replace_as(kv_cache_spec, FullAttentionSpec)
        return super().find_longest_cache_hit(*args, kv_cache_spec=dense, **kwargs)

    @property
    def geometry(self) -> PageGeometry:
        return self.rules.geometry

    # Blocks in and out, as `KVCacheManager` asks for them.

    def _is_quiet(self, request_id: str, num_tokens: int) -> bool:
        """Whether a step up to `num_tokens` needs no block of either kind."""
        state = self.heaps.get(request_id)
        return state is not None and num_tokens < state.quiet_until

    def _num_missing_heap_blocks(self, request_id: str, num_tokens: int) -> int:
        state = self.heaps.get(request_id) or HeapState()
        num_new = self._max_new_pages(state, num_tokens)
        if num_new == 0:
            return 0
        return max(0, self.geometry.num_blocks(state.num_pages + num_new) - len(state.blocks))

    def _max_new_pages(self, state: HeapState, num_tokens: int) -> int:
        """Pages that may be asked for once `num_tokens` are computed, beyond those in use."""
        if not state.prompt_is_compressed:
            known = num_tokens if state.prompt_len is None else state.prompt_len
            return self.rules.num_reserved_pages(min(num_tokens, known))
        end = self._interval_end(state, num_tokens)
        if end is None:
            return 0
        num_new = end - self._next_start(state)
        return self.geometry.max_new_pages(num_new, max_high=num_new)

    def get_num_blocks_to_allocate(
        self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any
    ) -> int:
        if self._is_quiet(request_id, num_tokens):
            return 0
        num_dense = super().get_num_blocks_to_allocate(request_id, num_tokens, *args, **kwargs)
        return num_dense + self._num_missing_heap_blocks(request_id, num_tokens)

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        if self._is_quiet(request_id, num_tokens):
            return []
        num_heap = self._num_missing_heap_blocks(request_id, num_tokens)
        new_blocks = super().allocate_new_blocks(request_id, num_tokens, num_tokens_main_model)
        if request_id not in self.heaps:
            self.heaps[request_id] = HeapState()
        if num_heap:
            self.heaps[request_id].blocks.extend(self.block_pool.get_new_blocks(num_heap))
        return new_blocks

    def _free_unused_reserve(self, state: HeapState) -> None:
        num_used = self.geometry.num_blocks(state.num_pages)
        if len(state.blocks) > num_used:
            self.block_pool.free_blocks(reversed(state.blocks[num_used:]))
            del state.blocks[num_used:]

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        state = self.heaps.pop(request_id, None)
        self.awaiting.pop(request_id, None)
        blocks = super().pop_blocks_for_free(request_id)
        if state is None:
            return blocks
        if state.slot is not None:
            self._free_slots.append(state.slot)
        if state.pending is not None:
            self.unreported.pop(state.pending.plan_id, None)
        return blocks + state.blocks

    def _cache_exact_blocks(
        self, request: Request, num_tokens: int, *args: Any, **kwargs: Any
    ) -> None:
        num_tokens = min(num_tokens, self._num_exact_tokens(request, num_tokens))
        super().cache_blocks(request, num_tokens, *args, **kwargs)

    def _cache_blocks_apart(
        self, request: Request, num_tokens: int, *args: Any, **kwargs: Any
    ) -> None:
        num_cached = self.num_cached_block.get(request.request_id, 0)
        if num_tokens // self.block_size <= num_cached:
            return
        is_sparse = request.num_tokens >= self.rules.config.min_tokens
        self.kv_cache_group_id = SPARSE_GROUP if is_sparse else DENSE_GROUP
        try:
            super().cache_blocks(request, num_tokens, *args, **kwargs)
        finally:
            self.kv_cache_group_id = DENSE_GROUP

    def _find_hit_of_alike(
        self, *args: Any, max_length: int, block_pool: Any, **kwargs: Any
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        # The last token is left out, which is computed in any case.
        if max_length + 1 >= self.rules.config.min_tokens:
            block_pool = EitherGroup(block_pool)
        return type(self).find_longest_cache_hit(
            *args, max_length=max_length, block_pool=block_pool, **kwargs
        )

    def _num_exact_tokens(self, request: Request, num_tokens: int) -> int:
        """Tokens whose keys and values owe nothing to sparse prefill or compression."""
        config = self.rules.config
        if config.prefills_sparsely and num_tokens >= config.min_tokens:
            return 0
        return min(num_tokens, request.num_prompt_tokens) if config.compress else num_tokens

    # The life of a request, as the connector tells it.

    def admit(self, request_id: str, prompt_len: int) -> None:
        """A waiting request was given blocks; `prompt_len` tokens are to be computed first."""
        state = self.heaps[request_id]
        state.prompt_len = prompt_len
        if not self._free_slots:
            self._free_slots.append(self._num_slots)
            self._num_slots += 1
        state.slot = self._free_slots.pop()
        self._new_slots.append(state.slot)

    def take_new_slots(self) -> list[int]:
        """Drain the slots that got a new owner."""
        slots, self._new_slots = self._new_slots, []
        return slots

    def _next_start(self, state: HeapState) -> int:
        """The first token of the next compression."""
        return max(state.compressed_len, self.rules.head_len)

    def _interval_end(self, state: HeapState, num_tokens: int) -> int | None:
        if not state.prompt_is_compressed or state.pending is not None:
            return None
        return self.rules.interval_end(state.compressed_len, num_tokens)

    def complete_prompt(self, request_id: str, num_tokens: int) -> None:
        """The step being planned completes the prompt with `num_tokens` in all."""
        state = self.heaps[request_id]
        state.prompt_end = num_tokens
        if self.rules.compressible_end(num_tokens):
            self.awaiting[request_id] = state
        else:
            state.prompt_is_compressed = True

    def plan_prompt(self, request_id: str) -> CompressionPlan:
        """Plan the compression of a complete prompt."""
        state = self.awaiting.pop(request_id)
        assert state.prompt_end is not None
        end = self.rules.compressible_end(state.prompt_end)
        return self._plan(request_id, state, end, state.prompt_end, is_prompt=True)

    def plan_interval(self, request_id: str, num_tokens: int) -> CompressionPlan | None:
        """Plan the compression of the tail's oldest blocks after this step, if it is due."""
        state = self.heaps[request_id]
        end = self._interval_end(state, num_tokens)
        if end is None:
            return None
        return self._plan(request_id, state, end, num_tokens, is_prompt=False)

    def note_planned(self, state: HeapState, num_tokens: int) -> None:
        """A decode step up to `num_tokens` is planned: when must the next one be looked at?"""
        next_block = cdiv(num_tokens, self.block_size) * self.block_size + 1
        state.quiet_until = min(next_block, self.rules.interval_due(state.compressed_len))

    def _plan(
        self,
        request_id: str,
        state: HeapState,
        end: int,
        context_len: int,
        is_prompt: bool,
    ) -> CompressionPlan:
        start = self._next_start(state)
        first, last = start // self.block_size, cdiv(context_len, self.block_size)
        blocks = self.req_to_blocks[request_id]
        # Only a prompt's decision looks at the head.
        head = blocks[:first] if is_prompt else []
        assert state.slot is not None
        state.pending = CompressionPlan(
            plan_id=next(self._plan_ids),
            request_id=request_id,
            slot=state.slot,
            start=start,
            end=end,
            context_len=context_len,
            is_prompt=is_prompt,
            head_block_ids=[block.block_id for block in head],
            dense_block_ids=[block.block_id for block in blocks[first:last]],
            heap_block_ids=[block.block_id for block in state.blocks],
            first_page=state.num_pages,
            is_first=state.compressed_len == 0,
        )
        self.unreported[state.pending.plan_id] = state
        return state.pending

    def confirm(
        self, plan_id: int, report: CompressionReport
    ) -> tuple[CompressionPlan, int] | None:
        """Take over a report: its plan, and how many dense blocks nobody holds any more.

        None if the request was freed since the plan.
        """
        state = self.unreported.pop(plan_id, None)
        if state is None:
            return None
        plan = state.pending
        assert plan is not None and plan.plan_id == plan_id
        assert report.num_pages <= len(state.blocks) * self.geometry.pages_per_block
        state.compressed_len = plan.end
        state.num_pages = report.num_pages
        state.prompt_is_compressed = True
        state.pending = None
        state.quiet_until = 0
        # No step reads these dense blocks any more: the workers read pages since the report.
        first, last = plan.start // self.block_size, plan.end // self.block_size
        moved = self.req_to_blocks[plan.request_id][first:last]
        num_freed = sum(block.ref_cnt == 1 for block in moved)
        self._remove_blocks_in_range(plan.request_id, first, last)
        self._free_unused_reserve(state)
        return plan, num_freed

    def frees_soon(self) -> bool:
        """Whether to wait for a compression under way, which may give blocks back.

        Not for ever: requests that fit into what is free are admitted meanwhile, and bring
        compressions of their own.
        """
        self._waits = self._num_waits < MAX_WAITS and bool(self.awaiting or self.unreported)
        return self._waits

    def end_schedule(self) -> None:
        """The scheduler has put a step together."""
        self._num_waits = self._num_waits + 1 if self._waits else 0
        self._waits = False

    def last_block_id(self, request_id: str, num_tokens: int) -> int:
        """The dense block of the last of `num_tokens` tokens."""
        blocks: Sequence[KVCacheBlock] = self.req_to_blocks[request_id]
        return blocks[(num_tokens - 1) // self.block_size].block_id
