"""Words and numbers written in the scene (after TextVQA)."""

import itertools
from random import Random

from drawing import COLOURS, SHAPES, cells, scene, write
from examples import EASY, Case, Question
from family_objects import things_of

NAME = "words"
WORDS = (
    "bus", "car", "cat", "cup", "dog", "egg", "fan", "hat", "ink", "jam", "key", "leg", "map",
    "net", "oak", "pen", "rug", "sun", "tea", "van",
)  # fmt: skip
HEIGHT = 0.17
"""Of a writing, as a share of the side."""


def writing(random: Random) -> str:
    """A word or a number of two digits."""
    is_word = random.random() < 0.5
    return random.choice(WORDS) if is_word else str(random.randint(10, 99))


def writings(random: Random, num: int) -> list[str]:
    """Different ones, words and numbers."""
    found: list[str] = []
    while len(found) < num:
        text = writing(random)
        if text not in found:
            found.append(text)
    return found


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def draw(random: Random, level: str, side: int) -> Case:
    """Writings, told apart by their colour, among objects: two when easy, four when hard."""
    while True:
        case, is_clear = _draw(random, 2 if level == EASY else 4, side)
        if is_clear:
            return case


def _draw(random: Random, num_texts: int, side: int) -> tuple[Case, bool]:
    """A case, and whether nothing in it covers anything else."""
    num_things = num_texts
    places = cells(random, num_texts + num_things)
    pairs = [(random.choice(SHAPES), random.choice(list(COLOURS))) for _ in range(num_things)]
    things = [
        thing._replace(x=x, y=y)
        for thing, (x, y) in zip(things_of(random, pairs), places, strict=False)
    ]
    image = scene(random, side, things)
    colours = random.sample(list(COLOURS), num_texts)
    texts = writings(random, num_texts)
    marks = [thing.mark for thing in things]
    for (x, y), text, colour in zip(places[num_things:], texts, colours, strict=True):
        marks.append(write(image, x, y, text, HEIGHT, colour))

    def ask(random: Random) -> Question | None:
        kind = random.choice(("read", "read", "colour", "list"))
        if kind == "list":
            lines = sorted(marks[num_things:], key=lambda mark: mark.box[1])
            tops = [mark.box[1] for mark in lines]
            if any(b - a < 0.06 for a, b in itertools.pairwise(tops)):
                return None
            text = "list all that is written from top to bottom"
            return Question(text, " ".join(mark.text for mark in lines))
        colour, text = random.choice(list(zip(colours, texts, strict=True)))
        if kind == "colour":
            return Question(f"what colour is {text}", colour)
        return Question(f"what is written in {colour}", text)

    is_clear = not any(_overlap(a.box, b.box) for a, b in itertools.combinations(marks, 2))
    return Case([image], [marks], ask), is_clear
