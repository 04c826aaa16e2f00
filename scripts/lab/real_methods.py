"""All methods of the study on pretrained weights by name: a prefill, and a cache."""

from dataclasses import dataclass, fields, replace
from typing import Any

from real_baselines import FastV, VerticalSlash
from real_cache import BLOCK_SIZE, Cache
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
    return Method(Sparse(Rule(**{"tau": tau, "outside": True, **of_rule}), **settings))


def all_mass(tau: float = Rule.tau, **settings: Any) -> Method:
    """The same, but the count goes by all mass, near or far."""
    return sparse(tau, outside=False, **settings)


def paper(tau: float = Rule.tau, **settings: Any) -> Method:
    """No neighbourhood: a token that is not kept sees nothing."""
    return all_mass(tau, window=0, sinks=0, **settings)


def near(**settings: Any) -> Method:
    """What is varied, at a tau where differences show."""
    return sparse(0.95, **settings)


def dense(high_bits: int, low_bits: int, tau: float = Rule.tau, **settings: Any) -> Method:
    """A dense prefill, and a cache at two precisions."""
    return Method(FULL, Cache(high_bits, low_bits, Rule(tau=tau), **settings))


def cut(method: Method, chunk: int) -> Method:
    """The same with prompts in chunks, compared with the whole ones."""
    return replace(method, prefill=replace(method.prefill, chunk=chunk), whole=method)


def both(
    method: Method, tau: float | None = None, head: int = 0, bits: tuple[int, int] = (4, 2)
) -> Method:
    """A prefill and a cache; `tau` is the cache's own share."""
    return replace(method, cache=Cache(*bits, tau and Rule(tau=tau), head))


TAUS = (0.7, 0.8, 0.9, 0.95, 0.975, 0.99)
RATIOS = (0.2, 0.4, 0.6)
ALL_PROBE = {"probe_recent": 16, "probe_random": 1 << 20}
HEADS = (4, 16, 32)
CHUNKS = (256, 512, 2048)
CACHES = {"8": (8, 8), "8/4": (8, 4), "4": (4, 4), "4/2": (4, 2), "4/0": (4, 0), "16/0": (16, 0)}

PREFILLS: dict[str, Method] = {
    "full": Method(FULL),
    **{f"paper-tau{tau}": paper(tau) for tau in TAUS},
    **{f"zipvl-tau{tau}": sparse(tau) for tau in (*TAUS, 0.985, 0.995)},
    **{f"all-mass-tau{tau}": all_mass(tau) for tau in TAUS},
    **{f"fixed-{ratio}": all_mass(ratio=ratio) for ratio in RATIOS},
    **{f"random-{ratio}": all_mass(ratio=ratio, order="random") for ratio in RATIOS},
    **{f"window-{window}": near(window=window) for window in (16, 32, 128, 256)},
    **{f"sinks-{sinks}": near(sinks=sinks) for sinks in (0, 16)},
    **{f"probes-{n}+{n}": near(probe_recent=n, probe_random=n) for n in (32, 16)},
    **{f"smooth-{n}": near(smooth=n) for n in (1, 3)},
    **{f"{sets}-sets": near(sets=sets) for sets in ("kv_head", "head")},
    **{f"dense-first-{n}": near(dense_layers=n) for n in (1, 2)},
    "dense-half": near(dense_half=True),
    **{f"window-{window}-tau0.975": sparse(window=window) for window in (32, 128)},
    **{
        f"probes-{recent}+{others}-tau0.975": sparse(probe_recent=recent, probe_random=others)
        for recent, others in ((32, 32), (64, 192), (128, 128))
    },
    "smooth-1-tau0.975": sparse(smooth=1),
    "loudest-tau0.975": sparse(order="loudest"),
    **{f"recent-x{weight}-tau0.975": sparse(recent_again=weight - 1) for weight in (3, 8)},
    "recent-x3-tau0.985": sparse(0.985, recent_again=2),
    "kv_head-sets-tau0.975": sparse(sets="kv_head"),
    "dense-first-2-tau0.975": sparse(dense_layers=2),
    **{
        f"token-sparse-tau{tau}": paper(tau, smooth=1, sets="head", dense_half=True)
        for tau in (0.9, 0.975)
    },
    **{f"window-alone-{window}": all_mass(order="nothing", window=window) for window in (64, 256)},
    **{f"qk-sparse-{r}": paper(ratio=r, sets="head", **ALL_PROBE) for r in (0.4, 0.6)},
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
        f"head-{head}-{name}-tau{tau}": dense(*CACHES[name], tau, head=head)
        for head in HEADS
        for tau in (0.99, 0.975, 0.9)
        for name in ("4/2", "8/4")
    },
    **{f"head-{head}-4": dense(4, 4, head=head) for head in HEADS},
}
"""Caches after a dense prefill."""

BASES = {
    **{f"{tau}": sparse(tau) for tau in (0.9, 0.95, 0.975)},
    **{f"all-mass-{tau}": all_mass(tau) for tau in (0.9, 0.975)},
}
DEFAULT = both(sparse(), Rule.tau, BLOCK_SIZE)
TOGETHER: dict[str, Method] = {
    "zipvl": DEFAULT,
    **{
        f"both-{name}/{tau or 'own'}{f'-head-{head}' * bool(head)}": both(method, tau, head)
        for name, method in BASES.items()
        for tau in (None, 0.975, 0.99)
        for head in (0, BLOCK_SIZE)
    },
    **{
        f"zipvl-{name}": replace(
            DEFAULT, cache=replace(DEFAULT.cache, high_bits=high, low_bits=low)
        )
        for name, (high, low) in CACHES.items()
        if name != "4/2"
    },
    **{
        f"zipvl-4-{name}": both(method, head=BLOCK_SIZE, bits=(4, 4))
        for name, method in {
            **{f"tau{tau}": sparse(tau) for tau in (0.9, 0.95, 0.985, 0.99)},
            "all-mass-tau0.975": all_mass(),
        }.items()
    },
}
"""Prefill and cache, by the tau of either; "own" is what the prefill kept."""

CUT: dict[str, Method] = {
    **{f"cut-{chunk}-{tau}": cut(sparse(tau), chunk) for tau in (0.9, 0.975) for chunk in CHUNKS},
    **{f"cut-{chunk}-all-mass-0.975": cut(all_mass(), chunk) for chunk in CHUNKS},
    "cut-512-paper": cut(paper(), 512),
    "cut-512-zipvl": cut(DEFAULT, 512),
}
"""Whole against cut prompts."""

METHODS: dict[str, Method] = {**PREFILLS, **DENSE, **TOGETHER, **CUT}
