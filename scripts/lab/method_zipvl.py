"""Methods that the transformers oracle runs: ZipVL, its ablations, and baselines of its parts."""

import math
import zlib
from dataclasses import dataclass, field
from typing import Any

import torch
from decoder import Asked, Decoder, Outcome

from vllm_zipvl.config import ZipVLConfig
from vllm_zipvl.core.geometry import UNQUANTISED, PageGeometry
from vllm_zipvl.core.neighbourhood import visible_pairs
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
    "window": 16,
}


@dataclass(frozen=True)
class ZipVL:
    """Adaptive sparse prefill and a cache at two precisions.

    Attributes:
        settings: Beside or instead of those of `base`.
        choose: In the place of the package's selection.
        num_dense_layers: First layers whose prefill attends densely.
        protects_text: Whether words are kept whatever their scores.
        block_size: Only whole blocks are compressed.
        chunk: Tokens of a chunk of the prompt; None is the whole prompt.
        shares_prefix: Whether the pictures' keys and values come from another question about them,
            as on a prefix-cache hit.
        base: What differs from the package's defaults in all methods.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    choose: Choose = select
    num_dense_layers: int = 0
    protects_text: bool = False
    block_size: int = BLOCK_SIZE
    chunk: int | None = None
    shares_prefix: bool = False
    base: dict[str, Any] = field(default_factory=LAB_SETTINGS.copy)

    @property
    def config(self) -> ZipVLConfig:
        return ZipVLConfig(**{**self.base, **self.settings})

    def __call__(self, decoder: Decoder, asked: Asked) -> Outcome:
        choose = _with_text(self.choose, asked.is_image) if self.protects_text else self.choose
        cache = ZipVLCache(self.config, self.block_size, choose, self.num_dense_layers)
        n = asked.num_tokens
        with decoder.attending(NAME):
            first = self._take_prefix(decoder, asked, cache) if self.shares_prefix else 0
            for positions in self._chunks(first, n):
                hidden = decoder.run(asked.embeddings[positions], positions, cache)
            selections = cache.selections()
            answer = decoder.answer(hidden, asked.num_tokens, cache)
        kept = torch.stack([selection.kept for selection in selections])
        if not self.config.sparse_prefill:
            kept.fill_(True)
        kept[: self.num_dense_layers] = True
        attends = kept.float().mean(1).tolist()
        flops = sum(map(self._share_of_pairs, kept)) / len(kept)
        if self.chunk is not None or self.shares_prefix:
            # The last chunk's selection says nothing about what the tokens before it saw.
            attends, flops = [math.nan] * len(attends), math.nan
        head_size = decoder.language_model.config.head_dim
        return Outcome(answer, attends, flops, self._kv_bytes(cache, n, head_size))

    def _chunks(self, first: int, end: int) -> list[torch.Tensor]:
        """Positions of each chunk from `first` on."""
        chunks = list(torch.arange(first, end).split(self.chunk or end))
        if len(chunks) > 1 and len(chunks[-1]) == 1:
            # The oracle takes a single token for one of the answer.
            chunks[-2:] = [torch.cat(chunks[-2:])]
        return chunks

    def _take_prefix(self, decoder: Decoder, asked: Asked, cache: ZipVLCache) -> int:
        """Fill a cache with the whole blocks that another question computed; their length."""
        num_prefix = asked.num_prefix_tokens
        num_shared = num_prefix // self.block_size * self.block_size
        other = torch.cat([asked.embeddings[:num_prefix], asked.other_words])
        before = ZipVLCache(self.config, self.block_size, self.choose, self.num_dense_layers)
        decoder.run(other, torch.arange(len(other)), before)
        for i, layer in enumerate(before.layers):
            cache.update(layer.keys[:, :, :num_shared], layer.values[:, :, :num_shared], i)
        return num_shared

    def _share_of_pairs(self, kept: torch.Tensor) -> float:
        """Of the causal pairs of a query and a key those that a layer attends to."""
        n, config = len(kept), self.config
        pairs = visible_pairs(torch.arange(n), kept, config.window, config.sinks)
        return float(pairs.sum()) / (n * (n + 1) / 2)

    def _kv_bytes(self, cache: ZipVLCache, num_tokens: int, head_size: int) -> float:
        """Parameters of the codes and the dense tail included; pages count by their tokens."""
        config, start, end = self.config, cache.head_len, cache.compressible(num_tokens)
        bits = (config.high_bits, config.low_bits)
        geometry = PageGeometry(1, 1, head_size, UNQUANTISED // 8, self.block_size, *bits)
        full = geometry.token_head_bytes(UNQUANTISED)
        high, low = (geometry.token_head_bytes(bits) for bits in geometry.bits)
        masks = cache.prompt_masks()
        num_compressed = max(0, end - start)
        kept = int(masks[:, start:end].sum()) / len(masks)
        total = kept * high + (num_compressed - kept) * low + (num_tokens - num_compressed) * full
        return total / (num_tokens * full)


def by_raw_scores(mass: torch.Tensor, num_probes: torch.Tensor, **rest: Any) -> Selection:
    """The choice by mass itself, which favours early tokens: more probes see them."""
    return select(mass, torch.ones_like(num_probes), **rest)


def at_random(
    mass: torch.Tensor,
    num_probes: torch.Tensor,
    is_recent: torch.Tensor,
    config: ZipVLConfig,
    covered: torch.Tensor | None = None,
) -> Selection:
    """As many tokens as the count rule asks for, whichever; others in each layer and question."""
    num = num_to_keep(mass, config, covered=covered)
    generator = torch.Generator().manual_seed(zlib.crc32(mass.numpy().tobytes()))
    scores = torch.rand(len(mass), generator=generator)
    return Selection(top_mask(scores, num) | is_recent, scores, num)


def nothing(mass: torch.Tensor, *args: Any, **rest: Any) -> Selection:
    """Everything is stored at the low precision."""
    return Selection(torch.zeros(len(mass), dtype=torch.bool), mass, torch.tensor([0]))


def _with_text(choose: Choose, is_image: torch.Tensor) -> Choose:
    def choose_with_text(*arguments: Any, **rest: Any) -> Selection:
        selection = choose(*arguments, **rest)
        kept = selection.kept | ~is_image[: len(selection.kept)]
        return selection._replace(kept=kept)

    return choose_with_text
