"""Examples as the model's inputs, in batches that worker processes draw."""

from collections.abc import Collection, Iterator
from functools import cache
from itertools import repeat
from random import Random
from typing import Any, NamedTuple

import family_album
import family_charts
import family_frames
import lessons
import numpy as np
import primer
import tasks
import torch
from drawing import Mark
from examples import LEVELS, Example
from lab_model import LabModel, make_processor, make_tokenizer
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerFast
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

KINDS = ("shape", "colour", "value", "character", "first", "second", "third")
"""Of what a patch shows; the last are the characters of the text that the one there is part of."""
_CHARACTER = KINDS.index("character")
IGNORED = -100
"""Label of positions without a loss."""
QUESTIONS = 8
"""Asked at once about an example."""
SINGLE = ("words", "perception", *["objects", "charts", "relations"] * 2)
"""Families of one picture, drawn alike; those with the most kinds of questions twice as often."""


class Batch(NamedTuple):
    """Inputs of one step: rows of pictures followed by their questions, side by side.

    Attributes:
        input_ids: int64 [batch, length], padded on the right.
        position_ids: int64, as `input_ids`; every question starts right after the pictures.
        parts: int64, as `input_ids`: 0 up to the last picture, then the question's number from 1
            on; -1 is padding.
        labels: int64, as `input_ids`; `IGNORED` outside of answers.
        pixel_values: float32 [num_views, 3, tile_side, tile_side]; a view is a picture, or its
            overview or a tile.
        marks: int64 [num_views, tokens_per_view, len(KINDS)], the token that says what a patch
            shows; the padding token for nothing.
        is_given: Bool [num_views, tokens_per_view], the patches that `input_ids` has tokens for.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    parts: torch.Tensor
    labels: torch.Tensor
    pixel_values: torch.Tensor
    marks: torch.Tensor
    is_given: torch.Tensor

    def attention_mask(self) -> torch.Tensor:
        """Bool [batch, 1, length, length]: a question sees the pictures and itself alone."""
        query, key = self.parts[:, :, None], self.parts[:, None, :]
        causal = torch.ones(query.shape[1], query.shape[1], dtype=torch.bool).tril()
        return (causal.to(query.device) & ((key == 0) | (key == query)))[:, None]


@cache
def tokenizer_of_tasks() -> PreTrainedTokenizerFast:
    return make_tokenizer()


def prompt_ids(num_images: int, question: str, spec: LabModel) -> tuple[list[int], list[int]]:
    """What the chat template makes of a question: up to the last image token, and the rest."""
    tokenizer = tokenizer_of_tasks()
    content = [{"type": "image"}] * num_images + [{"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    image = tokenizer.convert_tokens_to_ids("<image>")
    ids = tokenizer(text).input_ids
    split = len(ids) - ids[::-1].index(image)
    before = [
        i for one in ids[:split] for i in [one] * (spec.tokens_per_image if one == image else 1)
    ]
    return before, ids[split:]


def num_answer_tokens(answer: str) -> int:
    """The end included."""
    return len(tokenizer_of_tasks()(answer, add_special_tokens=False).input_ids) + 1


@cache
def _tiler(spec: LabModel) -> Any:
    return make_processor(spec).image_processor


def pixels(example: Example, spec: LabModel) -> torch.Tensor:
    """As CLIP's image processor makes them, float32 [num_views, 3, tile_side, tile_side]."""
    if spec.tiles > 1:
        cut = _tiler(spec)(example.images, return_tensors="pt").pixel_values
        return cut.flatten(0, 1)
    stacked = torch.from_numpy(np.stack([np.asarray(image) for image in example.images]))
    mean, std = (torch.tensor(x)[:, None, None] for x in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return (stacked.permute(0, 3, 1, 2).float() / 255 - mean) / std


def patch_marks(marks: list[Mark], spec: LabModel) -> torch.Tensor:
    """What each patch of a picture's views shows, [num_views, tokens_per_view, len(KINDS)]."""
    num = spec.tile_side // spec.patch_size
    overview = _marks_on_grid(marks, num)[None]
    if spec.tiles == 1:
        return overview.flatten(1, 2)
    tiles = _marks_on_grid(marks, num * spec.tiles)
    tiles = tiles.unflatten(0, (-1, num)).unflatten(2, (-1, num)).transpose(1, 2).flatten(0, 1)
    return torch.cat([overview, tiles]).flatten(1, 2)


def _marks_on_grid(marks: list[Mark], num: int) -> torch.Tensor:
    """What the middle of each of `num` x `num` patches shows, [num, num, len(KINDS)]."""
    tokenizer = tokenizer_of_tasks()
    labels = torch.full((num, num, len(KINDS)), tokenizer.pad_token_id)
    for mark in marks:
        left, top, right, bottom = (max(0, round(edge * num)) for edge in mark.box)
        words = (mark.shape, mark.colour, mark.value, None, *(mark.text or ""))
        for row in range(top, max(bottom, top + 1)):
            for column in range(left, max(right, left + 1)):
                shown = [*words, *[None] * (len(KINDS) - len(words))]
                if mark.edges:
                    place = sum(edge < (column + 0.5) / num for edge in mark.edges[:-1])
                    shown[_CHARACTER] = mark.text[place]
                for kind, word in enumerate(shown):
                    if word:
                        token = tokenizer.convert_tokens_to_ids(word)
                        labels[row, column, kind] = token
    return labels


class _Row(NamedTuple):
    """One example's part of a batch, as lists of equal length."""

    input_ids: list[int]
    position_ids: list[int]
    parts: list[int]
    labels: list[int]


_PADDING = _Row([0], [0], [-1], [IGNORED])


def _row(example: Example, spec: LabModel, is_given: list[bool] | None) -> _Row:
    tokenizer = tokenizer_of_tasks()
    image = tokenizer.convert_tokens_to_ids("<image>")
    row = _Row([], [], [], [])
    for part, question in enumerate(example.questions, start=1):
        pictures, words = prompt_ids(len(example.images), question.text, spec)
        if part == 1:
            patches = repeat(True) if is_given is None else iter(is_given)
            places = [i for i, token in enumerate(pictures) if token != image or next(patches)]
            row.input_ids.extend(pictures[i] for i in places)
            row.position_ids.extend(places)
            row.parts.extend([0] * len(places))
            row.labels.extend([IGNORED] * len(places))
        answer = tokenizer(question.answer, add_special_tokens=False).input_ids
        answer.append(tokenizer.eos_token_id)
        length = len(words) + len(answer)
        row.input_ids.extend(words + answer)
        row.position_ids.extend(range(len(pictures), len(pictures) + length))
        row.parts.extend([part] * length)
        row.labels.extend([IGNORED] * len(words) + answer)
    return row


def collate(
    examples: list[Example], spec: LabModel, blind: bool = False, only_marked: bool = False
) -> Batch:
    """Questions with their answers.

    Args:
        examples: A row each.
        spec: Of the model.
        blind: Show grey pictures.
        only_marked: Leave out the tokens of patches that show nothing; the others keep their
            positions. Of pictures without tiles.
    """
    marks = [torch.cat([patch_marks(one, spec) for one in example.marks]) for example in examples]
    pad = tokenizer_of_tasks().pad_token_id
    given = [(of_one != pad).any(-1) | (not only_marked) for of_one in marks]
    rows = [
        _row(example, spec, is_given.flatten().tolist() if only_marked else None)
        for example, is_given in zip(examples, given, strict=True)
    ]
    length = max(len(row.input_ids) for row in rows)
    padded = [
        [values + padding * (length - len(values)) for values in field]
        for field, padding in zip(zip(*rows, strict=True), _PADDING, strict=True)
    ]
    pictures = torch.cat([pixels(example, spec) for example in examples])
    if blind:
        pictures = torch.zeros_like(pictures)
    return Batch(*map(torch.tensor, padded), pictures, torch.cat(marks), torch.cat(given))


class TrainingBatches(IterableDataset):
    """Batch i is the same whoever draws it.

    Attributes:
        spec: Of the model.
        size: Pictures a batch.
        first: Batch to begin with, where a resumed run goes on.
        seed: Other batches for another one.
        blind: Show grey pictures.
        tower_steps: Batches for the vision tower alone, at the start.
        marked_steps: Batches after them, of lessons, that hold the patches which show something
            alone.
        lesson_steps: Batches after them, of lessons too, that hold all patches.
        lesson_families: Whose lessons are given.
        albums: Draw albums too.
    """

    def __init__(
        self,
        spec: LabModel,
        size: int,
        first: int,
        seed: int,
        blind: bool,
        tower_steps: int = 0,
        marked_steps: int = 0,
        lesson_steps: int = 0,
        lesson_families: Collection[str] = tuple(tasks.FAMILIES),
        albums: bool = False,
    ) -> None:
        self.spec, self.size, self.first = spec, size, first
        self.seed, self.blind, self.albums = seed, blind, albums
        self.tower_steps, self.marked_steps = tower_steps, marked_steps
        self.lesson_steps, self.lesson_families = lesson_steps, lesson_families

    def batch(self, index: int) -> Batch:
        random = Random(f"{self.seed}/{index}")
        if index < self.tower_steps:
            return collate(self._to_see(random), self.spec, self.blind)
        taught = index - self.tower_steps
        if taught >= self.marked_steps + self.lesson_steps:
            return collate(self._to_ask(random, index), self.spec, self.blind)
        only_marked = taught < self.marked_steps
        place = taught if only_marked else taught - self.marked_steps
        lesson = lessons.lesson_at(place, self.lesson_families)
        if lesson:
            examples = self._to_teach(random, lesson)
        else:
            examples = self._to_ask(random, place // lessons.REPEAT_EVERY)
        return collate(examples, self.spec, self.blind, only_marked)

    def _to_see(self, random: Random) -> list[Example]:
        """Two in three pictures are crowded ones, the others charts."""
        cases = [
            primer.draw(random, self.spec.side)
            if random.random() < 2 / 3
            else family_charts.draw(random, random.choice(LEVELS), self.spec.side)
            for _ in range(self.size)
        ]
        return [Example(case.images, case.marks, []) for case in cases]

    def _to_teach(self, random: Random, lesson: lessons.Lesson) -> list[Example]:
        size = max(1, self.size // tasks.num_pictures(lesson.family))
        return [lessons.draw(lesson, random, self.spec.side, QUESTIONS) for _ in range(size)]

    def _to_ask(self, random: Random, turn: int) -> list[Example]:
        """One in six batches shows several pictures a question, one in six may show albums."""
        families = SINGLE
        if turn % 6 == 0:
            families = (family_frames.NAME,)
        elif turn % 6 == 1 and self.albums:
            families = (family_album.NAME,)
        size = max(1, self.size // tasks.num_pictures(families[0]))
        return [
            tasks.example(
                random.choice(families),
                random.choice(LEVELS),
                "train",
                random.getrandbits(48),
                self.spec.side,
                QUESTIONS,
            )
            for _ in range(size)
        ]

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        offset, step = (info.id, info.num_workers) if info else (0, 1)
        index = self.first + offset
        while True:
            yield self.batch(index)
            index += step


def loader(batches: TrainingBatches, num_workers: int) -> Iterator[Batch]:
    """Batches in order, drawn by `num_workers` processes."""
    return iter(DataLoader(batches, batch_size=None, num_workers=num_workers))
