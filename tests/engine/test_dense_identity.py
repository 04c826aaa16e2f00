"""Keeping everything at full precision equals stock attention, token for token.

The settings still run the whole machinery: prompts are compressed into heap pages (unquantised
ones), dense blocks go back, tails are compressed while decoding. This test anchors all others.
"""

import pytest
from engines import draw_image, engine, generate, prompt
from zipvl_engine import KEEP_ALL, assert_counted_whole, compressing, zipvl_engine

QUESTIONS = ("What is it?", "Where is it?", "How many?", "Which colour? " * 30)
MAX_TOKENS = 72

FAMILIES = {
    "llama": {"heads": 28, "kv_heads": 4, "head_size": 128},
    "llava": {"heads": 32, "kv_heads": 8, "head_size": 64},
    "llava_next": {"heads": 32, "kv_heads": 32, "head_size": 64},
    "llava_onevision": {"heads": 28, "kv_heads": 4, "head_size": 64},
}


def requests_for(family: str) -> list[dict]:
    if family == "llama":
        texts = [f"{question} " * 8 for question in QUESTIONS] + list(QUESTIONS)
        return [prompt(text) for text in texts]
    requests = [prompt(text, draw_image(0, (480, 240))) for text in QUESTIONS]
    requests.append(prompt("Compare.", draw_image(1), draw_image(2, (200, 300))))
    requests += [prompt(text, draw_image(3, (240, 480))) for text in QUESTIONS[:2]]
    return [*requests, prompt("No image here.")]


@pytest.mark.parametrize("family", FAMILIES)
def test_same_tokens_as_stock(checkpoint, family):
    model = checkpoint(family, dtype="float32", **FAMILIES[family])
    requests = requests_for(family)
    common = {"dtype": "float32", "max_model_len": 4096}
    with engine(model, **common) as llm:
        expected = generate(llm, requests, MAX_TOKENS)
    assert len(requests) == 8
    with zipvl_engine(model, KEEP_ALL, **common) as llm:
        with compressing(llm):
            assert generate(llm, requests, MAX_TOKENS) == expected, "whole prompts"
        with compressing(llm):
            assert generate(llm, requests, MAX_TOKENS) == expected, "cached prefixes"
        assert_counted_whole(llm)
    chunked = {"max_num_batched_tokens": 256, **common}
    with zipvl_engine(model, KEEP_ALL, **chunked) as llm, compressing(llm):
        assert generate(llm, requests, MAX_TOKENS) == expected, "prompts in chunks"
