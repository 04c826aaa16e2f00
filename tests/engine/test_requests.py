"""Requests of every kind on one engine, with lossy settings; the pool is whole after each."""

import json
from types import SimpleNamespace

import pytest
import torch
from engines import assert_pool_whole, engine, generate, tokens
from zipvl_engine import (
    LOSSY,
    assert_counted_whole,
    confirmations,
    manager_of,
    worker_of,
    zipvl_engine,
)

EPS = torch.finfo(torch.float32).eps
MAX_MODEL_LEN = 512
SETTINGS = {"dtype": "float32", "max_model_len": MAX_MODEL_LEN, "max_num_batched_tokens": 2048}
LONG = list(range(300, 600))
SHORT = {1: 40, 2: 40, 31: 40, 63: 18, 65: 16, 127: 2}
"""By length of the prompt, the tokens that follow before anything compressed is read."""


@pytest.fixture(scope="module")
def model(checkpoint):
    return checkpoint("llama", dtype="float32")


@pytest.fixture(scope="module")
def stock(model):
    """Stock vLLM's answers to prompts of `SHORT` lengths, and its prompt logprobs of `LONG`."""
    with engine(model, **SETTINGS) as llm:
        answers = {num: generate(llm, [tokens(LONG[:num])], max_tokens=40)[0] for num in SHORT}
        return SimpleNamespace(answers=answers, prompt_logprobs=prompt_logprobs(llm))


@pytest.fixture(scope="module")
def shared_llm(model, stock):
    with zipvl_engine(model, LOSSY, **SETTINGS) as llm:
        yield llm


@pytest.fixture
def llm(shared_llm):
    yield shared_llm
    assert_pool_whole(shared_llm)
    assert_counted_whole(shared_llm)
    shared_llm.reset_prefix_cache()


def prompt_logprobs(llm):
    """Of `LONG`: a `{token id: Logprob}` per token but the first."""
    from vllm import SamplingParams

    parameters = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)
    (output,) = llm.generate([tokens(LONG)], parameters, use_tqdm=False)
    assert output.prompt_logprobs[0] is None
    return output.prompt_logprobs[1:]


def test_output_does_not_depend_on_the_batch(llm):
    requests = [tokens(LONG[:n]) for n in (1, 40, 130, 200, 299)]
    alone = []
    for request in requests:
        alone += generate(llm, [request], max_tokens=80)
        llm.reset_prefix_cache()
    # Disjoint first tokens, so that no request of the batch hits another's prefix.
    assert generate(llm, requests[:1] + requests[4:], max_tokens=80) == alone[:1] + alone[4:]
    llm.reset_prefix_cache()
    others = [tokens([700 + i, *LONG[i:]]) for i in range(6)]
    assert generate(llm, [*others, requests[3]], max_tokens=80)[-1] == alone[3]


def test_tails_are_compressed_again_and_again(llm):
    worker = worker_of()
    planned = []
    original = worker.compress_planned

    def compress_planned():
        planned.extend(worker.plan.compressions)
        return original()

    worker.compress_planned = compress_planned
    try:
        generate(llm, [tokens(LONG[:100])], max_tokens=200)
    finally:
        del worker.compress_planned
    assert [plan.is_prompt for plan in planned] == [True] + [False] * 6
    # From the first block on, which holds the sinks.
    assert [plan.start for plan in planned] == [32] + [plan.end for plan in planned[:-1]]
    assert planned[-1].end == 256


def test_reports_that_come_a_step_later(llm, monkeypatch):
    """As those of a GPU, which is not waited for in the step that compresses."""
    requests = [tokens(LONG[i : i + 130]) for i in range(0, 100, 20)]
    expected = generate(llm, requests, max_tokens=100)
    llm.reset_prefix_cache()
    worker = worker_of()
    monkeypatch.setattr(worker, "reports_late", True)
    with confirmations(llm) as confirmed:
        assert generate(llm, requests, max_tokens=100) == expected
    # A prompt each, and tails at 64 and more tokens.
    assert len(confirmed) >= 2 * len(requests)


@pytest.mark.parametrize("length", SHORT)
def test_short_prompts_prefill_densely(llm, stock, length):
    with confirmations(llm) as confirmed:
        (output,) = generate(llm, [tokens(LONG[:length])], max_tokens=40)
    assert len(output) == 40
    num_exact = SHORT[length]
    assert bool(confirmed) == (num_exact < 40)
    assert output[:num_exact] == stock.answers[length][:num_exact]


def test_a_prompt_and_answer_of_max_model_len(llm):
    ids = [300 + i % 400 for i in range(MAX_MODEL_LEN - 1)]
    (output,) = generate(llm, [tokens(ids)], max_tokens=50)
    assert len(output) == 1
    (output,) = generate(llm, [tokens(ids[:100])], max_tokens=1000)
    assert len(output) == MAX_MODEL_LEN - 100


def test_a_longer_prompt_is_refused_and_the_next_one_answered(llm):
    with pytest.raises(Exception, match="maximum context length"):
        generate(llm, [tokens([300] * (MAX_MODEL_LEN + 1))])
    assert len(generate(llm, [tokens(LONG)])[0]) == 8


def test_parallel_sampling_shares_the_prompt(llm):
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    parameters = SamplingParams(n=2, temperature=1.0, seed=1, max_tokens=60, ignore_eos=True)
    parameters.output_kind = RequestOutputKind.FINAL_ONLY
    llm.llm_engine.add_request("twins", tokens(LONG), parameters)
    llm.llm_engine.step()
    held = [[b.block_id for b in blocks] for blocks in manager_of(llm).req_to_blocks.values()]
    assert [len(blocks) for blocks in held] == [10, 10]
    assert held[0][:9] == held[1][:9], "the full blocks of the prompt"
    assert held[0][9] != held[1][9]
    while llm.llm_engine.has_unfinished_requests():
        outputs = llm.llm_engine.step()
    (output,) = outputs
    first, second = (list(completion.token_ids) for completion in output.outputs)
    assert len(first) == len(second) == 60
    assert first != second


def test_logprobs(llm):
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0, max_tokens=5, logprobs=3, ignore_eos=True)
    (output,) = llm.generate([tokens(LONG)], greedy, use_tqdm=False)
    (completion,) = output.outputs
    for token_id, step in zip(completion.token_ids, completion.logprobs, strict=True):
        assert len(step) >= 3
        assert step[token_id].logprob == max(entry.logprob for entry in step.values())


def test_prompt_logprobs_are_stock_vllms(llm, stock):
    found = prompt_logprobs(llm)
    for token_id, own, expected in zip(LONG[1:], found, stock.prompt_logprobs, strict=True):
        assert own[token_id].rank == expected[token_id].rank
        assert own[token_id].logprob == pytest.approx(expected[token_id].logprob, rel=32 * EPS)


def test_structured_output(llm):
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    schema = {"type": "object", "properties": {"n": {"type": "boolean"}}, "required": ["n"]}
    rule = StructuredOutputsParams(json=json.dumps(schema), disable_any_whitespace=True)
    parameters = SamplingParams(temperature=0, max_tokens=40, structured_outputs=rule)
    (output,) = llm.generate([tokens(LONG)], parameters, use_tqdm=False)
    assert set(json.loads(output.outputs[0].text)) == {"n"}


def test_a_second_engine_in_this_process_is_refused(llm):
    """vLLM would hand it the first one's connector, and its answers would be wrong."""
    with pytest.raises(RuntimeError, match="one engine at a time in a process"):
        worker_of().register({}, None, None, 1.0)
