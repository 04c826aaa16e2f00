"""What the kernels wait for: counters that Nsight Compute reads, clocks left as they are.

    python scripts/bench/gpu_counters.py --json OUT.json   # the report lies beside it: OUT.ncu-rep
    TRITON_INTERPRET=1 python scripts/bench/gpu_counters.py --json OUT.json --dry-run

To be falsified is what the instructions of `_attend` let expect, 2.4 for each element that it
dequantises: that it waits for issue slots, not for memory.
"""

import csv
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from gpu_cases import (
    DECODE_TOKENS,
    DRY_ROWS,
    DRY_TOKENS,
    MODELS,
    CompressCase,
    DecodeCase,
    PrefillCase,
    layer_of,
)
from gpu_program import Report, begin, parser_of

SECTIONS = (
    "SpeedOfLight", "SchedulerStats", "WarpStateStats", "MemoryWorkloadAnalysis", "Occupancy",
)  # fmt: skip
KERNELS = "regex:^(fold|_attend|combine|_encode|_column_sums)$"
NUM_ROWS, PROBED_TOKENS = 64, 8192
EXPECTED = "to falsify: _attend issue slots 50 to 70 %, DRAM 60 to 80 %, occupancy 18 %"
METRICS = {
    "us": ("gpu__time_duration.sum", 1e-3),
    "issue": ("smsp__issue_active.avg.per_cycle_active", 100),
    "dram": ("gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed", 1),
    "occupancy": ("sm__warps_active.avg.pct_of_peak_sustained_active", 1),
}
"""By what they are called here: the counter in base units, and a factor."""
STALL = re.compile(r"issue_stalled_(?!selected)(\w+?)_per_issue_active")
NUM_STALLS = 4


class Counters(NamedTuple):
    """Of one launch.

    Attributes:
        kernel: Its name.
        values: Of `METRICS`; what was not read is missing.
        stalls: Reasons for which a warp waits, cycles per issued instruction, the longest first.
    """

    kernel: str
    values: dict[str, float]
    stalls: dict[str, float]

    @property
    def line(self) -> str:
        known = {name: f"{value:.1f}" for name, value in self.values.items()}
        us, issue, dram, occupancy = (known.get(name, "?") for name in METRICS)
        longest = list(self.stalls.items())[:NUM_STALLS]
        waits = ", ".join(f"{name} {cycles:.1f}" for name, cycles in longest)
        return (
            f"{self.kernel:<13} {us:>8} us, issue slots {issue} %, DRAM {dram} %, "
            f"occupancy {occupancy} %; waits: {waits}"
        )


def _number(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def parsed(text: str) -> list[Counters]:
    """Launches in what `ncu --csv --page raw --print-units base` prints."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    found = []
    for row in csv.DictReader(lines[start:]):
        if not (row["ID"] or "").isdigit():
            # The line of units.
            continue
        numbers = {name: number for name, x in row.items() if (number := _number(x)) is not None}
        values = {
            name: factor * numbers[counter]
            for name, (counter, factor) in METRICS.items()
            if counter in numbers
        }
        stalls = {m[1]: x for name, x in numbers.items() if (m := STALL.search(name))}
        stalls = dict(sorted(stalls.items(), key=lambda stall: -stall[1]))
        found.append(Counters(row["Kernel Name"], values, stalls))
    return found


def runs(is_dry: bool) -> Sequence[Callable[[], object]]:
    """Calls that launch the kernels, of the layer with few KV heads."""
    layer = layer_of(MODELS[0], is_dry)
    num_tokens = DRY_TOKENS if is_dry else DECODE_TOKENS
    decode = DecodeCase(layer, DRY_ROWS if is_dry else NUM_ROWS, num_tokens)
    compress = CompressCase(layer, num_tokens)
    prefill = PrefillCase(layer, DRY_TOKENS if is_dry else PROBED_TOKENS)
    return decode.run, compress.run, prefill.probe


def run_once(is_dry: bool) -> None:
    """Launch the kernels; a profiler that waits for it sees the second time alone."""
    calls = runs(is_dry)
    for call in calls:
        call()
    if not is_dry:
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        for call in calls:
            call()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def find_ncu() -> str | None:
    installed = sorted(Path("/opt/nvidia/nsight-compute").glob("*/ncu"))
    return shutil.which("ncu") or (str(installed[-1]) if installed else None)


def read_counters(ncu: str, out: Path) -> list[Counters]:
    """Run this program under Nsight Compute, whose report goes to a file, and read that.

    Raises:
        CalledProcessError: Nsight Compute failed.
    """
    sections = [argument for name in SECTIONS for argument in ("--section", name)]
    own = [sys.executable, __file__, "--once", "--json", str(out)]
    command = [ncu, "--clock-control", "none", "--profile-from-start", "off"]
    command += ["--kernel-name", KERNELS, *sections]
    command += ["--export", str(out.with_suffix("")), "--force-overwrite", *own]
    # Standard output is for the table alone.
    subprocess.run(command, check=True, stdout=sys.stderr)
    report = str(out.with_suffix(".ncu-rep"))
    command = [ncu, "--import", report, "--csv", "--page", "raw", "--print-units", "base"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    out.with_suffix(".csv").write_text(printed)
    return parsed(printed)


def add_counters(report: Report, is_dry: bool) -> None:
    if is_dry:
        run_once(is_dry)
        report.add("a dry run reads no counters")
        return
    ncu = find_ncu()
    if ncu is None:
        raise SystemExit("there is no ncu")
    for found in read_counters(ncu, report.path):
        report.add(found.line, **found._asdict())
    report.add(EXPECTED)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--once", action="store_true", help="only launch the kernels")
    arguments = parser.parse_args()
    report = begin(arguments)
    if arguments.once:
        run_once(arguments.dry_run)
    else:
        add_counters(report, arguments.dry_run)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
