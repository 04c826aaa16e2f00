"""What Nsight Compute prints, read."""

import gpu_counters

HEAD = [
    "ID", "Process ID", "Kernel Name", "dram__bytes_read.sum", "gpu__time_duration.sum",
    "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio",
    "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio",
    "smsp__average_warps_issue_stalled_selected_per_issue_active.ratio",
    "smsp__issue_active.avg.per_cycle_active",
]  # fmt: skip
UNITS = ["", "", "", "byte", "ns", "%", "%", "inst", "inst", "inst", "inst/cycle"]
ATTEND = ["0", "77", "_attend", "1,000", "310,500", "24.5", "18.2", "0.9", "3.14", "1", "0.62"]
COMBINE = ["1", "77", "_combine", "n/a", "20,000", "", "50", "0.1", "0.2", "1", "0.1"]


def printed(*lines: list[str]) -> str:
    rows = [",".join(f'"{cell}"' for cell in line) for line in lines]
    return "\n".join(["==PROF== Connected to process 77", "", *rows]) + "\n"


def test_counters_are_found_by_their_names() -> None:
    attend, combine = gpu_counters.parsed(printed(HEAD, UNITS, ATTEND, COMBINE))
    assert attend.kernel == "_attend"
    assert attend.values == {"us": 310.5, "issue": 62, "dram": 24.5, "occupancy": 18.2}
    assert attend.stalls == {"long_scoreboard": 3.14, "barrier": 0.9}
    assert "310.5 us, issue slots 62.0 %, DRAM 24.5 %, occupancy 18.2 %" in attend.line
    assert attend.line.endswith("waits: long_scoreboard 3.1, barrier 0.9")
    assert "DRAM ? %" in combine.line


def test_a_report_without_launches_is_empty() -> None:
    assert gpu_counters.parsed("==WARNING== No kernels were profiled.\n") == []
