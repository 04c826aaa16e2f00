"""Methods that take image tokens out: FastV after some layers, HiRED before the first."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from decoder import Asked, Decoder, Outcome, Picture
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

    The budget of a picture with tiles is split: the overview has a fixed share, and tiles share
    the rest by how much of the overview's attention in the tower's first layer lies in them. Ends
    of lines are dropped.

    Attributes:
        kept: Budget of a picture, as a share of its tokens.
        overview: Share of the budget (alpha).
    """

    kept: float
    overview: float = 0.5

    def __call__(self, decoder: Decoder, asked: Asked) -> Outcome:
        there = ~asked.is_image
        there[asked.is_image] = torch.cat([self._kept(picture) for picture in asked.pictures])
        num_tokens = int(there.sum())
        cache = DynamicCache()
        with decoder.attending("sdpa"):
            # The tokens that are left move together, as where they are dropped before the model.
            hidden = decoder.run(asked.embeddings[there], torch.arange(num_tokens), cache)
            answer = decoder.answer(hidden, num_tokens, cache)
        share = num_tokens / asked.num_tokens
        return Outcome(answer, [share] * decoder.num_layers, share**2, share)

    def _kept(self, picture: Picture) -> torch.Tensor:
        """Bool [num_tokens]."""
        sizes = picture.views[picture.views >= 0].bincount().tolist()
        budget = math.floor(self.kept * len(picture.scores))
        budgets = [budget]
        if picture.tile_content is not None:
            # What a small overview has no use for is left to the tiles.
            budgets = [min(math.floor(self.overview * budget), sizes[0])]
            shares = picture.tile_content / picture.tile_content.sum()
            budgets += [math.floor((budget - budgets[0]) * share) for share in shares.tolist()]
        kept = torch.zeros_like(picture.views, dtype=torch.bool)
        for view, (size, num) in enumerate(zip(sizes, budgets, strict=True)):
            elsewhere = picture.views != view
            kept |= top_mask(picture.scores.masked_fill(elsewhere, -1), min(size, num))
        return kept
