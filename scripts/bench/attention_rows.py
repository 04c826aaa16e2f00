"""Rows of `attention.py`: made, and printed as a table."""

from typing import Any

COLUMNS = (
    ("kept", "kept", "{:.3f}"),
    ("stock ms", "baseline_seconds", "{:.3f}"),
    ("ours ms", "seconds", "{:.3f}"),
    ("ratio", "ratio", "{:.2f}x"),
    ("KV bytes", "kv_bytes_ratio", "{:.2f}x"),
    ("probes", "share_of_probes", "{:.1%}"),
    ("of prefill", "share_of_dense_prefill_attention", "{:.1%}"),
    ("of copy", "share_of_copy", "{:.0%}"),
)
FIRST = (("op", 9), ("rows", 5), ("tokens", 8), ("heads", 12), ("method", 21))
"""Columns that every row has, and their widths; the others are `WIDTH` wide."""
WIDTH = 11


def row(
    op: str,
    shape: dict[str, Any],
    method: str,
    seconds: float,
    baseline: str = "",
    baseline_seconds: float | None = None,
    **more: Any,
) -> dict[str, Any]:
    """A figure, and how many times faster it is than the baseline's."""
    found: dict[str, Any] = {"op": op, "shape": shape, "method": method, "seconds": seconds}
    if baseline_seconds is not None:
        found |= {
            "baseline": baseline,
            "baseline_seconds": baseline_seconds,
            "ratio": baseline_seconds / seconds,
        }
    return found | more


def absent(op: str, shape: dict[str, Any], method: str, reason: str) -> dict[str, Any]:
    """Something that is not measured, and why."""
    return {"op": op, "shape": shape, "method": method, "absent": reason}


HEADING = [title for title, _ in FIRST] + [title for title, _, _ in COLUMNS] + [""]


def cells(found: dict[str, Any]) -> list[str]:
    """A row of the table below `HEADING`; what does not apply is left blank."""
    shape = found["shape"]
    heads = "/".join(map(str, shape["heads"]))
    first = [found["op"], shape.get("rows", 1), shape["tokens"], heads, found["method"]]
    texts = [str(cell) for cell in first]
    for _, key, form in COLUMNS:
        factor = 1000 if key.endswith("seconds") else 1
        texts.append(form.format(found[key] * factor) if key in found else "")
    notes = [f"over {name} {ratio:.2f}x" for name, ratio in found.get("speed_up_over", {}).items()]
    if "absent" in found:
        notes = [f"absent: {found['absent']}"]
    return [*texts, ", ".join(notes)]


def line(texts: list[str]) -> str:
    """Cells in columns, so that a table can be printed while it grows."""
    widths = [width for _, width in FIRST] + [WIDTH] * len(COLUMNS)
    padded = [text.rjust(width) for text, width in zip(texts, widths, strict=False)]
    return "".join([*padded, "  ", texts[-1]]).rstrip()
