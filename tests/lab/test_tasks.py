"""The accuracy lab's questions: repeatable, varied and answerable."""

import hashlib
import os
import subprocess
import sys
from collections import Counter

import family_charts
import family_words
import numpy as np
import pytest
import tasks
from drawing import COLOURS, SHAPES
from examples import LEVELS, Example

SIDE = 84
ANSWERS = {
    "yes", "no", "top", "bottom", "left", "right", *COLOURS, *SHAPES, *family_words.WORDS,
    *family_charts.LETTERS, *(str(number) for number in range(100)),
}  # fmt: skip
EVERY = [(family, level) for family in tasks.CHOICES for level in LEVELS]


def draw(family: str, level: str, split: str = "train", num: int = 120) -> list[Example]:
    return [tasks.example(family, level, split, i, SIDE) for i in range(num)]


def pixels(example: Example) -> bytes:
    return b"".join(np.asarray(image).tobytes() for image in example.images)


def digest() -> str:
    """Of a few examples of every kind."""
    found = hashlib.sha256()
    for family, level in EVERY:
        for index in range(5):
            one = tasks.example(family, level, "test", index, SIDE, num_questions=8)
            found.update(pixels(one) + repr(one.questions).encode())
    return found.hexdigest()


def test_an_index_gives_the_same_example_in_every_process() -> None:
    command = "import test_tasks; print(test_tasks.digest())"
    for seed in ("1", "2"):
        run = subprocess.run(
            [sys.executable, "-c", command],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        )
        assert run.stdout.strip() == digest()


@pytest.mark.parametrize(("family", "level"), EVERY)
def test_splits_share_no_picture(family: str, level: str) -> None:
    train, test = (
        {pixels(one) for one in draw(family, level, split, 60)} for split in ("train", "test")
    )
    assert len(train) == len(test) == 60
    assert train.isdisjoint(test)


@pytest.mark.parametrize(("family", "level"), EVERY)
def test_answers_are_known_words_and_none_is_a_safe_guess(family: str, level: str) -> None:
    examples = draw(family, level)
    assert {word for one in examples for word in one.answer.split()} <= ANSWERS
    by_kind: dict[str, Counter[str]] = {}
    for one in examples:
        by_kind.setdefault(one.question.split()[0], Counter())[one.answer] += 1
    for kind, answers in by_kind.items():
        assert answers.most_common(1)[0][1] <= 0.8 * answers.total(), (kind, answers)


def test_the_same_question_has_other_answers_on_other_pictures() -> None:
    answers: dict[str, set[str]] = {}
    for one in draw("objects", "hard", num=400):
        answers.setdefault(one.question, set()).add(one.answer)
    asked_often = [found for found in answers.values() if len(found) > 1]
    assert len(asked_often) > 0.8 * len(answers)


@pytest.mark.parametrize(
    "arguments", [("poems", "easy", "train"), ("words", "odd", "train"), ("words", "easy", "all")]
)
def test_unknown_names_are_refused(arguments: tuple[str, str, str]) -> None:
    with pytest.raises(ValueError, match="must be one of"):
        tasks.example(*arguments, 0, SIDE)
