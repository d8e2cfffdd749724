"""The record of a run as JSON and as Markdown; both are replaced as a whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rlhf_engine.files import json_text
from rlhf_engine.planner.report import size

FORMAT = "rlhf bench 1"


def write(record: dict[str, Any], folder: Path) -> None:
    """Write bench.json and bench.md to an existing folder; a reader sees the old or the new text of a file."""
    for name, text in (("bench.json", json_text(record)), ("bench.md", markdown(record))):
        new = folder / f".{name}.new"
        new.write_text(text, encoding="utf-8")
        new.replace(folder / name)


def markdown(record: dict[str, Any]) -> str:
    """Return the report: the machine, and a table per suite."""
    return "\n".join(_lines(record)) + "\n"


def _lines(record: dict[str, Any]) -> Iterator[str]:
    settings, facts = record["settings"], record["machine"]
    versions = ", ".join(f"{name} {found}" for name, found in facts["versions"].items() if found != "not installed")
    yield "# rlhf bench"
    yield ""
    yield (
        f"{record['device']}, {settings['device']}, {settings['dtype']}, {facts['threads']} threads, effort "
        f"{settings['effort']}, load average {facts['load_average']:.1f} at the start; {versions}."
    )
    yield ""
    state = f"finished {record['finished']}" if record["finished"] else "not finished: still running, or interrupted"
    yield f"Started {record['started']}, {state}."
    if record["stopped"]:
        yield f"\n**Stopped: {record['stopped']}**"
    for name, suite in record["suites"].items():
        yield ""
        yield f"## {name}"
        yield ""
        yield from suite_lines(suite)


def suite_lines(suite: dict[str, Any]) -> Iterator[str]:
    """Yield the table of a suite and, below it, the reason of each case that was skipped."""
    measured = [case for case in suite["cases"] if "seconds" in case]
    if measured:
        yield from table(HEAD, [_row(case) for case in measured])
    for case in suite["cases"]:
        if "skipped" in case:
            yield f"\n{case['name']}, {case['shape']}: skipped, {case['skipped']}."


HEAD = (
    "case", "shape", "backend", "best", "median", "quartiles", "limit / best", "GB/s", "GFLOP/s", "peak", "eager / ours",
    "error", "eager's",
)  # fmt: skip


def _row(case: dict[str, Any]) -> tuple[str, ...]:
    seconds, gate, eager = case["seconds"], case.get("gate"), case.get("eager_seconds")
    best = seconds["least"]
    return (
        case["name"],
        case["shape"],
        case["backend"],
        duration(best),
        duration(seconds["median"]),
        f"{duration(seconds['low'])} - {duration(seconds['high'])}",
        f"{case['limit_seconds'] / best:.2f}",
        f"{case['bytes'] / best / 1e9:.1f}",
        f"{case['flops'] / best / 1e9:.0f}" if case["flops"] else "",
        "" if case.get("peak_bytes") is None else size(case["peak_bytes"]),
        f"{eager['least'] / best:.2f}" if eager else "",
        f"{gate['error']:.1e}" if gate else "",
        f"{gate['eager']:.1e}" if gate else "",
    )


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> Iterator[str]:
    """Yield the lines of a Markdown table."""
    for line in (head, ["---"] * len(head), *rows):
        yield "| " + " | ".join(str(cell).replace("|", "/") for cell in line) + " |"


def duration(seconds: float) -> str:
    """Return a time with three digits and its unit."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:#.3g} {unit}".replace(". ", " ")
    return f"{seconds / 1e-6:#.3g} us".replace(". ", " ")
