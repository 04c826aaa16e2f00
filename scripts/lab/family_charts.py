"""Bar, line and pie charts with values to read and to compare (after ChartQA)."""

import math
from random import Random

from drawing import COLOURS, Mark, texture, write
from examples import EASY, Case, Question
from PIL import Image, ImageDraw

NAME = "charts"
LETTERS = "abcdefgh"
TOP = 9
"""Largest value; a tick of the axis is one unit."""
_LEFT, _RIGHT, _BOTTOM, _HEIGHT = 0.14, 0.94, 0.86, 0.72
_BRIGHT = [colour for colour in COLOURS if colour not in ("white", "black")]


def _axis(image: Image.Image) -> None:
    pen, side = ImageDraw.Draw(image), image.width
    pen.rectangle((0.04 * side, 0.06 * side, 0.98 * side, 0.97 * side), fill=(232, 232, 228))
    for value in range(TOP + 1):
        y = (_BOTTOM - _HEIGHT * value / TOP) * side
        pen.line((_LEFT * side, y, _RIGHT * side, y), fill=(190, 190, 190))
        write(image, 0.09, y / side, str(value), 0.05, "black")


def _columns(names: list[str]) -> list[float]:
    width = (_RIGHT - _LEFT) / len(names)
    return [_LEFT + (i + 0.5) * width for i in range(len(names))]


def _names(image: Image.Image, names: list[str]) -> list[Mark]:
    xs = _columns(names)
    return [write(image, x, 0.92, name, 0.09, "black") for x, name in zip(xs, names, strict=True)]


def _bars(image: Image.Image, random: Random, values: dict[str, int]) -> None:
    _axis(image)
    pen, side = ImageDraw.Draw(image), image.width
    half = 0.3 * (_RIGHT - _LEFT) / len(values)
    for x, value in zip(_columns(list(values)), values.values(), strict=True):
        top = _BOTTOM - _HEIGHT * value / TOP
        box = ((x - half) * side, top * side, (x + half) * side, _BOTTOM * side)
        pen.rectangle(box, fill=COLOURS[random.choice(_BRIGHT)])


def _line(image: Image.Image, random: Random, values: dict[str, int]) -> None:
    _axis(image)
    pen, side = ImageDraw.Draw(image), image.width
    xs = _columns(list(values))
    ys = [_BOTTOM - _HEIGHT * value / TOP for value in values.values()]
    points = [(x * side, y * side) for x, y in zip(xs, ys, strict=True)]
    colour = COLOURS[random.choice(_BRIGHT)]
    pen.line(points, fill=colour, width=max(2, side // 80))
    for x, y in points:
        r = side / 60
        pen.ellipse((x - r, y - r, x + r, y + r), fill=colour)


def _value_of(random: Random, values: dict[str, int]) -> Question:
    name = random.choice(list(values))
    return Question(f"what is the value of {name}", str(values[name]))


def _extreme(random: Random, values: dict[str, int]) -> Question:
    word, choose = random.choice([("largest", max), ("smallest", min)])
    return Question(f"which one is the {word}", choose(values, key=values.__getitem__))


def _compare(random: Random, values: dict[str, int]) -> Question:
    a, b = random.sample(list(values), 2)
    return Question(f"is {a} larger than {b}", "yes" if values[a] > values[b] else "no")


def _list(random: Random, values: dict[str, int]) -> Question:
    return Question("list all values from left to right", " ".join(map(str, values.values())))


def _pie(random: Random, side: int, num: int) -> Case:
    """Colours name the parts."""
    image = texture(random, side)
    colours = random.sample(_BRIGHT, num)
    weights = [random.randint(1, 9) for _ in colours]
    pen, angle = ImageDraw.Draw(image), random.uniform(0, 360)
    marks = []
    box = (0.15 * side, 0.15 * side, 0.85 * side, 0.85 * side)
    for colour, weight in zip(colours, weights, strict=True):
        turn = 360 * weight / sum(weights)
        pen.pieslice(box, angle, angle + turn, fill=COLOURS[colour], outline=(30, 30, 30))
        middle = math.radians(angle + turn / 2)
        x, y = 0.5 + 0.22 * math.cos(middle), 0.5 + 0.22 * math.sin(middle)
        half = min(0.05, 0.22 * math.sin(math.radians(min(turn, 180) / 2)))
        marks.append(Mark((x - half, y - half, x + half, y + half), colour=colour))
        angle += turn
    parts = dict(zip(colours, weights, strict=True))

    def extreme(random: Random) -> Question | None:
        word, sign = random.choice([("largest", -1), ("smallest", 1)])
        first, second = sorted(parts, key=lambda colour: sign * parts[colour])[:2]
        if abs(parts[first] - parts[second]) < 2:
            return None
        return Question(f"what colour is the {word} part", first)

    def compare(random: Random) -> Question | None:
        a, b = random.sample(colours, 2)
        if abs(parts[a] - parts[b]) < 2:
            return None
        answer = "yes" if parts[a] > parts[b] else "no"
        return Question(f"is the {a} part larger than the {b} part", answer)

    # Equal parts cannot be asked about, so that a pie of them alone would have no question.
    if max(weights) - min(weights) < 2:
        return _pie(random, side, num)
    return Case([image], [marks], lambda random: random.choice((extreme, compare))(random))


def draw(random: Random, level: str, side: int) -> Case:
    """Easy charts have three values, hard ones six, or a pie five."""
    num = 3 if level == EASY else 6
    chart = random.choice((_bars, _line, None))
    if chart is None:
        return _pie(random, side, min(num, 5))
    names = random.sample(LETTERS, num)
    values = dict(zip(names, random.sample(range(1, TOP + 1), num), strict=True))
    image = texture(random, side)
    chart(image, random, values)

    def ask(random: Random) -> Question:
        return random.choice((_value_of, _extreme, _compare, _list))(random, values)

    half = 0.5 * (_RIGHT - _LEFT) / num
    marks = [
        Mark((x - half, _BOTTOM - _HEIGHT, x + half, 1.0), text=name, value=str(value))
        for x, (name, value) in zip(_columns(names), values.items(), strict=True)
    ]
    return Case([image], [marks + _names(image, names)], ask)
