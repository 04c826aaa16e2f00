"""A question as the language model sees it, and greedy answers under any way of attending."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import Cache

MAX_ANSWER = 32
"""Tokens; the longest list has nine words."""


class Picture(NamedTuple):
    """What the vision tower's class token attends to in one picture.

    Attributes:
        scores: In the layer whose features the language model sees, [num_tokens].
        views: Where a token comes from, int64 [num_tokens]: 0 for the picture, or the overview of
            one with tiles; the tile's number from 1 on; -1 for ends of lines.
        tile_content: How much of the overview's attention in the first layer lies in each tile,
            [num_tiles]; None without tiles.
    """

    scores: torch.Tensor
    views: torch.Tensor
    tile_content: torch.Tensor | None = None


class Asked(NamedTuple):
    """One question.

    Attributes:
        embeddings: Of pictures and words, [num_tokens, hidden_size].
        is_image: Bool [num_tokens].
        pictures: As the vision tower's class token sees them.
        other_words: Of another question about the same pictures, [num_words, hidden_size].
    """

    embeddings: torch.Tensor
    is_image: torch.Tensor
    pictures: list[Picture]
    other_words: torch.Tensor

    @property
    def num_prefix_tokens(self) -> int:
        """Up to the last picture's end."""
        return int(self.is_image.nonzero().max()) + 1

    @property
    def num_tokens(self) -> int:
        return self.embeddings.shape[0]


class Outcome(NamedTuple):
    """What a method answered, and what it cost against full attention with a 16-bit cache.

    Attributes:
        answer: Token ids, without the end.
        kept: Per layer, the share of the prompt's tokens that attend and are attended to; where
            pairs are left out, the share of tokens that would have as many. NaN where the prefill
            is not that of one whole prompt.
        flops: Share of the prefill's attention products; what choosing costs is not in it. NaN as
            `kept`.
        kv_bytes: Share of the bytes that the cache holds after the prompt was compressed.
    """

    answer: list[int]
    kept: list[float]
    flops: float
    kv_bytes: float


class Decoder:
    """The language model of a LLaVA, layer by layer."""

    def __init__(self, model: Any) -> None:
        self.language_model = model.model.language_model
        self.head = model.lm_head
        ends = model.generation_config.eos_token_id
        self.ends = {ends} if isinstance(ends, int) else set(ends or ())
        self.num_layers = len(self.language_model.layers)

    @contextmanager
    def attending(self, implementation: str) -> Iterator[None]:
        """Use one of transformers' attention implementations."""
        config = self.language_model.config
        before = config._attn_implementation
        config._attn_implementation = implementation
        try:
            yield
        finally:
            config._attn_implementation = before

    def run(
        self,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        cache: Cache,
        layers: range | None = None,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states [num_tokens, hidden_size] through `layers`, all of them by default."""
        model, hidden = self.language_model, hidden[None]
        rotary = model.rotary_emb(hidden, positions[None])
        for i in range(self.num_layers) if layers is None else layers:
            hidden = model.layers[i](
                hidden,
                attention_mask=mask,
                position_ids=positions[None],
                past_key_values=cache,
                use_cache=True,
                position_embeddings=rotary,
            )
        return hidden[0]

    def next_token(self, hidden: torch.Tensor) -> int:
        """The likeliest token after the last hidden state."""
        return int(self.head(self.language_model.norm(hidden[-1])).argmax())

    def answer(self, hidden: torch.Tensor, num_tokens: int, cache: Cache) -> list[int]:
        """Go on after a prompt's last hidden states; tokens without the end.

        Args:
            hidden: Of the prompt, after the last layer.
            num_tokens: The position of the answer's first token.
            cache: Holds the prompt.
        """
        found: list[int] = []
        token = self.next_token(hidden)
        while token not in self.ends and len(found) < MAX_ANSWER:
            found.append(token)
            embedding = self.language_model.embed_tokens(torch.tensor([token]))
            position = torch.tensor([num_tokens + len(found) - 1])
            token = self.next_token(self.run(embedding, position, cache))
        return found


Method = Callable[[Decoder, Asked], Outcome]
