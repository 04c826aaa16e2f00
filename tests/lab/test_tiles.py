"""A LLaVA-NeXT in the lab: what the methods are given of pictures that are cut into tiles."""

import math
from typing import Any

import numpy as np
import pytest
import tasks
import torch
from checkpoint import load_model, picture_side
from decoder import Decoder
from examples import Example, Question
from method_pruning import HiRED
from methods import METHODS
from PIL import Image
from questions import prompt
from seeing import see
from transformers import AutoProcessor

TILE, GRID = 84, 6
QUESTIONS = [Question("what colour is it", "red"), Question("how many are there", "two")]


@pytest.fixture(scope="module")
def tiled(checkpoint) -> tuple[Any, Any]:
    """A model and its processor."""
    folder = checkpoint("llava_next", layers=4, image_size=TILE, dtype="float32")
    return load_model(folder), AutoProcessor.from_pretrained(folder)


def picture(width: int, height: int) -> Image.Image:
    noise = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def example(*pictures: Image.Image) -> Example:
    return Example(list(pictures), [], QUESTIONS)


# Two of them fill their tiles, two are padded.
@pytest.mark.parametrize("size", [(168, 168), (84, 252), (100, 160), (250, 70)])
def test_it_sees_what_transformers_embeds(tiled, size) -> None:
    model, processor = tiled
    asked = see(model, processor, one := example(picture(*size), picture(168, 168)))
    text = prompt(processor, one, QUESTIONS[0].text)
    inputs = processor(images=one.images, text=text, return_tensors="pt")
    with torch.inference_mode():
        expected = model(**inputs).logits[0, -1]
        found = model(inputs_embeds=asked.embeddings[None]).logits[0, -1]
    assert torch.allclose(found, expected, atol=1e-4)
    assert len(asked.image_scores) == len(asked.image_parts) == int(asked.is_image.sum())
    assert asked.image_parts[: GRID**2].eq(0).all(), "the first overview"
    assert asked.image_parts.unique().tolist() == [-1, *range(len(asked.part_shares))]
    # Half of each picture's tokens are its overview's; the second one has four tiles.
    second = len(asked.part_shares) - 5
    start = int((asked.image_parts == second).nonzero()[0])
    share = start / len(asked.image_parts)
    overviews = [float(asked.part_shares[0]), float(asked.part_shares[second])]
    assert overviews == pytest.approx([0.5 * share, 0.5 * (1 - share)])
    assert float(asked.part_shares.sum()) == pytest.approx(1)


def test_tiles_share_by_what_the_overview_attends_to(tiled) -> None:
    model, processor = tiled
    one = example(picture(168, 168))
    asked = see(model, processor, one)
    inputs = processor(images=one.images, text="<image>", return_tensors="pt")
    with torch.inference_mode():
        seen = model.model.vision_tower(inputs.pixel_values[0], output_attentions=True)
    first, last = (
        seen.attentions[layer][:, :, 0, 1:].mean(1).unflatten(1, (GRID, GRID)) for layer in (0, -2)
    )
    corners = [(row, column) for row in (0, 1) for column in (0, 1)]
    half = GRID // 2
    mass = [first[0, r * half :, c * half :][:half, :half].sum() for r, c in corners]
    shares = [0.5, *(0.5 * float(part / sum(mass)) for part in mass)]
    assert asked.part_shares.tolist() == pytest.approx(shares)
    # Tiles lie as in the picture, in lines over two tiles, each with an end.
    lines = (2 * GRID, 2 * GRID + 1)
    parts, scores = (x[GRID**2 :].view(lines) for x in (asked.image_parts, asked.image_scores))
    assert parts[:, -1].eq(-1).all()
    for tile, (row, column) in enumerate(corners, start=1):
        inside = (slice(row * GRID, (row + 1) * GRID), slice(column * GRID, (column + 1) * GRID))
        assert parts[inside].eq(tile).all()
        assert torch.allclose(scores[inside], last[tile])
    budgets = [min(math.floor(0.4 * len(asked.image_parts) * share), GRID**2) for share in shares]
    num_words = int((~asked.is_image).sum())
    with torch.inference_mode():
        kept = HiRED(0.4)(Decoder(model), asked).kept
    assert kept == pytest.approx([(sum(budgets) + num_words) / asked.num_tokens] * 4)


@pytest.mark.parametrize("name", ["zipvl", "fastv", "hired-0.4", "qk-sparse-0.6", "shared-prefix"])
def test_methods_answer_about_drawn_pictures(tiled, name) -> None:
    model, processor = tiled
    side = picture_side(model.config)
    assert side == 2 * TILE
    drawn = tasks.example("objects", "hard", "test", 0, side, 2)
    with torch.inference_mode():
        outcome = METHODS[name](Decoder(model), see(model, processor, drawn))
    assert 0 < outcome.kv_bytes <= 1
    assert outcome.answer
