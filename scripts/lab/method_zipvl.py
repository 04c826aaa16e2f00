"""Methods that the transformers oracle runs: ZipVL, its ablations, and baselines of its parts."""

from dataclasses import dataclass, field
from typing import Any

import torch
from decoder import Asked, Decoder, Outcome

from vllm_zipvl.config import ZipVLConfig
from vllm_zipvl.core.geometry import PageGeometry
from vllm_zipvl.core.selection import Selection, num_to_keep, select, top_mask
from vllm_zipvl.hf import NAME, ZipVLCache
from vllm_zipvl.hf.cache import Choose

BLOCK_SIZE = 16
LAB_SETTINGS: dict[str, Any] = {
    # A picture has 144 tokens and a question about ten, so that all is smaller than by default.
    "min_tokens": 1,
    "probe_recent": 16,
    "probe_random": 16,
    "residual": 0,
    "interval": 16,
}


@dataclass(frozen=True)
class ZipVL:
    """Adaptive sparse prefill and a cache at two precisions.

    Attributes:
        settings: Beside or instead of `LAB_SETTINGS`.
        choose: In the place of the package's selection.
        num_dense_layers: First layers whose prefill attends densely.
        protects_text: Whether words are kept whatever their scores.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    choose: Choose = select
    num_dense_layers: int = 0
    protects_text: bool = False

    @property
    def config(self) -> ZipVLConfig:
        return ZipVLConfig(**{**LAB_SETTINGS, **self.settings})

    def __call__(self, decoder: Decoder, asked: Asked) -> Outcome:
        choose = _with_text(self.choose, asked.is_image) if self.protects_text else self.choose
        cache = ZipVLCache(self.config, BLOCK_SIZE, choose, self.num_dense_layers)
        with decoder.attending(NAME):
            hidden = decoder.run(asked.embeddings, torch.arange(asked.num_tokens), cache)
            selections = cache.selections()
            answer = decoder.answer(hidden, asked.num_tokens, cache)
        kept = [float(selection.kept.float().mean()) for selection in selections]
        attends = kept if self.config.sparse_prefill else [1.0] * len(kept)
        attends[: self.num_dense_layers] = [1.0] * self.num_dense_layers
        flops = sum(share**2 for share in attends) / len(attends)
        return Outcome(answer, attends, flops, self._kv_bytes(kept))

    def _kv_bytes(self, kept: list[float]) -> float:
        """Parameters of the codes included; tokens that are still dense are not."""
        config = self.config
        if not config.compress:
            return 1.0
        # Heads of 64 at 16 bits.
        geometry = PageGeometry(1, 1, 64, 2, BLOCK_SIZE, config.high_bits, config.low_bits)
        high, low = (geometry.token_head_bytes(bits) for bits in geometry.bits)
        share = sum(kept) / len(kept)
        return (share * high + (1 - share) * low) / geometry.token_head_bytes(16)


def by_raw_scores(
    mass: torch.Tensor, num_visible: torch.Tensor, num_recent: int, config: ZipVLConfig
) -> Selection:
    """The choice by mass itself, which favours early tokens: more probes see them."""
    return select(mass, torch.ones_like(num_visible), num_recent, config)


def at_random(
    mass: torch.Tensor, num_visible: torch.Tensor, num_recent: int, config: ZipVLConfig
) -> Selection:
    """As many tokens as the count rule asks for, whichever."""
    num = num_to_keep(mass, config)
    generator = torch.Generator().manual_seed(config.seed + len(mass))
    scores = torch.rand(len(mass), generator=generator)
    kept = top_mask(scores, num)
    kept[len(mass) - num_recent :] = True
    return Selection(kept, scores, num)


def nothing(
    mass: torch.Tensor, num_visible: torch.Tensor, num_recent: int, config: ZipVLConfig
) -> Selection:
    """Everything is stored at the low precision."""
    return Selection(torch.zeros(len(mass), dtype=torch.bool), mass, 0)


def _with_text(choose: Choose, is_image: torch.Tensor) -> Choose:
    def choose_with_text(*arguments: Any) -> Selection:
        selection = choose(*arguments)
        kept = selection.kept | ~is_image[: len(selection.kept)]
        return selection._replace(kept=kept)

    return choose_with_text
