"""Shapes, colours and textures that the tasks draw with."""

import math
from functools import cache
from random import Random
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (50, 80, 220),
    "yellow": (240, 210, 50),
    "purple": (150, 60, 180),
    "orange": (240, 140, 40),
    "white": (245, 245, 245),
    "black": (20, 20, 20),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
GRID = 4
"""Cells a side: objects lie in different cells."""
JITTER = 0.1
"""Of an object off its cell's middle, as a share of the cell; so centres of neighbours are at least
0.2 of the side apart, twice the largest radius."""


class Mark(NamedTuple):
    """What a part of a picture shows, in the words of the tasks.

    Attributes:
        box: Left, top, right and bottom, as shares of the side.
        shape: One of `SHAPES`.
        colour: One of `COLOURS`.
        text: What is written there.
        value: What a chart's column says.
        edges: Where each character of `text` ends, as shares of the side; empty if the part is
            only named by the text.
    """

    box: tuple[float, float, float, float]
    shape: str | None = None
    colour: str | None = None
    text: str | None = None
    value: str | None = None
    edges: tuple[float, ...] = ()


class Thing(NamedTuple):
    """One object of a scene.

    Attributes:
        shape: One of `SHAPES`.
        colour: One of `COLOURS`.
        x: Centre, as a share of the side.
        y: As `x`, downwards.
        size: Radius, as a share of the side.
    """

    shape: str
    colour: str
    x: float
    y: float
    size: float

    @property
    def mark(self) -> Mark:
        x, y, r = self.x, self.y, self.size
        return Mark((x - r, y - r, x + r, y + r), shape=self.shape, colour=self.colour)


def texture(random: Random, side: int) -> Image.Image:
    """A background of dull, uneven patches."""
    generator = np.random.default_rng(random.getrandbits(32))
    base = generator.integers(120, 180) + generator.integers(-12, 13, size=3)
    coarse = generator.normal(0, 12, size=(12, 12, 3))
    pixels = np.clip(base + coarse, 0, 255).astype(np.uint8)
    smooth = Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC)
    grain = generator.normal(0, 6, size=(side, side, 1))
    return Image.fromarray(np.clip(np.asarray(smooth) + grain, 0, 255).astype(np.uint8))


def cells(random: Random, num: int) -> list[tuple[float, float]]:
    """Centres of `num` different cells, a little off their middle."""
    chosen = random.sample(range(GRID * GRID), num)
    return [
        (
            (cell % GRID + 0.5 + random.uniform(-JITTER, JITTER)) / GRID,
            (cell // GRID + 0.5 + random.uniform(-JITTER, JITTER)) / GRID,
        )
        for cell in chosen
    ]


def _corners(shape: str, x: float, y: float, r: float) -> list[tuple[float, float]]:
    if shape == "star":
        turns = [(i * math.pi / 5, r if i % 2 == 0 else 0.42 * r) for i in range(10)]
    else:
        num, start = (3, 0.0) if shape == "triangle" else (4, math.pi / 4)
        turns = [(start + i * 2 * math.pi / num, 1.1 * r) for i in range(num)]
    return [(x + d * math.sin(turn), y - d * math.cos(turn)) for turn, d in turns]


def draw_thing(image: Image.Image, thing: Thing) -> None:
    """Paint one object."""
    pen, side = ImageDraw.Draw(image), image.width
    x, y, r = thing.x * side, thing.y * side, thing.size * side
    colour = COLOURS[thing.colour]
    box = (x - r, y - r, x + r, y + r)
    if thing.shape == "circle":
        pen.ellipse(box, fill=colour)
    elif thing.shape == "ring":
        pen.ellipse(box, outline=colour, width=max(2, round(0.4 * r)))
    elif thing.shape == "cross":
        w = 0.34 * r
        pen.rectangle((x - w, y - r, x + w, y + r), fill=colour)
        pen.rectangle((x - r, y - w, x + r, y + w), fill=colour)
    else:
        pen.polygon(_corners(thing.shape, x, y, r), fill=colour)


def scene(random: Random, side: int, things: list[Thing]) -> Image.Image:
    """Things on a texture."""
    image = texture(random, side)
    for thing in things:
        draw_thing(image, thing)
    return image


@cache
def _font(pixels: float) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size=pixels)


def write(image: Image.Image, x: float, y: float, text: str, height: float, colour: str) -> Mark:
    """Write text centred at shares (x, y) of the side, `height` as a share of it.

    Text that would leave the picture is moved inside.
    """
    side = image.width
    font = _font(height * side)
    pen, place = ImageDraw.Draw(image), (x * side, y * side)
    left, top, right, bottom = pen.textbbox(place, text, font=font, anchor="mm")
    place = (
        place[0] - min(0, left) - max(0, right - side),
        place[1] - min(0, top) - max(0, bottom - side),
    )
    pen.text(place, text, fill=COLOURS[colour], font=font, anchor="mm", stroke_width=side / 336)
    left, top, right, bottom = (x / side for x in pen.textbbox(place, text, font=font, anchor="mm"))
    edges = tuple(left + font.getlength(text[: i + 1]) / side for i in range(len(text)))
    return Mark((left, top, right, bottom), colour=colour, text=text, edges=edges)
