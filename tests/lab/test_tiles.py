"""A LLaVA-NeXT in the lab: what the methods are given of pictures that are cut into tiles."""

from typing import Any

import numpy as np
import pytest
import tasks
import torch
from checkpoint import load_model, picture_side
from decoder import Decoder, Picture
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
    folder = checkpoint("llava_next", layers=4, image_size=TILE, vision_layers=4, dtype="float32")
    return load_model(folder), AutoProcessor.from_pretrained(folder)


def drawn(width: int, height: int) -> Image.Image:
    noise = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def example(*pictures: Image.Image) -> Example:
    return Example(list(pictures), [], QUESTIONS)


# Two of them fill their tiles, two are padded.
@pytest.mark.parametrize("size", [(168, 168), (84, 252), (100, 160), (250, 70)])
def test_it_sees_what_transformers_embeds(tiled, size) -> None:
    model, processor = tiled
    asked = see(model, processor, one := example(drawn(*size), drawn(168, 168)))
    text = prompt(processor, one, QUESTIONS[0].text)
    inputs = processor(images=one.images, text=text, return_tensors="pt")
    with torch.inference_mode():
        expected = model(**inputs).logits[0, -1]
        found = model(inputs_embeds=asked.embeddings[None]).logits[0, -1]
    assert torch.allclose(found, expected, atol=1e-4)
    assert sum(len(one.scores) for one in asked.pictures) == int(asked.is_image.sum())
    for picture in asked.pictures:
        assert picture.views[: GRID**2].eq(0).all(), "the overview"
        assert picture.views.unique().tolist() == [-1, *range(len(picture.tile_content) + 1)]


def test_tiles_are_scored_where_they_lie(tiled) -> None:
    model, processor = tiled
    one = example(drawn(168, 168))
    (picture,) = see(model, processor, one).pictures
    inputs = processor(images=one.images, text="<image>", return_tensors="pt")
    with torch.inference_mode():
        seen = model.model.vision_tower(inputs.pixel_values[0], output_attentions=True)
    first, scores = (
        seen.attentions[layer][:, :, 0, 1:].mean(1).unflatten(1, (GRID, GRID)) for layer in (0, -2)
    )
    assert not torch.allclose(first, scores)
    corners = [(row, column) for row in (0, 1) for column in (0, 1)]
    half = GRID // 2
    content = [float(first[0, r * half :, c * half :][:half, :half].sum()) for r, c in corners]
    assert picture.tile_content.tolist() == pytest.approx(content)
    assert torch.allclose(picture.scores[: GRID**2], scores[0].flatten())
    # Tiles lie as in the picture, in lines over two tiles, each with an end.
    lines = (2 * GRID, 2 * GRID + 1)
    views, of_lines = (x[GRID**2 :].view(lines) for x in (picture.views, picture.scores))
    assert views[:, -1].eq(-1).all()
    for tile, (row, column) in enumerate(corners, start=1):
        inside = (slice(row * GRID, (row + 1) * GRID), slice(column * GRID, (column + 1) * GRID))
        assert views[inside].eq(tile).all()
        assert torch.allclose(of_lines[inside], scores[tile])


def test_hired_splits_its_budget() -> None:
    views = torch.tensor([0] * 4 + [1, 1, 2, 2, -1] * 2)
    scores = torch.arange(14).float().masked_fill(views < 0, -1)
    picture = Picture(scores, views, torch.tensor([0.75, 0.25]))
    kept = HiRED(6 / 14)._kept(picture)
    # Three of the overview; of the other three, two are of the tile with more to see.
    assert views[kept].tolist() == [0, 0, 0, 1, 1]
    assert scores[kept].tolist() == [1, 2, 3, 9, 10]
    # The overview has no use for three of its seven; the tiles have them, up to their size.
    kept = HiRED(1.0, overview=0.5)._kept(picture)
    assert views[kept].bincount().tolist() == [4, 4, 2]
    whole = Picture(torch.tensor([0.1, 0.4, 0.2, 0.3]), torch.zeros(4).long())
    assert HiRED(0.5)._kept(whole).tolist() == [False, True, False, True]


@pytest.mark.parametrize("name", ["zipvl", "fastv", "hired-0.4", "qk-sparse-0.6", "shared-prefix"])
def test_methods_answer_about_drawn_pictures(tiled, name) -> None:
    model, processor = tiled
    side = picture_side(model.config)
    assert side == 2 * TILE
    asked = see(model, processor, tasks.example("objects", "hard", "test", 0, side, 2))
    with torch.inference_mode():
        outcome = METHODS[name](Decoder(model), asked)
    assert 0 < outcome.kv_bytes <= 1
    assert outcome.answer
