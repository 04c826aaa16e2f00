"""Yes or no about objects and their properties (after MME)."""

from random import Random

from drawing import COLOURS, SHAPES, scene
from examples import EASY, Case, Question
from family_objects import things_of

NAME = "perception"


def draw(random: Random, level: str, side: int) -> Case:
    """Half of the answers are yes. Easy: three objects; hard: eight, and counting."""
    kinds = ("exists",) if level == EASY else ("exists", "more")
    num = 3 if level == EASY else 8
    pairs = [(random.choice(SHAPES), random.choice(list(COLOURS))) for _ in range(num)]

    def exists(random: Random, wanted: bool) -> str | None:
        """Whether something of a colour and a shape is there; a no has the parts apart."""
        shape, colour = random.choice(pairs)
        if not wanted:
            colour = random.choice(pairs)[1]
        return f"is there a {colour} {shape}" if ((shape, colour) in pairs) == wanted else None

    def more(random: Random, wanted: bool) -> str | None:
        """Whether there are more of one shape than of another."""
        shapes = [shape for shape, _ in pairs]
        a, b = random.sample(SHAPES, 2)
        num_a, num_b = shapes.count(a), shapes.count(b)
        if (num_a > num_b) != wanted or not (num_a or num_b):
            return None
        return f"are there more {a} objects than {b} objects"

    def ask(random: Random) -> Question | None:
        kind, wanted = random.choice(kinds), random.random() < 0.5
        # The answer was drawn first: another question with that answer, if there is any.
        for _ in range(20):
            text = (exists if kind == "exists" else more)(random, wanted)
            if text is not None:
                return Question(text, "yes" if wanted else "no")
        return None

    things = things_of(random, pairs)
    return Case([scene(random, side, things)], [[thing.mark for thing in things]], ask)
