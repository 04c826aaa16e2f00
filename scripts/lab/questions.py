"""The test set, and what a model's language part sees of a question."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import tasks
import torch
import transformers
from batches import pixels, prompt_ids
from decoder import Asked
from examples import LEVELS, Example
from lab_model import LabModel


class Key(NamedTuple):
    """Which question of the test set."""

    family: str
    level: str
    index: int


def test_set(num_per_level: int, families: Iterable[str] = tuple(tasks.FAMILIES)) -> Iterator[Key]:
    """Families and levels take turns, so that a part of it is balanced too."""
    for index in range(num_per_level):
        for family in families:
            for level in LEVELS:
                yield Key(family, level, index)


def draw(key: Key, spec: LabModel) -> Example:
    """Pictures and two questions, of which the first counts."""
    return tasks.example(key.family, key.level, "test", key.index, spec.side, num_questions=2)


def load_model(folder: Path) -> Any:
    """A LLaVA for evaluation, float32; its vision tower gives attention weights."""
    attention = {"text_config": "sdpa", "vision_config": "eager"}
    model = transformers.LlavaForConditionalGeneration.from_pretrained(
        folder, attn_implementation=attention, dtype=torch.float32
    )
    return model.eval()


def spec_of(model: Any) -> LabModel:
    """The sizes that decide how pictures are drawn and how many tokens they have."""
    vision = model.config.vision_config
    return LabModel(side=vision.image_size, patch_size=vision.patch_size)


@torch.inference_mode()
def see(model: Any, example: Example, spec: LabModel) -> Asked:
    """Embed an example's pictures, its first question and the words of its last."""
    pictures, words = prompt_ids(len(example.images), example.question, spec)
    ids = torch.tensor(pictures + words)
    is_image = ids == model.config.image_token_id
    seen = model.model.vision_tower(
        pixels(example), output_hidden_states=True, output_attentions=True
    )
    features = seen.hidden_states[model.config.vision_feature_layer][:, 1:]
    embeddings = model.model.get_input_embeddings()(ids).clone()
    embeddings[is_image] = model.model.multi_modal_projector(features).flatten(0, 1)
    scores = seen.attentions[-1][:, :, 0, 1:].mean(1)
    _, other = prompt_ids(len(example.images), example.questions[-1].text, spec)
    other_words = model.model.get_input_embeddings()(torch.tensor(other))
    return Asked(embeddings, is_image, scores, other_words)
