"""What a task hands out: pictures, a question and the one right answer."""

from typing import NamedTuple

from PIL import Image

EASY, HARD = LEVELS = ("easy", "hard")


class Example(NamedTuple):
    """One question about one or several pictures.

    Attributes:
        images: In the order in which the question sees them.
        question: Lower-case words.
        answer: One word or number.
    """

    images: list[Image.Image]
    question: str
    answer: str
