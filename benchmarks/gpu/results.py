"""Results of a run: `results.json`, which is rewritten after every entry, and the `report.md` derived from it."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from benchmarks.gpu.entries import DRY_RUN


class Results:
    """Results so far; every change is on disk before the next step begins."""

    def __init__(self, folder: Path, *, dry_run: bool):
        self.folder = folder
        self.steps: list[dict] = []
        self.header = {
            "dry_run": dry_run,
            "note": DRY_RUN if dry_run else "",
            "started": time.strftime("%Y-%m-%dT%H:%M:%S"),
            "finished": None,
        }
        self.save()

    @property
    def dry_run(self) -> bool:
        return self.header["dry_run"]

    def begin(self, name: str, budget: float) -> None:
        self.steps.append({"name": name, "state": "running", "budget_seconds": round(budget, 1), "entries": []})
        self.save()

    def add(self, entry: dict) -> None:
        self.steps[-1]["entries"].append(entry)
        self.save()

    def end(self, state: str, reason: str, seconds: float) -> None:
        # A dry run omits even the seconds of a step, although they are not a measurement of kernels.
        took = {} if self.dry_run else {"seconds": round(seconds, 1)}
        self.steps[-1].update(state=state, reason=reason, **took)
        self.save()

    def skip(self, name: str, reason: str) -> None:
        self.steps.append({"name": name, "state": "skipped", "reason": reason, "entries": []})
        self.save()

    def finish(self) -> None:
        self.header["finished"] = time.strftime("%Y-%m-%dT%H:%M:%S")
        self.save()

    def save(self) -> None:
        write_whole(self.folder / "results.json", json.dumps(self.header | {"steps": self.steps}, indent=1) + "\n")
        write_whole(self.folder / "report.md", "\n".join(report(self.header, self.steps)) + "\n")

    def value(self, step: str, name: str) -> float | str | None:
        """Return the value of an earlier step's entry; None if there is no such entry."""
        for entry in (entry for found in self.steps if found["name"] == step for entry in found["entries"]):
            if entry["name"] == name:
                return entry["value"]
        return None


def write_whole(path: Path, text: str) -> None:
    """Replace a file atomically, so that a reader sees the old or the new text, also if this process is killed."""
    aside = path.with_suffix(path.suffix + ".part")
    aside.write_text(text)
    os.replace(aside, path)


# ---- report ----


def report(header: dict, steps: list[dict]) -> list[str]:
    lines = ["# GPU suite", ""]
    if header["dry_run"]:
        lines += [f"**{DRY_RUN}**", ""]
    state = f"finished {header['finished']}" if header["finished"] else "not finished: still running, or interrupted"
    lines += [f"Started {header['started']}, {state}.", "", "## Steps", "", "| step | state | |", "|---|---|---|"]
    lines += [f"| {step['name']} | {step['state']} | {step.get('reason', '')} |" for step in steps]
    bounded = [entry for step in steps for entry in step["entries"] if "bound" in entry]
    lines += ["", "## Bounds", "", "| | measured | bound | met |", "|---|---|---|---|"]
    for entry in bounded:
        sign = ">=" if entry.get("at_least") else "<="
        bound = f"{sign} {entry['bound']:g} {entry.get('unit', '')}".strip()
        lines.append(f"| {entry['name']} | {value_of(entry)} | {bound} | {_word(entry['met'])} |")
    for step in steps:
        if step["entries"]:
            lines += ["", f"## {step['name']}", "", "| | | |", "|---|---|---|"]
            lines += [f"| {e['name']} | {value_of(e)} | {_remark(e)} |" for e in step["entries"]]
    return lines


def value_of(entry: dict) -> str:
    """Return the figure with its unit, or the reason why there is none."""
    if entry.get("skipped"):
        return f"skipped: {entry['skipped']}"
    if entry.get("error"):
        return f"error: {entry['error']}"
    value = entry["value"]
    if isinstance(value, (int, float)):
        return f"{value:.4g} {entry.get('unit', '')}".strip()
    if value is None:
        return "ran" if entry["met"] is None else _word(entry["met"])
    return str(value)


def _word(met: bool | None) -> str:
    return {True: "yes", False: "**no**", None: "not measured"}[met]


def _remark(entry: dict) -> str:
    return entry.get("note", "").replace("|", "/")
