"""Markdown tables and numbers of three digits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table without the columns that are empty in every row; `|` in a cell is escaped."""
    cells = [[str(cell) for cell in row] for row in rows]
    kept = [column for column in range(len(head)) if any(row[column] for row in cells)]
    lines = [[line[column] for column in kept] for line in (head, ["---"] * len(head), *cells)]
    return "".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |\n" for line in lines)


def digits(value: float, count: int = 3) -> str:
    """Return `value` with `count` significant digits; larger numbers are rounded to integers."""
    if value == 0:
        return "0"
    return f"{value:,.0f}" if abs(value) >= 10**count else f"{value:#.{count}g}".rstrip(".")


def seconds(value: float | None) -> str:
    """Return a time with three digits and its unit: s, ms or us."""
    if value is None:
        return ""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if value * factor >= 1:
            return f"{digits(value * factor)} {unit}"
    return f"{digits(value * 1e6)} us"
