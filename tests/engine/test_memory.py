"""Blocks move between requests, prefix cache and heap, and nothing of it shows in the tokens.

Most tests keep everything at full precision: then the right answer is stock vLLM's.
"""

from contextlib import contextmanager

import pytest
from engines import assert_pool_whole, engine, generate, scheduler_of, tokens, words
from zipvl_engine import (
    KEEP_ALL,
    LOSSY,
    assert_counted_whole,
    compressing,
    manager_of,
    worker_of,
    zipvl_engine,
)

COMMON = {"dtype": "float32", "max_model_len": 1024}
MAX_TOKENS = 90

# Their prompts fit side by side, their answers do not.
GROWING = [words(89 * i, 60 + 20 * i) for i in range(8)]
GROWN = 160


@pytest.fixture(scope="module")
def model(checkpoint):
    return checkpoint("llama", dtype="float32")


@contextmanager
def preemptions(llm):
    """The requests that are preempted while the block runs: `(request id, tokens generated)`."""
    scheduler = scheduler_of(llm)
    preempt = scheduler._preempt_request
    noted = []

    def noting_preempt(request, *args, **kwargs):
        noted.append((request.request_id, request.num_output_tokens))
        preempt(request, *args, **kwargs)

    scheduler._preempt_request = noting_preempt
    try:
        yield noted
    finally:
        del scheduler._preempt_request


@pytest.fixture(scope="module")
def grown(model):
    """Stock vLLM's answers to `GROWING`."""
    with engine(model, **COMMON) as llm:
        return generate(llm, GROWING, GROWN)


@pytest.mark.parametrize("num_blocks", [40, 56])
def test_preempted_requests_give_the_same_tokens(model, grown, num_blocks):
    small = {
        "num_gpu_blocks_override": num_blocks,
        "max_num_batched_tokens": 256,
        "dtype": "float32",
        "max_model_len": 512,
    }
    with zipvl_engine(model, KEEP_ALL, **small) as llm:
        with preemptions(llm) as preempted, compressing(llm):
            assert generate(llm, GROWING, GROWN) == grown
        assert preempted, "the pool was not too small"
        # Once more, with whatever prefixes are still cached.
        assert generate(llm, GROWING, GROWN) == grown
        assert_counted_whole(llm)


def test_hits_reach_beyond_the_prompt_after_a_preemption(model, monkeypatch):
    """A resumed request finds the blocks of the tokens that it had generated."""
    from vllm import SamplingParams

    request = words(0, 100)
    with engine(model, **COMMON) as llm:
        (expected,) = generate(llm, [request], GROWN)
    with zipvl_engine(model, KEEP_ALL, **COMMON) as llm, compressing(llm):
        llm_engine, scheduler, worker = llm.llm_engine, scheduler_of(llm), worker_of()
        begin_step, starts = worker.begin_step, []

        def noting_begin_step(plan):
            starts.extend(chunk.start for chunk in plan.chunks)
            begin_step(plan)

        monkeypatch.setattr(worker, "begin_step", noting_begin_step)
        parameters = SamplingParams(temperature=0, max_tokens=GROWN, ignore_eos=True)
        llm_engine.add_request("preempted", request, parameters)
        for _ in range(120):
            llm_engine.step()
        running = scheduler.running.pop()
        assert manager_of(llm).heaps[running.request_id].compressed_len > 128
        scheduler._preempt_request(running, 0.0)
        while llm_engine.has_unfinished_requests():
            outputs = llm_engine.step()
    assert starts == [0, 192], "219 tokens were computed, 6 blocks of which are full"
    assert list(outputs[0].outputs[0].token_ids) == expected


@pytest.mark.parametrize("reports_late", [False, True])
def test_a_small_pool_with_lossy_settings(model, reports_late):
    """Until it is preempted, a request gets the tokens that it gets in a pool for all."""
    lossy = {**LOSSY, "high_bits": 16, "low_bits": 8}
    settings = {"max_num_batched_tokens": 4096, "dtype": "float32", "max_model_len": 384}
    with zipvl_engine(model, lossy, **settings) as llm:
        with preemptions(llm) as preempted, compressing(llm):
            expected = generate(llm, GROWING, GROWN)
        assert not preempted
    with zipvl_engine(model, lossy, num_gpu_blocks_override=26, **settings) as llm:
        worker_of().reports_late = reports_late
        with preemptions(llm) as preempted, compressing(llm):
            outputs = generate(llm, GROWING, GROWN)
        assert_counted_whole(llm)
    assert preempted, "the pool was not too small"
    assert [len(output) for output in outputs] == [GROWN] * len(GROWING)
    # vLLM appends to the ids that it gives out, and these count the requests from 0 on.
    undisturbed = {int(key.split("-")[0]): num for key, num in reversed(preempted)}
    for i, (output, alone) in enumerate(zip(outputs, expected, strict=True)):
        num = undisturbed.get(i, GROWN)
        assert output[:num] == alone[:num], (i, num)


def cached_tokens(llm, request) -> int:
    from vllm import SamplingParams

    parameters = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True)
    (output,) = llm.generate([request], parameters, use_tqdm=False)
    return output.num_cached_tokens


def test_freed_blocks_still_hit(model):
    with zipvl_engine(model, LOSSY, **COMMON) as llm:
        first = words(0, 600)
        second = tokens(first["prompt_token_ids"][:580] + [301] * 20)
        assert cached_tokens(llm, first) == 0
        assert cached_tokens(llm, second) == 576
        assert_pool_whole(llm)


def test_dense_prompts_find_no_blocks_of_sparse_ones(model):
    short = tokens(words(0, 600)["prompt_token_ids"][:100])
    with zipvl_engine(model, LOSSY, **COMMON) as llm:
        assert cached_tokens(llm, words(0, 600)) == 0
        assert cached_tokens(llm, short) == 0, "sparsely prefilled"
        assert cached_tokens(llm, short) == 96, "densely prefilled"
        assert cached_tokens(llm, words(0, 600)) == 576
    approximate = {**LOSSY, "prefix_sharing": "approximate"}
    with zipvl_engine(model, approximate, **COMMON) as llm:
        assert cached_tokens(llm, words(0, 600)) == 0
        assert cached_tokens(llm, short) == 96


def test_exact_sharing_keeps_sparse_blocks_out(model):
    exact = {**LOSSY, "prefix_sharing": "exact"}
    with zipvl_engine(model, exact, **COMMON) as llm:
        assert cached_tokens(llm, words(0, 600)) == 0
        assert cached_tokens(llm, words(0, 600)) == 0, "sparsely prefilled"
        assert cached_tokens(llm, words(9, 100)) == 0
        assert cached_tokens(llm, words(9, 100)) == 96, "densely prefilled"


def test_live_requests_share_a_prefix_and_overwrite_nothing(model):
    prefix = words(0, 512)["prompt_token_ids"]
    requests = [tokens(prefix + [310 + i] * 40) for i in range(4)]
    with engine(model, **COMMON) as llm:
        expected = generate(llm, requests, MAX_TOKENS)
    with zipvl_engine(model, KEEP_ALL, **COMMON) as llm:
        generate(llm, requests[:1], 1)
        with compressing(llm):
            assert generate(llm, requests, MAX_TOKENS) == expected
        # Its blocks were freed by four compressions; a hit on them must still be intact.
        assert cached_tokens(llm, requests[0]) >= 512
        assert generate(llm, requests[:1], MAX_TOKENS) == expected[:1]


def test_freed_memory_is_used_by_others(model):
    """Four requests that would not fit side by side run at once, because each one shrinks."""
    requests = [words(61 * i, 600) for i in range(4)]
    with zipvl_engine(model, LOSSY, num_gpu_blocks_override=54, **COMMON) as llm:
        manager = manager_of(llm)
        most = 0
        admit = manager.admit

        def counting_admit(*args):
            nonlocal most
            admit(*args)
            most = max(most, len(manager.heaps))

        manager.admit = counting_admit
        generate(llm, requests, MAX_TOKENS)
    stock_blocks = 600 // 32 + 1
    assert most * stock_blocks > 54
    assert most == 4
