"""Where objects are to one another, in one or two steps (after GQA)."""

import math
from random import Random

from drawing import COLOURS, SHAPES, Thing, scene
from examples import EASY, Case, Question
from family_objects import GAP, in_order, things_of

NAME = "relations"
SIDES = ("left of", "right of", "above", "below")
_MARGIN = 0.12


def _is_beside(a: Thing, b: Thing, side: str) -> bool:
    """Whether `a` lies clearly on that side of `b`."""
    return {
        "left of": b.x - a.x,
        "right of": a.x - b.x,
        "above": b.y - a.y,
        "below": a.y - b.y,
    }[side] > _MARGIN


def _side_of(random: Random, things: list[Thing]) -> Question | None:
    a, b = random.sample(things, 2)
    relation = random.choice(SIDES)
    clear = abs(a.x - b.x if "of" in relation else a.y - b.y) > _MARGIN
    if not clear:
        return None
    answer = "yes" if _is_beside(a, b, relation) else "no"
    return Question(f"is the {a.shape} {relation} the {b.shape}", answer)


def _part_of(random: Random, things: list[Thing]) -> Question | None:
    a = random.choice(things)
    # Cells leave the middle free.
    part = f"{'top' if a.y < 0.5 else 'bottom'} {'left' if a.x < 0.5 else 'right'}"
    return Question(f"in which part of the picture is the {a.shape}", part)


def _only_one_beside(random: Random, things: list[Thing]) -> Question | None:
    b = random.choice(things)
    relation = random.choice(SIDES)
    beside = [a for a in things if a is not b and _is_beside(a, b, relation)]
    axis = "x" if "of" in relation else "y"
    is_unclear = any(
        abs(getattr(a, axis) - getattr(b, axis)) <= _MARGIN for a in things if a is not b
    )
    if len(beside) != 1 or is_unclear:
        return None
    return Question(f"what colour is the object {relation} the {b.shape}", beside[0].colour)


def _nearest_of(random: Random, things: list[Thing]) -> Question | None:
    b = random.choice(things)
    distances = {a: math.dist((a.x, a.y), (b.x, b.y)) for a in things if a is not b}
    first, second = sorted(distances, key=distances.__getitem__)[:2]
    if distances[second] < 1.25 * distances[first]:
        return None
    return Question(f"what colour is the object nearest to the {b.shape}", first.colour)


def _list(random: Random, things: list[Thing]) -> Question | None:
    axis, words = random.choice((("x", "left to right"), ("y", "top to bottom")))
    ordered = in_order(things, axis, GAP)
    if ordered is None:
        return None
    return Question(f"list the shapes from {words}", " ".join(thing.shape for thing in ordered))


def draw(random: Random, level: str, side: int) -> Case:
    """Easy: three objects and one step; hard: six, and references by neighbourhood."""
    kinds = (_side_of, _part_of)
    # Six objects on four rows and columns have no clear order.
    kinds += (_list,) if level == EASY else (_only_one_beside, _nearest_of)
    shapes = random.sample(SHAPES, 3 if level == EASY else len(SHAPES))
    things = things_of(random, [(shape, random.choice(list(COLOURS))) for shape in shapes])

    def ask(random: Random) -> Question | None:
        return random.choice(kinds)(random, things)

    return Case([scene(random, side, things)], [[thing.mark for thing in things]], ask)
