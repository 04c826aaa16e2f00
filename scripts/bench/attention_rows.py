"""Rows of `attention.py`: made, and printed as a table."""

from typing import Any

COLUMNS = (
    ("kept", "kept", "{:.3f}"),
    ("stock ms", "baseline_seconds", "{:.3f}"),
    ("ours ms", "seconds", "{:.3f}"),
    ("ratio", "ratio", "{:.2f}x"),
    ("KV bytes", "kv_bytes_ratio", "{:.2f}x"),
    ("of prefill", "share_of_dense_prefill_attention", "{:.1%}"),
    ("of copy", "share_of_copy", "{:.0%}"),
)
METHOD_WIDTH = 21


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


def heading() -> str:
    titles = "".join(f"{title:>11}" for title, _, _ in COLUMNS)
    return f"{'op':<9}{'rows':>5}{'tokens':>8}{'heads':>12}{'method':>{METHOD_WIDTH}}{titles}"


def line(found: dict[str, Any]) -> str:
    """A row of the table; what does not apply is left blank."""
    shape = found["shape"]
    heads = "/".join(map(str, shape["heads"]))
    text = f"{found['op']:<9}{shape.get('rows', 1):>5}{shape['tokens']:>8}{heads:>12}"
    text += f"{found['method']:>{METHOD_WIDTH}}"
    if "absent" in found:
        return f"{text}  absent: {found['absent']}"
    for _, key, form in COLUMNS:
        factor = 1000 if key.endswith("seconds") else 1
        text += f"{form.format(found[key] * factor) if key in found else '':>11}"
    if faster := found.get("speed_up_over"):
        text += "  over " + ", ".join(f"{name} {ratio:.2f}x" for name, ratio in faster.items())
    return text
