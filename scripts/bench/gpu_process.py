"""Runs a part of the GPU suite within its time, and says how it went."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

from gpu_environment import ROOT
from gpu_parts import Part

PROGRESS = re.compile(r"[.sxXFE]+( +\[ *\d+%\])?")
"""A line of pytest's, a letter for each test."""
NUM_ERROR_LINES = 4


class Outcome(NamedTuple):
    """How a part ended.

    Attributes:
        status: Its exit status; None if it was cut.
        seconds: How long it took.
        limit: How long it was given.
        lines: What the table shows of it.
        fails: Whether what it checks may not be trusted.
    """

    status: int | None
    seconds: float
    limit: float | None
    lines: list[str]
    fails: bool

    @property
    def verdict(self) -> str:
        if self.status is None:
            return f"CUT at its limit of {self.limit:.0f} s"
        return "ok" if self.status == 0 else f"FAILED with status {self.status}"


def has_failures(output: str) -> bool:
    """Whether a test failed before pytest was cut."""
    lines = [line for line in output.splitlines() if PROGRESS.fullmatch(line)]
    return any("F" in line or "E" in line for line in lines)


def _shown(part: Part, output: str, errors: str, status: int | None) -> list[str]:
    lines = output.rstrip().splitlines()[-part.num_lines :]
    if status:
        lines += ["! " + line for line in errors.rstrip().splitlines()[-NUM_ERROR_LINES:]]
    return lines


def run(
    name: str, part: Part, out: Path, environment: dict[str, str], limit: float | None
) -> Outcome:
    """Standard output goes to NAME.txt, standard error to NAME.log; a limit of None is none."""
    table, log, started = out / f"{name}.txt", out / f"{name}.log", time.monotonic()
    with (
        table.open("w") as output,
        log.open("w") as errors,
        subprocess.Popen(
            part.command, stdout=output, stderr=errors, cwd=ROOT,
            env=environment | part.environment, process_group=0,
        ) as process,
    ):  # fmt: skip
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            # With its workers, which would hold the GPU's memory.
            os.killpg(process.pid, signal.SIGKILL)
            status = None
    seconds = round(time.monotonic() - started, 1)
    text, errors_text = (path.read_text(errors="replace") for path in (table, log))
    fails = has_failures(text) if status is None else status != 0
    return Outcome(status, seconds, limit, _shown(part, text, errors_text, status), fails)
