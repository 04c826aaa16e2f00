"""Rules that say which tokens of a context are important, from what its probes saw."""

import math
import zlib
from dataclasses import dataclass

import torch
from real_probes import Seen

from vllm_zipvl.config import ZipVLConfig
from vllm_zipvl.core.selection import num_for_mass, top_mask

ORDERS = ("score", "loudest", "random", "nothing")
SETS = ("layer", "kv_head", "head")


@dataclass(frozen=True)
class Rule:
    """How many tokens a layer keeps, and which.

    Attributes:
        tau: Share of the probes' mass that is to be reached.
        ratio: Fixed share of the tokens, instead.
        outside: Whether what window and sinks hold of the mass counts as reached: the rest is
            chosen by the mass outside of them.
        smooth: Neighbours on either side with which a token's score is averaged.
        order: "score", or "loudest" for as many by the head that sees most of each, or "random" for
            as many, whichever, or "nothing".
        sets: Who shares a set: all heads of a "layer", a "kv_head"'s, or each "head" has its own.
    """

    tau: float = ZipVLConfig.tau
    ratio: float | None = None
    outside: bool = False
    smooth: int = 0
    order: str = "score"
    sets: str = "layer"

    def choose(self, seen: Seen, num_kv_heads: int) -> torch.Tensor:
        """Kept tokens, bool [num_sets, num_tokens]; recent probes are always kept."""
        num_heads, num_tokens = seen.mass.shape
        num_sets = {"layer": 1, "kv_head": num_kv_heads, "head": num_heads}[self.sets]
        if self.order == "nothing":
            return torch.zeros(num_sets, num_tokens, dtype=torch.bool)
        mass, num_visible = seen.mass, seen.num_visible
        if self.outside:
            mass, num_visible = seen.outside, seen.num_outside.clamp(min=1)
        by_head = mass.unflatten(0, (num_sets, -1))
        mass = by_head.sum(1)
        num = self._count(mass, seen.num_probes * num_heads // num_sets)
        if self.order == "loudest":
            return top_mask(by_head.amax(1) / num_visible, num) | seen.is_recent
        return top_mask(self._scores(mass, num_visible), num) | seen.is_recent

    def _count(self, mass: torch.Tensor, total: int) -> torch.Tensor:
        """int64 [num_sets, 1]."""
        num_sets, num_tokens = mass.shape
        if self.ratio is not None:
            return torch.full((num_sets, 1), math.ceil(self.ratio * num_tokens))
        if self.outside and self.tau < 1:
            return num_for_rest(mass, self.tau, total)
        return num_for_mass(mass, self.tau)

    def _scores(self, mass: torch.Tensor, num_visible: torch.Tensor) -> torch.Tensor:
        if self.order == "random":
            seed = zlib.crc32(mass.cpu().numpy().tobytes())
            generator = torch.Generator("cpu").manual_seed(seed)
            return torch.rand(mass.shape, generator=generator, device="cpu").to(mass.device)
        scores = mass / num_visible
        if self.smooth:
            width = 2 * self.smooth + 1
            scores = torch.nn.functional.avg_pool1d(
                scores[None], width, 1, self.smooth, count_include_pad=False
            )[0]
        return scores


def num_for_rest(outside: torch.Tensor, tau: float, total: float) -> torch.Tensor:
    """Fewest tokens, largest first, with which the mass near and theirs reach `tau` of the total.

    Args:
        outside: Mass per token that is not near its query, float32 [num_sets, num_tokens].
        tau: Share to reach.
        total: Mass of a set's probes.

    Returns:
        int64 [num_sets, 1]; 0 where what is near is enough.
    """
    running = outside.sort(-1, descending=True).values.double().cumsum(-1)
    missing = tau * total - (total - running[:, -1:])
    num = (running < missing).sum(-1, keepdim=True) + 1
    return torch.where(missing > 0, num, 0).clamp(max=outside.shape[-1])
