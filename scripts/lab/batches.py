"""Examples as the model's inputs, in batches that worker processes draw."""

from collections.abc import Iterator
from functools import cache
from random import Random
from typing import NamedTuple

import numpy as np
import tasks
import torch
from examples import LEVELS, Example
from lab_model import LabModel, make_tokenizer
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

IGNORED = -100
"""Label of positions without a loss."""
SINGLE = tuple(name for name in tasks.FAMILIES if name != "frames")


class Batch(NamedTuple):
    """Inputs of one step.

    Attributes:
        input_ids: int64 [batch, length], padded on the right.
        attention_mask: int64, as `input_ids`.
        labels: int64, as `input_ids`; `IGNORED` outside of answers.
        pixel_values: float32 [num_images, 3, side, side].
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    pixel_values: torch.Tensor


@cache
def _tokenizer():
    return make_tokenizer()


def prompt_ids(example: Example, spec: LabModel) -> list[int]:
    """What the chat template makes of a question, image tokens expanded."""
    tokenizer = _tokenizer()
    content = [{"type": "image"}] * len(example.images)
    content.append({"type": "text", "text": example.question})
    messages = [{"role": "user", "content": content}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    image = tokenizer.convert_tokens_to_ids("<image>")
    ids = tokenizer(text).input_ids
    return [i for token in ids for i in [token] * (spec.tokens_per_image if token == image else 1)]


def pixels(example: Example) -> torch.Tensor:
    """Normalised as CLIP's image processor does, float32 [num_images, 3, side, side]."""
    stacked = torch.from_numpy(np.stack([np.asarray(image) for image in example.images]))
    mean, std = (torch.tensor(x)[:, None, None] for x in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return (stacked.permute(0, 3, 1, 2).float() / 255 - mean) / std


def collate(examples: list[Example], spec: LabModel, blind: bool = False) -> Batch:
    """Questions with their answers; `blind` shows grey pictures."""
    tokenizer = _tokenizer()
    rows, labels = [], []
    for example in examples:
        prompt = prompt_ids(example, spec)
        answer = tokenizer(example.answer, add_special_tokens=False).input_ids
        answer.append(tokenizer.eos_token_id)
        rows.append(prompt + answer)
        labels.append([IGNORED] * len(prompt) + answer)
    length = max(map(len, rows))
    lengths = torch.tensor([len(row) for row in rows])
    padded = [row + [tokenizer.pad_token_id] * (length - len(row)) for row in rows]
    pictures = torch.cat([pixels(example) for example in examples])
    return Batch(
        torch.tensor(padded),
        (torch.arange(length) < lengths[:, None]).long(),
        torch.tensor([row + [IGNORED] * (length - len(row)) for row in labels]),
        torch.zeros_like(pictures) if blind else pictures,
    )


class TrainingBatches(IterableDataset):
    """Batch i is the same whoever draws it; `first` is where a resumed run goes on."""

    def __init__(self, spec: LabModel, size: int, first: int, seed: int, blind: bool) -> None:
        self.spec, self.size, self.first = spec, size, first
        self.seed, self.blind = seed, blind

    def batch(self, index: int) -> Batch:
        """One in six batches shows several pictures, and holds fewer questions."""
        random = Random(f"{self.seed}/{index}")
        several = index % len(tasks.FAMILIES) == 0
        families = ("frames",) if several else SINGLE
        size = max(1, self.size // 4) if several else self.size
        examples = [
            tasks.example(
                random.choice(families),
                random.choice(LEVELS),
                "train",
                random.getrandbits(48),
                self.spec.side,
            )
            for _ in range(size)
        ]
        return collate(examples, self.spec, self.blind)

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        offset, step = (info.id, info.num_workers) if info else (0, 1)
        index = self.first + offset
        while True:
            yield self.batch(index)
            index += step


def loader(batches: TrainingBatches, num_workers: int) -> Iterator[Batch]:
    """Batches in order, drawn by `num_workers` processes."""
    return iter(DataLoader(batches, batch_size=None, num_workers=num_workers))
