"""Words and numbers written in the scene (after TextVQA)."""

from random import Random

from drawing import COLOURS, SHAPES, cells, scene, write
from examples import EASY, Example
from family_objects import things_of

NAME = "words"
WORDS = (
    "bus", "car", "cat", "cup", "dog", "egg", "fan", "hat", "ink", "jam", "key", "leg", "map",
    "net", "oak", "pen", "rug", "sun", "tea", "van",
)  # fmt: skip
_HEIGHT = 0.11


def _written(random: Random) -> str:
    return random.choice(WORDS) if random.random() < 0.5 else str(random.randint(10, 99))


def draw(random: Random, level: str, side: int) -> Example:
    """Easy: one writing among objects; hard: several, named by their colour."""
    num_texts, num_things = (1, 3) if level == EASY else (4, 4)
    places = cells(random, num_texts + num_things)
    pairs = [(random.choice(SHAPES), random.choice(list(COLOURS))) for _ in range(num_things)]
    things = [
        thing._replace(x=x, y=y)
        for thing, (x, y) in zip(things_of(random, pairs), places, strict=False)
    ]
    image = scene(random, side, things)
    colours = random.sample(list(COLOURS), num_texts)
    texts = [_written(random) for _ in colours]
    for (x, y), text, colour in zip(places[num_things:], texts, colours, strict=True):
        write(image, min(max(x, 0.14), 0.86), y, text, _HEIGHT, colour)
    if level == EASY:
        return Example([image], "what is written", texts[0])
    return Example([image], f"what is written in {colours[0]}", texts[0])
