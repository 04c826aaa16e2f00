"""Crowded pictures without questions, from which the vision tower learns to see first."""

from random import Random

from drawing import COLOURS, GRID, JITTER, SHAPES, Mark, Thing, draw_thing, texture, write
from examples import Case
from family_words import HEIGHT, writing


def draw(random: Random, side: int) -> Case:
    """Every row of cells holds two objects and a writing, or two writings."""
    image = texture(random, side)
    marks: list[Mark] = []
    for row in range(GRID):
        y = (row + 0.5 + random.uniform(-JITTER, JITTER)) / GRID
        left = 0.0
        widths = random.choice(([0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [0.25, 0.25, 0.5], [0.5] * 2))
        for width in widths:
            x = left + 0.5 * width + random.uniform(-0.04, 0.04)
            left += width
            colour = random.choice(list(COLOURS))
            if width == 0.5:
                marks.append(write(image, x, y, writing(random), HEIGHT, colour))
            else:
                thing = Thing(random.choice(SHAPES), colour, x, y, random.uniform(0.06, 0.1))
                draw_thing(image, thing)
                marks.append(thing.mark)
    return Case([image], [marks], lambda random: None)
