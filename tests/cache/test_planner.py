"""One step at a time: what is planned when, on vLLM's own scheduler."""

import copy
from typing import Any

import pytest
from pretend_engine import Base, Case, PretendEngine

from vllm_zipvl.cache.manager import MAX_WAITS, HeapState
from vllm_zipvl.plan import CompressionReport, StepPlan, StepReport

BLOCK_SIZE = 16
RESIDUAL = 32
INTERVAL = 48


def make_engine(base: Base, **zipvl: Any) -> PretendEngine:
    zipvl = {"residual": RESIDUAL, "interval": INTERVAL, "min_tokens": 64, **zipvl}
    return PretendEngine(base, Case(zipvl, BLOCK_SIZE, spare_blocks=40, stop_every=0))


def step(engine: PretendEngine, budget: int = 1000) -> StepPlan:
    """Schedule and run a step, and leave its output in flight."""
    engine.scheduler.max_num_scheduled_tokens = budget
    scheduler_output = engine.scheduler.schedule()
    engine.in_flight.append((scheduler_output, engine.worker.execute(scheduler_output)))
    plan = scheduler_output.kv_connector_metadata.plan
    # A worker gets its own copy of a plan.
    return copy.deepcopy(plan)


def finish_step(engine: PretendEngine) -> StepReport:
    """The scheduler takes over the oldest output, and the report in it."""
    scheduler_output, output = engine.in_flight.popleft()
    engine.scheduler.update_from_output(scheduler_output, output)
    return output.kv_connector_output.kv_connector_worker_meta.report


def prompt(num_tokens: int) -> list[int]:
    return [10 + i % 10 for i in range(num_tokens)]


def test_a_prompt_is_compressed_one_step_after_its_last_chunk(base: Base) -> None:
    engine = make_engine(base)
    request_id = engine.add(prompt(100), max_tokens=20)

    first = step(engine, budget=70)
    (chunk,) = first.chunks
    assert (chunk.start, chunk.end, chunk.ends_prompt) == (0, 70, False)
    assert first.new_slots == [chunk.slot]
    finish_step(engine)

    (chunk,) = (second := step(engine)).chunks
    assert (chunk.start, chunk.end, chunk.ends_prompt) == (70, 100, True)
    assert not second.compressions, "the first token must not wait"
    finish_step(engine)
    dense_ids = [block.block_id for block in engine.manager.req_to_blocks[request_id]]
    num_free = engine.pool.get_num_free_blocks()

    third = step(engine)
    (plan,) = third.compressions
    assert not third.chunks
    # The first block holds the sinks and stays.
    assert (plan.start, plan.end, plan.context_len, plan.is_prompt) == (16, 64, 100, True)
    assert (plan.head_block_ids, plan.dense_block_ids) == (dense_ids[:1], dense_ids[1:7])
    assert plan.first_page == 0 and plan.is_first
    assert engine.pool.get_num_free_blocks() == num_free, "nothing is freed before the report"

    report = finish_step(engine).compressions[plan.plan_id]
    state = engine.manager.heaps[request_id]
    assert (state.compressed_len, state.num_pages) == (64, report.num_pages)
    num_used = engine.manager.geometry.num_blocks(report.num_pages)
    unused_reserve = len(plan.heap_block_ids) - num_used
    assert engine.pool.get_num_free_blocks() == num_free + 3 + unused_reserve


def test_the_report_of_a_freed_request_is_dropped(base: Base) -> None:
    engine = make_engine(base)
    request_id = engine.add(prompt(100), max_tokens=20)
    step(engine)
    finish_step(engine)
    assert step(engine).compressions

    engine.abort(request_id)
    finish_step(engine)

    assert engine.planner.take_stats() is None
    engine._check_is_whole()


def test_the_report_of_a_preempted_request_does_not_count_for_its_new_life(base: Base) -> None:
    engine = make_engine(base)
    request_id = engine.add(prompt(100), max_tokens=20)
    step(engine)
    finish_step(engine)
    (old,) = step(engine).compressions
    engine.preempt(request_id, drop_output=True)
    step(engine)
    (new,) = step(engine).compressions
    assert new.plan_id != old.plan_id

    engine.planner.confirm(StepReport({old.plan_id: CompressionReport(1, [0, 0, 0])}))

    assert engine.manager.heaps[request_id].compressed_len == 0
    finish_step(engine)
    finish_step(engine)
    finish_step(engine)
    assert engine.manager.heaps[request_id].compressed_len == new.end


def test_the_tail_is_compressed_when_an_interval_is_full(base: Base) -> None:
    engine = make_engine(base)
    request_id = engine.add(prompt(100), max_tokens=100)
    state = None
    plans = []
    while request_id in engine.scheduler.requests:
        plan = step(engine)
        num_tokens = engine.scheduler.requests[request_id].num_computed_tokens
        tail_plans = [c for c in plan.compressions if not c.is_prompt]
        if not plan.chunks and state.prompt_is_compressed:
            assert bool(tail_plans) == (num_tokens - state.compressed_len == RESIDUAL + INTERVAL)
        plans += [(num_tokens, c) for c in tail_plans]
        state = engine.manager.heaps[request_id]
        finish_step(engine)

    # The tail starts at 64, the end of the prompt's compression.
    (first_end, first), (second_end, second) = plans
    assert (first_end, first.start, first.end, first.context_len) == (144, 64, 112, 144)
    assert (second_end, second.start, second.end) == (192, 112, 160)
    assert second.first_page > first.first_page > 0


def test_a_short_prompt_is_left_alone(base: Base) -> None:
    engine = make_engine(base)
    # One token less than a block beyond the residual.
    request_id = engine.add(prompt(RESIDUAL + BLOCK_SIZE - 1), max_tokens=3)
    while request_id in engine.scheduler.requests:
        assert not step(engine).compressions
        assert not engine.manager.awaiting
        assert not engine.manager.heaps[request_id].blocks, "nothing to reserve for"
        finish_step(engine)


def test_with_compress_off_nothing_is_reserved_or_planned(base: Base) -> None:
    engine = make_engine(base, compress=False)
    request_id = engine.add(prompt(150), max_tokens=50)
    while request_id in engine.scheduler.requests:
        assert not step(engine).compressions
        assert not engine.manager.heaps[request_id].blocks
        finish_step(engine)


@pytest.mark.parametrize(
    "asked",
    [{"prompt_logprobs": 0}, {"prompt_logprob_token_ids": [3, 4]}],
    ids=lambda a: next(iter(a)),
)
def test_a_request_for_prompt_logprobs_is_planned_densely(base: Base, asked: dict) -> None:
    engine = make_engine(base)
    with_logprobs = engine.add(prompt(100), max_tokens=2)
    for name, value in asked.items():
        setattr(engine.scheduler.requests[with_logprobs].sampling_params, name, value)
    engine.add(prompt(90), max_tokens=2)
    rows = {chunk.request_id: chunk.attends_densely for chunk in step(engine).chunks}
    assert rows.pop(with_logprobs)
    assert not any(rows.values())


def test_a_resumed_request_takes_all_it_knows_for_its_prompt(base: Base) -> None:
    engine = make_engine(base, interval=128)
    request_id = engine.add(prompt(60), max_tokens=60)
    for _ in range(41):
        step(engine)
        finish_step(engine)
    engine.preempt(request_id, drop_output=False)

    (chunk,) = step(engine).chunks
    # 60 tokens of the prompt and 41 outputs, whose whole blocks were still cached.
    assert (chunk.start, chunk.end, chunk.ends_prompt) == (96, 101, True)
    finish_step(engine)
    (plan,) = step(engine).compressions
    assert (plan.start, plan.end, plan.context_len, plan.is_prompt) == (16, 64, 101, True)


def test_a_decode_step_is_planned_only_where_something_changes(base: Base) -> None:
    engine = make_engine(base)
    request_id = engine.add(prompt(97), max_tokens=60)
    plans = [step(engine)]
    finish_step(engine)
    while request_id in engine.scheduler.requests:
        plans.append(step(engine))
        finish_step(engine)

    # Step i computes token 96 + i; the prompt is reported after step 1, an interval after 47.
    named = [i for i, plan in enumerate(plans) if plan.slot_of_block]
    assert named == [0, 1, 2, 16, 32, 47, 48]
    assert [i for i, plan in enumerate(plans) if plan.compressions] == [1, 47]


@pytest.mark.parametrize(
    ("settings", "compressed_at"), [({"compress": False}, []), ({"interval": 2}, [1, 15, 31])]
)
def test_nothing_is_planned_while_nothing_can_be_due(
    base: Base, settings: dict, compressed_at: list[int]
) -> None:
    engine = make_engine(base, **settings)
    request_id = engine.add(prompt(97), max_tokens=40)
    plans = []
    while request_id in engine.scheduler.requests:
        plans.append(step(engine))
        finish_step(engine)
    assert [i for i, plan in enumerate(plans) if plan.compressions] == compressed_at
    # The prompt, the step before and after a compression, and each new block.
    named = {i for i, plan in enumerate(plans) if plan.slot_of_block}
    assert named == {0, 1, 16, 32, *compressed_at, *(i + 1 for i in compressed_at)}


def test_waiting_for_a_report_ends(base: Base) -> None:
    """Another compression is always under way, and none of them gives back enough."""
    engine = make_engine(base)
    engine.manager.unreported[-1] = HeapState()
    connector = engine.scheduler.connector
    for _ in range(MAX_WAITS):
        assert connector.has_pending_block_frees()
        step(engine)
    assert not connector.has_pending_block_frees()
    assert not connector.has_pending_block_frees(), "until it is served, in the same step"
    step(engine)
    assert connector.has_pending_block_frees(), "the next one may wait again"


def test_shared_blocks_do_not_count_as_freed(base: Base) -> None:
    engine = make_engine(base)
    # Otherwise the scheduler takes them with every output.
    engine.planner.take_stats = lambda: None
    for _ in range(2):
        engine.add(prompt(100), max_tokens=20)
    for _ in range(2):
        step(engine)
        finish_step(engine)
    data = engine.planner._stats.data
    assert (data["prompts"], data["prompt_tokens"]) == (2, 2 * 48)
    assert data["blocks_freed"] == 48 // BLOCK_SIZE, "both held the same ones"
