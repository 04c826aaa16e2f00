"""Yes or no about objects and their properties (after MME)."""

from random import Random

from drawing import COLOURS, SHAPES, scene
from examples import EASY, Example
from family_objects import things_of

NAME = "perception"


def _exists(random: Random, pairs: list[tuple[str, str]], wanted: bool) -> str | None:
    """Whether something of a colour and a shape is there; a no has the parts apart."""
    if wanted:
        shape, colour = random.choice(pairs)
        return f"is there a {colour} {shape}"
    shape, colour = random.choice(pairs)[0], random.choice(pairs)[1]
    return None if (shape, colour) in pairs else f"is there a {colour} {shape}"


def _more(random: Random, pairs: list[tuple[str, str]], wanted: bool) -> str | None:
    """Whether there are more of one shape than of another."""
    shapes = [shape for shape, _ in pairs]
    a, b = random.sample(SHAPES, 2)
    num_a, num_b = shapes.count(a), shapes.count(b)
    if (num_a > num_b) != wanted or not (num_a or num_b):
        return None
    return f"are there more {a} objects than {b} objects"


def draw(random: Random, level: str, side: int) -> Example:
    """Half of the answers are yes. Easy: three objects; hard: eight, and counting."""
    kinds = (_exists,) if level == EASY else (_exists, _more)
    kind, wanted = random.choice(kinds), random.random() < 0.5
    while True:
        num = 3 if level == EASY else 8
        pairs = [(random.choice(SHAPES), random.choice(list(COLOURS))) for _ in range(num)]
        question = kind(random, pairs, wanted)
        if question is not None:
            image = scene(random, side, things_of(random, pairs))
            return Example([image], question, "yes" if wanted else "no")
