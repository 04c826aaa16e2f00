"""Which objects, which colours, how many (after VQAv2)."""

import itertools
from random import Random

from drawing import COLOURS, SHAPES, Thing, cells, scene
from examples import EASY, Case, Question

NAME = "objects"
GAP = 0.06
"""Between objects in a clear order, as a share of the side."""


def things_of(random: Random, pairs: list[tuple[str, str]]) -> list[Thing]:
    """Objects of the given shapes and colours in different cells."""
    places = cells(random, len(pairs))
    return [
        Thing(shape, colour, x, y, random.uniform(0.06, 0.1))
        for (shape, colour), (x, y) in zip(pairs, places, strict=True)
    ]


def in_order(things: list[Thing], axis: str, gap: float) -> list[Thing] | None:
    """By `axis`, "x" or "y"; None where two of them are less than `gap` apart."""
    ordered = sorted(things, key=lambda thing: getattr(thing, axis))
    places = [getattr(thing, axis) for thing in ordered]
    is_clear = all(b - a >= gap for a, b in itertools.pairwise(places))
    return ordered if is_clear else None


def _alone(values: list[str]) -> list[str]:
    return [value for value in values if values.count(value) == 1]


def draw(random: Random, level: str, side: int) -> Case:
    """Easy pictures have four objects, hard ones nine."""
    num = 4 if level == EASY else 9
    # Few shapes in a picture, so that counts vary.
    shapes = random.sample(SHAPES, random.randint(2, len(SHAPES)))
    pairs = [(random.choice(shapes), random.choice(list(COLOURS))) for _ in range(num)]

    things = things_of(random, pairs)

    def ask(random: Random) -> Question | None:
        kind = random.choice(("colour", "shape", "count", "list"))
        if kind == "list":
            asked = random.choice(shapes)
            ordered = in_order([thing for thing in things if thing.shape == asked], "x", GAP)
            if not ordered:
                return None
            answer = " ".join(thing.colour for thing in ordered)
            return Question(f"list the colours of all {asked} objects from left to right", answer)
        if kind == "count":
            seen = [shape for shape, _ in pairs]
            asked = random.choice(shapes)
            return Question(f"how many {asked} objects are there", str(seen.count(asked)))
        known, wanted = (0, 1) if kind == "colour" else (1, 0)
        alone = _alone([pair[known] for pair in pairs])
        if not alone:
            return None
        asked = random.choice(alone)
        (answer,) = (pair[wanted] for pair in pairs if pair[known] == asked)
        text = f"what colour is the {asked}" if kind == "colour" else f"what shape is {asked}"
        return Question(text, answer)

    return Case([scene(random, side, things)], [[thing.mark for thing in things]], ask)
