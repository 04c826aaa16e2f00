"""Several pictures in a row: in which, how often, what came after (after Video-MME)."""

from random import Random

from drawing import COLOURS, SHAPES, scene
from examples import EASY, Case, Question
from family_objects import things_of

NAME = "frames"
NUM_PICTURES = 4


def draw(random: Random, level: str, side: int) -> Case:
    """Each frame shows one red object, when hard among two others that are never red."""
    num_others = 0 if level == EASY else 2
    shapes = [random.choice(SHAPES) for _ in range(NUM_PICTURES)]
    others = [colour for colour in COLOURS if colour != "red"]
    images, marks = [], []
    for shape in shapes:
        pairs = [(shape, "red")]
        pairs += [(random.choice(SHAPES), random.choice(others)) for _ in range(num_others)]
        things = things_of(random, pairs)
        images.append(scene(random, side, things))
        marks.append([thing.mark for thing in things])

    def ask(random: Random) -> Question | None:
        kind = random.choice(("which", "often", "after", "list"))
        if kind == "list":
            return Question("list the red shapes of all pictures", " ".join(shapes))
        if kind == "after":
            place = random.randrange(NUM_PICTURES - 1)
            return Question(f"what red shape comes after picture {place + 1}", shapes[place + 1])
        asked = random.choice(SHAPES if kind == "often" else shapes)
        if kind == "often":
            return Question(f"how often is there a red {asked}", str(shapes.count(asked)))
        if shapes.count(asked) > 1:
            return None
        return Question(f"in which picture is the red {asked}", str(shapes.index(asked) + 1))

    return Case(images, marks, ask)
