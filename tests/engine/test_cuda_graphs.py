"""Decode steps that a CUDA graph replays, against the same steps launched one by one."""

import pytest
import torch
from engines import draw_image, generate, prompt, words
from zipvl_engine import LOSSY, zipvl_engine

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

SETTINGS = {"dtype": "float32", "max_num_seqs": 4, "async_scheduling": True}
GRAPHS = {
    "enforce_eager": False,
    "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},
}
MAX_TOKENS = 100


def test_a_graph_gives_the_tokens_of_single_launches(checkpoint) -> None:
    """Requests that come and go, with compressions in between."""
    model = checkpoint("llava_next", dtype="float32")
    requests = [words(41 * i, num) for i, num in enumerate((700, 40, 333, 90))]
    requests += [prompt("what is it", draw_image(seed)) for seed in range(4)]
    with zipvl_engine(model, LOSSY, **SETTINGS) as llm:
        expected = generate(llm, requests, MAX_TOKENS)
    with zipvl_engine(model, LOSSY, **SETTINGS, **GRAPHS) as llm:
        assert generate(llm, requests, MAX_TOKENS) == expected
