"""The lab's model and its batches; runs are a few steps of a model that learns nothing."""

import dataclasses
import json
import subprocess
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

import family_album
import pytest
import tasks
import torch
import train as train_program
from batches import (
    IGNORED,
    KINDS,
    QUESTIONS,
    Batch,
    TrainingBatches,
    collate,
    patch_marks,
    prompt_ids,
)
from drawing import Mark, write
from examples import LEVELS
from lab_model import LabModel, make_model, make_processor, make_tokenizer
from PIL import Image

SPEC = LabModel(side=84, layers=1, hidden_size=64, heads=2, vision_layers=1, vision_hidden_size=64)
TILED = dataclasses.replace(SPEC, side=168, tiles=2)
EVERY = [(family, level) for family in tasks.CHOICES for level in LEVELS]
TRAIN = Path(__file__).parents[2] / "scripts" / "lab" / "train.py"


@pytest.mark.parametrize(("family", "level"), EVERY)
def test_every_word_is_known(family: str, level: str) -> None:
    tokenizer = make_tokenizer()
    for index in range(40):
        one = tasks.example(family, level, "train", index, SPEC.side, QUESTIONS)
        for question in one.questions:
            assert tokenizer.unk_token_id not in tokenizer(question.text).input_ids
            answer = tokenizer(question.answer, add_special_tokens=False).input_ids
            assert tokenizer.decode(answer).replace(" ", "") == question.answer.replace(" ", "")


@pytest.mark.parametrize("family", ["objects", "frames"])
@pytest.mark.parametrize("spec", [SPEC, TILED], ids=["whole", "tiled"])
def test_inputs_are_those_of_the_processor(family: str, spec: LabModel) -> None:
    one = tasks.example(family, "hard", "train", 3, spec.side)
    processor = make_processor(spec)
    content = [{"type": "image"}] * len(one.images) + [{"type": "text", "text": one.question}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    expected = processor(images=one.images, text=text, return_tensors="pt")
    batch = collate([one], spec)
    num_prompt = expected.input_ids.shape[1]
    pictures, words = prompt_ids(len(one.images), one.question, spec)
    ids = expected.input_ids[0].tolist()
    assert pictures + words == ids
    assert ids[0] == processor.tokenizer.bos_token_id not in ids[1:]
    assert torch.equal(batch.input_ids[:, :num_prompt], expected.input_ids)
    pixels = expected.pixel_values.flatten(0, -4)
    assert torch.allclose(batch.pixel_values, pixels, atol=1e-5)
    assert len(pixels) == len(one.images) * spec.num_views


def test_only_answers_have_labels() -> None:
    drawn = [tasks.example("words", "easy", "train", i, SPEC.side) for i in range(4)]
    batch = collate(drawn, SPEC)
    tokenizer = make_tokenizer()
    for row, one in zip(batch.labels, drawn, strict=True):
        *answer, end = row[row != IGNORED].tolist()
        assert answer == tokenizer(one.answer, add_special_tokens=False).input_ids
        assert end == tokenizer.eos_token_id


@pytest.mark.parametrize("family", ["charts", "frames"])
def test_questions_side_by_side_do_not_see_each_other(family: str) -> None:
    torch.manual_seed(0)
    model = make_model(SPEC).eval()
    several = tasks.example(family, "hard", "train", 0, SPEC.side, QUESTIONS)
    assert len(several.questions) > 2
    apart = [several._replace(questions=[question]) for question in several.questions]
    with torch.inference_mode():
        together = answer_logits(model, collate([several], SPEC))
        alone = torch.cat([answer_logits(model, collate([one], SPEC)) for one in apart])
    assert torch.allclose(together, alone, atol=1e-5)


def answer_logits(model: Any, batch: Batch, **more: torch.Tensor) -> torch.Tensor:
    logits = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask(),
        position_ids=batch.position_ids,
        pixel_values=batch.pixel_values,
        **more,
    ).logits
    return logits[:, :-1][batch.labels[:, 1:] != IGNORED]


def test_patches_are_marked_by_what_they_show() -> None:
    tokenizer = make_tokenizer()
    box = (0.5, 0.5, 0.84, 0.7)
    marks = patch_marks([Mark(box, shape="star", colour="red", text="42")], SPEC)
    shape, colour, value, character, first, second, third = marks.view(6, 6, len(KINDS)).unbind(-1)
    shown = (shape == tokenizer.convert_tokens_to_ids("star")).nonzero().tolist()
    assert shown == [[3, 3], [3, 4]]
    assert torch.equal(colour != tokenizer.pad_token_id, shape != tokenizer.pad_token_id)
    assert tokenizer.decode([first[3, 3], second[3, 4]]) == "4 2"
    assert (torch.stack([value, character, third]) == tokenizer.pad_token_id).all()


def test_tiles_are_marked_as_they_lie() -> None:
    mark = Mark((0.25, 0.75, 0.5, 1.0), shape="star")
    overview, *tiles = patch_marks([mark], TILED)[:, :, 0].view(5, 6, 6)
    star = make_tokenizer().convert_tokens_to_ids("star")
    assert torch.equal(overview, patch_marks([mark], SPEC)[0, :, 0].view(6, 6))
    expected = torch.zeros(6, 6, dtype=torch.bool)
    expected[3:, 3:] = True
    shown = [tile == star for tile in tiles]
    assert torch.equal(shown.pop(2), expected), "the lower left one"
    assert not torch.stack(shown).any()


def test_a_trainer_sees_what_transformers_computes_of_tiles(tmp_path: Path, monkeypatch) -> None:
    command = ["train.py", "--out", str(tmp_path), "--preset", "cpu-tiled", "--steps", "1"]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setitem(train_program.PRESETS, "cpu-tiled", TILED)
    trainer = train_program.Trainer(train_program.parse_arguments())
    batch = collate([tasks.example("frames", "hard", "train", 0, TILED.side, QUESTIONS)], TILED)
    with torch.inference_mode():
        projected = trainer._projected(trainer._features(batch))
        found, _ = trainer._logits(batch, projected)
        sizes = torch.full((4, 2), TILED.side)
        views = batch.pixel_values.unflatten(0, (-1, TILED.num_views))
        inputs = batch._replace(pixel_values=views)
        expected = answer_logits(trainer.model, inputs, image_sizes=sizes)
    assert torch.allclose(found, expected, atol=1e-5)


def test_a_written_character_is_marked_where_it_stands() -> None:
    tokenizer = make_tokenizer()
    written = write(Image.new("RGB", (336, 336)), 0.5, 0.5, "jam", 0.3, "red")
    marks = patch_marks([written], LabModel()).view(24, 24, len(KINDS))
    character, first = marks[12, :, 3], marks[12, :, 4]
    shown = character[character != tokenizer.pad_token_id]
    assert torch.equal(character != tokenizer.pad_token_id, first != tokenizer.pad_token_id)
    assert [char for char, _ in groupby(tokenizer.decode(shown).split())] == [*"jam"]


def test_a_batch_depends_on_its_index_alone() -> None:
    one, resumed = (TrainingBatches(SPEC, 4, first, 0, blind=False) for first in (0, 7))
    for a, b in zip(one.batch(7), next(iter(resumed)), strict=True):
        assert torch.equal(a, b)


def test_blind_pictures_are_all_the_same() -> None:
    blind = TrainingBatches(SPEC, 4, 0, 0, blind=True).batch(1)
    assert not blind.pixel_values.any()


def test_the_tower_first_sees_pictures_without_questions() -> None:
    batches = TrainingBatches(SPEC, 4, 0, 0, blind=False, tower_steps=2)
    assert not batches.batch(1).input_ids.numel()
    assert len(batches.batch(1).pixel_values) == 4
    assert (batches.batch(2).labels != IGNORED).any()


def test_patches_that_show_nothing_can_be_left_out() -> None:
    one = tasks.example("objects", "easy", "train", 0, SPEC.side, QUESTIONS)
    whole, marked = (collate([one], SPEC, only_marked=only) for only in (False, True))
    image = make_tokenizer().convert_tokens_to_ids("<image>")
    is_shown = (whole.marks != make_tokenizer().pad_token_id).any(-1)
    assert torch.equal(marked.is_given, is_shown)
    assert whole.is_given.all()
    (places,) = (whole.input_ids[0] == image).nonzero(as_tuple=True)
    left_out = places[~is_shown[0]]
    assert 0 < len(left_out) < len(places)
    stays = torch.ones_like(whole.input_ids[0], dtype=torch.bool).index_fill(0, left_out, False)
    for name in ("input_ids", "position_ids", "parts", "labels"):
        assert torch.equal(getattr(whole, name)[:, stays], getattr(marked, name)), name


def test_albums_come_when_asked_for() -> None:
    for albums in (False, True):
        batches = TrainingBatches(SPEC, 4, 0, 0, blind=False, albums=albums)
        counts = [len(batches.batch(index).pixel_values) for index in range(3)]
        assert counts == [4, family_album.NUM_PICTURES if albums else 4, 4]


def train(out: Path, steps: int) -> dict:
    """Train up to `steps` in a process of its own; the state."""
    code = (
        "import sys, lab_model, train; "
        f"lab_model.PRESETS['tiny'] = lab_model.{SPEC!r}; "
        f"sys.argv = ['train.py', '--out', {str(out)!r}, '--preset', 'tiny', '--steps', '6', "
        "'--tower-steps', '1', '--marked-steps', '2', '--lesson-steps', '2', '--batch', '4', "
        "'--evaluate-every', '3', '--workers', '0']; "
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
    assert [line["step"] for line in lines if "seen" in line] == [3, 6]
    assert (tmp_path / "cut" / "model" / "model.safetensors").exists()
