"""One of two requests is aborted; the other one's answer is what it is alone."""

import pytest
from engines import assert_pool_whole, generate, scheduler_of, tokens
from zipvl_engine import (
    KEEP_ALL,
    assert_counted_whole,
    confirmations,
    manager_of,
    zipvl_engine,
)

ABORTED = list(range(300, 600))
KEPT = [5, *ABORTED]
PHASES = ("prefill", "before compression", "before the report", "decode")


@pytest.fixture(scope="module")
def llm(checkpoint):
    settings = {"dtype": "float32", "max_model_len": 512, "max_num_batched_tokens": 128}
    keep_all = {**KEEP_ALL, "min_tokens": 128, "residual": 16}
    with zipvl_engine(checkpoint("llama", dtype="float32"), keep_all, **settings) as llm:
        yield llm


@pytest.fixture(scope="module")
def alone(llm):
    return generate(llm, [tokens(KEPT)], max_tokens=100)


@pytest.mark.parametrize("phase", PHASES)
def test_abort(llm, alone, phase, monkeypatch):
    from vllm import SamplingParams

    llm.reset_prefix_cache()
    llm_engine, scheduler = llm.llm_engine, scheduler_of(llm)
    parameters = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
    for name, ids in (("aborted", ABORTED), ("kept", KEPT)):
        llm_engine.add_request(name, tokens(ids), parameters)
    (key,) = (key for key in scheduler.requests if key.startswith("aborted"))
    request, manager = scheduler.requests[key], manager_of(llm)
    update = scheduler.update_from_output
    pending = []

    def phase_of_request():
        state = manager.heaps.get(key)
        if state is None:
            return "queued"
        if state.prompt_end is None:
            return "prefill" if request.num_computed_tokens > 0 else "queued"
        if key in manager.awaiting:
            return "before compression"
        if state.pending is not None and state.pending.is_prompt:
            return "before the report"
        return "decode" if state.compressed_len > 256 else "tail not compressed"

    def aborting_update(*args):
        # As vLLM does: after the forward pass, before its output is taken over.
        if key in scheduler.requests and phase_of_request() == phase:
            pending.append(manager.heaps[key].pending)
            llm_engine.abort_request(["aborted"])
        return update(*args)

    monkeypatch.setattr(scheduler, "update_from_output", aborting_update)
    outputs = []
    with confirmations(llm) as confirmed:
        while llm_engine.has_unfinished_requests():
            outputs += [out for out in llm_engine.step() if out.finished]
    assert [out.request_id for out in outputs] == ["kept"]
    assert [list(out.outputs[0].token_ids) for out in outputs] == alone
    (pending,) = pending
    assert (pending is not None) == (phase == "before the report")
    assert pending is None or confirmed[pending.plan_id] is None, "the report is dropped"
    mine = [plan for plan in confirmed.values() if plan and plan.request_id == key]
    assert [plan.end for plan in mine] == ([256, 288] if phase == "decode" else [])
    assert_pool_whole(llm)
    assert_counted_whole(llm)
