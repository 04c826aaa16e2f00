"""All methods of the study on pretrained weights by name: a prefill, and a cache."""

from dataclasses import dataclass, fields, replace
from typing import Any

from real_baselines import FastV, VerticalSlash
from real_cache import Cache
from real_prefill import FULL, Prefill, Sparse
from real_rules import Rule


@dataclass(frozen=True)
class Method:
    """What attends, and what is attended to afterwards.

    Attributes:
        prefill: How the prompt is computed.
        cache: What is made of its keys and values.
        whole: Of a method that cuts prompts, the same one that does not.
    """

    prefill: Prefill
    cache: Cache = Cache()
    whole: "Method | None" = None


def sparse(tau: float = Rule.tau, **settings: Any) -> Method:
    """The package's prefill alone, 16 bits; settings of the rule are given with the prefill's."""
    names = {field.name for field in fields(Rule)} & set(settings)
    of_rule = {name: settings.pop(name) for name in names}
    return Method(Sparse(Rule(tau=tau, **of_rule), **settings))


def near(**settings: Any) -> Method:
    """What is varied: the prefill that counts what window and sinks hold, at tau 0.95."""
    return sparse(0.95, outside=True, **settings)


def dense(high_bits: int, low_bits: int, tau: float = Rule.tau, **settings: Any) -> Method:
    """A dense prefill, and a cache at two precisions."""
    return Method(FULL, Cache(high_bits, low_bits, Rule(tau=tau), **settings))


def cut(method: Method, chunk: int) -> Method:
    """The same with prompts in chunks, compared with the whole ones."""
    return replace(method, prefill=replace(method.prefill, chunk=chunk), whole=method)


def both(
    method: Method, tau: float | None = None, first: int = 0, bits: tuple[int, int] = (4, 2)
) -> Method:
    """A prefill and a cache; `tau` is the cache's own share."""
    return replace(method, cache=Cache(*bits, tau and Rule(tau=tau), first))


TAUS = (0.7, 0.8, 0.9, 0.95, 0.975, 0.99)
PAPER: dict[str, Any] = {"window": 0, "sinks": 0}
ALL_PROBE = {"probe_recent": 16, "probe_random": 1 << 20}
RATIOS = (0.2, 0.4, 0.6)
CACHES = {"8": (8, 8), "8/4": (8, 4), "4": (4, 4), "4/2": (4, 2), "4/0": (4, 0), "16/0": (16, 0)}
DEFAULT, AT_90, OUTSIDE = sparse(), sparse(0.9), sparse(0.9, outside=True)

PREFILLS: dict[str, Method] = {
    "full": Method(FULL),
    **{f"paper-tau{tau}": sparse(tau, **PAPER) for tau in TAUS},
    **{f"zipvl-tau{tau}": sparse(tau) for tau in TAUS},
    **{f"outside-tau{tau}": sparse(tau, outside=True) for tau in TAUS},
    **{f"fixed-{ratio}": sparse(ratio=ratio) for ratio in RATIOS},
    **{f"random-{ratio}": sparse(ratio=ratio, order="random") for ratio in RATIOS},
    **{f"window-{window}": near(window=window) for window in (16, 32, 128, 256)},
    **{f"sinks-{sinks}": near(sinks=sinks) for sinks in (0, 16)},
    **{f"probes-{n}+{n}": near(probe_recent=n, probe_random=n) for n in (32, 16)},
    **{f"smooth-{n}": near(smooth=n) for n in (1, 3)},
    **{f"{sets}-sets": near(sets=sets) for sets in ("kv_head", "head")},
    **{f"dense-first-{n}": near(dense_layers=n) for n in (1, 2)},
    "dense-half": near(dense_half=True),
    **{
        f"token-sparse-tau{tau}": sparse(tau, smooth=1, sets="head", dense_half=True, **PAPER)
        for tau in (0.9, 0.975)
    },
    **{f"window-alone-{window}": sparse(order="nothing", window=window) for window in (64, 256)},
    **{f"qk-sparse-{r}": sparse(ratio=r, sets="head", **PAPER, **ALL_PROBE) for r in (0.4, 0.6)},
    **{f"minference-{share}": Method(VerticalSlash(share)) for share in (0.1, 0.2)},
    **{f"fastv-{dropped}": Method(FastV(dropped)) for dropped in (0.25, 0.5)},
}
"""With a 16-bit cache."""

DENSE: dict[str, Method] = {
    **{
        f"cache-{name}-tau{tau}": dense(*bits, tau)
        for tau in (0.99, 0.975, 0.9)
        for name, bits in CACHES.items()
        if bits[0] != bits[1]
    },
    **{f"cache-{name}": dense(*CACHES[name]) for name in ("8", "4")},
    "cache-2": Method(FULL, Cache(4, 2, Rule(order="nothing"))),
    "cache-fp8": Method(FULL, Cache(fp8=True)),
    **{
        f"first-{first}-{name}-tau{tau}": dense(*CACHES[name], tau, first=first)
        for first in (4, 16, 32)
        for name, tau in (("4/2", 0.975), ("4/2", 0.9), ("8/4", 0.9))
    },
    **{f"first-{first}-4": dense(4, 4, first=first) for first in (4, 16, 32)},
}
"""Caches after a dense prefill."""

TOGETHER: dict[str, Method] = {
    "zipvl": both(DEFAULT),
    **{
        f"both-{name}/{tau or 'own'}{f'-first-{first}' * bool(first)}": both(method, tau, first)
        for name, method in {
            "tau0.9": AT_90,
            "tau0.975": DEFAULT,
            "outside0.9": OUTSIDE,
            "outside0.95": near(),
            "outside0.975": sparse(outside=True),
        }.items()
        for tau in (None, 0.975, 0.99)
        for first in (0, 4)
    },
    **{
        f"both-outside0.975/{tau or 'own'}-first-4-{name}": both(
            sparse(outside=True), tau, 4, CACHES[name]
        )
        for tau, name in ((None, "8/4"), (0.9, "8/4"), (None, "4"))
    },
}
"""Prefill and cache."""

CUT: dict[str, Method] = {
    **{f"cut-{chunk}-tau0.975": cut(DEFAULT, chunk) for chunk in (256, 512, 2048)},
    **{f"cut-{chunk}-tau0.9": cut(AT_90, chunk) for chunk in (256, 512, 2048)},
    **{f"cut-{chunk}-outside0.9": cut(OUTSIDE, chunk) for chunk in (256, 512, 2048)},
    **{f"cut-{chunk}-outside0.975": cut(sparse(outside=True), chunk) for chunk in (256, 512)},
    **{f"cut-{chunk}-paper": cut(sparse(**PAPER), chunk) for chunk in (512,)},
    "cut-512-zipvl": cut(both(DEFAULT), 512),
}
"""Whole against cut prompts."""

METHODS: dict[str, Method] = {**PREFILLS, **DENSE, **TOGETHER, **CUT}
