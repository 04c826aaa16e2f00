"""What the paper leads one to expect, shown or refuted by the answers at hand."""

import math
from collections.abc import Iterable
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from answers import FULL, ZIPVL, Question, by_family, lists_of, mean, percent, table

DETAILED = ("charts", "words")
COLOURFUL = "objects"


class Difference(NamedTuple):
    """Accuracy of one method less another's on the same questions, with its 95 % interval."""

    value: float
    half: float

    def verdict(self, least: float) -> str:
        """Whether the difference is more than that."""
        if self.value - self.half > least:
            return "shown"
        return "refuted" if self.value + self.half < least else "open"

    def __str__(self) -> str:
        low, high = self.value - self.half, self.value + self.half
        return f"{100 * self.value:+.1f} points ({100 * low:+.1f} to {100 * high:+.1f})"


def difference(questions: Iterable[Question], method: str, other: str) -> Difference:
    """Paired, so that questions which both answer alike count for nothing but their number."""
    found = np.array([float(q.is_right(method)) - float(q.is_right(other)) for q in questions])
    return Difference(float(found.mean()), float(1.96 * found.std(ddof=1) / math.sqrt(len(found))))


def _at_share(questions: list[Question], names: list[str], share: float) -> tuple[str, str] | None:
    """The two of several methods whose kept shares lie around one."""
    ordered = sorted(names, key=lambda name: mean(questions, name, "kept"))
    for below, above in pairwise(ordered):
        if mean(questions, below, "kept") <= share <= mean(questions, above, "kept"):
            return below, above
    return None


def _of_full(questions: list[Question]) -> list[str]:
    found = difference(questions, ZIPVL, FULL)
    kept = mean(questions, ZIPVL, "kept")
    verdict = found.verdict(-0.01) if kept <= 0.55 else "refuted"
    claim = "tau 0.975 within 1 point of full attention at no more than 55 % kept"
    return [claim, f"{found} at {percent(kept)} % kept", verdict]


def _of_pruning(questions: list[Question], other: str) -> list[str]:
    detailed = [q for q in questions if q.family in DETAILED]
    found = difference(detailed, ZIPVL, other)
    shares = [mean(detailed, name, "kept") for name in (ZIPVL, other)]
    claim = f"better than {other} on charts and words at no larger share"
    measured = f"{found} at {percent(shares[0])} % against {percent(shares[1])} % kept"
    return [claim, measured, found.verdict(0) if shares[0] <= shares[1] else "not comparable"]


def _of_adaptation(questions: list[Question]) -> list[str]:
    shares = {name: mean(group, ZIPVL, "kept") for name, group in by_family(questions).items()}
    is_shown = all(shares[name] > shares[COLOURFUL] for name in DETAILED)
    names = (*DETAILED, COLOURFUL)
    measured = ", ".join(f"{name} {percent(shares[name])} %" for name in names)
    claim = f"keeps more on charts and words than on {COLOURFUL}"
    return [claim, measured, "shown" if is_shown else "refuted"]


def _of_fixed(questions: list[Question], methods: list[str]) -> list[list[str]]:
    """Against the fixed shares around the adaptive one, as none is equal to it."""
    fixed = [name for name in methods if name.startswith("fixed-")]
    around = _at_share(questions, fixed, mean(questions, ZIPVL, "kept"))
    rows = []
    for other, least in zip(around or (), ("smaller", "larger"), strict=False):
        found = difference(questions, ZIPVL, other)
        kept = percent(mean(questions, other, "kept"))
        claim = f"adaptive better than the next {least} fixed share"
        rows.append([claim, f"{found} against {other} at {kept} % kept", found.verdict(0)])
    return rows


def _of_bits(questions: list[Question]) -> list[str]:
    found = difference(lists_of(questions), ZIPVL, "zipvl-16/16")
    return ["4/2 bits within 1 point of 16 on lists", str(found), found.verdict(-0.01)]


def claims_table(questions: list[Question], methods: list[str]) -> str:
    """Claims for which the methods at hand have answered all questions."""
    rows = []
    if ZIPVL in methods and FULL in methods:
        rows.append(_of_full(questions))
    if ZIPVL in methods:
        rows += [_of_pruning(questions, name) for name in ("fastv", "hired-0.4") if name in methods]
        rows.append(_of_adaptation(questions))
        rows += _of_fixed(questions, methods)
    if ZIPVL in methods and "zipvl-16/16" in methods:
        rows.append(_of_bits(questions))
    return table(["expected", "measured", "verdict"], rows)
