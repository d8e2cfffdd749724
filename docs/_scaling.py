"""Predicted scaling of PPO to 1,024 GPUs: the table of the page, and its plot as an SVG file that is the same everywhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import rlhf_engine
from docs._tables import table
from rlhf_engine.config import RunConfig, load_config
from rlhf_engine.planner.cluster import RankPlan
from rlhf_engine.planner.gpus import GPUS, HOP, LINKS, MEMORY, PRODUCTS, TRANSFERS
from rlhf_engine.recipes.planning import workload_of

CONFIG = Path(rlhf_engine.__path__[0]) / "examples" / "8_gpus.yaml"
MODEL, GPU = "llama-3.1-8b", "h100"
COUNTS = (8, 16, 32, 64, 128, 256, 512, 1024)
STRONG = {"rollout_batch": 4096, "minibatch": 1024}
"""Batch of all GPUs together, for strong scaling."""
WEAK = {"rollout_batch": 64, "minibatch": 16}
"""Batch per GPU, for weak scaling."""
SERIES = {
    "strong, a copy per node": (True, 8),
    "strong, one copy": (True, None),
    "weak, a copy per node": (False, 8),
    "weak, one copy": (False, None),
}


@cache
def plans(name: str) -> Sequence[RankPlan]:
    """Return the plans of a series for all counts of GPUs."""
    strong, shard = SERIES[name]
    workload = workload_of(load_config(CONFIG, kind=RunConfig), MODEL)
    found: list[RankPlan] = []
    for count in COUNTS:
        sizes = STRONG if strong else {key: count * size for key, size in WEAK.items()}
        found.append(RankPlan.of(replace(workload, **sizes), GPU, count, shard))
    return found


def efficiencies(name: str) -> list[float]:
    """Return the efficiency relative to the smallest count of GPUs, which is 1 with perfect scaling."""
    first, *_ = found = plans(name)
    strong, _ = SERIES[name]
    return [first.total / one.total * (COUNTS[0] / one.cluster.gpus if strong else 1) for one in found]


def scaling() -> str:
    """Return seconds of an update and efficiency for every count of GPUs."""
    columns = [plans(name) for name in SERIES], [efficiencies(name) for name in SERIES]
    rows = [
        (f"{count:,}", *(f"{of[place].total:.1f} s, {share[place]:.0%}" for of, share in zip(*columns, strict=True)))
        for place, count in enumerate(COUNTS)
    ]
    return table(("GPUs", *SERIES), rows)


def assumptions() -> str:
    """Return the data sheets and the shares of their speeds that the prediction assumes."""
    rows = [
        (
            name,
            f"{gpu.memory / 1e9:.0f} GB",
            f"{gpu.float32 / 1e12:.0f}, {gpu.half / 1e12:.0f}",
            f"{gpu.bandwidth / 1e12:.2f}",
            f"{gpu.link}, {LINKS[gpu.link] / 1e9:.0f}",
            f"{gpu.network / 1e9:.0f}",
        )
        for name, gpu in GPUS.items()
    ]
    head = (
        *("GPU", "memory", "float32 and bfloat16, 10^12 operations per second", "memory, TB per second"),
        *("link, GB per second", "network of a node, GB per second"),
    )
    shares = (
        f"Of these speeds, {PRODUCTS:.0%} is assumed for products, {MEMORY:.0%} for device memory and {TRANSFERS:.0%} for "
        f"links. A collective operation takes {HOP * 1e6:.0f} microseconds per rank of its group in addition.\n"
    )
    return f"{table(head, rows)}\n{shares}"


# ---- the plot ----

_COLOURS = ("#1f5f8b", "#d1495b")
_WIDTH, _HEIGHT, _LEFT, _TOP, _INNER = 330, 250, 52, 34, (255, 170)


def plot() -> str:
    """Return the plot: seconds of an update in strong scaling, and efficiency in weak scaling."""
    seconds = {name: [one.total for one in plans(name)] for name in SERIES if name.startswith("strong")}
    ideal = [next(iter(seconds.values()))[0] * COUNTS[0] / count for count in COUNTS]
    weak = {name: efficiencies(name) for name in SERIES if name.startswith("weak")}
    low, high = (math.log10(x) for x in (min(ideal), max(ideal)))
    ticks = [10.0**power for power in range(math.ceil(low), math.floor(high) + 1)]

    def of_seconds(value: float) -> float:
        return (math.log10(value) - low) / (high - low)

    left = _panel(0, "strong: seconds of an update", seconds | {"perfect": ideal}, of_seconds, ticks, "{:g}")
    right = _panel(_WIDTH, "weak: efficiency", weak, lambda value: value, [0.0, 0.25, 0.5, 0.75, 1.0], "{:.0%}")
    size = f'width="{2 * _WIDTH}" height="{_HEIGHT}" viewBox="0 0 {2 * _WIDTH} {_HEIGHT}"'
    style = 'font-family="sans-serif" font-size="10"'
    white = f'<rect width="{2 * _WIDTH}" height="{_HEIGHT}" fill="white"/>'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>'
    return "\n".join([head, white, *left, *right, "</svg>", ""])


def _panel(x, title, curves, height, ticks, form) -> list[str]:
    """Return the elements of one panel whose left edge is at `x`; `height` maps a value to [0, 1]."""
    wide, tall = _INNER
    left, bottom = x + _LEFT, _TOP + tall
    places = [left + wide * place / (len(COUNTS) - 1) for place in range(len(COUNTS))]
    found = [f'<text x="{left}" y="14" font-size="11">{title}</text>']
    found.append(f'<path d="M{left} {_TOP}V{bottom}H{left + wide}" fill="none" stroke="black"/>')
    found += [
        f'<text x="{place:.1f}" y="{bottom + 14}" text-anchor="middle">{count}</text>'
        for place, count in zip(places, COUNTS, strict=True)
    ]
    found.append(f'<text x="{left + wide / 2}" y="{bottom + 30}" text-anchor="middle">GPUs</text>')
    for tick in ticks:
        y = bottom - tall * height(tick)
        found.append(f'<path d="M{left} {y:.1f}H{left + wide}" stroke="#dddddd"/>')
        found.append(f'<text x="{left - 5}" y="{y + 3:.1f}" text-anchor="end">{form.format(tick)}</text>')
    for number, (name, values) in enumerate(curves.items()):
        colour, dash = (_COLOURS[number], "") if number < 2 else ("#888888", ' stroke-dasharray="4 3"')
        points = " ".join(
            f"{place:.1f},{bottom - tall * height(value):.1f}" for place, value in zip(places, values, strict=True)
        )
        found.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>')
        label, y = name.partition(", ")[2] or name, bottom - 40 + 13 * number
        found.append(f'<text x="{left + 10}" y="{y}" fill="{colour}">{label}</text>')
    return found
