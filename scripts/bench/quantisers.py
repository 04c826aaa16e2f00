"""Quantisation schemes for keys and values, as round trips through what each would store."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from vllm_zipvl.core.codes import clip, dequantise, quantise
from vllm_zipvl.core.geometry import PARAM_BYTES
from vllm_zipvl.core.quantization import (
    KEY_ZEROS,
    KeyNorm,
    key_norm,
    normalise_keys,
    restore_keys,
    rotate,
    through,
)

CHANNEL_BYTES = 2
"""Of a channel's figure that a request keeps outside the pages: float16."""

Codec = Callable[[torch.Tensor, int], torch.Tensor]
"""Round trip of float32 [num_tokens, num_kv_heads, head_size] of one class at some bits."""


def per_token(x: torch.Tensor, bits: int) -> torch.Tensor:
    """One min/max range per token and head."""
    return dequantise(quantise(x, bits))


def rotated(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Hadamard rotation, then one min/max range per token and head."""
    return rotate(dequantise(quantise(rotate(x), bits)))


def rotated_clipped(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Like `rotated`, with a clipped range."""
    return rotate(dequantise(quantise(clip(rotate(x), bits), bits)))


def per_channel(x: torch.Tensor, bits: int) -> torch.Tensor:
    """One min/max range per channel and head over all tokens (ZipCache's keys)."""
    return dequantise(quantise(x.permute(1, 2, 0).contiguous(), bits)).permute(2, 0, 1)


def per_channel_clipped(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Like `per_channel`, with a clipped range."""
    return dequantise(quantise(clip(x.permute(1, 2, 0).contiguous(), bits), bits)).permute(2, 0, 1)


def channel_separable(x: torch.Tensor, bits: int) -> torch.Tensor:
    """One min/max range per token over all heads, channels divided by sqrt(max |x|) first.

    ZipCache's values (arXiv 2405.14256).
    """
    factor = x.abs().amax(0).sqrt().half().float()
    factor = torch.where(factor > 0, factor, torch.ones_like(factor))
    return dequantise(quantise((x / factor).flatten(1), bits)).view_as(x) * factor


class Statistics(NamedTuple):
    """Per-channel figures of the keys of both classes, float32 [num_kv_heads, head_size]."""

    mean: torch.Tensor
    scale: torch.Tensor


class Scheme(NamedTuple):
    """How keys and values are stored.

    Attributes:
        keys: Round trip of the keys of one class.
        values: Round trip of the values of one class.
        centred: Whether the keys' channel means are taken off first. They add the same number
            to all scores of a query, which matters only next to tokens that are not centred.
        scaled: Whether the keys are divided by their channels' standard deviations first, by
            which a query would be multiplied.
        head_params: Parameters per token and head.
        token_params: Parameters per token, shared by its heads.
        class_params: Parameters per channel of a head, per class and compression event.
        request_params: Parameters per channel of a head, taken with a request's first compression
            and used by all later ones.
    """

    keys: Codec
    values: Codec
    centred: bool = False
    scaled: bool = False
    head_params: int = 0
    token_params: int = 0
    class_params: int = 0
    request_params: int = 0

    def statistics(self, keys: torch.Tensor) -> Statistics:
        """Take the figures of keys [num_tokens, num_kv_heads, head_size], rounded to float16."""
        mean, scale = torch.zeros_like(keys[0]), torch.ones_like(keys[0])
        if self.centred:
            mean = keys.mean(0).half().float()
        if self.scaled:
            # A channel that never varies keeps a scale that float16 can hold.
            scale = (keys - mean).square().mean(0).sqrt().clamp(min=1e-4).half().float()
        return Statistics(mean, scale)

    def round_trip(
        self, keys: torch.Tensor, values: torch.Tensor, statistics: Statistics, bits: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the tokens of one class [num_tokens, num_kv_heads, head_size]; read them back."""
        mean, scale = statistics
        return self.keys((keys - mean) / scale, bits) * scale + mean, self.values(values, bits)

    def bytes_per_token_head(
        self,
        bits: tuple[int, int],
        kept_share: float,
        head_size: int,
        num_kv_heads: int,
        num_tokens: int,
        is_first: bool = True,
    ) -> float:
        """Mean bytes of a token's key and value of one head, parameters included.

        Args:
            bits: Precision of the kept tokens and of the rest; 0 evicts.
            kept_share: Share of the tokens that is kept at `bits[0]`.
            head_size: Channels per head.
            num_kv_heads: Heads that share a token's `token_params`.
            num_tokens: Tokens compressed together, evicted ones included.
            is_first: Whether this is the request's first compression.
        """
        kept = math.ceil(kept_share * num_tokens)
        total = 0.0
        for count, width in ((kept, bits[0]), (num_tokens - kept, bits[1])):
            if width and count:
                total += count * 2 * head_size * width / 8
                total += count * PARAM_BYTES * (self.head_params + self.token_params / num_kv_heads)
                total += PARAM_BYTES * self.class_params * head_size
        if is_first:
            total += CHANNEL_BYTES * self.request_params * head_size
        return total / num_tokens


class Stored(Scheme):
    """What the engine stores: see `vllm_zipvl.core.quantization`."""

    def statistics(self, keys: torch.Tensor) -> KeyNorm:
        return key_norm(keys)

    def round_trip(
        self, keys: torch.Tensor, values: torch.Tensor, statistics: KeyNorm, bits: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        stored = through(normalise_keys(keys, statistics), bits, KEY_ZEROS)
        return restore_keys(stored, statistics), through(values, bits)


SCHEMES = {
    "plain": Scheme(per_token, per_token, head_params=4),
    "channel": Scheme(per_channel, channel_separable, token_params=2, class_params=3),
    "rotated": Scheme(rotated, rotated, head_params=4),
    "clipped": Scheme(rotated_clipped, rotated_clipped, head_params=4),
    "centred": Scheme(rotated_clipped, rotated_clipped, True, head_params=4, request_params=1),
    "scaled": Scheme(rotated_clipped, rotated_clipped, True, True, head_params=4, request_params=2),
    "mixed": Scheme(per_channel_clipped, rotated_clipped, head_params=2, class_params=2),
    # Two zeros of the key and one of the value; both scales share one parameter's bytes.
    "stored": Stored(rotated_clipped, rotated_clipped, True, True, head_params=4, request_params=3),
}
"""By name: (a) plain, (b) channel, (c) rotated, and hybrids.

clipped: (c) with a narrower range at 2 bits. centred: clipped, keys less their channel means.
scaled: centred, keys divided by their channels' standard deviations. mixed: keys as in (b) and
values as in (c), both clipped at 2 bits. stored: the largest pair of channels in a key's two zeros,
the others divided by the roots of their deviations; what the engine stores.
"""
