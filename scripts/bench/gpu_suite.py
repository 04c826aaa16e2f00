"""What needs a GPU, cut into occasions of a few minutes, for one that is rented by the minute.

    python scripts/bench/gpu_suite.py A --out DIR [--vllm DIR] [--only PART ...]
    python scripts/bench/gpu_suite.py A --out DIR --dry-run   # the same on a CPU, interpreted

- A, 240 s: name and copy rate of the card; registers and spills; the gate, tests of the kernels at
  the shapes that serve; decode replayed from CUDA graphs against dense attention, its kernels
  apart; Nsight Compute's counters; a profile of sparse prefill and of compression.
- B, 240 s: ways to launch the decode kernel, each checked before it is timed; an fp8 cache; prefill
  from 4K to 128K tokens.
- C, 200 s: a decoder of a 7B model's shape, decode, then prefill of 16K and 32K tokens.
- decode, 100 s: the gate of decode attention alone, then ways to launch it.
- checks, tables, engine, 570 s each: all tests of the operations, and the sanitizer; one layer at
  all sizes and both models; the real engine's tests and serving figures.

A table comes last, and is DIR/table.txt; DIR/suite.zip, written anew after each part, gets a table
and a log per part, the programs' rows, and suite.json: what ran, how it ended, how long it took. A
part has a budget, and what earlier parts left over. What would overrun is cut, and the table says
so; a further call with `--only` repeats it. A part that fails does not stop those after it, except
that nothing is timed if the gate fails. A gate that is cut before a test failed stops nothing, as
all programs check what they time. Tests draw other inputs in every call, from a seed that is
printed. Neither vLLM nor this package need be installed: `--vllm` names a folder that vLLM's CUDA
wheels were extracted into, of which FlashAttention alone is enough for the baseline of A, B and C.
"""

import argparse
import importlib.util
import json
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

from gpu_environment import environment, write_metadata
from gpu_parts import OCCASIONS, Call, Part, Parts
from gpu_process import Outcome, run

RESERVE = 4
"""Seconds for the table and what ends with the programs."""
TABLE_CHARACTERS, WIDTHS = 11_000, (180, 130, 90)
"""What a table may have, and how wide its lines are: as wide as fits."""


class Suite:
    """One call: parts that run one after another, and what the table says of them."""

    def __init__(self, arguments: argparse.Namespace, out: Path, variables: dict[str, str]) -> None:
        self.is_dry, self.target, self.out = arguments.dry_run, arguments.out, out
        self.variables = variables
        self.started = time.monotonic()
        self.seconds = arguments.seconds or OCCASIONS[arguments.occasion].seconds
        self.title = f"occasion {arguments.occasion}, test seed {variables['ZIPVL_TEST_SEED']}"
        self.outcomes: dict[str, Outcome | str] = {}
        self._gate_fails = False

    def run(self, parts: Parts) -> None:
        budget = 0
        for name, part in parts.items():
            budget += part.seconds
            end = min(budget, self.seconds - RESERVE)
            limit = None if self.is_dry else self.started + end - time.monotonic()
            self.outcomes[name] = self._run_part(name, part, limit)
            print(f"{name}: {self._headline(name)}", file=sys.stderr, flush=True)
            self._save(parts)

    def _run_part(self, name: str, part: Part, limit: float | None) -> Outcome | str:
        if part.is_timing and self._gate_fails:
            return "not timed, since the gate fails"
        if limit is not None and limit <= 0:
            return f"no time left; run it with --only {name}"
        outcome = run(name, part, self.out, self._environment(part), limit)
        self._gate_fails |= part.is_gate and outcome.fails
        return outcome

    def _environment(self, part: Part) -> dict[str, str]:
        if not self.is_dry:
            return self.variables | {"ZIPVL_TEST_DEVICE": "cuda"}
        return self.variables if part.needs_vllm else self.variables | {"TRITON_INTERPRET": "1"}

    def _headline(self, name: str) -> str:
        outcome = self.outcomes[name]
        if isinstance(outcome, str):
            return outcome
        return f"{outcome.verdict}, {outcome.seconds:.0f} s"

    @property
    def table(self) -> str:
        tables = ["".join(line[:width] + "\n" for line in self._lines()) for width in WIDTHS]
        return next((table for table in tables if len(table) <= TABLE_CHARACTERS), tables[-1])

    def _lines(self) -> list[str]:
        taken = time.monotonic() - self.started
        lines = [f"==== {self.title}: {taken:.0f} s of {self.seconds:.0f} ===="]
        for name, outcome in self.outcomes.items():
            lines.append(f"== {name}: {self._headline(name)}")
            lines += [] if isinstance(outcome, str) else outcome.lines
        return lines

    def _save(self, parts: Parts) -> None:
        found = {
            name: {"command": parts[name].command, "outcome": outcome}
            if isinstance(outcome, str)
            else {"command": parts[name].command, **outcome._asdict()}
            for name, outcome in self.outcomes.items()
        }
        about = {"title": self.title, "parts": found}
        (self.out / "suite.json").write_text(json.dumps(about, indent=1) + "\n")
        (self.target / "table.txt").write_text(self.table)
        shutil.make_archive(str(self.target / "suite"), "zip", self.out)

    @property
    def is_whole(self) -> bool:
        """Whether every part ran to its end."""
        return all(not isinstance(o, str) and o.status == 0 for o in self.outcomes.values())


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("occasion", choices=OCCASIONS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--vllm", type=Path, metavar="DIR", help="extracted CUDA vLLM")
    parser.add_argument("--only", nargs="+", metavar="PART", help="parts of the occasion")
    parser.add_argument("--engine", default="{}", help="more arguments of vllm.LLM, JSON")
    parser.add_argument("--seconds", type=float, help="instead of the occasion's")
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args()
    if arguments.vllm and not (arguments.vllm / "vllm").is_dir():
        parser.error(f"--vllm {arguments.vllm}: there is no vllm in it")
    return arguments


def chosen(arguments: argparse.Namespace, call: Call) -> Parts:
    """The parts that are asked for, or all that can run."""
    found = OCCASIONS[arguments.occasion].parts(call)
    if arguments.only is None:
        has_vllm = arguments.vllm is not None or importlib.util.find_spec("vllm") is not None
        return {name: part for name, part in found.items() if has_vllm or not part.needs_vllm}
    if unknown := set(arguments.only) - set(found):
        raise SystemExit(f"--only {' '.join(unknown)}: choose from {' '.join(found)}")
    return {name: part for name, part in found.items() if name in arguments.only}


def main() -> None:
    arguments = parse_arguments()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as metadata, tempfile.TemporaryDirectory() as folder:
        write_metadata(Path(metadata))
        variables = environment(Path(metadata), arguments.vllm)
        variables.setdefault("ZIPVL_TEST_SEED", str(random.randrange(1000)))
        suite = Suite(arguments, Path(folder), variables)
        parts = chosen(arguments, Call(Path(folder), arguments.dry_run, arguments.engine))
        suite.run(parts)
    # As it was saved: the seconds it names go on.
    print((arguments.out / "table.txt").read_text(), end="")
    sys.exit(0 if suite.is_whole else 1)


if __name__ == "__main__":
    main()
