"""The paper's tables and figures from what `evaluate.py` wrote.

    python scripts/lab/report.py --json OUT.jsonl [MORE.jsonl ...] --out DIR

Writes DIR/tables.md and PNGs: kept share per layer by task, per task by method, accuracy and kept
share against tau, accuracy against cache bytes. Methods that have not answered all questions are
marked in the tables and left out of the plots.
"""

import argparse
import math
import re
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import tasks
from answers import (
    FULL,
    ZIPVL,
    Question,
    accuracy,
    agreement,
    by_family,
    lists_of,
    mean,
    percent,
    read,
    table,
)
from claims import claims_table, difference

from vllm_zipvl.config import ZipVLConfig

NUM_HEIGHTS = 16
COMPARED = (ZIPVL, "fixed-0.5", "random-0.5", "fastv", "hired-0.4", "minference-0.2")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--families", nargs="+", choices=tasks.CHOICES, default=list(tasks.FAMILIES)
    )
    parser.add_argument("--questions", type=int, default=500, help="planned per family and level")
    parser.add_argument(
        "--compare", nargs=2, action="append", default=[], metavar=("METHOD", "OTHER"),
        help="write how much better one answers than the other, on the same questions",
    )  # fmt: skip
    return parser.parse_args()


def label(questions: list[Question], method: str, num_planned: int) -> str:
    """A method's name, and how far it is if it has not answered everything."""
    num = sum(method in q.methods for q in questions)
    return method if num == num_planned else f"{method} ({num} of {num_planned} questions)"


def methods_table(questions: list[Question], methods: list[str], num_planned: int) -> str:
    families = by_family(questions)
    rows = []
    for method in methods:
        rows.append(
            [
                label(questions, method, num_planned),
                percent(mean(questions, method, "kept")),
                percent(1 - mean(questions, method, "flops")),
                percent(mean(questions, method, "kv_bytes")),
                *(percent(accuracy(group, method).value) for group in families.values()),
                str(accuracy(questions, method)),
                percent(agreement(questions, method, FULL).value),
            ]
        )
    heading = ["method", "kept %", "attention FLOPs cut %", "KV bytes %", *families]
    return table([*heading, "all (95 %)", "as full %"], rows)


def lists_table(questions: list[Question], methods: list[str], num_planned: int) -> str:
    """Accuracy where the cache's precision counts."""
    lists = lists_of(questions)
    rows = [
        [
            label(questions, method, num_planned),
            str(accuracy(lists, method)),
            percent(agreement(lists, method, FULL).value),
        ]
        for method in methods
    ]
    return table(["method", f"accuracy on {len(lists)} lists", "as full %"], rows)


def differences_table(questions: list[Question], pairs: list[list[str]]) -> str:
    """Of two methods each, on the questions that both have answered."""
    lists = lists_of(questions)
    rows = []
    for method, other in pairs:
        both = [q for q in questions if method in q.methods and other in q.methods]
        of_all, of_lists = (str(difference(part, method, other)) for part in (both, lists))
        rows.append([f"{method} over {other}", str(len(both)), of_all, of_lists])
    return table(["compared", "questions", "all", f"{len(lists)} lists"], rows)


def families_table(questions: list[Question], num_planned: int) -> str:
    """Accuracy of full attention by level, with its interval."""
    rows = []
    for family, group in by_family(questions).items():
        levels = [[q for q in group if q.level == level] for level in ("easy", "hard")]
        rows.append([family, *(str(accuracy(part, FULL)) for part in (*levels, group))])
    return table([label(questions, FULL, num_planned), "easy", "hard", "both"], rows)


def plot_layers(questions: list[Question], out: Path) -> None:
    """Kept share per layer by task: the paper's Figure 3."""
    figure, axes = plt.subplots(figsize=(6, 4))
    for family, group in by_family(questions).items():
        shares = np.mean([q.methods[ZIPVL]["kept"] for q in group if ZIPVL in q.methods], axis=0)
        axes.plot(range(len(shares)), 100 * shares, marker="o", label=family)
    axes.set(xlabel="layer", ylabel="kept tokens, %", ylim=(0, 100))
    axes.set_xticks(range(len(shares)))
    axes.legend()
    _save(figure, out)


def plot_tasks(questions: list[Question], methods: list[str], out: Path) -> None:
    """Kept share per task by method: the paper's Figure 4."""
    families = by_family(questions)
    figure, axes = plt.subplots(figsize=(8, 4))
    width = 0.8 / len(methods)
    for i, method in enumerate(methods):
        shares = [100 * mean(group, method, "kept") for group in families.values()]
        places = np.arange(len(families)) + (i - (len(methods) - 1) / 2) * width
        axes.bar(places, shares, width, label=method)
    axes.set_xticks(range(len(families)), list(families))
    axes.set(ylabel="kept tokens, %", ylim=(0, 100))
    axes.legend(ncols=len(methods), fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1))
    _save(figure, out)


def plot_tau(questions: list[Question], methods: list[str], out: Path) -> None:
    """Accuracy and kept share against tau: the paper's Figure 5."""
    taus = [(ZipVLConfig.tau, ZIPVL)] if ZIPVL in methods else []
    for name in methods:
        if match := re.fullmatch(r"zipvl-tau(.*)", name):
            taus.append((float(match[1]), name))
    taus.sort()
    figure, left = plt.subplots(figsize=(6, 4))
    right = left.twinx()
    x = [tau for tau, _ in taus]
    shares = [accuracy(questions, name) for _, name in taus]
    low, high = zip(*(share.interval() for share in shares), strict=True)
    left.fill_between(x, [100 * v for v in low], [100 * v for v in high], alpha=0.2)
    left.plot(x, [100 * share.value for share in shares], marker="o", label="accuracy")
    left.axhline(100 * accuracy(questions, FULL).value, ls=":", color="black", label="full")
    right.plot(x, [100 * mean(questions, n, "kept") for _, n in taus], "s--", color="tab:red")
    left.set(xlabel="tau", ylabel="accuracy, %")
    right.set_ylabel("kept tokens, % (dashed)", color="tab:red")
    left.legend(loc="lower right")
    _save(figure, out)


def plot_bytes(questions: list[Question], methods: list[str], out: Path) -> None:
    """Accuracy on lists against cache bytes, all methods."""
    lists = lists_of(questions)
    figure, axes = plt.subplots(figsize=(9, 6))
    placed = {method: mean(lists, method, "kv_bytes") for method in methods}
    placed = {method: x for method, x in placed.items() if not math.isnan(x)}
    for i, method in enumerate(sorted(placed, key=lambda method: placed[method])):
        x, share = placed[method], accuracy(lists, method)
        low, high = share.interval()
        colour = "tab:red" if method.startswith("zipvl") else "tab:blue"
        axes.plot([100 * x] * 2, [100 * low, 100 * high], color=colour, alpha=0.4)
        axes.plot(100 * x, 100 * share.value, "o", color=colour)
        # Most lie close together: their names hang below them at different heights.
        axes.annotate(
            method, (100 * x, 100 * share.value), fontsize=6, textcoords="offset points",
            xytext=(4, -30 - 11 * (i % NUM_HEIGHTS) if share.value > 0.4 else 12), color=colour,
            arrowprops={"arrowstyle": "-", "lw": 0.4, "color": colour},
        )  # fmt: skip
    axes.set(
        xlim=(None, 110),
        xlabel="KV bytes, % of 16 bit",
        ylabel=f"accuracy on {len(lists)} lists, %",
    )
    _save(figure, out)


def _save(figure: Any, out: Path) -> None:
    figure.tight_layout()
    figure.savefig(out, dpi=120)
    plt.close(figure)


def main() -> None:
    arguments = parse_arguments()
    out = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    questions = [
        q
        for q in read(arguments.json)
        if q.family in arguments.families and q.index < arguments.questions
    ]
    methods = list(dict.fromkeys(name for q in questions for name in q.methods))
    num_planned = 2 * len(arguments.families) * arguments.questions
    parts = [
        families_table(questions, num_planned),
        methods_table(questions, methods, num_planned),
        lists_table(questions, methods, num_planned),
    ]
    whole = [name for name in methods if label(questions, name, num_planned) == name]
    parts.append(claims_table(questions, whole))
    if arguments.compare:
        parts.append(differences_table(questions, arguments.compare))
    (out / "tables.md").write_text("\n\n".join(parts) + "\n")
    print((out / "tables.md").read_text())
    compared = [name for name in COMPARED if name in whole]
    if ZIPVL in whole:
        plot_layers(questions, out / "kept_by_layer.png")
    if compared:
        plot_tasks(questions, compared, out / "kept_by_task.png")
    if FULL in whole and any(name.startswith("zipvl-tau") for name in whole):
        plot_tau(questions, whole, out / "tau.png")
    if lists_of(questions) and whole:
        plot_bytes(questions, whole, out / "kv_bytes.png")


if __name__ == "__main__":
    main()
