"""The test set: which questions there are, how they are put, and how answers are compared."""

import argparse
import hashlib
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import tasks
from examples import LEVELS, Example


class Key(NamedTuple):
    """Which question of the test set."""

    family: str
    level: str
    index: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What decides which questions are asked."""
    parser.add_argument(
        "--families", nargs="+", choices=tasks.CHOICES, default=list(tasks.FAMILIES)
    )
    parser.add_argument("--questions", type=int, default=500, help="per family and level")
    parser.add_argument(
        "--package-defaults",
        action="store_true",
        help="ZipVL's own settings, not the lab's for short prompts",
    )
    parser.add_argument("--suffix", default="", help="follows every question")


def test_set(num_per_level: int, families: Iterable[str] = tuple(tasks.FAMILIES)) -> Iterator[Key]:
    """Families and levels take turns, so that a part of it is balanced too."""
    for index in range(num_per_level):
        for family in families:
            for level in LEVELS:
                yield Key(family, level, index)


def draw(key: Key, side: int) -> Example:
    """Pictures of `side` pixels and two questions, of which the first counts."""
    return tasks.example(key.family, key.level, "test", key.index, side, num_questions=2)


def questions_digest() -> str:
    """Of a few questions of every kind: another one after the tasks have changed."""
    found = hashlib.sha256()
    for key in test_set(5, tasks.CHOICES):
        found.update(repr(tasks.example(*key[:2], "test", key.index, 56, 8).questions).encode())
    return found.hexdigest()


def prompt(processor: Any, example: Example, question: str) -> str:
    """A question about all pictures of an example, through the model's chat template."""
    content: list[dict[str, Any]] = [{"type": "image"} for _ in example.images]
    content.append({"type": "text", "text": question})
    message = {"role": "user", "content": content}
    return processor.apply_chat_template([message], add_generation_prompt=True)


def normal(text: str) -> str:
    """Letters and digits alone: tokenizers differ in spaces, models in capitals and full stops."""
    return "".join(re.findall(r"[a-z0-9]", text.lower()))
