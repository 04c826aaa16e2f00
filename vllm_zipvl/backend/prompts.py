"""Choosing the tokens of a prompt, chunk by chunk and layer by layer."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from vllm_zipvl.cache.messages import ChunkPlan
from vllm_zipvl.config import ZipVLConfig
from vllm_zipvl.core.probes import Probes, num_visible_probes, probe_positions
from vllm_zipvl.core.selection import Selection, cap_selections, select
from vllm_zipvl.ops.probe_scores import probe_scores


@dataclass
class PromptState:
    """What a prompt's chunks leave behind, per slot.

    Attributes:
        random_positions: Random probes of the earlier chunks.
        random_mass: Per layer, their attention mass, float32 [tokens so far].
        selections: Per layer, the selection of the last chunk.
        num_recent: Recent probes of the last chunk.
    """

    random_positions: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    random_mass: dict[int, torch.Tensor] = field(default_factory=dict)
    selections: dict[int, Selection] = field(default_factory=dict)
    num_recent: int = 0


class PromptSelector:
    """The selections of the prompts that are being computed or wait for their compression."""

    def __init__(
        self, config: ZipVLConfig, sum_over_ranks: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        self.config = config
        self._sum_over_ranks = sum_over_ranks
        self._prompts: dict[int, PromptState] = {}

    def forget(self, slot: int) -> None:
        """The slot got a new owner."""
        self._prompts.pop(slot, None)

    def selects(self, chunk: ChunkPlan) -> bool:
        """Whether the step selects tokens for a chunk."""
        config = self.config
        return self.attends_sparsely(chunk) or (config.compress and chunk.ends_prompt)

    def attends_sparsely(self, chunk: ChunkPlan) -> bool:
        """Whether a chunk's attention runs on its selection."""
        config = self.config
        return (
            config.sparse_prefill and not chunk.attends_densely and chunk.end >= config.min_tokens
        )

    def select(
        self, layer: int, chunk: ChunkPlan, query: torch.Tensor, key: torch.Tensor, scale: float
    ) -> Selection | None:
        """Probe a prompt chunk, and select if this step needs it.

        Args:
            layer: Index of the layer.
            chunk: Its plan.
            query: The chunk's queries [end - start, num_heads, head_size].
            key: All keys of the context [end, num_kv_heads, head_size].
            scale: Softmax scale.
        """
        config = self.config
        if chunk.ends_prompt and not self.selects(chunk):
            return None
        probes = probe_positions(
            config.seed, chunk.start, chunk.end, config.probe_recent, config.probe_random
        )
        prompt = self._prompts.setdefault(chunk.slot, PromptState())
        if config.ratio is None and config.tau == 1:
            selection = self._select_all(chunk, key.device)
        else:
            mass = self._accumulate_mass(prompt, layer, chunk, probes, query, key, scale)
            if not self.selects(chunk):
                return None
            positions = np.concatenate([prompt.random_positions, probes.random, probes.recent])
            visible = torch.from_numpy(num_visible_probes(positions, chunk.end))
            selection = select(mass, visible.to(mass.device), len(probes.recent), config)
        if chunk.ends_prompt:
            prompt.selections[layer] = selection
            prompt.num_recent = len(probes.recent)
        return selection

    @staticmethod
    def _select_all(chunk: ChunkPlan, device: torch.device) -> Selection:
        kept = torch.ones(chunk.end, dtype=torch.bool, device=device)
        return Selection(kept, kept.float(), chunk.end)

    def _accumulate_mass(
        self,
        prompt: PromptState,
        layer: int,
        chunk: ChunkPlan,
        probes: Probes,
        query: torch.Tensor,
        key: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """Mass of this chunk's probes and of the earlier chunks' random ones, float32 [end]."""
        positions = torch.from_numpy(np.concatenate([probes.random, probes.recent]))
        positions = positions.to(query.device)
        chunk_mass = probe_scores(
            query[positions - chunk.start], positions, len(probes.random), key, scale
        )
        random, recent = self._sum_over_ranks(torch.stack(chunk_mass))
        earlier = prompt.random_mass.get(layer)
        if earlier is not None:
            random[: earlier.shape[0]] += earlier
        prompt.random_mass[layer] = random
        return random + recent

    def finish_chunk(self, chunk: ChunkPlan) -> None:
        """After the last layer of a chunk: its random probes count in the chunks to come."""
        config = self.config
        prompt = self._prompts.get(chunk.slot)
        if prompt is None:
            return
        if not chunk.ends_prompt:
            probes = probe_positions(
                config.seed, chunk.start, chunk.end, config.probe_recent, config.probe_random
            )
            prompt.random_positions = np.concatenate([prompt.random_positions, probes.random])
        elif config.compress:
            prompt.random_mass.clear()
        else:
            del self._prompts[chunk.slot]

    def take_masks(self, slot: int) -> list[torch.Tensor]:
        """What each layer keeps of a complete prompt, bool masks [num_tokens], in layer order."""
        prompt = self._prompts.pop(slot)
        selections = [selection for _, selection in sorted(prompt.selections.items())]
        return cap_selections(selections, prompt.num_recent, self.config.max_kept)
