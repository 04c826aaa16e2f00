"""The benchmark of a whole decoder goes through, with the kernels interpreted."""

import json
import os
import subprocess
import sys
from pathlib import Path

from kernels import numba_only

PROGRAM = Path(__file__).parents[2] / "scripts" / "bench" / "whole_model.py"


@numba_only
def test_a_dry_run_checks_the_model_and_gives_every_row(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    command = [sys.executable, PROGRAM, "--dry-run", "--models", "LongVA-7B", "--json", out]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-3000:]
    rows = json.loads(out.read_text())["rows"]
    found = [(row["op"], row["method"]) for row in rows]
    expected = [(op, m) for op in ("first token", "decode") for m in ("dense", "zipvl", "fp8")]
    assert found == expected
    assert not any("absent" in row for row in rows)
