"""Rows of a study: written as they come, read again to go on."""

import hashlib
import json
import os
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple

from answers import read_rows

VERSION = 2
"""Raised when the same method would give other figures."""


class Key(NamedTuple):
    """What a row is about."""

    task: str
    tokens: int
    doc: int
    method: str


def key_of(row: dict[str, Any]) -> Key:
    return Key(row["task"], row["tokens"], row["doc"], row["method"])


def settings_of(method: Any) -> Any:
    """What a dataclass holds, but for what is off, so that a new option leaves old rows valid."""
    if not is_dataclass(method):
        return method
    found = {field.name: settings_of(getattr(method, field.name)) for field in fields(method)}
    return type(method).__name__, {name: value for name, value in found.items() if value}


def digest_of(model: str, text: str, method: Any) -> str:
    """Of all that decides a row: digests of model and text, and a method."""
    what = repr((VERSION, model, text, settings_of(method)))
    return hashlib.sha256(what.encode()).hexdigest()[:12]


def read_study(file: Path) -> tuple[list[dict[str, Any]], int]:
    """As `answers.read_rows`, of rows of a study."""
    return read_rows(file, (*Key._fields, "digest"), "rows of a study")


class Rows:
    """A file that grows by a row at a time.

    Args:
        file: Rows that it has already count as done; a part of a row at its end is cut off.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.digests: dict[Key, str] = {}
        if file.exists():
            rows, num_bytes = read_study(file)
            self.digests = {key_of(row): row["digest"] for row in rows}
            os.truncate(file, num_bytes)

    def has(self, key: Key, digest: str) -> bool:
        """Whether a row is there already.

        Raises:
            SystemExit: It is, but was made by other settings, another model or other text.
        """
        found = self.digests.get(key)
        if found not in (None, digest):
            raise SystemExit(
                f"{self.file} has a row of another model, text or other settings for {key.task}, "
                f"{key.tokens} tokens, {key.method}; choose another file"
            )
        return found is not None

    def write(self, row: dict[str, Any]) -> None:
        with self.file.open("a") as out:
            out.write(json.dumps(row) + "\n")
        self.digests[key_of(row)] = row["digest"]
