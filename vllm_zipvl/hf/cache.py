"""A cache for transformers that knows what each layer of each request keeps, and at which bits."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import Cache, DynamicLayer

from vllm_zipvl.config import ZipVLConfig
from vllm_zipvl.core.geometry import UNQUANTISED, compressible_end, head_len
from vllm_zipvl.core.neighbourhood import visible_pairs
from vllm_zipvl.core.probes import num_far_probes, num_visible_probes, probe_positions
from vllm_zipvl.core.quantization import KeyNorm, key_norm, keys_through, through
from vllm_zipvl.core.selection import (
    Selection,
    cap_selection,
    num_to_keep,
    recent_mask,
    select,
    top_mask,
)

_LAYER = "_zipvl_layer"

QUERIES_AT_ONCE = 512
"""Bounds the memory of weights."""

Choose = Callable[..., Selection]
"""`core.selection.select`, or what a study puts in its place; it gets the mass covered already,
float64 [1], where it chooses for the prefill."""


def layer_of(key: torch.Tensor) -> "ZipVLLayer | None":
    """The cache layer that handed out `key`.

    transformers passes an attention function neither the cache nor its layer, so the layer travels
    with the keys that it returned.
    """
    return getattr(key, _LAYER, None)


@dataclass
class Request:
    """One row of the batch in one layer.

    Attributes:
        prompt_len: Tokens of the prompt so far; complete once a step brings one token.
        random_positions: Random probes of the prompt's earlier chunks.
        random_mass: Their attention mass, far and near, float32 [2, tokens so far]; None before
            the first chunk.
        selection: What the newest chunk attends to.
        cache_selection: What the cache keeps of the prompt so far.
        num_recent: Recent probes of the newest chunk.
        is_decoding: Whether the prompt is complete.
        is_prompt_compressed: Whether the step after the prompt is over.
        compressed_len: Where the compressed or evicted tokens end; 0 for none.
        norm: Statistics of the keys compressed first.
        evicted: Positions that nobody attends to any more, bool [tokens so far].
    """

    prompt_len: int = 0
    random_positions: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    random_mass: torch.Tensor | None = None
    selection: Selection | None = None
    cache_selection: Selection | None = None
    num_recent: int = 0
    is_decoding: bool = False
    is_prompt_compressed: bool = False
    compressed_len: int = 0
    norm: KeyNorm | None = None
    evicted: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.bool))


class ZipVLLayer(DynamicLayer):
    """Keys and values of one layer, [batch, num_kv_heads, num_tokens, head_size].

    Compressed tokens hold the values that their codes stand for.
    """

    def __init__(self, cache: "ZipVLCache") -> None:
        super().__init__()
        self.cache = cache
        self.requests: dict[int, Request] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        setattr(keys, _LAYER, self)
        return keys, values

    def attend(
        self,
        row: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """One row's new tokens: a chunk of its prompt, or a token of its answer.

        After the prompt's first chunk, a single token is taken for one of the answer.

        Args:
            row: Index of the row in the batch.
            query: [num_heads, num_queries, head_size].
            key: The row's part of the cache, [num_kv_heads, num_tokens, head_size], written to when
                tokens are compressed.
            value: As `key`.
            scale: Softmax scale.

        Returns:
            [num_heads, num_queries, head_size].
        """
        request = self.requests.setdefault(row, Request())
        if query.shape[1] == 1 and request.prompt_len:
            request.is_decoding = True
            return self._decode(row, request, query, key, value, scale)
        if request.is_decoding:
            raise ValueError("a ZipVLCache takes one prompt; make a new one for the next")
        return self._prefill(request, query, key, value, scale)

    def _prefill(
        self,
        request: Request,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        config = self.cache.config
        end, start = key.shape[1], key.shape[1] - query.shape[1]
        request.prompt_len = end
        self._select(request, query, key, scale)
        positions = torch.arange(start, end, device=key.device)
        assert request.selection is not None
        kept = request.selection.kept
        if not config.sparse_prefill or end < config.min_tokens or self._attends_densely:
            kept = torch.ones_like(kept)
        out = torch.empty_like(query)
        for rows in positions.split(QUERIES_AT_ONCE):
            pairs = visible_pairs(rows, kept, config.window, config.sinks)
            queries = query[:, rows - start]
            out[:, rows - start] = _weighted(_weights(queries, pairs, key, scale), value)
        return out

    @property
    def _attends_densely(self) -> bool:
        return self.cache.layers.index(self) < self.cache.num_dense_layers

    def _select(
        self, request: Request, query: torch.Tensor, key: torch.Tensor, scale: float
    ) -> None:
        """Choose what the chunk attends to, and what the cache keeps if it is the last one."""
        config = self.cache.config
        end, start = key.shape[1], key.shape[1] - query.shape[1]
        random, recent = probe_positions(
            config.seed, start, end, config.probe_recent, config.probe_random
        )
        random_mass, recent_mass = (
            self._mass(query, torch.tensor(positions, device=key.device), start, key, scale)
            for positions in (random, recent)
        )
        if request.random_mass is not None:
            random_mass[:, : request.random_mass.shape[1]] += request.random_mass
        request.random_mass = random_mass
        request.random_positions = np.concatenate([request.random_positions, random])
        request.num_recent = len(recent)
        probes = np.concatenate([request.random_positions, recent])
        is_recent = recent_mask(len(recent), end, key.device)
        num_visible = num_visible_probes(probes, end)
        num_far = num_far_probes(probes, end, config.window, config.sinks)
        far, near = random_mass + recent_mass
        choose = partial(self.cache.choose, is_recent=is_recent, config=config)
        covered = near.double().sum()[None]
        request.selection = choose(far, torch.from_numpy(num_far).to(far.device), covered=covered)
        request.cache_selection = choose(far + near, torch.from_numpy(num_visible).to(far.device))

    def _mass(
        self,
        query: torch.Tensor,
        positions: torch.Tensor,
        start: int,
        key: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """Attention of the queries at `positions`, summed over them and heads, float32 [2, end].

        First what they find far from themselves, then in their own neighbourhood.
        """
        if len(positions) == 0:
            return torch.zeros(2, key.shape[1], device=key.device)
        config, nothing = self.cache.config, torch.zeros(key.shape[1], dtype=torch.bool)
        pairs = torch.arange(key.shape[1], device=key.device) <= positions[:, None]
        weights = _weights(query[:, positions - start], pairs, key, scale).sum(0)
        near = visible_pairs(positions, nothing.to(key.device), config.window, config.sinks)
        return torch.stack([(weights * ~near).sum(0), (weights * near).sum(0)])

    def _decode(
        self,
        row: int,
        request: Request,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        num_tokens = key.shape[1]
        num_new = num_tokens - request.evicted.shape[0]
        request.evicted = torch.nn.functional.pad(request.evicted.to(key.device), (0, num_new))
        there = (~request.evicted).nonzero()[:, 0]
        weights = _weights(query, torch.ones_like(there, dtype=torch.bool), key[:, there], scale)
        out = _weighted(weights, value[:, there])
        if not request.is_prompt_compressed:
            # One step after the prompt, as in the engine, where the first token does not wait.
            request.is_prompt_compressed = True
            kept = self.cache.prompt_masks(row)[self.cache.layers.index(self)]
            start, end = self.cache.head_len, self.cache.compressible(request.prompt_len)
            self._compress(request, start, end, kept[start:end], key, value)
            return out
        config = self.cache.config
        start = max(request.compressed_len, self.cache.head_len)
        end = self.cache.compressible(num_tokens)
        if num_tokens - start >= config.interval + config.residual and end > start:
            mass = torch.zeros(num_tokens, device=key.device)
            mass[there] = weights.sum((0, 1))
            tail = mass[start:end]
            kept = top_mask(tail, num_to_keep(tail, config))
            if not config.chooses_for_cache:
                kept = torch.ones_like(kept)
            self._compress(request, start, end, kept, key, value)
        return out

    def _compress(
        self,
        request: Request,
        start: int,
        end: int,
        kept: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
    ) -> None:
        """Tokens [start, end) go to their precision; `kept` says which of them are important."""
        if end <= start:
            return
        if request.norm is None:
            request.norm = key_norm(key[:, start:end].transpose(0, 1))
        config = self.cache.config
        for mask, bits in ((kept, config.high_bits), (~kept, config.low_bits)):
            positions = start + mask.nonzero()[:, 0]
            if bits == 0:
                request.evicted[positions] = True
            elif bits != UNQUANTISED:
                keys = keys_through(key[:, positions].transpose(0, 1), request.norm, bits)
                key[:, positions] = keys.transpose(0, 1).to(key.dtype)
                value[:, positions] = through(value[:, positions].float(), bits).to(value.dtype)
        request.compressed_len = end


class ZipVLCache(Cache):
    """The cache of one `generate` call.

    Attributes:
        config: The settings, the same as the engine's.
        block_size: Tokens of the engine's blocks; only whole ones are compressed.
        choose: Chooses what a layer keeps.
        num_dense_layers: First layers whose prefill attends densely.
    """

    def __init__(
        self,
        config: ZipVLConfig,
        block_size: int = 32,
        choose: Choose = select,
        num_dense_layers: int = 0,
    ) -> None:
        super().__init__(layer_class_to_replicate=lambda: ZipVLLayer(self))
        self.config = config
        self.block_size = block_size
        self.choose = choose
        self.num_dense_layers = num_dense_layers
        self._masks: dict[int, torch.Tensor] = {}

    @property
    def head_len(self) -> int:
        """First tokens that stay whole: the sinks, in whole blocks."""
        return head_len(self.config.sinks, self.block_size)

    def compressible(self, num_tokens: int) -> int:
        """Where the tokens end, from the head on, that may be compressed; 0 if there are none."""
        if not self.config.compress:
            return 0
        config = self.config
        return compressible_end(num_tokens, config.sinks, config.residual, self.block_size)

    def selections(self, row: int = 0) -> list[Selection]:
        """What each layer's prefill attended to in the newest chunk of a row's prompt."""
        return [layer.requests[row].selection for layer in self.layers]

    def prompt_masks(self, row: int = 0) -> torch.Tensor:
        """What layers keep at `high_bits` of a complete prompt, bool [num_layers, prompt_len]."""
        if row not in self._masks:
            requests = [layer.requests[row] for layer in self.layers]
            parts = zip(*(request.cache_selection for request in requests), strict=True)
            chosen = Selection(*map(torch.stack, parts))
            num_recent, prompt_len = requests[0].num_recent, requests[0].prompt_len
            is_recent = recent_mask(num_recent, prompt_len, chosen.kept.device)
            kept = cap_selection(chosen, is_recent, self.config.max_kept)
            self._masks[row] = kept if self.config.chooses_for_cache else torch.ones_like(kept)
        return self._masks[row]


def _grouped(query: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """[num_kv_heads, group * num_queries, head_size], float32."""
    num_heads, num_queries, head_size = query.shape
    return query.float().reshape(num_kv_heads, -1, num_queries, head_size).flatten(1, 2)


def _weights(
    query: torch.Tensor, pairs: torch.Tensor, key: torch.Tensor, scale: float
) -> torch.Tensor:
    """Softmax weights over the visible pairs, float32 [num_heads, num_queries, num_keys].

    A query that sees nothing has weights of 0.
    """
    num_heads, num_queries, _ = query.shape
    scores = _grouped(query, key.shape[0]) @ key.float().transpose(1, 2) * scale
    scores = scores.reshape(num_heads, num_queries, -1)
    return scores.masked_fill_(~pairs, -torch.inf).softmax(-1).masked_fill_(~pairs, 0)


def _weighted(weights: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """[num_heads, num_queries, head_size] in the dtype of `value`."""
    num_heads, num_queries, num_keys = weights.shape
    grouped = weights.reshape(value.shape[0], -1, num_keys)
    return (grouped @ value.float()).reshape(num_heads, num_queries, -1).to(value.dtype)
