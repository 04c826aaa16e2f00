"""All families of questions, and the examples that a split, a level and an index stand for."""

from random import Random

import family_album
import family_charts
import family_frames
import family_objects
import family_perception
import family_relations
import family_words
from examples import LEVELS, Example, questions

FAMILIES = {
    module.NAME: module
    for module in (
        family_objects,
        family_charts,
        family_words,
        family_relations,
        family_perception,
        family_frames,
    )
}
VARIANTS = {family_album.NAME: family_album}
"""Beside the families: 2,592 and more image tokens a prompt at 144 a picture."""
CHOICES = (*FAMILIES, *VARIANTS)
SPLITS = ("train", "validation", "test")


def num_pictures(family: str) -> int:
    """That a question sees."""
    return getattr((FAMILIES | VARIANTS)[family], "NUM_PICTURES", 1)


def example(
    family: str, level: str, split: str, index: int, side: int, num_questions: int = 1
) -> Example:
    """The same picture and questions whenever they are asked for.

    Args:
        family: One of `FAMILIES` or `VARIANTS`.
        level: One of `LEVELS`.
        split: One of `SPLITS`; they share no picture.
        index: Which example.
        side: Pixels a side of each picture.
        num_questions: Up to how many; the first ones do not depend on it.

    Raises:
        ValueError: An unknown family, level or split.
    """
    drawn_by = FAMILIES | VARIANTS
    for value, choices in ((family, tuple(drawn_by)), (level, LEVELS), (split, SPLITS)):
        if value not in choices:
            raise ValueError(f"{value!r} must be one of {choices}")
    # A string as the seed, so that no two of them can lead to the same numbers.
    random = Random(f"{family}/{level}/{split}/{index}")
    case = drawn_by[family].draw(random, level, side)
    return Example(case.images, case.marks, questions(case, random, num_questions))
