"""One kind of question after another, before all are asked at once.

Asked everything from the start, the lab's model stays for thousands of steps at guessing from what
a picture shows somewhere. Asked one kind alone it finds out where to look in a hundred: "what
colour is the circle" went from 0.43 to 0.98 right. What it found serves the kinds that follow.
"""

import re
from collections.abc import Collection
from random import Random
from typing import NamedTuple

import tasks
from examples import LEVELS, Example

STEPS = 150
"""A lesson's."""
REPEAT_EVERY = 4
"""Steps, of which one is about anything."""
TRIES = 1000


class Lesson(NamedTuple):
    """What is asked for a while.

    Attributes:
        family: Whose pictures are shown.
        pattern: Regular expression that its questions begin with.
    """

    family: str
    pattern: str


LESSONS = (
    Lesson("objects", "what colour is the"),
    Lesson("charts", "what is the value of"),
    Lesson("relations", "in which part"),
    Lesson("relations", "is the"),
    Lesson("objects", "how many"),
    Lesson("objects", "list the colours"),
    Lesson("perception", "is there"),
    Lesson("words", "what is written"),
    Lesson("words", "list all"),
    Lesson("relations", "list the shapes"),
    Lesson("relations", "what colour is the object"),
    Lesson("charts", "is . larger"),
    Lesson("frames", "in which picture"),
)
"""From finding one thing by what it is to comparing several; then from the first again."""


def lesson_at(step: int, families: Collection[str]) -> Lesson | None:
    """That a step of a stage of lessons is about; None for a step about anything.

    Args:
        step: From the stage's start.
        families: Whose lessons take turns.
    """
    taught = [lesson for lesson in LESSONS if lesson.family in families]
    return None if step % REPEAT_EVERY == 0 else taught[step // STEPS % len(taught)]


def draw(lesson: Lesson, random: Random, side: int, num_questions: int) -> Example:
    """A training picture with up to `num_questions` questions of the lesson alone.

    Raises:
        ValueError: Its family hardly ever asks such questions.
    """
    for _ in range(TRIES):
        level, index = random.choice(LEVELS), random.getrandbits(48)
        example = tasks.example(lesson.family, level, "train", index, side, 3 * num_questions)
        asked = [one for one in example.questions if re.match(lesson.pattern, one.text)]
        if asked:
            return example._replace(questions=asked[:num_questions])
    raise ValueError(f"the family {lesson.family} does not ask {lesson.pattern!r}")
