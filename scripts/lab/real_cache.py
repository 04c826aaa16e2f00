"""What a cache makes of a prompt's keys and values: two precisions, first tokens whole, fp8."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from real_prefill import View
from real_rules import Rule

from vllm_zipvl.config import ZipVLConfig
from vllm_zipvl.core.geometry import UNQUANTISED, PageGeometry, num_compressible
from vllm_zipvl.core.quantization import key_norm, keys_through, through

BLOCK_SIZE = 32
FP8_MAX = 448.0


class Stored(NamedTuple):
    """What one layer's cache holds, as the values that codes stand for.

    Attributes:
        key: [num_kv_heads, num_tokens, head_size], in the order of positions.
        value: As `key`.
        num_prompt: Tokens of the prompt among them.
    """

    key: torch.Tensor
    value: torch.Tensor
    num_prompt: int

    @classmethod
    def of(cls, key: torch.Tensor, value: torch.Tensor, there: torch.Tensor | None) -> "Stored":
        if there is not None:
            key, value = key[:, there], value[:, there]
        return cls(key, value, key.shape[1])

    def joined(self, key: torch.Tensor, value: torch.Tensor) -> "Stored":
        key, value = torch.cat([self.key, key], 1), torch.cat([self.value, value], 1)
        return self._replace(key=key, value=value)


@dataclass(frozen=True)
class Cache:
    """Important tokens at one precision, the others at another.

    Attributes:
        high_bits: Of important tokens; 16 is unquantised.
        low_bits: Of the others; 0 evicts them.
        rule: Which are important; None is what the prefill kept.
        head: First tokens that stay unquantised, and out of the keys' statistics.
        fp8: Whether everything is stored as float8 e4m3 with scale 1 instead, as stock vLLM does
            with `--kv-cache-dtype fp8`.
        residual: Newest tokens that stay unquantised.
    """

    high_bits: int = UNQUANTISED
    low_bits: int = UNQUANTISED
    rule: Rule | None = None
    head: int = 0
    fp8: bool = False
    residual: int = ZipVLConfig.residual

    def through(self, x: torch.Tensor) -> torch.Tensor:
        """A new token's key or value as it is stored."""
        return x.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).float() if self.fp8 else x

    def before(self, stored: list[Stored]) -> list[Stored]:
        """While the answer's first token is computed."""
        parts = (layer._replace(key=self.through(layer.key)) for layer in stored)
        return [layer._replace(value=self.through(layer.value)) for layer in parts]

    def after(self, stored: list[Stored], views: list[View]) -> list[Stored]:
        """Once the prompt is compressed."""
        if self.high_bits == self.low_bits == UNQUANTISED:
            return list(stored)
        return [self._compress(*parts) for parts in zip(stored, views, strict=True)]

    def important(self, view: View, num_kv_heads: int) -> torch.Tensor:
        """Bool [num_tokens]."""
        if self.rule is None or view.seen is None:
            return view.kept.any(0)
        return self.rule.choose(view.seen, num_kv_heads)[0]

    def _classes(self, is_important: torch.Tensor) -> list[tuple[torch.Tensor, int]]:
        """Positions that are compressed, by precision."""
        end = num_compressible(len(is_important), self.residual, BLOCK_SIZE)
        tokens = torch.arange(len(is_important))
        is_due = (tokens < end) & (tokens >= self.head)
        classes = ((is_due & is_important, self.high_bits), (is_due & ~is_important, self.low_bits))
        return [(mask, bits) for mask, bits in classes]

    def _compress(self, layer: Stored, view: View) -> Stored:
        key, value = layer.key.clone(), layer.value.clone()
        end = num_compressible(layer.num_prompt, self.residual, BLOCK_SIZE)
        if end <= self.head:
            return layer
        norm = key_norm(key[:, self.head : end].transpose(0, 1))
        stays = torch.ones(key.shape[1], dtype=torch.bool)
        for mask, bits in self._classes(self.important(view, key.shape[0])):
            places = mask.nonzero()[:, 0]
            if bits == 0:
                stays[places] = False
            elif bits != UNQUANTISED:
                keys = keys_through(key[:, places].transpose(0, 1), norm, bits)
                key[:, places] = keys.transpose(0, 1)
                value[:, places] = through(value[:, places], bits)
        num_evicted = int((~stays).sum())
        return Stored(key[:, stays], value[:, stays], layer.num_prompt - num_evicted)

    def share(self, stored: list[Stored], views: list[View]) -> tuple[float, float]:
        """Bytes as a share of a 16-bit cache's, parameters included, and tokens at high bits."""
        num_kv_heads, _, head_size = stored[0].key.shape
        geometry = PageGeometry(
            1, 1, head_size, UNQUANTISED // 8, BLOCK_SIZE, self.high_bits, self.low_bits
        )
        full = geometry.token_head_bytes(UNQUANTISED)
        spent, high = 0.0, 0.0
        for layer, view in zip(stored, views, strict=True):
            n = view.kept.shape[-1]
            is_important = self.important(view, num_kv_heads)
            high += float(is_important.float().mean()) / len(stored)
            if layer.num_prompt < n or self.fp8:
                spent += layer.num_prompt * (0.5 if self.fp8 else 1.0) / n
                continue
            num = [(int(mask.sum()), bits) for mask, bits in self._classes(is_important)]
            compressed = sum(count * geometry.token_head_bytes(bits) for count, bits in num)
            whole = (n - sum(count for count, _ in num)) * full
            spent += (compressed + whole) / (n * full)
        return spent / len(stored), high
