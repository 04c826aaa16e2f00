"""The GPU suite: every occasion goes through on a CPU, and what fails or overruns is named."""

import argparse
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from gpu_environment import ROOT
from gpu_parts import OCCASIONS, Call, Part
from gpu_process import has_failures, run
from gpu_suite import TABLE_CHARACTERS, Suite

PROGRAM = ROOT / "scripts" / "bench" / "gpu_suite.py"
DRY_RUNS = ("A", "B", "C")


@pytest.fixture(scope="module")
def dry_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders that dry runs wrote, side by side."""
    out = {name: tmp_path_factory.mktemp(name) for name in DRY_RUNS}
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    running = {
        name: subprocess.Popen(
            [sys.executable, PROGRAM, name, "--dry-run", "--out", folder],
            env=environment, stdout=subprocess.PIPE, text=True,
        )
        for name, folder in out.items()
    }  # fmt: skip
    for name, process in running.items():
        printed, _ = process.communicate(timeout=900)
        assert process.returncode == 0, printed
        assert printed == (out[name] / "table.txt").read_text()
    return out


def rows(folder: Path, part: str) -> list[dict[str, object]]:
    with zipfile.ZipFile(folder / "suite.zip") as archive:
        return json.loads(archive.read(f"{part}.json"))["rows"]


@pytest.mark.parametrize("occasion", DRY_RUNS)
def test_a_dry_run_goes_through_every_part(dry_runs: dict[str, Path], occasion: str) -> None:
    table = (dry_runs[occasion] / "table.txt").read_text()
    parts = OCCASIONS[occasion].parts(Call(Path(), True, "{}"))
    headlines = [line for line in table.splitlines() if line.startswith("== ")]
    assert [line.split()[1].rstrip(":") for line in headlines] == list(parts)
    assert all(": ok, " in line for line in headlines)
    assert len(table) < 10_000


def test_a_dry_run_gives_every_row(dry_runs: dict[str, Path]) -> None:
    first, tuning, model = (dry_runs[name] for name in DRY_RUNS)
    assert [row["method"] for row in rows(first, "decode")] == ["torch SDPA", "ours 4/2"]
    titles = [str(row["case"]).split(",")[0] for row in rows(first, "profile")]
    assert titles == ["sparse prefill", "compression", "compression"]
    *tried, parts = rows(tuning, "tuning")
    assert all("ms" in row for row in tried) and "kernels" in parts
    found = [(row["op"], row["method"]) for row in rows(model, "model")]
    methods = ("dense", "zipvl", "fp8")
    assert found == [(op, m) for op in ("decode", "first token") for m in methods]
    assert not any("absent" in row for row in rows(model, "model"))


@pytest.mark.parametrize("occasion", OCCASIONS)
def test_budgets_fit_the_occasions_of_four_minutes(occasion: str, tmp_path: Path) -> None:
    seconds, parts = OCCASIONS[occasion]
    budget = sum(part.seconds for part in parts(Call(tmp_path, False, "{}")).values())
    assert budget < seconds or seconds > 240


def python(program: str, seconds: int, **more: bool) -> Part:
    return Part([sys.executable, "-c", program], seconds, **more)


def suite(folder: Path, seconds: float) -> Suite:
    (folder / "work").mkdir()
    arguments = argparse.Namespace(occasion="A", dry_run=False, out=folder, seconds=seconds)
    return Suite(arguments, folder / "work", os.environ | {"ZIPVL_TEST_SEED": "0"})


def test_what_overruns_is_cut_and_named(tmp_path: Path) -> None:
    call = suite(tmp_path, 60)
    slow = "import time; print('half', flush=True); time.sleep(60)"
    call.run({"slow": python(slow, 5), "next": python("print('whole')", 20)})
    assert "== slow: CUT at its limit of 5 s" in call.table
    assert "half\n== next: ok, " in call.table
    assert "whole" in call.table
    assert not call.is_whole


def test_a_table_of_long_lines_fits(tmp_path: Path) -> None:
    call = suite(tmp_path, 60)
    many = "print('\\n'.join(100 * ['first' + 300 * 'x']))"
    call.run({"wide": Part([sys.executable, "-c", many], 20, num_lines=100)})
    assert len(call.table) < TABLE_CHARACTERS
    assert call.table.count("firstxxx") == 100


def test_nothing_starts_without_time(tmp_path: Path) -> None:
    call = suite(tmp_path, 4)
    call.run({"late": python("print('never')", 20)})
    assert "== late: no time left; run it with --only late" in call.table


def test_nothing_is_timed_if_the_gate_fails(tmp_path: Path) -> None:
    call = suite(tmp_path, 60)
    fails = "import sys; print('why not', file=sys.stderr); sys.exit(3)"
    call.run({
        "gate": python(fails, 20, is_gate=True),
        "timed": python("print('never')", 20, is_timing=True),
        "look": python("print('always')", 20),
    })  # fmt: skip
    assert "== gate: FAILED with status 3" in call.table
    assert "! why not\n== timed: not timed, since the gate fails\n== look: ok" in call.table
    assert "never" not in call.table


@pytest.mark.parametrize(("progress", "fails"), [("..s..", False), ("..F..", True)])
def test_a_gate_that_is_cut_fails_only_with_a_test(
    progress: str, fails: bool, tmp_path: Path
) -> None:
    program = f"import time; print('bringing up nodes...\\n{progress}', flush=True); time.sleep(60)"
    outcome = run("gate", python(program, 5), tmp_path, dict(os.environ), 5)
    assert outcome.status is None
    assert outcome.fails == fails


def test_what_pytest_prints_of_failures() -> None:
    assert has_failures("...E.   [ 50%]\n")
    assert not has_failures("...s.x  [ 50%]\nFAILURES are spelt out elsewhere\n")
