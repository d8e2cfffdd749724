"""Results of a run: `results.json`, which is rewritten after every entry, and the `report.md` and plots derived from it."""

from __future__ import annotations

import json
import os
import time
from importlib.util import find_spec
from pathlib import Path

DRY_RUN = "DRY RUN on a CPU, through Triton's interpreter, at tiny shapes: no GPU was used and nothing was measured."


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


# ---- plots ----


def plot(results: Results) -> list[str]:
    """Write the plots and return the names of the PNG files; none if matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        return []
    entries = [entry for step in results.steps for entry in step["entries"]]
    figures = {
        "bounds.png": ("measured / bound (at least: bound / measured); 1 is the bound", _shares(entries)),
        "linear_ppo_loss.png": (
            "linear_ppo_loss forward+backward and its peers, milliseconds",
            {e["name"]: e["value"] for e in entries if e.get("note", "").startswith("peer") and e["value"]},
        ),
    }
    for name, (title, bars) in figures.items():
        _bars(results.folder / name, f"{title}\n{DRY_RUN}" if results.dry_run else title, bars)
    return list(figures)


def _shares(entries: list[dict]) -> dict[str, float]:
    shares = {}
    for entry in entries:
        value, bound = entry["value"], entry.get("bound")
        if bound and isinstance(value, (int, float)) and value > 0:
            shares[entry["name"]] = bound / value if entry.get("at_least") else value / bound
    return shares


def _bars(path: Path, title: str, bars: dict[str, float]) -> None:
    from matplotlib.figure import Figure  # an optional package, and slow to import

    figure = Figure(figsize=(9, 1.5 + 0.3 * len(bars)), layout="constrained")
    axes = figure.subplots()
    axes.barh(list(bars), list(bars.values()))
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.8) if path.name == "bounds.png" else None
    axes.set_title(title, fontsize=8)
    axes.tick_params(labelsize=7)
    figure.savefig(path, dpi=120)
