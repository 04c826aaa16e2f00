"""Error of the attention output under several ways to quantise keys and values.

    python scripts/bench/quantisation.py --json OUT [--markdown]

Synthetic keys, values and queries; the reference is attention in float64 on the same inputs,
and quantised attention is computed in float64 too, so that nothing but the storage differs.
"""

import argparse
import json
import math
import platform
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from aligned_table import aligned
from quantisers import SCHEMES, Scheme

KEPT_SHARE = 0.286
KEPT_MASS = 0.975
NUM_KV_HEADS = 4
GROUP = 4
NUM_PROBES = 32
NUM_QUERIES = 32
INTERVAL = 128
BITS = ((4, 2), (4, 4), (8, 4), (2, 2), (4, 0))
DISTRIBUTIONS = ("gaussian", "outliers", "balanced", "offset", "rope")
HEAD_SIZES = (64, 128)
CONTEXTS = (626, 2900)
SEEDS = (0, 1, 2)


class Sample(NamedTuple):
    """One layer's attention inputs.

    Attributes:
        keys: float32 [num_tokens, num_kv_heads, head_size].
        values: Of the same shape.
        queries: float32 [num_queries, num_kv_heads, group, head_size].
        kept: bool [num_tokens], chosen by the probes' attention.
        mass: Share of the queries' attention that the kept tokens carry.
        truth: float64 [num_queries, num_kv_heads, group, head_size]; the exact output.
    """

    keys: torch.Tensor
    values: torch.Tensor
    queries: torch.Tensor
    kept: torch.Tensor
    mass: float
    truth: torch.Tensor


def _outliers(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """Factors [num_kv_heads, head_size]: 1, but 10 to 30 in four channels of each head."""
    factors = torch.ones(shape)
    for row in factors:
        chosen = torch.randperm(shape[1], generator=generator)[:4]
        row[chosen] = 10 * 3 ** torch.rand(4, generator=generator)
    return factors


def _rope(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Rotate `x` [num_kv_heads, head_size] to `positions`, halves paired, base 10000."""
    half = x.shape[-1] // 2
    angles = positions[:, None] * 10000.0 ** (-torch.arange(half) / half)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    first, second = x[:, :half], x[:, half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def logits(keys: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    """Scaled products [num_queries, num_kv_heads, group, num_tokens]."""
    return torch.einsum("qhgd,nhd->qhgn", queries, keys) * keys.shape[-1] ** -0.5


def attend(keys: torch.Tensor, values: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    return torch.einsum("qhgn,nhd->qhgd", logits(keys, queries).softmax(-1), values)


def kept_mass(scores: torch.Tensor, kept: torch.Tensor) -> float:
    return float(scores[..., kept].sum(-1).mean())


def top(scores: torch.Tensor) -> torch.Tensor:
    """The tokens, as bool [num_tokens], that carry most of the attention, over all heads."""
    mass = scores.sum((0, 1, 2))
    kept = torch.zeros(mass.shape, dtype=torch.bool)
    kept[mass.topk(math.ceil(KEPT_SHARE * mass.numel())).indices] = True
    return kept


def sample(distribution: str, head_size: int, num_tokens: int, seed: int) -> Sample:
    """Draw one layer's attention inputs.

    The content of a key is normal, plus a share of a direction of its head that grows with how
    salient the token is (the same for all heads). A query holds that direction and the content
    of four tokens, salient ones more often. All queries are scaled by the one factor at which
    the kept tokens carry `KEPT_MASS` of the attention.

    - gaussian: no outliers.
    - outliers: four channels of each head, in keys and in values, are 10 to 30 times larger;
      queries are of one scale, so that those channels lead the scores.
    - balanced: the same, but queries are smaller where keys are larger, so that all channels
      feed the scores alike.
    - offset: keys have a constant per channel, normal, but 10 to 30 in four channels, which
      also vary a tenth of that. Values are normal.
    - rope: the same constants, but rotated to each token's position.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (NUM_KV_HEADS, head_size)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator)

    salience = torch.tanh(2 * normal(num_tokens) - 1)
    direction = torch.nn.functional.normalize(normal(*shape), dim=-1)
    content = normal(num_tokens, *shape) + 3 * salience[:, None, None] * direction

    num = NUM_PROBES + NUM_QUERIES
    popularity = (2 * salience).softmax(0).expand(num * NUM_KV_HEADS * GROUP, -1)
    targets = popularity.multinomial(4, generator=generator).view(num, NUM_KV_HEADS, GROUP, 4)
    heads = torch.arange(NUM_KV_HEADS)[None, :, None, None]
    queries = content[targets, heads].mean(-2) / 4 + direction[:, None] + normal(num, 1, 1, 1) / 9

    factors = _outliers(shape, generator)
    values = normal(num_tokens, *shape)
    if distribution == "gaussian":
        keys = content
    elif distribution in ("outliers", "balanced"):
        keys = content * factors
        values = values * _outliers(shape, generator)
        if distribution == "balanced":
            queries = queries / factors[:, None]
    elif distribution in ("offset", "rope"):
        large = factors > 1
        spread = torch.where(large, factors / 10, factors)
        constant = normal(*shape)
        constant = torch.where(large, factors * constant.sign(), constant)
        at = _rope(constant, torch.arange(num_tokens)) if distribution == "rope" else constant
        keys = content * spread + at
    else:
        raise ValueError(f"distribution must be one of {DISTRIBUTIONS}, not {distribution!r}")

    probes, queries = queries[:NUM_PROBES], queries[NUM_PROBES:]
    probe_logits = logits(keys, probes)
    low, high = 0.0, 64.0
    for _ in range(9):
        gain = (low + high) / 2
        scores = (gain * probe_logits).softmax(-1)
        low, high = (gain, high) if kept_mass(scores, top(scores)) < KEPT_MASS else (low, gain)
    kept = top((high * probe_logits).softmax(-1))
    queries = high * queries
    mass = kept_mass(logits(keys, queries).softmax(-1), kept)
    truth = attend(keys.double(), values.double(), queries.double())
    return Sample(keys, values, queries, kept, mass, truth)


def errors(inputs: Sample, scheme: Scheme, bits: Sequence[tuple[int, int]]) -> list[float]:
    """Relative Frobenius error of the attention output, for each pair of `bits`."""
    keys, values, queries, kept, _, truth = inputs
    statistics = scheme.statistics(keys)

    @cache
    def stored(high: bool, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        mask = kept == high
        if width == 0:
            return keys[:0], values[:0]
        return scheme.round_trip(keys[mask], values[mask], statistics, width)

    def error(pair: tuple[int, int]) -> float:
        parts = zip(stored(True, pair[0]), stored(False, pair[1]), strict=True)
        new_keys, new_values = (torch.cat(part) for part in parts)
        output = attend(new_keys, new_values, queries).double()
        return float((output - truth).norm() / truth.norm())

    return [error(pair) for pair in bits]


def measure(
    distribution: str,
    head_size: int,
    num_tokens: int,
    bits: Sequence[tuple[int, int]],
    seeds: Sequence[int] = SEEDS,
) -> list[dict]:
    """One row per scheme and pair of bits, over all seeds."""
    inputs = [sample(distribution, head_size, num_tokens, seed) for seed in seeds]
    mass = sum(one.mass for one in inputs) / len(inputs)
    rows = []
    for name, scheme in SCHEMES.items():
        by_bits = zip(*(errors(one, scheme, bits) for one in inputs), strict=True)
        for pair, values in zip(bits, by_bits, strict=True):
            sizes = (
                scheme.bytes_per_token_head(
                    pair, KEPT_SHARE, head_size, NUM_KV_HEADS, together, is_first
                )
                for together, is_first in ((num_tokens, True), (INTERVAL, False))
            )
            rows.append(
                {
                    "scheme": name,
                    "bits": f"{pair[0]}/{pair[1]}",
                    "distribution": distribution,
                    "head_size": head_size,
                    "num_tokens": num_tokens,
                    "error_mean": sum(values) / len(values),
                    "error_max": max(values),
                    "kept_mass": mass,
                    "bytes_per_token_head": next(sizes),
                    "bytes_per_token_head_interval": next(sizes),
                }
            )
    return rows


def table(
    rows: list[dict], labels: Sequence[str], cell: Callable[[dict], str], markdown: bool
) -> str:
    """Lay rows out by the values of `labels`, one column per scheme."""
    lines = [[*labels, *SCHEMES]]
    groups: dict[tuple, dict[str, str]] = {}
    for row in rows:
        key = tuple(
            f"{row[label]:.3f}" if label == "kept_mass" else str(row[label]) for label in labels
        )
        groups.setdefault(key, {})[row["scheme"]] = cell(row)
    lines += [[*key, *(cells[name] for name in SCHEMES)] for key, cells in groups.items()]
    return aligned(lines, markdown)


def report(rows: list[dict], markdown: bool) -> str:
    """Three tables: errors at 4/2, errors at other precisions, bytes."""
    largest = {"head_size": HEAD_SIZES[-1], "num_tokens": CONTEXTS[-1]}
    main = [row for row in rows if row["bits"] == "4/2"]
    other = [row for row in rows if all(row[key] == value for key, value in largest.items())]
    other = [row for row in other if row["bits"] != "4/2"]
    first = [row for row in main if row["distribution"] == DISTRIBUTIONS[0]]
    where = ("distribution", "head_size", "num_tokens")
    parts = [
        f"Error at 4/2 bits, mean (max) over {len(SEEDS)} seeds:",
        table(
            main,
            (*where, "kept_mass"),
            lambda row: f"{row['error_mean']:.3f} ({row['error_max']:.3f})",
            markdown,
        ),
        f"Error at other precisions, mean, head size {HEAD_SIZES[-1]}, {CONTEXTS[-1]} tokens:",
        table(other, ("distribution", "bits"), lambda row: f"{row['error_mean']:.3f}", markdown),
        "Bytes per token and head at 4/2 bits (in brackets: of the tokens decoded later, "
        f"{INTERVAL} at a time):",
        table(
            first,
            ("head_size", "num_tokens"),
            lambda row: (
                f"{row['bytes_per_token_head']:.1f} ({row['bytes_per_token_head_interval']:.1f})"
            ),
            markdown,
        ),
    ]
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True, help="where the rows are written")
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    arguments = parser.parse_args()
    rows = []
    for distribution in DISTRIBUTIONS:
        for head_size in HEAD_SIZES:
            for num_tokens in CONTEXTS:
                largest = (head_size, num_tokens) == (HEAD_SIZES[-1], CONTEXTS[-1])
                bits = BITS if largest else BITS[:1]
                rows += measure(distribution, head_size, num_tokens, bits)
    about = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "num_kv_heads": NUM_KV_HEADS,
        "queries_per_kv_head": GROUP,
        "kept_share": KEPT_SHARE,
        "num_queries": NUM_QUERIES,
        "seeds": list(SEEDS),
    }
    print(", ".join(f"{key} {value}" for key, value in about.items()), end="\n\n")
    print(report(rows, arguments.markdown))
    arguments.json.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
