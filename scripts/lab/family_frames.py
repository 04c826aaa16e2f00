"""Several pictures in a row: in which, how often, what came after (after Video-MME)."""

from random import Random

from drawing import COLOURS, SHAPES, scene
from examples import EASY, Example
from family_objects import things_of

NAME = "frames"
NUM_FRAMES = 4


def draw(random: Random, level: str, side: int) -> Example:
    """Each frame shows one object, or three of which one is asked about when hard."""
    num_others = 0 if level == EASY else 2
    shapes = [random.choice(SHAPES) for _ in range(NUM_FRAMES)]
    kind = random.choice(("which", "often", "after"))
    shown = random.choice(shapes)
    if kind == "which":
        while shapes.count(shown) > 1:
            shapes = [random.choice(SHAPES) for _ in range(NUM_FRAMES)]
            shown = random.choice(shapes)
    # Objects that are asked about are red; distractors never are.
    others = [colour for colour in COLOURS if colour != "red"]
    images = []
    for shape in shapes:
        pairs = [(shape, "red")]
        pairs += [(random.choice(SHAPES), random.choice(others)) for _ in range(num_others)]
        images.append(scene(random, side, things_of(random, pairs)))
    if kind == "which":
        return Example(images, f"in which picture is the red {shown}", str(shapes.index(shown) + 1))
    if kind == "often":
        asked = random.choice(SHAPES)
        return Example(images, f"how often is there a red {asked}", str(shapes.count(asked)))
    place = random.randrange(NUM_FRAMES - 1)
    return Example(images, f"what red shape comes after picture {place + 1}", shapes[place + 1])
