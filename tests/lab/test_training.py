"""The lab's model and its batches; runs are a few steps of a model that learns nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tasks
import torch
from batches import IGNORED, TrainingBatches, collate, prompt_ids
from examples import LEVELS
from lab_model import LabModel, make_processor, make_tokenizer

SPEC = LabModel(side=84, layers=1, hidden_size=64, heads=2, vision_layers=1, vision_hidden_size=64)
EVERY = [(family, level) for family in tasks.FAMILIES for level in LEVELS]
TRAIN = Path(__file__).parents[2] / "scripts" / "lab" / "train.py"


@pytest.mark.parametrize(("family", "level"), EVERY)
def test_every_word_is_known_and_an_answer_is_one(family: str, level: str) -> None:
    tokenizer = make_tokenizer()
    for index in range(60):
        one = tasks.example(family, level, "train", index, SPEC.side)
        assert tokenizer.unk_token_id not in tokenizer(one.question).input_ids
        (answer,) = tokenizer(one.answer, add_special_tokens=False).input_ids
        assert tokenizer.decode([answer]) == one.answer


@pytest.mark.parametrize("family", ["objects", "frames"])
def test_inputs_are_those_of_the_processor(family: str) -> None:
    one = tasks.example(family, "hard", "train", 3, SPEC.side)
    processor = make_processor(SPEC)
    content = [{"type": "image"}] * len(one.images) + [{"type": "text", "text": one.question}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    expected = processor(images=one.images, text=text, return_tensors="pt")
    batch = collate([one], SPEC)
    num_prompt = expected.input_ids.shape[1]
    assert prompt_ids(one, SPEC) == expected.input_ids[0].tolist()
    assert torch.equal(batch.input_ids[:, :num_prompt], expected.input_ids)
    assert torch.allclose(batch.pixel_values, expected.pixel_values, atol=1e-5)


def test_only_answers_have_labels() -> None:
    drawn = [tasks.example("words", "easy", "train", i, SPEC.side) for i in range(4)]
    batch = collate(drawn, SPEC)
    tokenizer = make_tokenizer()
    for row, one in zip(batch.labels, drawn, strict=True):
        answer, end = row[row != IGNORED].tolist()
        assert (tokenizer.decode([answer]), end) == (one.answer, tokenizer.eos_token_id)


def test_a_batch_depends_on_its_index_alone() -> None:
    one, resumed = (TrainingBatches(SPEC, 4, first, 0, blind=False) for first in (0, 7))
    for a, b in zip(one.batch(7), next(iter(resumed)), strict=True):
        assert torch.equal(a, b)


def test_blind_pictures_are_all_the_same() -> None:
    blind = TrainingBatches(SPEC, 4, 0, 0, blind=True).batch(1)
    assert not blind.pixel_values.any()


def train(out: Path, steps: int) -> dict:
    """Train up to `steps` in a process of its own; the state."""
    code = (
        "import sys, lab_model, train; "
        f"lab_model.PRESETS['tiny'] = lab_model.{SPEC!r}; "
        f"sys.argv = ['train.py', '--out', {str(out)!r}, '--preset', 'tiny', '--steps', '6', "
        "'--batch', '4', '--evaluate-every', '3', '--workers', '0']; "
        f"arguments = train.parse_arguments(); arguments.out.mkdir(exist_ok=True); "
        f"trainer = train.Trainer(arguments); trainer.run({steps})"
    )
    subprocess.run([sys.executable, "-c", code], cwd=TRAIN.parent, check=True, timeout=300)
    return torch.load(out / "state.pt", weights_only=True)


def test_a_resumed_run_is_the_run_that_was_not_interrupted(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", 6)
    assert train(tmp_path / "cut", 3)["step"] == 3
    cut = train(tmp_path / "cut", 6)
    assert cut["step"] == whole["step"] == 6
    for name, weight in whole["model"].items():
        assert torch.equal(cut["model"][name], weight), name
    lines = [json.loads(line) for line in (tmp_path / "cut" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "accuracy" in line] == [3, 6]
    assert (tmp_path / "cut" / "model" / "model.safetensors").exists()
