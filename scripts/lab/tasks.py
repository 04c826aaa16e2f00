"""All families of questions, and the examples that a split, a level and an index stand for."""

from random import Random

import family_charts
import family_frames
import family_objects
import family_perception
import family_relations
import family_words
from examples import LEVELS, Example

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
SPLITS = ("train", "validation", "test")


def example(family: str, level: str, split: str, index: int, side: int) -> Example:
    """The same picture and question whenever it is asked for.

    Raises:
        ValueError: An unknown family, level or split.
    """
    for value, choices in ((family, tuple(FAMILIES)), (level, LEVELS), (split, SPLITS)):
        if value not in choices:
            raise ValueError(f"{value!r} must be one of {choices}")
    # A string as the seed, so that no two of them can lead to the same numbers.
    return FAMILIES[family].draw(Random(f"{family}/{level}/{split}/{index}"), level, side)
