"""Figures of a run as PNG files. Every function draws one figure from plain numbers."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from rlhf_engine.evaluate import WinRate
from rlhf_engine.files import with_new_file

_COLOURS = ("#1f5f8b", "#d1495b", "#66a182", "#edae49", "#7a5195")
_STACK = (
    *("#1f4e79", "#4f86b8", "#9ec3e0", "#7a5195", "#b08cc9", "#d9c7e8", "#444444", "#66a182", "#b8d8c3", "#edae49"),
    *("#d1495b", "#f2a3ad", "#8c6d31", "#c9b26b", "#2a9d8f", "#8ed1c8"),
)

PANELS: dict[str, dict[str, dict[str, str]]] = {
    "sft": {
        "loss, nats per token": {"training": "loss", "validation": "validation_loss"},
        "gradient norm": {"gradient norm": "grad_norm"},
        "learning rate": {"learning rate": "lr"},
    },
    "rm": {
        "loss, nats per pair": {"training": "loss", "held out": "validation_loss"},
        "held-out accuracy": {"accuracy": "accuracy"},
        "held-out margin of the better response": {"margin": "margin"},
        "held-out calibration error": {"calibration error": "calibration_error"},
        "gradient norm": {"gradient norm": "grad_norm"},
    },
    "ppo": {
        "score, before scaling and penalties": {"score": "score_mean"},
        "KL to the reference, nats per sequence": {"kl": "kl"},
        "entropy, nats per token": {"entropy": "entropy"},
        "tokens per response": {"length": "response_length"},
        "value: explained variance": {"explained variance": "explained_variance"},
        "clipped share of tokens": {"clipped": "clipfrac"},
        "pretraining loss, nats per token": {"ptx": "ptx_loss"},
        "policy loss": {"policy loss": "policy_loss"},
        "value loss": {"value loss": "value_loss"},
        "gradient norm": {"gradient norm": "grad_norm"},
    },
}
"""Panels of each stage: stage -> panel title -> curve label -> name of the metric."""


def plot_stage(
    rows: Sequence[Mapping[str, Any]], panels: Mapping[str, Mapping[str, str]], path: str | Path, *, x_label: str
) -> None:
    """Plot curves over the steps of `rows`; a metric that is missing or null in a row has no point there."""
    found = {
        title: {
            label: points
            for label, name in curves.items()
            if (points := [(row["step"], row[name]) for row in rows if row.get(name) is not None])
        }
        for title, curves in panels.items()
    }
    plot_curves({title: curves for title, curves in found.items() if curves}, path, x_label=x_label)


def plot_win_rates(rates: Mapping[str, WinRate], baseline: str, path: str | Path) -> None:
    """Plot bars of win rates against one baseline, with 95% intervals and a line at 0.5, which means no difference."""
    figure = Figure(figsize=(7.0, 0.8 + 0.7 * len(rates)), layout="constrained")
    axes = figure.subplots()
    for row, (name, rate) in enumerate(reversed(list(rates.items()))):
        axes.barh(row, rate.rate, color=_COLOURS[0], height=0.6)
        axes.plot([rate.low, rate.high], [row, row], color="black", linewidth=1.5)
        axes.text(rate.high + 0.015, row, f"{rate.rate:.2f}", va="center")
        axes.text(0.01, row, name, va="center", color="white")
    axes.axvline(0.5, color="grey", linestyle="--", linewidth=1)
    axes.set(xlim=(0, 1.08), yticks=[], xlabel=f"win rate against {baseline} (ties count half, 95% interval)")
    _save(figure, path)


def plot_win_rate_lines(
    series: Mapping[str, Sequence[tuple[float, WinRate]]],
    path: str | Path,
    *,
    x_label: str,
    baseline: str,
    log_x: bool = False,
) -> None:
    """Plot win rates of several contestants over a number, such as the model's size, with 95% intervals."""
    figure = Figure(figsize=(6.5, 4.4), layout="constrained")
    axes = figure.subplots()
    for number, (colour, (name, points)) in enumerate(zip(_COLOURS, series.items(), strict=False)):
        xs, rates = zip(*points, strict=True)
        # The series are shifted along x, so that their intervals do not overlap.
        aside = number - (len(series) - 1) / 2
        xs = [x * 1.03**aside if log_x else x + 0.03 * aside for x in xs]
        middle = [rate.rate for rate in rates]
        errors = [[rate.rate - rate.low for rate in rates], [rate.high - rate.rate for rate in rates]]
        axes.errorbar(xs, middle, yerr=errors, color=colour, label=name, marker="o", markersize=4, capsize=3)
    axes.axhline(0.5, color="grey", linestyle="--", linewidth=1)
    ticks = sorted({x for points in series.values() for x, _ in points})
    if log_x:
        axes.set_xscale("log")
        axes.minorticks_off()
    axes.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks])
    axes.set(ylim=(0, 1), xlabel=x_label, ylabel=f"win rate against {baseline}\n(ties count half)")
    axes.grid(alpha=0.25)
    if len(series) > 1:
        axes.legend(frameon=False)
    _save(figure, path)


def plot_trade_off(points: Mapping[str, tuple[float, WinRate]], path: str | Path, *, x_label: str) -> None:
    """Plot one named point per policy: a cost on the x-axis, and the win rate with its 95% interval on the y-axis."""
    figure = Figure(figsize=(6.5, 4.0), layout="constrained")
    axes = figure.subplots()
    for number, (name, (x, rate)) in enumerate(points.items()):
        errors = [[rate.rate - rate.low], [rate.high - rate.rate]]
        colour = _COLOURS[min(number, 2)]
        axes.errorbar([x], [rate.rate], yerr=errors, color=colour, marker="o", markersize=5, capsize=3)
        axes.annotate(name, (x, rate.rate), xytext=(6, 6), textcoords="offset points", fontsize=8)
    axes.axhline(0.5, color="grey", linestyle="--", linewidth=1)
    axes.margins(x=0.2)
    axes.set(xlabel=x_label, ylabel="win rate against SFT (ties count half)")
    axes.grid(alpha=0.25)
    _save(figure, path)


def plot_curves(
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]],
    path: str | Path,
    *,
    x_label: str,
    mark: float | None = None,
) -> None:
    """Plot one panel per title with named curves of (x, y) points; `mark` draws a vertical line in all panels."""
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.0 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, (title, curves) in zip(grid, panels.items(), strict=False):
        for colour, (name, points) in zip(_COLOURS, curves.items(), strict=False):
            xs, ys = zip(*points, strict=True)
            # Mark the single points of a short curve only.
            axes.plot(xs, ys, color=colour, label=name, marker="o" if len(points) <= 12 else None, markersize=4)
        if mark is not None:
            axes.axvline(mark, color="grey", linestyle="--", linewidth=1)
        axes.set(title=title, xlabel=x_label)
        axes.grid(alpha=0.25)
        if len(curves) > 1:
            axes.legend(frameon=False)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    _save(figure, path)


def plot_memory(
    panels: Mapping[str, tuple[Mapping[str, int], Mapping[str, Mapping[str, int]], int | None]], path: str | Path
) -> None:
    """Plot memory as stacked bars in GiB, one panel per title: persistent items, the items of each phase, and a budget line.

    A panel is (persistent item -> bytes, phase -> item -> bytes, budget in bytes or None).
    """
    names = dict.fromkeys(
        name for kept, phases, _ in panels.values() for part in (kept, *phases.values()) for name in part
    )
    colours = {name: _STACK[number % len(_STACK)] for number, name in enumerate(names)}
    figure = Figure(figsize=(1.6 + 2.7 * len(panels), 5.2), layout="constrained")
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, (kept, phases, budget)) in zip(grid, panels.items(), strict=True):
        highest = 0.0
        for place, items in enumerate(phases.values()):
            bottom = 0.0
            for name, count in (*kept.items(), *items.items()):
                axes.bar(
                    place,
                    count / 2**30,
                    bottom=bottom,
                    color=colours[name],
                    width=0.75,
                    edgecolor="white",
                    linewidth=0.4,
                )
                bottom += count / 2**30
            number = axes.text(place, bottom, f"{bottom:.1f}", ha="center", va="bottom", fontsize=8)
            number.set_bbox(
                {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
            )  # hides the budget line below the number
            highest = max(highest, bottom)
        if budget is not None:
            axes.axhline(budget / 2**30, color="black", linestyle="--", linewidth=1)
            highest = max(highest, budget / 2**30)
        axes.set(ylim=(0, 1.08 * highest), xticks=range(len(phases)), xticklabels=list(phases))
        axes.set_title("\n".join(textwrap.wrap(title, 36, break_long_words=False)), fontsize=7.5)
    grid[0].set_ylabel("GiB")
    handles = [Patch(color=colours[name], label=name.replace("_", " ")) for name in names]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    _save(figure, path)


def plot_card(card: Mapping[str, Any], path: str | Path) -> None:
    """Plot a throughput card of `rlhf_engine.bench`: its numbers, seconds per phase, and memory per phase with the budget."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    title = f"PPO with a critic: {card['model']}, {card['parameters'] / 1e9:.3g}e9 weights, {card['device']}"
    figure.suptitle("\n".join([title, *textwrap.wrap(card["workload"], 130)]), fontsize=10)
    text, times, memory = figure.subplots(1, 3, width_ratios=(1.25, 1, 1))
    parts = {name: card[name] for name in ("predicted", "measured") if card[name]}
    text.axis("off")
    rows = [[label, *(shown(part) for part in parts.values())] for label, shown in _CARD.items()]
    cells = text.table(rows, colLabels=["", *parts], loc="center", cellLoc="right", bbox=[0, 0.2, 1, 0.75])
    cells.auto_set_font_size(False)
    cells.set_fontsize(9)
    note = "\n".join(textwrap.wrap(card["note"], 58))
    text.text(0, 0.0, note, fontsize=7.5, va="bottom", transform=text.transAxes)
    for place, part in enumerate(parts.values()):
        bottom = 0.0
        for colour, (name, phase) in zip(_COLOURS, part["phases"].items(), strict=False):
            times.bar(place, phase["seconds"], 0.6, bottom, color=colour, label=name if place == 0 else None)
            bottom += phase["seconds"]
        width = 0.8 / len(parts)
        peaks = [phase["peak_bytes"] / 2**30 for phase in part["phases"].values()]
        places = [x + (place - (len(parts) - 1) / 2) * width for x in range(len(peaks))]
        bars = memory.bar(places, peaks, width, color=_COLOURS[place], label=list(parts)[place])
        memory.bar_label(bars, fmt="%.3g", fontsize=8)
    if card["memory_bytes"]:
        memory.axhline(card["memory_bytes"] / 2**30, color="black", linestyle="--", linewidth=1, label="memory")
    times.set(
        xticks=range(len(parts)), xticklabels=list(parts), xlim=(-0.7, len(parts) - 0.3), title="seconds per update"
    )
    names = list(next(iter(parts.values()))["phases"])
    memory.set(xticks=range(len(names)), xticklabels=names, title="peak by phase, GiB")
    memory.margins(y=0.1)
    for axes in (times, memory):
        axes.legend(frameon=False, fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.08))
    _save(figure, path)


_CARD: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "response tokens/s": lambda part: f"{part['tokens_per_second']:,.0f}",
    "model FLOPs utilisation": lambda part: f"{part['mfu']:.2f}",
    "seconds per update": lambda part: f"{part['seconds']:.3g}",
    "peak, GiB": lambda part: f"{part['peak_bytes'] / 2**30:.3g}",
    "largest batch of one pass": lambda part: "" if part["largest_batch"] is None else str(part["largest_batch"]),
}
"""Numbers of a throughput card: label -> text."""


def plot_calibration(bins: Sequence[tuple[float, float, int]], accuracy: float, path: str | Path) -> None:
    """Plot the reliability of a reward model: the share of responses preferred over the predicted probability."""
    figure = Figure(figsize=(4.2, 4.0), layout="constrained")
    axes = figure.subplots()
    predicted, seen, counts = zip(*bins, strict=True)
    axes.plot([0, 1], [0, 1], color="grey", linestyle="--", linewidth=1)
    axes.plot(predicted, seen, color=_COLOURS[0])
    axes.scatter(predicted, seen, s=[20 + 180 * count / max(counts) for count in counts], color=_COLOURS[0])
    axes.set(
        xlim=(0, 1),
        ylim=(0, 1),
        xlabel="predicted P(first is better)",
        ylabel="share preferred by the labeler",
        title=f"held-out rankings, accuracy {accuracy:.3f}",
    )
    axes.grid(alpha=0.25)
    _save(figure, path)


def plot_histograms(samples: Mapping[str, Sequence[float]], path: str | Path, *, x_label: str) -> None:
    """Plot histograms of one number for several policies over shared bins."""
    figure = Figure(figsize=(6.5, 3.6), layout="constrained")
    axes = figure.subplots()
    weights = [[1.0 / len(values)] * len(values) for values in samples.values()]
    axes.hist(list(samples.values()), bins=20, weights=weights, label=list(samples), color=_COLOURS[: len(samples)])
    axes.set(xlabel=x_label, ylabel="share of responses")
    axes.legend(frameon=False)
    _save(figure, path)


def _save(figure: Figure, path: str | Path) -> None:
    path = Path(path)
    kind = path.suffix.removeprefix(".") or "png"
    with_new_file(path, lambda new: figure.savefig(new, dpi=130, format=kind))
