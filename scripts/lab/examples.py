"""What a task hands out: pictures, and questions about them that have one right answer each."""

from collections.abc import Callable
from random import Random
from typing import NamedTuple

from drawing import Mark
from PIL import Image

EASY, HARD = LEVELS = ("easy", "hard")
_TRIES = 8
"""For another question than those asked already, before giving up."""


class Question(NamedTuple):
    """A question and its answer.

    Attributes:
        text: Lower-case words.
        answer: Words and numbers, one as a rule; those of a list are read while answering, when
            the cache is compressed already.
    """

    text: str
    answer: str


class Case(NamedTuple):
    """Pictures and all that can be asked about them.

    Attributes:
        images: In the order in which a question sees them.
        marks: Per picture, what its parts show.
        ask: Draws a question; None if the one drawn has no clear answer here.
    """

    images: list[Image.Image]
    marks: list[list[Mark]]
    ask: Callable[[Random], Question | None]


class Example(NamedTuple):
    """Different questions about the same pictures.

    Attributes:
        images: In the order in which the questions see them.
        marks: Per picture, what its parts show.
        questions: One or more.
    """

    images: list[Image.Image]
    marks: list[list[Mark]]
    questions: list[Question]

    @property
    def question(self) -> str:
        return self.questions[0].text

    @property
    def answer(self) -> str:
        return self.questions[0].answer


def questions(case: Case, random: Random, num: int) -> list[Question]:
    """Up to `num` different questions, one at least."""
    found: dict[str, Question] = {}
    tries = 0
    while not found or (len(found) < num and tries < _TRIES * num):
        tries += 1
        question = case.ask(random)
        if question is not None:
            found.setdefault(question.text, question)
    return list(found.values())
