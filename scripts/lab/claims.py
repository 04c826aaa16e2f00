"""What the paper leads one to expect, shown or refuted by the answers at hand.

Every interval is of 95 %, without a correction for how many claims there are.
"""

import math
from collections.abc import Iterable
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from answers import FULL, ZIPVL, Question, lists_of, mean, percent, table

from vllm_zipvl.config import ZipVLConfig

DETAILED = ("charts", "words")
COLOURFUL = "objects"
MOST_KEPT = 0.55
TAU = ZipVLConfig.tau
Z = 1.96


class Difference(NamedTuple):
    """A difference of two shares with its 95 % interval."""

    value: float
    low: float
    high: float

    def verdict(self, least: float) -> str:
        """Whether the difference is more than that."""
        if self.low > least:
            return "shown"
        return "refuted" if self.high < least else "open"

    def __str__(self) -> str:
        # Adding 0 turns what rounds to -0 into 0.
        value, low, high = (round(100 * x, 1) + 0 for x in self)
        return f"{value:+.1f} points ({low:+.1f} to {high:+.1f})"


def difference(questions: Iterable[Question], method: str, other: str) -> Difference:
    """Accuracy of one method less another's, on the questions that both answered.

    Paired, after Bonett and Price (2012): one question more for either, so that few questions
    without a difference do not pass for proof.
    """
    pairs = [
        (q.is_right(method), q.is_right(other))
        for q in questions
        if method in q.methods and other in q.methods
    ]
    better = sum(own and not others for own, others in pairs)
    worse = sum(others and not own for own, others in pairs)
    n = len(pairs)
    a, b = (better + 1) / (n + 2), (worse + 1) / (n + 2)
    half = Z * math.sqrt((a + b - (a - b) ** 2) / (n + 2))
    return Difference((better - worse) / n if n else math.nan, a - b - half, a - b + half)


def difference_of_means(a: list[float], b: list[float]) -> Difference:
    """Of two separate samples."""
    value = float(np.mean(a) - np.mean(b))
    half = Z * math.sqrt(np.var(a, ddof=1) / len(a) + np.var(b, ddof=1) / len(b))
    return Difference(value, value - half, value + half)


def _adaptive(methods: list[str]) -> list[str]:
    return [name for name in methods if name == ZIPVL or name.startswith(f"{ZIPVL}-tau")]


def _at_share(questions: list[Question], names: list[str], share: float) -> tuple[str, str] | None:
    """The two of several methods whose kept shares lie around one."""
    ordered = sorted(names, key=lambda name: mean(questions, name, "kept"))
    for below, above in pairwise(ordered):
        if mean(questions, below, "kept") <= share <= mean(questions, above, "kept"):
            return below, above
    return None


def _of_full(questions: list[Question]) -> list[list[str]]:
    found = difference(questions, ZIPVL, FULL)
    kept = mean(questions, ZIPVL, "kept")
    return [
        [f"tau {TAU} within 1 point of full attention", str(found), found.verdict(-0.01)],
        [
            f"tau {TAU} keeps at most {percent(MOST_KEPT)} %",
            f"{percent(kept)} % kept",
            "shown" if kept <= MOST_KEPT else "refuted",
        ],
    ]


def _of_pruning(questions: list[Question], methods: list[str], other: str) -> list[str]:
    """Against the adaptive method that keeps most, but no more than the other."""
    most = mean(questions, other, "kept")
    shares = {name: mean(questions, name, "kept") for name in _adaptive(methods)}
    smaller = {name: share for name, share in shares.items() if share <= most}
    if not smaller:
        claim = f"adaptive better than {other} on charts and words at no larger share"
        return [claim, f"no adaptive method keeps as few as {percent(most)} %", "not comparable"]
    name = max(smaller, key=lambda name: smaller[name])
    found = difference(questions, name, other)
    claim = f"{name} better than {other} on charts and words at no larger share"
    measured = f"{found} at {percent(smaller[name])} % against {percent(most)} % kept"
    return [claim, measured, found.verdict(0)]


def _of_adaptation(questions: list[Question]) -> list[list[str]]:
    """Kept shares of either detailed family against those of the colourful one."""

    def shares(family: str) -> list[float]:
        return [float(np.mean(q.methods[ZIPVL]["kept"])) for q in questions if q.family == family]

    rows = []
    for family in DETAILED:
        a, b = shares(family), shares(COLOURFUL)
        if min(len(a), len(b)) < 2:
            continue
        found = difference_of_means(a, b)
        measured = f"{found}: {percent(float(np.mean(a)))} % against {percent(float(np.mean(b)))} %"
        rows.append([f"keeps more on {family} than on {COLOURFUL}", measured, found.verdict(0)])
    return rows


def _of_fixed(questions: list[Question], methods: list[str]) -> list[list[str]]:
    """Fixed shares around an adaptive one, as none is equal to it; the one nearest to half."""
    fixed = [name for name in methods if name.startswith("fixed-")]
    if not fixed:
        return []
    adaptive = min(_adaptive(methods), key=lambda name: abs(mean(questions, name, "kept") - 0.5))
    share = mean(questions, adaptive, "kept")
    around = _at_share(questions, fixed, share)
    if around is None:
        claim = f"{adaptive} better than a fixed share of as many tokens"
        measured = f"no two fixed shares lie around {percent(share)} % kept"
        return [[claim, measured, "not comparable"]]
    rows = []
    for other, least in zip(around, ("smaller", "larger"), strict=True):
        found = difference(questions, adaptive, other)
        kept = percent(mean(questions, other, "kept"))
        claim = f"{adaptive} at {percent(share)} % kept better than the next {least} fixed share"
        rows.append([claim, f"{found} against {other} at {kept} % kept", found.verdict(0)])
    return rows


def _of_bits(lists: list[Question]) -> list[str]:
    found = difference(lists, ZIPVL, "zipvl-16/16")
    bits = f"{ZipVLConfig.high_bits}/{ZipVLConfig.low_bits}"
    return [f"{bits} bits within 1 point of 16 on lists", str(found), found.verdict(-0.01)]


def claims_table(questions: list[Question], methods: list[str]) -> str:
    """Claims about which there are questions, for methods that have answered all of them."""
    rows = []
    detailed = [q for q in questions if q.family in DETAILED]
    lists = lists_of(questions)
    if ZIPVL in methods and FULL in methods:
        rows += _of_full(questions)
    if ZIPVL in methods:
        if detailed:
            others = [name for name in ("fastv", "hired-0.4") if name in methods]
            rows += [_of_pruning(detailed, methods, name) for name in others]
        rows += _of_adaptation(questions)
        rows += _of_fixed(questions, methods)
    if lists and ZIPVL in methods and "zipvl-16/16" in methods:
        rows.append(_of_bits(lists))
    return table(["expected", "measured", "verdict"], rows)
