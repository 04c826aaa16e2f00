"""The test set, and what a model's language part sees of a question."""

import argparse
import hashlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import tasks
import torch
import transformers
from decoder import Asked
from examples import LEVELS, Example
from lab_model import LabModel


class Key(NamedTuple):
    """Which question of the test set."""

    family: str
    level: str
    index: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What decides which questions are asked."""
    parser.add_argument(
        "--families", nargs="+", choices=tasks.CHOICES, default=list(tasks.FAMILIES)
    )
    parser.add_argument("--questions", type=int, default=500, help="per family and level")
    parser.add_argument("--suffix", default="", help="follows every question")


def test_set(num_per_level: int, families: Iterable[str] = tuple(tasks.FAMILIES)) -> Iterator[Key]:
    """Families and levels take turns, so that a part of it is balanced too."""
    for index in range(num_per_level):
        for family in families:
            for level in LEVELS:
                yield Key(family, level, index)


def draw(key: Key, spec: LabModel) -> Example:
    """Pictures and two questions, of which the first counts."""
    return tasks.example(key.family, key.level, "test", key.index, spec.side, num_questions=2)


def questions_digest() -> str:
    """Of a few questions of every kind: another one after the tasks have changed."""
    found = hashlib.sha256()
    for key in test_set(5, tasks.CHOICES):
        found.update(repr(tasks.example(*key[:2], "test", key.index, 56, 8).questions).encode())
    return found.hexdigest()


def load_model(folder: Path) -> Any:
    """A LLaVA for evaluation, float32; its vision tower gives attention weights."""
    attention = {"text_config": "sdpa", "vision_config": "eager"}
    model = transformers.LlavaForConditionalGeneration.from_pretrained(
        folder, attn_implementation=attention, dtype=torch.float32
    )
    return model.eval()


def spec_of(config: Any) -> LabModel:
    """The sizes in a model's config that decide how pictures are drawn."""
    vision = config.vision_config
    return LabModel(side=vision.image_size, patch_size=vision.patch_size)


def prompt(processor: Any, example: Example, question: str) -> str:
    """A question about all pictures of an example, through the model's chat template."""
    content: list[dict[str, Any]] = [{"type": "image"} for _ in example.images]
    content.append({"type": "text", "text": question})
    message = {"role": "user", "content": content}
    return processor.apply_chat_template([message], add_generation_prompt=True)


def normal(text: str) -> str:
    """Letters and digits alone: tokenizers differ in spaces, models in capitals and full stops."""
    return "".join(re.findall(r"[a-z0-9]", text.lower()))


@torch.inference_mode()
def see(model: Any, processor: Any, example: Example, suffix: str = "") -> Asked:
    """Embed an example's pictures, its first question and the words of its last.

    Args:
        model: A LLaVA whose vision tower returns attention weights.
        processor: The model's own.
        example: Pictures and questions.
        suffix: Follows every question, as "Answer with one word."
    """
    texts = [prompt(processor, example, question.text + suffix) for question in example.questions]
    inputs = processor(images=example.images, text=texts[0], return_tensors="pt")
    ids = inputs.input_ids[0]
    seen = model.model.vision_tower(
        inputs.pixel_values, output_hidden_states=True, output_attentions=True
    )
    features = seen.hidden_states[model.config.vision_feature_layer][:, 1:]
    embed = model.model.get_input_embeddings()
    is_image = ids == model.config.image_token_id
    embeddings = embed(ids).clone()
    embeddings[is_image] = model.model.multi_modal_projector(features).flatten(0, 1)
    scores = seen.attentions[model.config.vision_feature_layer][:, :, 0, 1:].mean(1)
    other = processor(images=example.images, text=texts[-1], return_tensors="pt").input_ids[0]
    last_image = int((other == model.config.image_token_id).nonzero().max())
    return Asked(embeddings, is_image, scores, embed(other[last_image + 1 :]))
