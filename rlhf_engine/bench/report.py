"""The record of a run as JSON and as Markdown; both are replaced as a whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
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
    """Yield the tables of a suite and, below them, the reason of each case that was skipped."""
    for key, head, row in TABLES:
        found = [case for case in suite["cases"] if key in case]
        if found:
            yield from table(head, [line for case in found for line in row(case)])
            yield ""
    for case in suite["cases"]:
        if "skipped" in case:
            yield f"{case['name']}, {case['shape']}: skipped, {case['skipped']}."
            yield ""


def _row(case: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    seconds, gate, eager = case["seconds"], case.get("gate"), case.get("eager_seconds")
    best = seconds["least"]
    yield (
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
        f"{gate['eager']:.1e}" if gate and "eager" in gate else "",
    )


def _phases(case: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for name, phase in case["phases"].items():
        yield (
            *(f"{case['name']}: {name}", case["shape"], *_times(phase["seconds"]), "", ""),
            *_peaks(phase),
        )
    rates = f"{case['tokens_per_second']:.0f}", f"{case['mfu']:.2f}"
    yield f"**{case['name']}**", case["shape"], *_times(case["seconds"]), *rates, *_peaks(case)


def _memory(case: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    yield case["name"], case["shape"], case["largest_phase"], *_peaks(case)


def _growth(case: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    points = ", ".join(f"{x:g}: {duration(took)}" for x, took in case["points"])
    yield case["name"], case["shape"], points, f"{case['exponent']:.2f} ± {case['exponent_error']:.2f}"


def _times(seconds: dict[str, float]) -> tuple[str, str, str]:
    quartiles = f"{duration(seconds['low'])} - {duration(seconds['high'])}"
    return duration(seconds["least"]), duration(seconds["median"]), quartiles


def _peaks(case: dict[str, Any]) -> tuple[str, str, str]:
    measured, planned = case["peak_bytes"], case["planned_bytes"]
    return size(measured), size(planned), f"{planned / measured:.2f}" if measured > 0 else ""


TABLES: tuple[tuple[str, tuple[str, ...], Callable[[dict[str, Any]], Iterator[tuple[str, ...]]]], ...] = (
    (
        "limit_seconds",
        ("case", "shape", "backend", "best", "median", "quartiles", "limit / best", "GB/s", "GFLOP/s", "peak",
         "baseline / ours", "error", "eager's"),
        _row,
    ),
    ("phases", ("case", "shape", "best", "median", "quartiles", "tokens/s", "MFU", "peak", "planned", "planned / peak"),
     _phases),
    ("largest_phase", ("case", "shape", "largest phase", "peak", "planned", "planned / peak"), _memory),
    ("exponent", ("case", "shape", "seconds", "exponent"), _growth),
)  # fmt: skip
"""Key that a case of the table has -> head of the table, and its rows per case."""


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
