"""Which objects, which colours, how many (after VQAv2)."""

from random import Random

from drawing import COLOURS, SHAPES, Thing, cells, scene
from examples import EASY, Example

NAME = "objects"


def things_of(random: Random, pairs: list[tuple[str, str]]) -> list[Thing]:
    """Objects of the given shapes and colours in different cells."""
    places = cells(random, len(pairs))
    return [
        Thing(shape, colour, x, y, random.uniform(0.06, 0.1))
        for (shape, colour), (x, y) in zip(pairs, places, strict=True)
    ]


def _colour_of(random: Random, side: int, num: int) -> Example:
    shapes = random.sample(SHAPES, num)
    pairs = [(shape, random.choice(list(COLOURS))) for shape in shapes]
    shape, colour = random.choice(pairs)
    image = scene(random, side, things_of(random, pairs))
    return Example([image], f"what colour is the {shape}", colour)


def _shape_of(random: Random, side: int, num: int) -> Example:
    colours = random.sample(list(COLOURS), num)
    pairs = [(random.choice(SHAPES), colour) for colour in colours]
    shape, colour = random.choice(pairs)
    image = scene(random, side, things_of(random, pairs))
    return Example([image], f"what shape is {colour}", shape)


def _count(random: Random, side: int, num_others: int) -> Example:
    asked = random.choice(SHAPES)
    others = [shape for shape in SHAPES if shape != asked]
    count = random.randint(1, 6)
    shapes = [asked] * count + [random.choice(others) for _ in range(num_others)]
    pairs = [(shape, random.choice(list(COLOURS))) for shape in shapes]
    image = scene(random, side, things_of(random, pairs))
    return Example([image], f"how many {asked} objects are there", str(count))


def draw(random: Random, level: str, side: int) -> Example:
    """Easy pictures have few distractors."""
    num, num_others = (3, 1) if level == EASY else (6, 6)
    kind = random.choice((_colour_of, _shape_of, _count))
    return kind(random, side, num_others if kind is _count else num)
