"""Methods that take image tokens out: FastV after some layers, HiRED before the first."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from decoder import Asked, Decoder, Outcome
from transformers import DynamicCache

from vllm_zipvl.core.selection import top_mask


@dataclass(frozen=True)
class FastV:
    """Drops image tokens by what the last prompt token attends to (arXiv 2403.06764).

    Attributes:
        layer: K; that many layers see all tokens, and the last of them decides.
        dropped: R, share of the image tokens that later layers do without.
    """

    layer: int = 2
    dropped: float = 0.5

    def __call__(self, decoder: Decoder, asked: Asked) -> Outcome:
        n, num_layers = asked.num_tokens, decoder.num_layers
        cache, positions = DynamicCache(), torch.arange(n)
        causal = torch.full((n, n), -torch.inf).triu(1)[None, None]
        weights: list[torch.Tensor] = []
        deciding = decoder.language_model.layers[self.layer - 1].self_attn

        def note(module: Any, inputs: Any, output: tuple[torch.Tensor, torch.Tensor]) -> None:
            weights.append(output[1][0, :, -1].mean(0))

        with decoder.attending("eager"):
            handle = deciding.register_forward_hook(note)
            try:
                hidden = decoder.run(
                    asked.embeddings, positions, cache, range(self.layer), mask=causal
                )
            finally:
                handle.remove()
        num_images = int(asked.is_image.sum())
        scores = weights[0].masked_fill(~asked.is_image, -1)
        kept = top_mask(scores, num_images - math.floor(self.dropped * num_images))
        kept |= ~asked.is_image
        with decoder.attending("sdpa"):
            rest = range(self.layer, num_layers)
            hidden = decoder.run(hidden[kept], positions[kept], cache, rest)
            answer = decoder.answer(hidden, n, cache)
        shares = [1.0] * self.layer + [float(kept.float().mean())] * len(rest)
        flops = sum(share**2 for share in shares) / num_layers
        return Outcome(answer, shares, flops, sum(shares) / num_layers)


@dataclass(frozen=True)
class HiRED:
    """Drops image tokens by what the vision tower's class token attends to (arXiv 2408.10945).

    Whole pictures have the same budget each; of a picture with tiles the overview has half, and
    the tiles share the rest by what the overview's class token attends to.

    Attributes:
        kept: Share of all image tokens that the language model sees, at most.
    """

    kept: float

    def __call__(self, decoder: Decoder, asked: Asked) -> Outcome:
        budgets = self.kept * len(asked.image_scores) * asked.part_shares.double()
        seen = torch.zeros_like(asked.image_parts, dtype=torch.bool)
        for part, budget in enumerate(budgets.tolist()):
            inside = asked.image_parts == part
            scores = asked.image_scores.masked_fill(~inside, -1)
            # A share of 1/3 in float32 times 3 is a little more or less than 1.
            seen |= top_mask(scores, min(math.floor(budget + 1e-3), int(inside.sum())))
        there = ~asked.is_image
        there[asked.is_image] = seen
        num_tokens = int(there.sum())
        cache = DynamicCache()
        with decoder.attending("sdpa"):
            # The tokens that are left move together, as where they are dropped before the model.
            hidden = decoder.run(asked.embeddings[there], torch.arange(num_tokens), cache)
            answer = decoder.answer(hidden, num_tokens, cache)
        share = num_tokens / asked.num_tokens
        return Outcome(answer, [share] * decoder.num_layers, share**2, share)
