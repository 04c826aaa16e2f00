"""Tables of what `real.py` wrote, with 95 % intervals over stretches.

    python scripts/lab/real_report.py --json OUT.jsonl [MORE.jsonl ...] [--methods NAME ...]
        [--against NAME]

A table per task and length; how much the loss rises is against full attention on the same
stretches. A method that has not been measured on as many stretches as full
attention says on how many.
"""

import argparse
import math
from collections import defaultdict
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from answers import Share
from real_methods import METHODS
from real_rows import key_of, read_study

SHARES = {"kept": "kept %", "pairs": "pairs %", "kv_bytes": "KV bytes %"}
"""Means without an interval."""

FIGURES = {"rise": "loss rises by", "kl": "KL", "same": "same %", "kl_whole": "KL to whole"}
DIGITS = {"rise": 3, "kl": 4, "same": 1, "kl_whole": 4}
FULL = "full"

Row = dict[str, Any]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, nargs="+", required=True)
    parser.add_argument("--methods", nargs="+", help="of these alone, in this order")
    parser.add_argument("--against", help="a method: KL as a multiple of its, stretch by stretch")
    return parser.parse_args()


def quantile(freedom: int) -> float:
    """97.5 % of Student's t: from 5 degrees on by Abramowitz and Stegun, 26.7.5, within 0.2 %."""
    if freedom < 5:
        return (12.706, 4.303, 3.182, 2.776)[freedom - 1]
    z = NormalDist().inv_cdf(0.975)
    powers = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(power / freedom ** (i + 1) for i, power in enumerate(powers))


def interval(values: list[float], digits: int) -> str:
    """Mean and half the width of its 95 % interval."""
    mean = f"{np.mean(values):.{digits}f}"
    if len(values) < 2:
        return mean
    half = quantile(len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))
    return f"{mean} ± {half:.{digits}f}"


def ratio(rows: dict[int, Row], others: dict[int, Row]) -> str:
    """Geometric mean of the KL as a multiple of another's, with the ends of its 95 % interval."""
    both = [(row["kl"], others[doc]["kl"]) for doc, row in rows.items() if doc in others]
    logs = [math.log(kl / other) for kl, other in both if kl > 0 and other > 0]
    if len(logs) < 2:
        return ""
    half = quantile(len(logs) - 1) * np.std(logs, ddof=1) / math.sqrt(len(logs))
    mean, low, high = (math.exp(np.mean(logs) + shift) for shift in (0, -half, half))
    return f"{mean:.2f} ({low:.2f} to {high:.2f})"


def groups(rows: list[Row]) -> dict[tuple[str, int], dict[str, dict[int, Row]]]:
    """By task and length, then by method, then by stretch."""
    found: dict = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        key = key_of(row)
        found[key.task, key.tokens][key.method][key.doc] = row
    for methods in found.values():
        for row in [row for some in methods.values() for row in some.values()]:
            full = methods.get(FULL, {}).get(row["doc"])
            if full is not None:
                row["rise"] = row["loss"] - full["loss"]
    return {place: dict(methods) for place, methods in sorted(found.items())}


def aligned(heading: list[str], lines: list[list[str]]) -> str:
    """A table of Markdown, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(heading, *lines, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    found = []
    for line in (heading, rule, *lines):
        cells = [line[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        found.append(f"| {' | '.join(cells)} |")
    return "\n".join(found)


def cells(rows: list[Row], name: str, digits: int) -> str:
    """A figure's cell; empty where the method has none."""
    factor = 100 if name == "same" else 1
    values = [factor * row[name] for row in rows if name in row]
    return interval(values, digits) if values else ""


def line(method: str, rows: list[Row], num_full: int, with_right: bool) -> list[str]:
    name = method if len(rows) == num_full else f"{method} ({len(rows)})"
    found = [name]
    found += [f"{100 * np.mean([row[share] for row in rows]):.1f}" for share in SHARES]
    found += [cells(rows, figure, DIGITS[figure]) for figure in FIGURES]
    if with_right:
        found.append(str(Share(float(np.mean([row["right"] for row in rows])), len(rows))))
    return found


def table(
    task: str, methods: dict[str, dict[int, Row]], wanted: list[str] | None, against: str | None
) -> str:
    """Of one task and length."""
    names = [name for name in wanted or [*METHODS, *methods] if name in methods]
    with_right = task == "facts"
    heading = ["method", *SHARES.values(), *FIGURES.values(), *(["right %"] * with_right)]
    heading += [f"KL / {against}'s"] * bool(against)
    num_full = len(methods.get(FULL, {})) or max(map(len, methods.values()))
    lines = []
    for name in dict.fromkeys(names):
        lines.append(line(name, list(methods[name].values()), num_full, with_right))
        if against:
            lines[-1].append(ratio(methods[name], methods.get(against, {})))
    # Columns that no method has a figure for say nothing.
    some = [i for i in range(len(heading)) if any(cells[i] for cells in lines)]
    return aligned([heading[i] for i in some], [[cells[i] for i in some] for cells in lines])


def report(files: list[Path], wanted: list[str] | None = None, against: str | None = None) -> str:
    """All tables."""
    rows = [row for file in files for row in read_study(file)[0]]
    parts = []
    for (task, tokens), methods in groups(rows).items():
        num = max(map(len, methods.values()))
        heading = f"{task}, {tokens:,} tokens, {num} stretches"
        losses = [row["loss"] for row in methods.get(FULL, {}).values()]
        if losses:
            heading += f" (loss {np.mean(losses):.3f} with full attention)"
        parts.append(f"{heading}\n\n{table(task, methods, wanted, against)}")
    return "\n\n".join(parts)


def main() -> None:
    arguments = parse_arguments()
    print(report(arguments.json, arguments.methods, arguments.against))


if __name__ == "__main__":
    main()
