"""The same answers whatever runs the model: ranks, a compiled model, processes, narrow dtypes."""

import pytest
import torch
from engines import engine, generate, words
from zipvl_engine import KEEP_ALL, LOSSY, compressing, zipvl_engine

COMMON = {"dtype": "float32", "max_model_len": 1024, "max_num_batched_tokens": 256}
RAW = {**COMMON, "max_logprobs": -1, "logprobs_mode": "raw_logits"}
MAX_TOKENS = 70
REQUESTS = [words(97 * i, num) for i, num in enumerate((500, 40, 310))]


@pytest.fixture(scope="module")
def model(checkpoint):
    return checkpoint("llama", dtype="float32")


@pytest.fixture(scope="module")
def expected(model):
    with zipvl_engine(model, LOSSY, **COMMON) as llm, compressing(llm):
        return generate(llm, REQUESTS, MAX_TOKENS)


def test_two_ranks(model, expected, monkeypatch):
    """Ranks that compressed differently would stop the engine: see `StepReport.check_same`."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    ranks = {"processes": "workers", "tensor_parallel_size": 2}
    with zipvl_engine(model, LOSSY, **ranks, **COMMON) as llm, compressing(llm):
        assert generate(llm, REQUESTS, MAX_TOKENS) == expected


def test_processes_of_their_own(model, expected):
    """The enum member of the backend is unpickled there before plugins are loaded."""
    with zipvl_engine(model, LOSSY, processes="all", **COMMON) as llm:
        assert generate(llm, REQUESTS, MAX_TOKENS) == expected


def test_default_compilation(model):
    compiled = {"enforce_eager": False, **COMMON}
    with engine(model, **compiled) as llm:
        stock = generate(llm, REQUESTS, MAX_TOKENS)
    with zipvl_engine(model, KEEP_ALL, **compiled) as llm, compressing(llm):
        assert generate(llm, REQUESTS, MAX_TOKENS) == stock


def logits(llm) -> torch.Tensor:
    """Of every step, when all answers are the same token over and over."""
    from vllm import SamplingParams

    parameters = SamplingParams(
        max_tokens=MAX_TOKENS, ignore_eos=True, allowed_token_ids=[7], logprobs=-1, detokenize=False
    )
    outputs = llm.generate(REQUESTS, parameters, use_tqdm=False)
    steps = [step for output in outputs for step in output.outputs[0].logprobs]
    return torch.tensor([[step[i].logprob for i in range(len(step))] for step in steps])


@pytest.fixture(scope="module")
def exact(model):
    """Logits in float32, of stock and of lossy settings."""
    with engine(model, **RAW) as llm:
        stock = logits(llm)
    with zipvl_engine(model, LOSSY, **RAW) as llm, compressing(llm):
        return stock, logits(llm)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(model, exact, dtype):
    """Rounding moves the logits as it moves stock's, and less than the lossy settings do."""
    half = {**RAW, "dtype": dtype}
    stock, lossy = exact
    with engine(model, **half) as llm:
        rounding = (logits(llm) - stock).norm()
    with zipvl_engine(model, KEEP_ALL, **half) as llm, compressing(llm):
        found = (logits(llm) - stock).norm()
    with zipvl_engine(model, LOSSY, **half) as llm, compressing(llm):
        found_lossy = (logits(llm) - lossy).norm()
    assert found <= 2 * rounding
    assert found_lossy < (lossy - stock).norm()
