"""Prompts and forced answers through a Llama- or Qwen2-shaped model, fast enough for a CPU.

The answer is not decoded step by step. Its first token attends to the prompt as it was, since the
cache is compressed one step later, as in the engine; all others attend to the compressed prompt in
one causal chunk, since no tail is due within the interval.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from real_attention import masked
from real_cache import Cache, Stored
from real_prefill import Layer, Prefill, View
from transformers import AttentionInterface

NAME = "lab_real"
Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]
"""Layer, query, key and value [heads, num_tokens, head_size], scale; returns as the query."""


def attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    lab_attend: Attend,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls in each layer; batch 1."""
    out = lab_attend(module.layer_idx, query[0], key[0], value[0], scaling)
    return out.transpose(0, 1)[None], None


AttentionInterface.register(NAME, attention)


class Prompt(NamedTuple):
    """A prompt after its prefill, layer by layer.

    Attributes:
        keys: [num_kv_heads, num_tokens, head_size] each.
        values: As `keys`.
        views: What the last chunk chose.
        pairs: Share of the causal pairs that each layer attended to.
        logits: Of the token that follows, [vocabulary].
    """

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    views: list[View]
    pairs: list[float]
    logits: torch.Tensor

    @property
    def num_tokens(self) -> int:
        return self.keys[0].shape[1]

    def stored(self) -> list[Stored]:
        """Everything as it was computed, but for what the prefill dropped."""
        parts = zip(self.keys, self.values, self.views, strict=True)
        return [Stored.of(key, value, view.there) for key, value, view in parts]


class Runner:
    """A model of transformers whose attention is the lab's."""

    def __init__(self, model: Any) -> None:
        model.config._attn_implementation = NAME
        self.model, self.head = model.model, model.lm_head
        self.num_layers, self.device = len(self.model.layers), model.device

    def layers(self, ids: torch.Tensor, first: int, attend: Attend) -> torch.Tensor:
        """Tokens from position `first` on through all layers, [num_tokens, hidden_size]."""
        hidden = self.model.embed_tokens(ids)[None]
        positions = torch.arange(first, first + len(ids))[None]
        rotary = self.model.rotary_emb(hidden, positions)
        for layer in self.model.layers:
            hidden = layer(
                hidden, attention_mask=None, position_embeddings=rotary, lab_attend=attend
            )
        return hidden[0]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.head(self.model.norm(hidden))

    @torch.inference_mode()
    def prefill(self, ids: torch.Tensor, method: Prefill) -> Prompt:
        """A prompt by a method, chunk by chunk."""
        chooser, chunks = method.chooser(), list(method.chunks(len(ids)))
        keys: list[torch.Tensor] = [torch.empty(0)] * self.num_layers
        values, views = list(keys), [None] * self.num_layers
        pairs = [0.0] * self.num_layers

        def attend(
            i: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
        ) -> torch.Tensor:
            keys[i] = torch.cat([keys[i], key], 1) if keys[i].numel() else key
            values[i] = torch.cat([values[i], value], 1) if values[i].numel() else value
            views[i] = chooser.view(Layer(i, self.num_layers, query, keys[i], scale))
            out, share = views[i].sight.attend(query, keys[i], values[i], scale)
            # Each chunk's share weighs as its causal pairs.
            n, end = query.shape[1], keys[i].shape[1]
            pairs[i] += share * n * (2 * end - n + 1) / (len(ids) * (len(ids) + 1))
            return out

        for chunk in chunks:
            hidden = self.layers(ids[chunk], chunk.start, attend)
        return Prompt(keys, values, views, pairs, self.logits(hidden[-1]))

    @torch.inference_mode()
    def answer(self, prompt: Prompt, ids: torch.Tensor, cache: Cache) -> torch.Tensor:
        """Logits of a forced answer's tokens, float32 [num_tokens, vocabulary]."""
        before = cache.before(prompt.stored())
        found = [prompt.logits[None]]
        if len(ids) > 1:
            found.append(self._continue(ids[:1], prompt.num_tokens, before, cache))
        if len(ids) > 2:
            after = cache.after(before, prompt.views)
            found.append(self._continue(ids[1:-1], prompt.num_tokens + 1, after, cache))
        return torch.cat(found)

    @torch.inference_mode()
    def share(
        self, prompt: Prompt, shared: int, own: torch.Tensor, ids: torch.Tensor
    ) -> torch.Tensor:
        """Logits of a forced answer's tokens to a short prompt, float32 [num_tokens, vocabulary].

        Args:
            prompt: A long prompt, whose blocks it finds in the prefix cache.
            shared: First tokens in them.
            own: The other tokens of the short prompt, at least one, attended to densely.
            ids: The answer's tokens.
        """
        parts = zip(prompt.keys, prompt.values, strict=True)
        stored = [Stored.of(key[:, :shared], value[:, :shared], None) for key, value in parts]
        rest = torch.cat([own, ids[:-1]])
        return self._continue(rest, shared, stored, Cache())[len(own) - 1 :]

    def _continue(
        self, ids: torch.Tensor, first: int, stored: list[Stored], cache: Cache
    ) -> torch.Tensor:
        """Logits after tokens that see all that is stored; their keys and values join it."""

        def attend(
            i: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
        ) -> torch.Tensor:
            stored[i] = stored[i].joined(cache.through(key), cache.through(value))
            num_new, num_all = query.shape[1], stored[i].key.shape[1]
            rows = torch.arange(num_all - num_new, num_all)
            pairs = torch.arange(num_all) <= rows[:, None]
            return masked(query, stored[i].key, stored[i].value, pairs[None], scale)

        return self.logits(self.layers(ids, first, attend))
