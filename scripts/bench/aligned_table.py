"""Cells as text in columns."""

from collections.abc import Sequence


def aligned(lines: Sequence[Sequence[str]], markdown: bool = False) -> str:
    """Lines of cells, padded to the widest of their column; the first line is the heading."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = list(lines)
    if markdown:
        rows.insert(1, ["-" * width for width in widths])
    left, between, right = ("| ", " | ", " |") if markdown else ("", "  ", "")
    padded = ([c.ljust(w) for c, w in zip(row, widths, strict=True)] for row in rows)
    return "\n".join((left + between.join(cells) + right).rstrip() for cells in padded)
