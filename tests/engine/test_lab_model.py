"""The trained models that come with the project: their size, and engine against oracle on them."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from zipvl_engine import assert_same_masks, noting_masks, zipvl_engine

from vllm_zipvl.config import ZipVLConfig
from vllm_zipvl.hf import ZipVLCache

LAB = Path(__file__).parents[2] / "scripts" / "lab"
MODEL, TILED = LAB / "model", LAB / "model_tiled"
NUM_NEW = 12
LARGEST_FILE, LARGEST_BOTH = 16 * 2**20, 24 * 2**20


def test_they_are_small() -> None:
    sizes = [file.stat().st_size for folder in (MODEL, TILED) for file in folder.iterdir()]
    assert max(sizes) <= LARGEST_FILE
    assert sum(sizes) <= LARGEST_BOTH


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(LAB)
    import checkpoint
    import questions
    from method_zipvl import BLOCK_SIZE, LAB_SETTINGS

    # At two precisions, so that the cache chooses, too.
    return checkpoint, questions, BLOCK_SIZE, {**LAB_SETTINGS, "low_bits": 2}


@pytest.mark.parametrize(
    ("folder", "asked"),
    [(MODEL, {}), (TILED, {"families": ("words", "relations")})],
    ids=["whole pictures", "tiles"],
)
def test_engine_and_oracle_keep_and_answer_the_same(lab, folder, asked) -> None:
    checkpoint, questions, block_size, settings = lab
    processor = transformers.AutoProcessor.from_pretrained(folder)
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        folder, attn_implementation="zipvl", dtype=torch.float32
    )
    side = checkpoint.picture_side(model.config)
    examples = [questions.draw(key, side) for key in questions.test_set(1, **asked)]
    texts = [questions.prompt(processor, one, one.question) for one in examples]

    expected, expected_masks = [], []
    for one, text in zip(examples, texts, strict=True):
        inputs = processor(images=one.images, text=text, return_tensors="pt")
        cache = ZipVLCache(ZipVLConfig(**settings), block_size)
        output = model.generate(
            **inputs, past_key_values=cache, do_sample=False, max_new_tokens=NUM_NEW
        )
        expected.append(output[0, inputs.input_ids.shape[1] :].tolist())
        expected_masks.append(cache.prompt_masks())

    from vllm import SamplingParams

    requests = [
        {"prompt": text, "multi_modal_data": {"image": one.images}}
        for one, text in zip(examples, texts, strict=True)
    ]
    common = {"dtype": "float32", "block_size": block_size, "max_num_seqs": 1}
    with zipvl_engine(folder, settings, **common) as llm, noting_masks() as masks:
        greedy = SamplingParams(temperature=0, max_tokens=NUM_NEW)
        outputs = llm.generate(requests, greedy, use_tqdm=False)
    assert_same_masks(masks, expected_masks)
    assert [list(output.outputs[0].token_ids) for output in outputs] == expected
    answers = [questions.normal(output.outputs[0].text) for output in outputs]
    right = [questions.normal(one.answer) for one in examples]
    assert sum(a == b for a, b in zip(answers, right, strict=True)) >= len(right) - 3, answers
