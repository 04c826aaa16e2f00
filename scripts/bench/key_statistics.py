"""Error of keys over a long answer whose statistics were taken from its prompt.

    python scripts/bench/key_statistics.py --json OUT [--markdown] [--quick]

Synthetic keys, rotated by position (NeoX), with a bias on a rotary pair. The prompt is compressed,
then 2,000 decoded tokens, 128 at a time, with the prompt's statistics. Queries hold the content of
four earlier tokens each, and a bias of norm 1 along the keys'. `logits` is the root mean square
error of the logits of compressed tokens, `output` the relative error of the attention output; the
reference is attention in float64. Both are given for the third and for the last hundred tokens.
"""

import argparse
import json
import math
import platform
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from aligned_table import aligned
from key_norms import RULES, WINDOW, Rule

from vllm_zipvl.core.geometry import num_compressible
from vllm_zipvl.core.quantization import through

NUM_KV_HEADS, GROUP = 2, 2
RESIDUAL, BLOCK_SIZE = 32, 16
NUM_DECODED, QUERY_EVERY = 2000, 25
KEPT_SHARE = 0.286
BITS = ((4, 2), (4, 4), (8, 4), (8, 8))
GAIN = 3.0


class Case(NamedTuple):
    """Attention inputs.

    Attributes:
        head_size: Channels.
        theta: Base of the rotary frequencies.
        prompt_len: Tokens of the prompt.
        norm: Of the bias on each of `pairs`.
        pairs: Rotary pairs with a bias.
        prompt: "text", or "repeated" (one token, over and over) or "blank" (no content at all).
    """

    head_size: int
    theta: float
    prompt_len: int
    norm: float
    pairs: tuple[int, ...]
    prompt: str = "text"

    @property
    def wavelength(self) -> float:
        return 2 * math.pi * self.theta ** (2 * self.pairs[0] / self.head_size)


class Sample(NamedTuple):
    """keys, values [num_tokens, num_kv_heads, head_size]; queries [num, num_kv_heads, group, ...].

    Query i is that of the token at `positions[i]`.
    """

    keys: torch.Tensor
    values: torch.Tensor
    queries: torch.Tensor
    positions: torch.Tensor


def rotated(x: torch.Tensor, positions: torch.Tensor, theta: float) -> torch.Tensor:
    """`x` [num_tokens, num_kv_heads, head_size] rotated to positions, halves paired."""
    half = x.shape[-1] // 2
    angles = positions.double()[:, None] / theta ** (torch.arange(half).double() / half)
    cos, sin = angles.cos()[:, None].float(), angles.sin()[:, None].float()
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def sample(case: Case, seed: int = 0) -> Sample:
    generator = torch.Generator().manual_seed(seed)
    head_size, n = case.head_size, case.prompt_len + NUM_DECODED
    shape = (n, NUM_KV_HEADS, head_size)
    content, values = (torch.randn(shape, generator=generator) for _ in range(2))
    if case.prompt != "text":
        content[: case.prompt_len] = content[0] if case.prompt == "repeated" else 0
    direction = torch.zeros(NUM_KV_HEADS, head_size)
    for pair in case.pairs:
        phase = 2 * math.pi * torch.rand(NUM_KV_HEADS, generator=generator)
        direction[:, pair], direction[:, pair + head_size // 2] = phase.cos(), phase.sin()
    content = rotated(content, torch.arange(n), case.theta)
    turning = rotated(direction.expand(shape), torch.arange(n), case.theta)
    positions = torch.arange(case.prompt_len, n, QUERY_EVERY)
    salience = (2 * torch.tanh(2 * torch.randn(n, generator=generator) - 1)).exp()
    queries = []
    for position in positions.tolist():
        weights = salience[: position + 1].expand(NUM_KV_HEADS * GROUP, -1)
        targets = weights.multinomial(4, replacement=True, generator=generator)
        targets = targets.view(NUM_KV_HEADS, GROUP, 4)
        of_targets = content[targets, torch.arange(NUM_KV_HEADS)[:, None, None]].mean(-2)
        queries.append(GAIN * (128 / head_size) ** 0.5 * of_targets + turning[position, :, None])
    return Sample(content + case.norm * turning, values, torch.stack(queries), positions)


def compressions(prompt_len: int, num_tokens: int) -> Iterator[tuple[int, int, int]]:
    """Start and end of what is compressed, and the step after which it is."""
    start = 0
    for step in range(prompt_len, num_tokens):
        end = num_compressible(step, RESIDUAL, BLOCK_SIZE)
        is_due = step == prompt_len or step - start >= WINDOW + RESIDUAL
        if is_due and end > start:
            yield start, end, step
            start = end


def logits(keys: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    return torch.einsum("hgd,nhd->hgn", query, keys) * keys.shape[-1] ** -0.5


def important(inputs: Sample, start: int, end: int, step: int) -> torch.Tensor:
    """The tokens [start, end) with the most attention at `step`."""
    query = inputs.queries[(inputs.positions - step).abs().argmin()]
    mass = logits(inputs.keys[:step], query).softmax(-1).sum((0, 1))[start:end]
    kept = torch.zeros(end - start, dtype=torch.bool)
    kept[mass.topk(math.ceil(KEPT_SHARE * (end - start))).indices] = True
    return kept


def errors(inputs: Sample, prompt_len: int, rule: Rule, bits: tuple[int, int]) -> torch.Tensor:
    """Squared errors of logits and output at each query, [num_queries, 2]."""
    keys, values = inputs.keys, inputs.values
    new_keys, new_values = keys.clone(), values.clone()
    compressed = torch.zeros(len(keys), dtype=torch.long)
    for start, end, step in compressions(prompt_len, len(keys)):
        begun = bool(compressed.any())
        (rule.follow if begun else rule.begin)(keys[start:end])
        kept = important(inputs, start, end, step)
        for mask, width in zip((kept, ~kept), bits, strict=True):
            places = start + mask.nonzero()[:, 0]
            new_keys[places] = rule.store(keys[places], width)
            new_values[places] = through(values[places], width)
        compressed[step + 1 :] = end
    found = []
    for query, position in zip(inputs.queries.double(), inputs.positions.tolist(), strict=True):
        end, cut = position + 1, int(compressed[position])
        exact = logits(keys[:end].double(), query)
        stored = torch.cat([new_keys[:cut], keys[cut:end]]).double()
        given = torch.cat([new_values[:cut], values[cut:end]]).double()
        rough = logits(stored, query)
        output, truth = (
            torch.einsum("hgn,nhd->hgd", scores.softmax(-1), v)
            for scores, v in ((rough, given), (exact, values[:end].double()))
        )
        difference = (rough - exact)[..., :cut]
        of_logits = difference.square().mean() if cut else torch.zeros(())
        found.append([float(of_logits), float((output - truth).norm() / truth.norm()) ** 2])
    return torch.tensor(found)


def cases(quick: bool) -> list[Case]:
    """Biases of 0 to 600, on short and on long waves, after prompts of 1 to 2,000 tokens."""
    found = [Case(128, 1e6, 80, 0, (0,))]
    if quick:
        return [*found, Case(64, 1e4, 16, 300, (20,))]
    found += [Case(128, 1e6, 2000, 0, (0,))]
    found += [Case(128, 1e6, 80, 300, (pair,)) for pair in (2, 16, 24, 32, 40, 60)]
    found += [Case(128, 1e6, prompt_len, 300, (32,)) for prompt_len in (1, 16, 500, 2000)]
    found += [Case(128, 1e6, 80, norm, (32,)) for norm in (30, 100, 600)]
    found += [Case(64, 1e4, prompt_len, 300, (16,)) for prompt_len in (80, 2000)]
    found += [Case(64, 1e4, 1, 600, (24,))]
    found += [Case(128, 1e6, 80, norm, (4, 20, 30, 40, 50)) for norm in (20, 100)]
    ends = product(("repeated", "blank"), (0, 300))
    return found + [Case(128, 1e6, 80, norm, (32,), prompt) for prompt, norm in ends]


def measure(quick: bool) -> Iterator[dict[str, Any]]:
    for case in cases(quick):
        inputs = sample(case)
        for (name, make), bits in product(RULES.items(), BITS):
            found = errors(inputs, case.prompt_len, make(), bits)
            by_hundred = found.view(-1, 100 // QUERY_EVERY, 2).mean(1).sqrt()
            yield case._asdict() | {
                "wavelength": case.wavelength,
                "bits": f"{bits[0]}/{bits[1]}",
                "rule": name,
                "logits": by_hundred[:, 0].tolist(),
                "output": by_hundred[:, 1].tolist(),
            }


def label(row: dict[str, Any]) -> tuple[str, ...]:
    bias = f"{row['norm']:g}" + (f" x{len(row['pairs'])}" if len(row["pairs"]) > 1 else "")
    wavelength = f"{row['wavelength']:.0f}" if row["norm"] and len(row["pairs"]) == 1 else "-"
    prompt = f"{row['prompt_len']} {row['prompt']}"
    return row["bits"], str(row["head_size"]), prompt, bias, wavelength


def table(rows: list[dict[str, Any]], figure: str, markdown: bool) -> str:
    """One line per case and precision, one column per rule: third and last hundred."""
    lines = [["bits", "head_size", "prompt", "bias", "wavelength", *RULES]]
    groups: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        cell = " ".join(f"{row[figure][i]:.3g}" for i in (2, -1))
        groups.setdefault(label(row), []).append(cell)
    lines += [[*names, *cells] for names, cells in sorted(groups.items(), key=first_by_bits(rows))]
    return aligned(lines, markdown)


def first_by_bits(rows: list[dict[str, Any]]) -> Callable[[tuple[tuple[str, ...], Any]], Any]:
    order = list(dict.fromkeys(map(label, rows)))
    by_bits = [f"{high}/{low}" for high, low in BITS]
    return lambda item: (by_bits.index(item[0][0]), order.index(item[0]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, required=True, help="where the rows are written")
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    parser.add_argument("--quick", action="store_true", help="two cases only")
    arguments = parser.parse_args()
    about = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "num_kv_heads": NUM_KV_HEADS,
        "queries_per_kv_head": GROUP,
        "kept_share": KEPT_SHARE,
        "num_decoded": NUM_DECODED,
    }
    print(", ".join(f"{key} {value}" for key, value in about.items()), end="\n\n")
    rows = list(measure(arguments.quick))
    for figure in ("logits", "output"):
        print(f"Error of {figure}, third and last hundred of the decoded tokens:\n")
        print(table(rows, figure, arguments.markdown), end="\n\n")
    arguments.json.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
