"""Every answer again, from the marks of what the pictures show."""

import math
import re
from collections.abc import Callable
from random import Random

import lessons
import numpy as np
import pytest
import tasks
from drawing import COLOURS, Mark
from examples import LEVELS, Example

SIDE = 84
SIDES = "(left of|right of|above|below)"


def middle(mark: Mark) -> tuple[float, float]:
    left, top, right, bottom = mark.box
    return (left + right) / 2, (top + bottom) / 2


def things(one: Example) -> list[Mark]:
    return [mark for marks in one.marks for mark in marks if mark.shape]


def texts(one: Example) -> list[Mark]:
    return [mark for marks in one.marks for mark in marks if mark.text and mark.edges]


def values(one: Example) -> dict[str, int]:
    columns = sorted((mark for mark in one.marks[0] if mark.value), key=middle)
    return {mark.text: int(mark.value) for mark in columns}


def areas(one: Example) -> dict[str, int]:
    """Pixels of each part of a pie."""
    pixels = np.asarray(one.images[0])
    colours = {mark.colour for mark in one.marks[0]}
    return {colour: int((pixels == COLOURS[colour]).all(-1).sum()) for colour in colours}


def the(one: Example, **wanted: str) -> Mark:
    """The only thing with these properties."""
    (found,) = having(one, **wanted)
    return found


def having(one: Example, **wanted: str) -> list[Mark]:
    return [m for m in things(one) if all(getattr(m, k) == v for k, v in wanted.items())]


def extreme(figures: dict[str, int], word: str) -> str:
    return (max if word == "largest" else min)(figures, key=figures.__getitem__)


def is_beside(a: Mark, b: Mark, side: str) -> bool:
    (ax, ay), (bx, by) = middle(a), middle(b)
    return {"left of": ax < bx, "right of": ax > bx, "above": ay < by, "below": ay > by}[side]


def reds(one: Example) -> list[str]:
    return [mark.shape for marks in one.marks for mark in marks if mark.colour == "red"]


def part(mark: Mark) -> str:
    x, y = middle(mark)
    return f"{'top' if y < 0.5 else 'bottom'} {'left' if x < 0.5 else 'right'}"


def nearest(one: Example, shape: str) -> str:
    this = the(one, shape=shape)
    others = [mark for mark in things(one) if mark is not this]
    return min(others, key=lambda mark: math.dist(middle(mark), middle(this))).colour


def beside(one: Example, side: str, shape: str) -> str:
    this = the(one, shape=shape)
    (found,) = (m for m in things(one) if m is not this and is_beside(m, this, side))
    return found.colour


def in_order(marks: list[Mark], axis: int) -> list[Mark]:
    return sorted(marks, key=lambda mark: middle(mark)[axis])


def yes(is_so: bool) -> str:
    return "yes" if is_so else "no"


ANSWERS: dict[str, Callable[..., str]] = {
    r"what colour is the (largest|smallest) part": lambda one, w: extreme(areas(one), w),
    r"is the (\w+) part larger than the (\w+) part": (
        lambda one, a, b: yes(areas(one)[a] > areas(one)[b])
    ),
    r"what colour is the object nearest to the (\w+)": nearest,
    rf"what colour is the object {SIDES} the (\w+)": beside,
    r"what colour is the (\w+)": lambda one, shape: the(one, shape=shape).colour,
    r"what shape is (\w+)": lambda one, colour: the(one, colour=colour).shape,
    r"how many (\w+) objects are there": lambda one, shape: str(len(having(one, shape=shape))),
    r"list the colours of all (\w+) objects from left to right": (
        lambda one, shape: " ".join(m.colour for m in in_order(having(one, shape=shape), 0))
    ),
    r"what is the value of (\w)": lambda one, name: str(values(one)[name]),
    r"which one is the (largest|smallest)": lambda one, word: extreme(values(one), word),
    r"is (\w) larger than (\w)": lambda one, a, b: yes(values(one)[a] > values(one)[b]),
    r"list all values from left to right": lambda one: " ".join(map(str, values(one).values())),
    r"what is written in (\w+)": (
        lambda one, colour: next(m.text for m in texts(one) if m.colour == colour)
    ),
    r"list all that is written from top to bottom": (
        lambda one: " ".join(m.text for m in sorted(texts(one), key=lambda m: m.box[1]))
    ),
    r"list all that is written in the pictures": (
        lambda one: " ".join(m.text for m in texts(one))
    ),
    r"what colour is (\w+)": (
        lambda one, text: next(m.colour for m in texts(one) if m.text == text)
    ),
    rf"is the (\w+) {SIDES} the (\w+)": (
        lambda one, a, side, b: yes(is_beside(the(one, shape=a), the(one, shape=b), side))
    ),
    r"in which part of the picture is the (\w+)": (
        lambda one, shape: part(the(one, shape=shape))
    ),
    r"list the shapes from (left to right|top to bottom)": (
        lambda one, words: " ".join(
            m.shape for m in in_order(things(one), ("left", "top").index(words.split()[0]))
        )
    ),
    r"is there a (\w+) (\w+)": (
        lambda one, colour, shape: yes(bool(having(one, colour=colour, shape=shape)))
    ),
    r"are there more (\w+) objects than (\w+) objects": (
        lambda one, a, b: yes(len(having(one, shape=a)) > len(having(one, shape=b)))
    ),
    r"list the red shapes of all pictures": lambda one: " ".join(reds(one)),
    r"what red shape comes after picture (\d)": lambda one, place: reds(one)[int(place)],
    r"in which picture is the red (\w+)": lambda one, shape: str(reds(one).index(shape) + 1),
    r"how often is there a red (\w+)": lambda one, shape: str(reds(one).count(shape)),
}  # fmt: skip


def test_every_answer_is_right() -> None:
    met = set()
    for family in tasks.CHOICES:
        for level in LEVELS:
            for index in range(10 if family == "album" else 60):
                one = tasks.example(family, level, "train", index, SIDE, num_questions=8)
                for question in one.questions:
                    pattern = next(p for p in ANSWERS if re.fullmatch(p, question.text))
                    groups = re.fullmatch(pattern, question.text).groups()
                    assert ANSWERS[pattern](one, *groups) == question.answer, (family, index)
                    met.add(pattern)
    assert met == set(ANSWERS)


@pytest.mark.parametrize("lesson", lessons.LESSONS, ids=str)
def test_a_lesson_asks_what_it_is_about(lesson: lessons.Lesson) -> None:
    one = lessons.draw(lesson, Random(0), SIDE, 4)
    assert 1 <= len(one.questions) <= 4
    assert all(re.match(lesson.pattern, question.text) for question in one.questions)


def test_a_lesson_that_nobody_asks_is_an_error() -> None:
    lesson = lessons.Lesson("perception", "who are you")
    with pytest.raises(ValueError, match="perception does not ask 'who are you'"):
        lessons.draw(lesson, Random(0), 28, 1)


def test_every_lesson_has_its_turn_and_repetition_too() -> None:
    length = lessons.STEPS * len(lessons.LESSONS)
    given = [lessons.lesson_at(step, tasks.FAMILIES) for step in range(2 * length)]
    assert set(given) == {None, *lessons.LESSONS}
    assert set(given[:length]) == set(given[length:])
    assert given.count(None) == 2 * length // lessons.REPEAT_EVERY
    of_charts = {lessons.lesson_at(step, ["charts"]) for step in range(length)}
    assert of_charts == {None, *(one for one in lessons.LESSONS if one.family == "charts")}
