"""Rows of results, and the text that shows them."""

import os
import platform
from collections.abc import Sequence
from typing import Any

from aligned_table import aligned

Row = dict[str, Any]
COLUMNS = ("op", "shape", "method", "measured", "stock", "ratio", "kept", "KV bytes")


def count_row(
    op: str, shape: str, method: str, value: float, baseline: float, better: str, **extra: Any
) -> Row:
    """A figure beside stock's; `better` is "higher" or "lower"."""
    above, below = (value, baseline) if better == "higher" else (baseline, value)
    ratio = 1.0 if above == below else above / below if below else None
    return {
        "op": op,
        "shape": shape,
        "method": method,
        "value": value,
        "baseline": "stock",
        "baseline_value": baseline,
        "ratio": ratio,
    } | extra


def time_row(
    op: str, shape: str, method: str, seconds: float, baseline: float, **extra: Any
) -> Row:
    """A time beside stock's."""
    return {
        "op": op,
        "shape": shape,
        "method": method,
        "seconds": seconds,
        "baseline": "stock",
        "baseline_seconds": baseline,
        "ratio": baseline / seconds,
    } | extra


def kept_share(compressed: dict[str, Any]) -> float | None:
    """Share of prompt tokens kept at high precision, mean over layers; None for stock."""
    if not compressed or not compressed["prompt_tokens"]:
        return None
    kept = compressed["kept_tokens"]
    return sum(kept) / len(kept) / compressed["prompt_tokens"]


def about(versions: dict[str, str]) -> dict[str, Any]:
    return {
        "device": f"{_processor()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        **versions,
        "load_average_at_start": round(os.getloadavg()[0], 1),
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor()


def table(rows: Sequence[Row]) -> str:
    """Rows as aligned text; an op and a shape that repeat are left out."""
    lines = [COLUMNS]
    previous: Row = {}
    for row in rows:
        same_op = row["op"] == previous.get("op")
        same_shape = same_op and row["shape"] == previous.get("shape")
        op, shape = "" if same_op else row["op"], "" if same_shape else row["shape"]
        lines.append((op, shape, row["method"], *_figures(row)))
        previous = row
    return aligned(lines)


def _figures(row: Row) -> tuple[str, ...]:
    if "seconds" in row:
        measured, stock = (_seconds(row[key]) for key in ("seconds", "baseline_seconds"))
    else:
        measured, stock = (f"{row[key]:.4g}" for key in ("value", "baseline_value"))
    rest = (_share(row.get(key)) for key in ("ratio", "kept", "kv_bytes_ratio"))
    return measured, stock, *rest


def _seconds(seconds: float) -> str:
    return f"{seconds:.3f} s" if seconds >= 1 else f"{1000 * seconds:.3f} ms"


def _share(share: float | None) -> str:
    return "-" if share is None else f"{share:.3f}"
