"""Choosing the tokens of prompts, chunk by chunk and layer by layer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property

import numpy as np
import torch

from vllm_zipvl.backend.runs import runs_of
from vllm_zipvl.config import ZipVLConfig
from vllm_zipvl.core.probes import Probes, num_far_probes, num_visible_probes, probe_positions
from vllm_zipvl.core.selection import Selection, cap_selection, select, select_for_prefill
from vllm_zipvl.core.sequences import Chunks, Sequences
from vllm_zipvl.core.transfer import to_device
from vllm_zipvl.ops.probe_scores import ProbePlaces, probe_scores
from vllm_zipvl.plan import ChunkPlan
from vllm_zipvl.rules import CacheRules

SORTED_AT_ONCE = 2**19
"""Tokens of all layers that choosing for the cache sorts at once: bounds its temporary tensors."""


class Kind(Enum):
    """What a chunk of a prompt does."""

    SPARSE = "probes, and attends to what its probes choose"
    PROBING = "attends densely, and probes for the chunks to come"
    WAITING = "attends densely, and leaves its probes' queries for the compression"
    DENSE = "attends densely"


@dataclass
class PromptState:
    """What a prompt's chunks leave behind, per slot.

    Attributes:
        chunk: The newest chunk.
        random_positions: Random probes of the earlier chunks.
        random_mass: Per layer, their attention mass, far and near, float32 [2, tokens so far].
        waiting: Per layer, queries of the last chunk's probes, [num_probes, num_heads, head_size].
        probed: What the batch of the last chunk probed, and the prompt's place there.
    """

    chunk: ChunkPlan
    random_positions: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    random_mass: dict[int, torch.Tensor] = field(default_factory=dict)
    waiting: dict[int, torch.Tensor] = field(default_factory=dict)
    probed: "tuple[ProbedMass, int] | None" = None


class ProbedMass:
    """Attention mass of a batch's tokens; prompts hold it until they are compressed.

    Attributes:
        layers: Per layer, float32 [num_tokens].

    Args:
        num_visible: Probes that may see each token, float32 [num_tokens].
        is_recent: The recent probes, bool [num_tokens].
        contexts: Whose tokens they are.
        config: How the cache chooses.
    """

    def __init__(
        self,
        num_visible: torch.Tensor,
        is_recent: torch.Tensor,
        contexts: Sequences,
        config: ZipVLConfig,
    ) -> None:
        self.layers: dict[int, torch.Tensor] = {}
        self._num_visible = num_visible
        self._is_recent = is_recent
        self._contexts = contexts
        self._config = config

    @cached_property
    def masks(self) -> tuple[torch.Tensor, ...]:
        """What the cache keeps of each prompt, bool [num_layers, its tokens]."""
        mass, contexts = torch.stack([self.layers[i] for i in sorted(self.layers)]), self._contexts
        at_once = max(1, SORTED_AT_ONCE // contexts.num_tokens)
        parts = [
            select(layers, self._num_visible, self._is_recent, self._config, contexts)
            for layers in mass.split(at_once)
        ]
        chosen = Selection(*map(torch.cat, zip(*parts, strict=True)))
        kept = cap_selection(chosen, self._is_recent, self._config.max_kept, contexts)
        return kept.split(contexts.lengths, dim=1)


class PromptBatch:
    """Chunks of one kind, one after another; what follows from them serves all layers.

    Attributes:
        kind: Of all of them.
        prompts: Whose chunks they are.
        rows: How many queries and tokens each has.
    """

    def __init__(
        self, kind: Kind, prompts: Sequence[PromptState], rules: CacheRules, device: torch.device
    ) -> None:
        self.kind = kind
        self.prompts = prompts
        self.chunks = [prompt.chunk for prompt in prompts]
        self.rows = Chunks(
            [chunk.end - chunk.start for chunk in self.chunks],
            [chunk.end for chunk in self.chunks],
            device,
        )
        self._rules = rules
        self._device = device

    @cached_property
    def _positions(self) -> list[Probes]:
        return [_probes_of(chunk, self._rules) for chunk in self.chunks]

    @cached_property
    def probes(self) -> ProbePlaces:
        """Where they are in their contexts."""
        positions = [np.concatenate(own) for own in self._positions]
        is_random = [np.repeat([True, False], list(map(len, own))) for own in self._positions]
        return ProbePlaces(
            to_device(np.concatenate(positions), self._device),
            to_device(np.concatenate(is_random), self._device),
            Sequences(list(map(len, positions)), self._device),
        )

    @cached_property
    def probe_places(self) -> torch.Tensor:
        """Where the probes are among the chunks' queries, int64 [num_probes]."""
        places = [
            np.concatenate(own) - chunk.start + tokens.start
            for own, chunk, tokens in zip(
                self._positions, self.chunks, self.rows.queries.slices(), strict=True
            )
        ]
        return to_device(np.concatenate(places), self._device)

    @cached_property
    def num_visible(self) -> torch.Tensor:
        """How many probes may see each token, those of earlier chunks too, float32 [num_tokens]."""
        return self._count_probes(num_visible_probes)

    @cached_property
    def num_far(self) -> torch.Tensor:
        """As `num_visible`, of probes that do not have the token near."""
        config = self._rules.config
        return self._count_probes(num_far_probes, config.window, config.sinks)

    def _count_probes(self, count: Callable[..., np.ndarray], *neighbourhood: int) -> torch.Tensor:
        counts = [
            count(np.concatenate([prompt.random_positions, *own]), prompt.chunk.end, *neighbourhood)
            for prompt, own in zip(self.prompts, self._positions, strict=True)
        ]
        return to_device(np.concatenate(counts), self._device, torch.float32)

    @cached_property
    def is_recent(self) -> torch.Tensor:
        """The recent probes, bool [num_tokens]."""
        masks = [
            np.arange(chunk.end) >= chunk.end - len(own.recent)
            for chunk, own in zip(self.chunks, self._positions, strict=True)
        ]
        return to_device(np.concatenate(masks), self._device)

    @cached_property
    def probed(self) -> ProbedMass:
        """What their probes find, layer by layer."""
        contexts, config = self.rows.contexts, self._rules.config
        return ProbedMass(self.num_visible, self.is_recent, contexts, config)


def _probes_of(chunk: ChunkPlan, rules: CacheRules) -> Probes:
    config = rules.config
    return probe_positions(
        config.seed, chunk.start, chunk.end, config.probe_recent, config.probe_random
    )


def _context_len(prompt: PromptState) -> int:
    return prompt.chunk.end


class PromptSelector:
    """The selections of the prompts that are being computed or wait for their compression.

    Args:
        rules: Settings and shapes.
        sum_over_ranks: Sums a tensor over tensor-parallel ranks.
        max_tokens: Of the contexts of a batch.
    """

    def __init__(
        self,
        rules: CacheRules,
        sum_over_ranks: Callable[[torch.Tensor], torch.Tensor],
        max_tokens: int,
    ) -> None:
        self.rules = rules
        self.config = rules.config
        self._sum_over_ranks = sum_over_ranks
        self._max_tokens = max_tokens
        self._prompts: dict[int, PromptState] = {}

    def forget(self, slot: int) -> None:
        """The slot got a new owner."""
        self._prompts.pop(slot, None)

    def _kind(self, chunk: ChunkPlan) -> Kind:
        config = self.config
        is_asked = config.prefills_sparsely and not chunk.attends_densely
        if is_asked and chunk.end >= config.min_tokens:
            return Kind.SPARSE
        if chunk.ends_prompt:
            return Kind.WAITING if self._is_chosen_from_after(chunk) else Kind.DENSE
        return Kind.PROBING if is_asked or config.chooses_for_cache else Kind.DENSE

    def _is_chosen_from_after(self, chunk: ChunkPlan) -> bool:
        """Whether the chunk ends a prompt of which the cache keeps some tokens better."""
        is_compressed = chunk.ends_prompt and self.rules.compressible_end(chunk.end) > 0
        return is_compressed and self.config.chooses_for_cache

    def _prompt_of(self, chunk: ChunkPlan) -> PromptState:
        """The prompt that a chunk belongs to; it is its newest one from now on."""
        prompt = self._prompts.setdefault(chunk.slot, PromptState(chunk))
        prompt.chunk = chunk
        return prompt

    def batches(self, chunks: Sequence[ChunkPlan], device: torch.device) -> list[PromptBatch]:
        """Chunks that are computed at once, kind by kind."""
        batches = []
        for kind in Kind:
            own = [chunk for chunk in chunks if self._kind(chunk) is kind]
            leaves_something = kind is not Kind.DENSE
            prompts = [self._prompt_of(c) if leaves_something else PromptState(c) for c in own]
            for run in runs_of(prompts, _context_len, self._max_tokens):
                batches.append(PromptBatch(kind, run, self.rules, device))
                if kind is Kind.SPARSE:
                    self._keep_mass(batches[-1])
        return batches

    def _keep_mass(self, batch: PromptBatch) -> None:
        """Leave what the batch will probe to the prompts that the cache chooses from after it."""
        for place, prompt in enumerate(batch.prompts):
            if self._is_chosen_from_after(prompt.chunk):
                prompt.probed = batch.probed, place

    def select(
        self, layer: int, batch: PromptBatch, query: torch.Tensor, key: torch.Tensor, scale: float
    ) -> torch.Tensor | None:
        """Probe, and choose what the chunks attend to if they attend sparsely.

        Chunks that attend densely and are their prompts' last leave their probes' queries to
        `choose_waiting`, so that the first token does not wait for them.

        Args:
            layer: Index of the layer.
            batch: The chunks.
            query: Their queries, [num_queries, num_heads, head_size].
            key: All keys of their contexts, [num_tokens, num_kv_heads, head_size].
            scale: Softmax scale.

        Returns:
            Bool mask [num_tokens]; None if they attend to all.
        """
        if batch.kind is Kind.DENSE:
            return None
        probes = query[batch.probe_places]
        if batch.kind is Kind.WAITING:
            for prompt, own in zip(batch.prompts, batch.probes.contexts.slices(), strict=True):
                prompt.waiting[layer] = probes[own]
            return None
        mass = self._accumulate_mass(batch, layer, probes, key, scale)
        if batch.kind is Kind.PROBING:
            return None
        if any(self._is_chosen_from_after(chunk) for chunk in batch.chunks):
            batch.probed.layers[layer] = mass.sum(0)
        chosen = select_for_prefill(
            mass, batch.num_far, batch.is_recent, self.config, batch.rows.contexts
        )
        return chosen.kept

    def take_single(self, chunk: ChunkPlan, queries: torch.Tensor) -> None:
        """As `select`, after the fact, for a chunk of one token.

        Args:
            chunk: Its plan.
            queries: The token's, of all layers, [num_layers, num_heads, head_size].
        """
        if self._is_chosen_from_after(chunk):
            self._prompt_of(chunk).waiting = dict(enumerate(queries[:, None]))

    def _accumulate_mass(
        self,
        batch: PromptBatch,
        layer: int,
        probes: torch.Tensor,
        key: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """Mass of the chunks' probes and of earlier chunks' random ones.

        Far and near, float32 [2, num_tokens].
        """
        contexts, near = batch.rows.contexts, (self.config.window, self.config.sinks)
        mass = probe_scores(probes, batch.probes, key, contexts, scale, *near)
        random, recent = self._sum_over_ranks(mass)
        for prompt, tokens in zip(batch.prompts, contexts.slices(), strict=True):
            earlier = prompt.random_mass.pop(layer, None)
            if earlier is not None:
                random[:, tokens][:, : earlier.shape[1]] += earlier
            if not prompt.chunk.ends_prompt:
                # A copy: a view would hold the mass of the whole batch.
                prompt.random_mass[layer] = random[:, tokens].clone()
        return random + recent

    def finish_chunk(self, chunk: ChunkPlan) -> None:
        """After the last layer of a chunk: its random probes count in the chunks to come."""
        prompt = self._prompts.get(chunk.slot)
        if prompt is None:
            return
        if not chunk.ends_prompt:
            random = _probes_of(chunk, self.rules).random
            prompt.random_positions = np.concatenate([prompt.random_positions, random])
        elif not self._is_chosen_from_after(chunk):
            del self._prompts[chunk.slot]

    def choose_waiting(
        self,
        slots: Sequence[int],
        keys: Callable[[list[int], Sequences], Callable[[int], torch.Tensor]],
        scale: float,
    ) -> None:
        """Let the complete prompts choose whose last chunk attended densely.

        Args:
            slots: Of prompts that are to be compressed.
            keys: Of the slots and lengths of contexts, what gives a layer's keys of them,
                [num_tokens, num_kv_heads, head_size].
            scale: Softmax scale.
        """
        waiting = [self._prompts[slot] for slot in slots if self._prompts[slot].waiting]
        for run in runs_of(waiting, _context_len, self._max_tokens):
            device = run[0].waiting[0].device
            batch = PromptBatch(Kind.WAITING, run, self.rules, device)
            self._keep_mass(batch)
            keys_of = keys([prompt.chunk.slot for prompt in run], batch.rows.contexts)
            for layer in run[0].waiting:
                probes = torch.cat([prompt.waiting[layer] for prompt in run])
                mass = self._accumulate_mass(batch, layer, probes, keys_of(layer), scale)
                batch.probed.layers[layer] = mass.sum(0)

    def take_masks(self, slot: int) -> torch.Tensor:
        """What the layers keep of the complete prompt of a slot, bool [num_layers, num_tokens]."""
        prompt = self._prompts.pop(slot)
        assert prompt.probed is not None
        probed, place = prompt.probed
        return probed.masks[place]
