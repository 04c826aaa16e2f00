"""The scheduler's side of a step: what the workers are to do, and what they did."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from vllm.v1.core.sched.output import SchedulerOutput

from vllm_zipvl.backend.metrics import ZipVLStats
from vllm_zipvl.cache.manager import ZipVLManager
from vllm_zipvl.plan import ChunkPlan, StepPlan, StepReport

if TYPE_CHECKING:
    from vllm.v1.request import Request


class StepPlanner:
    """Turns the scheduler's steps into plans, and reports into freed blocks."""

    def __init__(self, manager: ZipVLManager) -> None:
        self.manager = manager
        self._dense_requests: set[str] = set()
        self._stats = ZipVLStats()

    def admit(self, request: "Request") -> None:
        """A waiting or preempted request starts: all tokens known now are its prompt."""
        self.manager.admit(request.request_id, request.num_tokens)
        params = request.sampling_params
        if params is not None and (
            params.prompt_logprobs is not None or params.prompt_logprob_token_ids is not None
        ):
            # What sparse prefill computes for tokens that are not kept is good enough for the
            # tokens after them, but these are asked for themselves.
            self._dense_requests.add(request.request_id)

    def finish(self, request: "Request") -> None:
        self._dense_requests.discard(request.request_id)

    def plan(self, scheduler_output: SchedulerOutput) -> StepPlan:
        """The plan of the step that the scheduler just put together."""
        manager = self.manager
        manager.end_schedule()
        plan = StepPlan(new_slots=manager.take_new_slots())
        # Prompts completed in an earlier step, so that their first token did not wait.
        for request_id in list(manager.awaiting):
            plan.compressions.append(manager.plan_prompt(request_id))
        heaps, num_scheduled_tokens = manager.heaps, scheduler_output.num_scheduled_tokens
        for request_id, num_computed in num_computed_tokens(scheduler_output):
            end = num_computed + num_scheduled_tokens[request_id]
            state = heaps[request_id]
            if end < state.quiet_until:
                continue
            assert state.slot is not None
            last_block_id = manager.last_block_id(request_id, end)
            plan.slot_of_block[last_block_id] = state.slot
            if state.prompt_end is None:
                chunk = self._plan_chunk(request_id, num_computed, end, last_block_id)
                plan.chunks.append(chunk)
                continue
            compression = manager.plan_interval(request_id, end)
            if compression is not None:
                plan.compressions.append(compression)
            manager.note_planned(state, end)
        return plan

    def _plan_chunk(self, request_id: str, start: int, end: int, last_block_id: int) -> ChunkPlan:
        manager = self.manager
        state = manager.heaps[request_id]
        assert state.slot is not None and state.prompt_len is not None
        ends_prompt = end >= state.prompt_len
        if ends_prompt:
            manager.complete_prompt(request_id, end)
        return ChunkPlan(
            request_id=request_id,
            slot=state.slot,
            last_block_id=last_block_id,
            start=start,
            end=end,
            ends_prompt=ends_prompt,
            attends_densely=request_id in self._dense_requests,
        )

    def confirm(self, report: StepReport) -> None:
        """Take over the workers' report of a step."""
        manager = self.manager
        geometry = manager.geometry
        for plan_id, compression in report.compressions.items():
            confirmed = manager.confirm(plan_id, compression)
            if confirmed is None:
                continue
            plan, num_freed = confirmed
            num_used = geometry.num_blocks(compression.num_pages)
            self._stats.record(
                plan,
                compression,
                num_freed=num_freed,
                num_used=num_used - geometry.num_blocks(plan.first_page),
            )

    def take_stats(self) -> ZipVLStats | None:
        """Drain what was counted since the last call."""
        if self._stats.is_empty():
            return None
        stats, self._stats = self._stats, ZipVLStats()
        return stats


def num_computed_tokens(scheduler_output: SchedulerOutput) -> Iterator[tuple[str, int]]:
    """Scheduled requests with the tokens computed before the step."""
    for request in scheduler_output.scheduled_new_reqs:
        yield request.req_id, request.num_computed_tokens
    cached = scheduler_output.scheduled_cached_reqs
    yield from zip(cached.req_ids, cached.num_computed_tokens, strict=True)
