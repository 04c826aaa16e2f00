"""A decoder of a model's shape with random weights, in plain torch."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from attention_cases import DTYPE, Layer

Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Attention of a layer: its index, queries, keys and values [num_tokens, heads, head_size]."""
MLP_TOKENS = 16384
"""Of which the MLP's activations are in memory at once."""
EPSILON = 1e-6


class ModelShape(NamedTuple):
    """What a decoder is built from."""

    layer: Layer
    num_layers: int
    hidden_size: int
    mlp_size: int
    vocab_size: int
    rope_base: float

    @property
    def num_rotated(self) -> int:
        """Heads of queries and keys, which positions rotate."""
        return self.layer.num_heads + self.layer.num_kv_heads


class DecoderLayer(NamedTuple):
    """Weights of one layer, as `torch.nn.functional.linear` takes them."""

    attention_norm: torch.Tensor
    qkv: torch.Tensor
    output: torch.Tensor
    mlp_norm: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


def _weight(num_out: int, num_in: int) -> torch.Tensor:
    return torch.randn(num_out, num_in, dtype=DTYPE).mul_(num_in**-0.5)


def _norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, EPSILON)


class Decoder:
    """Embedding, layers and the head that gives the next token's logits.

    Args:
        shape: Its sizes.
        num_positions: How many are ever rotated by.
        sharpness: Factor of queries and keys; 1 attends almost uniformly.
    """

    def __init__(self, shape: ModelShape, num_positions: int, sharpness: float = 1.0) -> None:
        self.shape = shape
        hidden, head_size = shape.hidden_size, shape.layer.head_size
        self.embedding = torch.randn(shape.vocab_size, hidden, dtype=DTYPE)
        self.layers = [self._layer(sharpness) for _ in range(shape.num_layers)]
        self.norm = torch.ones(hidden, dtype=DTYPE)
        self.head = _weight(shape.vocab_size, hidden)
        steps = torch.arange(0, head_size, 2) / head_size
        angles = torch.arange(num_positions)[:, None] * shape.rope_base**-steps
        self.cos, self.sin = angles.cos().to(DTYPE), angles.sin().to(DTYPE)

    def _layer(self, sharpness: float) -> DecoderLayer:
        shape, ones = self.shape, torch.ones(self.shape.hidden_size, dtype=DTYPE)
        layer, hidden = shape.layer, shape.hidden_size
        qkv = _weight((shape.num_rotated + layer.num_kv_heads) * layer.head_size, hidden)
        qkv[: shape.num_rotated * layer.head_size] *= sharpness
        return DecoderLayer(
            ones, qkv, _weight(hidden, layer.num_heads * layer.head_size), ones,
            _weight(2 * shape.mlp_size, hidden), _weight(hidden, shape.mlp_size),
        )  # fmt: skip

    def logits(
        self, tokens: torch.Tensor, positions: torch.Tensor, attend: Attend, num_last: int
    ) -> torch.Tensor:
        """Logits [num_last, vocab_size] after the last tokens.

        Args:
            tokens: int64 [num_tokens].
            positions: As `tokens`.
            attend: Attention of a layer; it stores keys and values itself.
            num_last: After how many tokens they are wanted.
        """
        x = F.embedding(tokens, self.embedding)
        cos, sin = self.cos[positions, None], self.sin[positions, None]
        for index, layer in enumerate(self.layers):
            q, k, v = self._qkv(layer, x, cos, sin)
            x = x + F.linear(attend(index, q, k, v).flatten(1), layer.output)
            del q, k, v
            for part in x.split(MLP_TOKENS):
                gate, up = F.linear(_norm(part, layer.mlp_norm), layer.gate_up).chunk(2, dim=-1)
                part += F.linear(F.silu(gate) * up, layer.down)
        return F.linear(_norm(x[-num_last:], self.norm), self.head)

    def _qkv(
        self, layer: DecoderLayer, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        heads = F.linear(_norm(x, layer.attention_norm), layer.qkv)
        heads = heads.unflatten(-1, (-1, self.shape.layer.head_size))
        num_rotated = self.shape.num_rotated
        even, odd = heads[:, :num_rotated].chunk(2, dim=-1)
        rotated = torch.cat([even * cos - odd * sin, odd * cos + even * sin], dim=-1)
        num_heads = self.shape.layer.num_heads
        return rotated[:, :num_heads], rotated[:, num_heads:], heads[:, num_rotated:]
