"""What `evaluate.py` wrote, read and summed up."""

import json
import math
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from questions import normal

FULL, ZIPVL = "full", "zipvl"


class Question(NamedTuple):
    """A question of the test set with all answers to it.

    Attributes:
        family: One of the tasks'.
        level: Easy or hard.
        index: Which of that family and level.
        text: What was asked.
        expected: The answer in its normal form.
        num_tokens: Of the expected answer.
        methods: What each method answered, and its figures.
    """

    family: str
    level: str
    index: int
    text: str
    expected: str
    num_tokens: int
    methods: dict[str, dict[str, Any]]

    def is_right(self, method: str) -> bool:
        return self.methods[method]["answer"] == self.expected


def read_rows(
    file: Path, needed: Iterable[str] = ("methods",), what: str = "answers"
) -> tuple[list[dict[str, Any]], int]:
    """The whole lines of a file of rows, and how many bytes these are.

    Args:
        file: What `evaluate.py` or `real.py` wrote.
        needed: What every row has.
        what: The rows are, for messages.

    Raises:
        SystemExit: It has other lines, or cannot be read.
    """
    try:
        text = file.read_bytes()
    except OSError as error:
        raise SystemExit(f"{file}: {error.strerror}") from error
    num_bytes = text.rfind(b"\n") + 1
    # An interruption leaves a part of a row.
    if num_bytes < len(text) and not text[num_bytes:].startswith(b'{"'):
        raise SystemExit(f"{file} is no file of {what}; choose another one")
    rows = []
    for number, line in enumerate(text[:num_bytes].splitlines(), start=1):
        try:
            row = json.loads(line)
            is_row = isinstance(row, dict) and row.keys() >= set(needed)
        except ValueError:
            is_row = False
        if not is_row:
            raise SystemExit(f"{file}, line {number}: no {what}")
        rows.append(row)
    return rows, num_bytes


def read(files: Iterable[Path]) -> list[Question]:
    """All rows, those of one question put together.

    Raises:
        SystemExit: They are of several models, or of several versions of the tasks; a file has
            other lines.
    """
    found: dict[tuple[str, str, int], Question] = {}
    models = set()
    for file in files:
        for row in read_rows(file)[0]:
            key = (row["family"], row["level"], row["index"])
            for outcome in row["methods"].values():
                outcome["answer"] = normal(outcome["answer"])
            asked = (row["question"], normal(row["expected"]), row["expected_tokens"])
            question = found.setdefault(key, Question(*key, *asked, {}))
            if (question.text, question.expected, question.num_tokens) != asked:
                raise SystemExit(f"{file}: other rows ask {question.text!r} as {key}, not {asked}")
            question.methods.update(row["methods"])
            models.add(row["model"])
    if len(models) > 1:
        raise SystemExit(f"the rows are of {len(models)} models; give those of one")
    return list(found.values())


class Share(NamedTuple):
    """A share of n questions; NaN of none."""

    value: float
    n: int

    def interval(self) -> tuple[float, float]:
        """95 %, after Wilson (1927)."""
        if self.n == 0:
            return math.nan, math.nan
        z, p, n = 1.96, self.value, self.n
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return middle - half, middle + half

    def __str__(self) -> str:
        if self.n == 0:
            return ""
        low, high = self.interval()
        return f"{100 * self.value:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def accuracy(questions: Iterable[Question], method: str) -> Share:
    return _share(q.is_right(method) for q in questions if method in q.methods)


def agreement(questions: Iterable[Question], method: str, other: str) -> Share:
    return _share(
        q.methods[method]["answer"] == q.methods[other]["answer"]
        for q in questions
        if method in q.methods and other in q.methods
    )


def _share(outcomes: Iterable[bool]) -> Share:
    found = list(outcomes)
    return Share(sum(found) / len(found) if found else math.nan, len(found))


def mean(questions: Iterable[Question], method: str, figure: str) -> float:
    values = [
        float(np.mean(q.methods[method][figure]))
        for q in questions
        if figure in q.methods.get(method, {})
    ]
    return float(np.mean(values)) if values else math.nan


def by_family(questions: list[Question]) -> dict[str, list[Question]]:
    groups = defaultdict(list)
    for question in questions:
        groups[question.family].append(question)
    return dict(groups)


def percent(share: float) -> str:
    return "" if math.isnan(share) else f"{100 * share:.1f}"


def table(heading: list[str], rows: list[list[str]]) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def lists_of(questions: list[Question]) -> list[Question]:
    """Questions whose answer is read from the compressed cache, from its third token on."""
    return [q for q in questions if q.num_tokens > 2]
