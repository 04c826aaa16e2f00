"""Choosing the tokens of a prompt, chunk by chunk and layer by layer."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from vllm_zipvl.cache.messages import ChunkPlan
from vllm_zipvl.cache.spec import CacheRules
from vllm_zipvl.core.probes import Probes, num_visible_probes, probe_positions
from vllm_zipvl.core.selection import Selection, cap_selections, keep_all, select
from vllm_zipvl.ops.probe_scores import probe_scores
from vllm_zipvl.ops.transfer import to_device


class ProbeQueries(NamedTuple):
    """Queries of one layer that wait to probe, [num_probes, num_heads, head_size], unscaled."""

    queries: torch.Tensor
    scale: float


@dataclass
class PromptState:
    """What a prompt's chunks leave behind, per slot.

    Attributes:
        chunk: The newest chunk.
        random_positions: Random probes of the earlier chunks.
        random_mass: Per layer, their attention mass, float32 [tokens so far].
        positions: Of the newest chunk's probes, random ones first, int64; None until a layer needs
            them.
        num_visible: How many probes may see each token, float32 [end of the newest chunk]; None
            until a layer needs it.
        selections: Per layer, the selection of the last chunk.
        waiting: Per layer that attended densely, the last chunk's probes.
    """

    chunk: ChunkPlan
    random_positions: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    random_mass: dict[int, torch.Tensor] = field(default_factory=dict)
    positions: torch.Tensor | None = None
    num_visible: torch.Tensor | None = None
    selections: dict[int, Selection] = field(default_factory=dict)
    waiting: dict[int, ProbeQueries] = field(default_factory=dict)


class PromptSelector:
    """The selections of the prompts that are being computed or wait for their compression."""

    def __init__(
        self, rules: CacheRules, sum_over_ranks: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        self.rules = rules
        self.config = rules.config
        self._sum_over_ranks = sum_over_ranks
        self._prompts: dict[int, PromptState] = {}

    def forget(self, slot: int) -> None:
        """The slot got a new owner."""
        self._prompts.pop(slot, None)

    def attends_sparsely(self, chunk: ChunkPlan) -> bool:
        """Whether a chunk's attention runs on its selection."""
        config = self.config
        return (
            config.sparse_prefill and not chunk.attends_densely and chunk.end >= config.min_tokens
        )

    @property
    def _needs_no_scores(self) -> bool:
        config = self.config
        is_capped = config.compress and config.max_kept < 1
        return config.ratio is None and config.tau == 1 and not is_capped

    def _is_compressed_after(self, chunk: ChunkPlan) -> bool:
        return chunk.ends_prompt and self.rules.compressible_end(chunk.end) > 0

    def _probes(self, chunk: ChunkPlan) -> Probes:
        config = self.config
        return probe_positions(
            config.seed, chunk.start, chunk.end, config.probe_recent, config.probe_random
        )

    def _prompt_of(self, chunk: ChunkPlan) -> PromptState:
        """The prompt that a chunk belongs to; it is its newest one from now on."""
        prompt = self._prompts.setdefault(chunk.slot, PromptState(chunk))
        if prompt.chunk is not chunk:
            prompt.chunk, prompt.positions, prompt.num_visible = chunk, None, None
        return prompt

    def _positions(self, prompt: PromptState, device: torch.device) -> torch.Tensor:
        if prompt.positions is None:
            prompt.positions = to_device(np.concatenate(self._probes(prompt.chunk)), device)
        return prompt.positions

    def select(
        self, layer: int, chunk: ChunkPlan, query: torch.Tensor, key: torch.Tensor, scale: float
    ) -> Selection | None:
        """Probe a prompt chunk, and select if its attention runs on the selection.

        A chunk that attends densely and is its prompt's last leaves its probes' queries to
        `take_masks`, so that the first token does not wait for them.

        Args:
            layer: Index of the layer.
            chunk: Its plan.
            query: The chunk's queries [end - start, num_heads, head_size].
            key: All keys of the context [end, num_kv_heads, head_size].
            scale: Softmax scale.
        """
        is_sparse, is_compressed = self.attends_sparsely(chunk), self._is_compressed_after(chunk)
        if chunk.ends_prompt and not is_sparse and not is_compressed:
            return None
        if chunk.attends_densely and not self.config.compress:
            return None
        prompt = self._prompt_of(chunk)
        positions = self._positions(prompt, query.device)
        probes = ProbeQueries(query[positions - chunk.start], scale)
        if chunk.ends_prompt and not is_sparse:
            prompt.waiting[layer] = probes
            return None
        if not is_sparse:
            if not self._needs_no_scores:
                self._accumulate_mass(prompt, layer, probes, key)
            return None
        selection = self._choose(prompt, layer, probes, key)
        if is_compressed:
            prompt.selections[layer] = selection
        return selection

    def take_single(self, chunk: ChunkPlan, queries: Iterable[ProbeQueries]) -> None:
        """As `select`, after the fact, for a chunk of one token.

        Args:
            chunk: Its plan.
            queries: The token's, one of each layer.
        """
        if self._is_compressed_after(chunk):
            self._prompt_of(chunk).waiting = dict(enumerate(queries))

    def _choose(
        self, prompt: PromptState, layer: int, probes: ProbeQueries, key: torch.Tensor
    ) -> Selection:
        """Select among the context of a prompt's newest chunk."""
        end = prompt.chunk.end
        if self._needs_no_scores:
            return keep_all(key[:end, 0, 0])
        mass = self._accumulate_mass(prompt, layer, probes, key)
        random, recent = self._probes(prompt.chunk)
        if prompt.num_visible is None:
            positions = np.concatenate([prompt.random_positions, random, recent])
            visible = num_visible_probes(positions, end)
            prompt.num_visible = to_device(visible, mass.device, mass.dtype)
        return select(mass, prompt.num_visible, len(recent), self.config)

    def _accumulate_mass(
        self, prompt: PromptState, layer: int, probes: ProbeQueries, key: torch.Tensor
    ) -> torch.Tensor:
        """Mass of this chunk's probes and of the earlier chunks' random ones, float32 [end]."""
        positions = self._positions(prompt, key.device)
        num_random = len(self._probes(prompt.chunk).random)
        mass = probe_scores(probes.queries, positions, num_random, key, probes.scale)
        random, recent = self._sum_over_ranks(torch.stack(mass))
        earlier = prompt.random_mass.pop(layer, None)
        if earlier is not None:
            random[: earlier.shape[0]] += earlier
        if not prompt.chunk.ends_prompt:
            prompt.random_mass[layer] = random
        return random + recent

    def finish_chunk(self, chunk: ChunkPlan) -> None:
        """After the last layer of a chunk: its random probes count in the chunks to come."""
        prompt = self._prompts.get(chunk.slot)
        if prompt is None:
            return
        if not chunk.ends_prompt:
            random = self._probes(chunk).random
            prompt.random_positions = np.concatenate([prompt.random_positions, random])
        elif not self._is_compressed_after(chunk):
            del self._prompts[chunk.slot]

    def take_masks(
        self, slot: int, num_layers: int, keys: Callable[[int], torch.Tensor]
    ) -> list[torch.Tensor]:
        """What each layer keeps of a complete prompt, bool masks [num_tokens].

        Args:
            slot: The prompt's slot.
            num_layers: How many layers there are.
            keys: Gives a layer's keys of the prompt, [num_tokens, num_kv_heads, head_size].
        """
        prompt = self._prompts.pop(slot)
        for layer, probes in prompt.waiting.items():
            prompt.selections[layer] = self._choose(prompt, layer, probes, keys(layer))
        selections = [prompt.selections[layer] for layer in range(num_layers)]
        num_recent = len(self._probes(prompt.chunk).recent)
        return cap_selections(selections, num_recent, self.config.max_kept)
