"""Many pictures, of which a question needs one or a few: long prompts."""

import itertools
from random import Random

from drawing import COLOURS, SHAPES, cells, scene, write
from examples import EASY, Case, Question
from family_objects import things_of
from family_words import HEIGHT, writings

NAME = "album"
NUM_PICTURES = 18


def draw(random: Random, level: str, side: int) -> Case:
    """Some pictures have a writing, the others an object, or two when hard."""
    num_things, num_texts = (1, 3) if level == EASY else (2, 4)
    texts = dict(
        zip(writings(random, num_texts), random.sample(list(COLOURS), num_texts), strict=True)
    )
    written_in = dict(
        zip(sorted(random.sample(range(NUM_PICTURES), num_texts)), texts, strict=True)
    )
    rare, *common = random.sample(SHAPES, len(SHAPES))
    pairs_of = {
        place: [(random.choice(common), random.choice(list(COLOURS))) for _ in range(num_things)]
        for place in range(NUM_PICTURES)
        if place not in written_in
    }
    once = random.choice(list(pairs_of.values()))
    once[0] = (rare, once[0][1])

    images, marks = [], []
    for place in range(NUM_PICTURES):
        things = things_of(random, pairs_of.get(place, []))
        image = scene(random, side, things)
        shown = [thing.mark for thing in things]
        if place in written_in:
            text, ((x, y),) = written_in[place], cells(random, 1)
            shown.append(write(image, x, y, text, HEIGHT, texts[text]))
        images.append(image)
        marks.append(shown)
    pairs = [pair for group in pairs_of.values() for pair in group]
    absent = [pair for pair in itertools.product(SHAPES, COLOURS) if pair not in pairs]

    def ask(random: Random) -> Question | None:
        kind = random.choice(("read", "read", "colour", "shape", "exists", "list"))
        if kind == "list":
            return Question("list all that is written in the pictures", " ".join(texts))
        if kind == "shape":
            return Question(f"what colour is the {rare}", once[0][1])
        if kind == "exists":
            answer, choices = random.choice((("yes", pairs), ("no", absent)))
            shape, colour = random.choice(choices)
            return Question(f"is there a {colour} {shape}", answer)
        text, colour = random.choice(list(texts.items()))
        if kind == "colour":
            return Question(f"what colour is {text}", colour)
        return Question(f"what is written in {colour}", text)

    return Case(images, marks, ask)
