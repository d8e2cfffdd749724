"""Plots of the suite's results: `python -m benchmarks.gpu.plots FOLDER` draws them again from FOLDER/results.json."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.gpu.entries import DRY_RUN, HEAD_PEERS

if TYPE_CHECKING:  # an optional package, and slow to import
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OURS, OTHER, SHADES = "#1f5f8b", "#b0b7bf", ("#9ec3e0", "#4f86b8", "#1f5f8b")
BF16_LOGITS = ("TRL selective_log_softmax", "torch.compile of eager", "log_softmax + gather")
"""Peers that round the logits to bfloat16."""
PHASES = {"collect": "generate", "score": "score", "update": "train"}
"""Name of a phase in the entries of time -> its name in the entries of memory."""


class Bar(NamedTuple):
    """One bar: its name, its value, and whether it is ours."""

    name: str
    value: float
    ours: bool


def plot(folder: Path, steps: list[dict], *, dry_run: bool) -> list[str]:
    """Write the plots and return the names of the PNG files; none if matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        return []
    entries = [entry for step in steps for entry in step["entries"]]
    for name, draw in FIGURES.items():
        figure = draw(entries)
        if dry_run:
            figure.text(0.5, 0.01, DRY_RUN, ha="center", fontsize=7, color="#d1495b")
        figure.savefig(folder / name, dpi=120)
    return list(FIGURES)


def bounds(entries: list[dict]) -> Figure:
    """Draw each value that has a bound as its share of the bound."""
    shares = []
    for entry in entries:
        value, bound = entry["value"], entry.get("bound")
        if bound and isinstance(value, (int, float)) and value > 0:
            share = bound / value if entry.get("at_least") else value / bound
            shares.append(Bar(entry["name"], share, ours=True))
    figure, (axes,) = _figure("measured / bound (at least: bound / measured); 1 is the bound", 1.5 + 0.3 * len(shares))
    _bars(axes, "", shares)
    axes.axvline(1, color="black", linewidth=0.8)
    return figure


def head_peers(entries: list[dict]) -> Figure:
    """Draw time and peak memory of `linear_ppo_loss` and of its peers."""
    found = [entry for entry in entries if entry.get("note", "").startswith("peer") and entry["value"]]
    found.sort(key=lambda entry: entry["value"])
    times, peaks = [], []
    for entry in found:
        name, ours = entry["name"].rpartition(", N=")[0], entry["name"].startswith("ours")
        shown = "linear_ppo_loss" if ours else f"{name} *" if name in BF16_LOGITS else name
        times.append(Bar(shown, entry["value"], ours))
        peak = re.search(r"peak ([\d.]+) GB", entry["note"])
        peaks.append(Bar(shown, float(peak[1]) if peak else 0.0, ours))
    n, h, v = HEAD_PEERS
    title = f"PPO loss from hidden states, forward and backward; N={n} tokens, H={h}, V={v}, bf16"
    figure, (left, right) = _figure(f"{title}{_device(entries)}\n* logits rounded to bf16", 1.6 + 0.3 * len(found), 2)
    _bars(left, "milliseconds", times)
    _bars(right, "peak GB above hidden states and weight, gradients included", peaks, names=False)
    return figure


def ppo_step(entries: list[dict]) -> Figure:
    """Draw time and peak memory of a PPO update of the 1.5B model, ours by phase, and of TRL's trainer."""
    by_name = {entry["name"].removeprefix(MODEL): entry for entry in entries if entry["name"].startswith(MODEL)}
    seconds = [value for phase in PHASES if (value := by_name.get(f"seconds of {phase}", {}).get("value"))]
    trl = by_name.get("seconds of an update, TRL", {})
    peaks = []
    for phase in PHASES.values():
        note = by_name.get(f"planned by measured peak of {phase}, from 1", {}).get("note", "")
        peaks += [
            Bar(f"rlhf_engine, {phase}", float(mb[1]) / 1e3, ours=True) for mb in re.finditer(r"measured (\d+)", note)
        ]
    peaks += [
        Bar("TRL PPOTrainer", float(mb[1]) / 1e3, ours=False) for mb in re.finditer(r"peak (\d+)", trl.get("note", ""))
    ]
    title = "One PPO update, 1.5B parameters (Qwen2.5 shape), 64 x (1024 + 1024) tokens, 4 epochs, bf16"
    figure, (left, right) = _figure(title + _device(entries), 2.4, 2)
    left.set_xlabel("seconds", fontsize=8)
    start = 0.0
    for phase, took, shade in zip(PHASES.values(), seconds, SHADES, strict=False):
        left.barh("rlhf_engine", took, left=start, color=shade, label=f"{phase} {_digits(took)} s")
        start += took
    if seconds:
        _label(left, "rlhf_engine", start, _digits(start))
        left.legend(fontsize=7, loc="upper right", title="rlhf_engine by phase", title_fontsize=7)
    _bars(left, "seconds", [Bar("TRL PPOTrainer", trl["value"], ours=False)] if trl.get("value") else [])
    _bars(right, "peak GB of device memory", peaks)
    return figure


MODEL = "qwen2.5-1.5b: "
FIGURES: dict[str, Callable[[list[dict]], Figure]] = {
    "bounds.png": bounds,
    "linear_ppo_loss.png": head_peers,
    "ppo_step.png": ppo_step,
}


def _figure(title: str, height: float, panels: int = 1) -> tuple[Figure, Sequence[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, height), layout="constrained")
    figure.suptitle(title, fontsize=9)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for one in axes:
        one.tick_params(labelsize=8)
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _bars(axes: Axes, label: str, bars: Sequence[Bar], *, names: bool = True) -> None:
    """Draw horizontal bars from top to bottom with their values; cut off one that is much longer than the others."""
    values = sorted(bar.value for bar in bars)
    longest = values[-1] if values else 1.0
    cut = 1.5 * values[-2] if len(values) > 2 and longest > 4 * values[-2] else longest
    for bar in bars:
        axes.barh(bar.name, min(bar.value, cut), color=OURS if bar.ours else OTHER)
        _label(axes, bar.name, min(bar.value, cut), _digits(bar.value) + " (bar cut off)" * (bar.value > cut))
    axes.set_xlim(0, max(1.25 * cut, axes.get_xlim()[1] if not bars else 0))
    axes.set_xlabel(label, fontsize=8)
    axes.invert_yaxis()
    axes.tick_params(labelleft=names)


def _label(axes: Axes, name: str, end: float, text: str) -> None:
    white = {"facecolor": "white", "edgecolor": "none", "pad": 0.4}
    axes.annotate(text, (end, name), (3, 0), textcoords="offset points", va="center", fontsize=8, bbox=white)


def _device(entries: list[dict]) -> str:
    """Return the device of the run for a title; empty in a dry run."""
    return "".join(f", {entry['value']}" for entry in entries if entry["name"] == "device" and entry["value"])


def _digits(value: float) -> str:
    return f"{value:.1f}" if value >= 100 else f"{value:#.3g}"


def main(folder: Path) -> None:
    results: dict[str, Any] = json.loads((folder / "results.json").read_text())
    print("\n".join(plot(folder, results["steps"], dry_run=results["dry_run"])) or "matplotlib is not installed")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
