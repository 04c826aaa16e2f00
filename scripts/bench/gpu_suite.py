"""Everything that needs a GPU, in one call: checks first, then timings.

    python scripts/bench/gpu_suite.py --out DIR
    python scripts/bench/gpu_suite.py --out DIR --dry-run   # the same on a CPU, interpreted

DIR gets a log per part, attention.json, and suite.json: what ran, how it ended, how long it took.
A part that fails does not stop those after it, except that nothing is timed if the checks fail.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

BENCH = Path(__file__).parent
ROOT = BENCH.parents[1]
PART_SECONDS = 420
SANITISED = "test_any_precision_has_a_codec or test_normalised_keys or test_gather_gives"
"""Tests that write pages and blocks and read them back; the sanitizer is slow."""
DRY = "test_any_precision_has_a_codec"


def parts(out: Path, is_dry: bool) -> dict[str, list[str]]:
    """Commands in the order in which they run."""
    python = sys.executable
    tests = [python, "-m", "pytest", "tests/ops", "-p", "no:cacheprovider"]
    attention = [python, str(BENCH / "attention.py"), "--device", "cuda"]
    attention += ["--json", str(out / "attention.json")]
    if is_dry:
        return {"tests": [*tests, "-k", DRY], "attention": [*attention, "--dry-run"]}
    found = {"gpu": ["nvidia-smi"], "tests": tests}
    if sanitizer := shutil.which("compute-sanitizer"):
        found["sanitizer"] = [sanitizer, "--error-exitcode", "9", *tests, "-k", SANITISED]
    return {**found, "attention": attention}


def run(
    name: str, command: list[str], out: Path, environment: dict[str, str], is_dry: bool
) -> dict[str, object]:
    """One part; its output goes to a log, the end of which is printed."""
    print(f"== {name}: {' '.join(command)}", flush=True)
    log, started = out / f"{name}.log", time.monotonic()
    with log.open("w") as file:
        try:
            status = subprocess.run(
                command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=environment,
                timeout=None if is_dry else PART_SECONDS,
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            status = None
    seconds = round(time.monotonic() - started, 1)
    print("\n".join(log.read_text().splitlines()[-15:]))
    return {"command": command, "status": status, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args()
    out, is_dry = arguments.out, arguments.dry_run
    out.mkdir(parents=True, exist_ok=True)
    chosen = {"TRITON_INTERPRET": "1"} if is_dry else {"ZIPVL_TEST_DEVICE": "cuda"}
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | chosen | {"PYTHONPATH": os.pathsep.join(paths)}
    found: dict[str, dict[str, object]] = {}
    for name, command in parts(out, is_dry).items():
        if name == "attention" and found["tests"]["status"] != 0:
            print("== attention: not timed, since the tests failed")
            break
        found[name] = run(name, command, out, environment, is_dry)
        (out / "suite.json").write_text(json.dumps(found, indent=1) + "\n")
    print({name: part["status"] for name, part in found.items()})
    failed = [name for name, part in found.items() if part["status"] != 0]
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
