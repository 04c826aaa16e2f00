"""Ways to attend in a prefill: who sees what in each layer, decided as the prompt comes."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from real_attention import Everything, Neighbourhood, Sight
from real_probes import Probing, Seen, Tally
from real_rules import Rule

from vllm_zipvl.config import ZipVLConfig


class Layer(NamedTuple):
    """One layer's part of a chunk of the prompt.

    Attributes:
        index: Of the layer.
        num_layers: Of the model.
        query: [num_heads, num_queries, head_size].
        key: [num_kv_heads, num_tokens, head_size]; the queries are the last of them.
        scale: Softmax scale.
    """

    index: int
    num_layers: int
    query: torch.Tensor
    key: torch.Tensor
    scale: float

    @property
    def num_tokens(self) -> int:
        return self.key.shape[1]


class View(NamedTuple):
    """What a method makes of a layer.

    Attributes:
        sight: Who sees what.
        kept: Tokens that count as important, bool [num_sets, num_tokens].
        seen: What the probes saw; None where a method has none.
        there: Tokens that stay in the cache, bool [num_tokens]; None is all.
    """

    sight: Sight
    kept: torch.Tensor
    seen: Seen | None = None
    there: torch.Tensor | None = None


class Chooser(Protocol):
    """Decides for one prompt."""

    def view(self, layer: Layer) -> View:
        """Of each chunk, the layers in their order."""


class Prefill(Protocol):
    """A way to attend; equal ones share their work."""

    def chunks(self, num_tokens: int) -> Iterator[slice]:
        """How the prompt is cut."""

    def chooser(self) -> Chooser:
        """For a new prompt."""


class Whole:
    """A prefill that takes the prompt as one."""

    def chunks(self, num_tokens: int) -> Iterator[slice]:
        yield slice(0, num_tokens)


MIN_TOKENS = 512
"""Less than by default: what the rule does shows at 1,024 tokens already."""


@dataclass(frozen=True)
class Sparse:
    """The package's prefill, and what may be put in the place of its parts.

    Attributes:
        rule: Which tokens are important.
        window: Newest tokens that every query sees.
        sinks: First tokens that every query sees.
        probe_recent: Last positions of a chunk that probe.
        probe_random: Random ones.
        recent_again: How many times more each of the last positions counts than a random one.
        chunk: Tokens of a chunk; None is the whole prompt.
        dense_layers: First layers that attend densely.
        dense_half: Whether the first half of the layers does.
        min_tokens: Shorter contexts attend densely.
    """

    rule: Rule = Rule()
    window: int = ZipVLConfig.window
    sinks: int = ZipVLConfig.sinks
    probe_recent: int = ZipVLConfig.probe_recent
    probe_random: int = ZipVLConfig.probe_random
    recent_again: int = 0
    chunk: int | None = None
    dense_layers: int = 0
    dense_half: bool = False
    min_tokens: int = MIN_TOKENS

    def chunks(self, num_tokens: int) -> Iterator[slice]:
        """As vLLM's token budget would cut; a last token alone joins the chunk before it."""
        step, first = self.chunk or num_tokens, 0
        while first < num_tokens:
            end = num_tokens if num_tokens - first <= step + 1 else first + step
            yield slice(first, end)
            first = end

    def chooser(self) -> Chooser:
        return _ByProbes(self)


class _ByProbes:
    """Chooses by what the probes of all chunks so far saw."""

    def __init__(self, method: Sparse) -> None:
        self.method = method
        self.tallies: dict[int, Tally] = {}

    def view(self, layer: Layer) -> View:
        method = self.method
        near = method.window, method.sinks
        probing = Probing(
            method.probe_recent, method.probe_random, 0, *near, 1 + method.recent_again
        )
        tally = self.tallies.setdefault(layer.index, Tally(probing))
        seen = tally.add(layer.query, layer.key, layer.scale)
        kept = method.rule.choose(seen, layer.key.shape[0])
        num_dense = layer.num_layers // 2 if method.dense_half else method.dense_layers
        is_dense = layer.index < num_dense
        if is_dense or layer.num_tokens < method.min_tokens or bool(kept.all()):
            return View(Everything(), kept, seen)
        return View(Neighbourhood(kept, method.window, method.sinks), kept, seen)


FULL = Sparse(Rule(tau=1.0))
"""Full attention, with probes for the cache that follows."""
