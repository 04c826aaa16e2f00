"""All methods by name: `--methods` of the evaluation."""

from dataclasses import replace

from decoder import Method
from method_full import full
from method_masks import MaskedPrefill, QKSparse, VerticalSlash
from method_pruning import FastV, HiRED
from method_zipvl import ZipVL, at_random, by_raw_scores, nothing

TAUS = (0.7, 0.8, 0.9, 0.94, 0.96, 0.985, 0.99)
"""Beside the default, 0.975."""
PAPER = {"window": 0, "sinks": 0}
DENSE = {"sparse_prefill": False}
TWO_BITS = {"low_bits": 2}
"""For what the cache does not choose."""
BITS = ((8, 4), (4, 2), (16, 0), (4, 0), (16, 16))
RATIOS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.8)

METHODS: dict[str, Method] = {
    "full": full,
    "zipvl": ZipVL(),
    **{f"zipvl-tau{tau}": ZipVL({"tau": tau}) for tau in TAUS},
    # The paper's rule: what is not kept sees nothing, and no first tokens stay whole.
    **{f"paper-tau{tau}": ZipVL({"tau": tau, **PAPER}) for tau in (*TAUS, 0.975)},
    **{f"window-{window}": ZipVL({"tau": 0.8, "window": window}) for window in (4, 8, 32)},
    **{f"zipvl-{high}/{low}": ZipVL({"high_bits": high, "low_bits": low}) for high, low in BITS},
    # ZipVL, but for the same share in every layer and question.
    **{f"fixed-{ratio}": ZipVL({"ratio": ratio}) for ratio in RATIOS},
    # A dense prefill, and a fixed share of the cache at the high precision (arXiv 2405.14256).
    **{f"zipcache-{r}": ZipVL({"ratio": r, **TWO_BITS, **DENSE}) for r in (0.3, 0.5)},
    **{f"random-{ratio}": ZipVL({"ratio": ratio}, choose=at_random) for ratio in RATIOS},
    **{f"kv{bits}": ZipVL({"high_bits": bits, "low_bits": bits, **DENSE}) for bits in (8, 4)},
    "kv2": ZipVL({**TWO_BITS, **DENSE}, choose=nothing),
    "cache-4/2": ZipVL({**TWO_BITS, **DENSE}),
    "cache-16/0": ZipVL({"high_bits": 16, "low_bits": 0, **DENSE}),
    "fastv": FastV(),
    "fastv-k1": FastV(layer=1),
    **{f"fastv-{dropped}": FastV(dropped=dropped) for dropped in (0.25, 0.75)},
    **{f"hired-{kept}": HiRED(kept) for kept in (0.2, 0.4, 0.6)},
    **{f"qk-sparse-{kept}": MaskedPrefill(QKSparse(kept)) for kept in (0.4, 0.6)},
    **{f"minference-{share}": MaskedPrefill(VerticalSlash(share, share)) for share in (0.1, 0.2)},
    "probes-recent": ZipVL({"probe_recent": 32, "probe_random": 0}),
    "probes-random": ZipVL({"probe_recent": 1, "probe_random": 31}),
    **{
        f"probes-{num}": ZipVL({"probe_recent": num // 2, "probe_random": num // 2})
        for num in (4, 8, 16, 64)
    },
    # Answers are short, so tails are compressed token by token here.
    **{f"interval-{num}": ZipVL({"interval": num}, block_size=1) for num in (1, 2, 4, 8)},
    "raw-scores": ZipVL(choose=by_raw_scores),
    "dense-first-layer": ZipVL(num_dense_layers=1),
    # The recent probes of the default would keep a question's words in any case.
    "text-free": ZipVL({"probe_recent": 2, "probe_random": 30}),
    "text-protected": ZipVL({"probe_recent": 2, "probe_random": 30}, protects_text=True),
    "in-chunks": ZipVL(chunk=64),
    "shared-prefix": ZipVL(shares_prefix=True),
}


def at_package_defaults(method: Method) -> Method:
    """Without the lab's settings, which are for short prompts."""
    return replace(method, base={}) if isinstance(method, ZipVL) else method
