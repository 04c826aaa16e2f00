"""All methods of the study on pretrained weights by name: a prefill, and a cache."""

from dataclasses import dataclass
from typing import Any

from real_cache import Cache
from real_prefill import FULL, Prefill, Sparse
from real_rules import Rule


@dataclass(frozen=True)
class Method:
    """What attends, and what is attended to afterwards.

    Attributes:
        prefill: How the prompt is computed.
        cache: What is made of its keys and values.
    """

    prefill: Prefill
    cache: Cache = Cache()


TAUS = (0.7, 0.8, 0.9, 0.95, 0.975, 0.99)
PAPER: dict[str, Any] = {"window": 0, "sinks": 0}


def sparse(tau: float = Rule.tau, **settings: Any) -> Method:
    """The package's prefill alone, 16 bits; settings of the rule are given with the prefill's."""
    of_rule = {name: settings.pop(name) for name in list(settings) if hasattr(Rule, name)}
    return Method(Sparse(Rule(tau=tau, **of_rule), **settings))


METHODS: dict[str, Method] = {
    "full": Method(FULL),
    **{f"paper-tau{tau}": sparse(tau, **PAPER) for tau in TAUS},
    **{f"zipvl-tau{tau}": sparse(tau) for tau in TAUS},
    **{f"outside-tau{tau}": sparse(tau, outside=True) for tau in TAUS},
}
