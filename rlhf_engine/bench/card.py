"""A throughput card: what PPO with a critic does with a model on a device, predicted by the planner and measured."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rlhf_engine.bench.machine import device_name
from rlhf_engine.bench.run import EFFORTS, Log, Run, Settings
from rlhf_engine.bench.shapes import DTYPES, fields_of
from rlhf_engine.bench.trainer import Fields, make_trainer, make_workload
from rlhf_engine.bench.updates import measured_updates
from rlhf_engine.config import RunConfig, load_config
from rlhf_engine.files import write_json
from rlhf_engine.planner import MemoryPlan
from rlhf_engine.planner.gpus import GPUS
from rlhf_engine.planner.report import size, workload_words
from rlhf_engine.planner.strategies import Strategy, fitting_or_smallest
from rlhf_engine.planner.work import model_flops, phase_seconds, product_rate
from rlhf_engine.plots import plot_card

FORMAT = "rlhf card 1"
RESERVE = 0.95
"""Share of a device's memory that the plan may use: it does not count what an allocator loses."""
MOST_ROWS = 1024
"""Most sequences in one pass that are considered."""
UPDATES = 3


def known_gpu(name: str) -> str:
    """Return the key of `GPUS` that is part of a device's name; empty if none is."""
    words = re.findall(r"[a-z0-9]+", name.lower())
    return next((key for key in GPUS if key in words), "")


def strategy_for(fields: Fields, gpu: str | None, memory: int, overrides: Sequence[str]) -> Strategy:
    """Return the fastest settings that fit `memory` bytes, by the planner.

    `gpu` is a key of `GPUS`, empty for an unknown GPU, or None for a CPU.

    Raises:
        ValueError: no settings fit.
    """
    lengths = () if gpu is None else ("rollout.max_prompt_tokens=1024", "rollout.max_response_tokens=1024")
    dtype = () if gpu is None else ("dtype=bfloat16",)
    config = load_config(None, [*dtype, *lengths, *overrides], kind=RunConfig)
    kind = "cpu" if gpu is None else "cuda"
    workload = replace(make_workload(fields, config), device=kind, gpu=gpu or "", budget=int(RESERVE * memory))
    found, least = fitting_or_smallest(workload)
    if not found:
        raise ValueError(
            f"no settings that were tried fit {size(memory)}; the smallest peak is {size(least.plan.peak)} with {least.words}"
        )
    return found[0]


def predicted(plan: MemoryPlan) -> dict[str, Any]:
    """Return the planner's numbers; the context of a GPU counts in the peak."""
    w, seconds = plan.workload, phase_seconds(plan.workload)
    total = sum(seconds.values())
    wide = MemoryPlan.of(replace(w, minibatch=max(w.minibatch, MOST_ROWS)))
    return {
        "seconds": total,
        "tokens_per_second": w.rollout_batch * w.response / total,
        "mfu": model_flops(w) / total / product_rate(w),
        "peak_bytes": plan.peak,
        "largest_batch": wide.largest_microbatch(),
        "phases": {
            name: {"seconds": seconds[name], "peak_bytes": plan.kept + plan.phases[name].total} for name in seconds
        },
    }


def measured(fields: Fields, settings: dict[str, Any], device: torch.device, largest: int, log: Log) -> dict[str, Any]:
    """Run updates and return their numbers; on a GPU also the most sequences of one pass, near the planned `largest`."""
    dtype = DTYPES[settings["dtype"]]
    run = Run(Settings((), device, dtype, EFFORTS["quick"]), Path(), log)
    last: dict[str, Any] = {}
    for number, last in enumerate(measured_updates(run, fields, settings, UPDATES)):
        log(f"update {number + 1} of {UPDATES}: {last['samples'][-1]:.2f} s")
    phases = {
        name: {"seconds": phase["seconds"]["least"], "peak_bytes": phase["peak_bytes"]}
        for name, phase in last["phases"].items()
    }
    numbers = {name: last[name] for name in ("tokens_per_second", "mfu", "peak_bytes")}
    batch = largest_batch(fields, settings, largest) if device.type == "cuda" else None
    return numbers | {"seconds": last["seconds"]["least"], "largest_batch": batch, "phases": phases}


def largest_batch(fields: Fields, settings: dict[str, Any], planned: int) -> int:
    """Return the most sequences of one pass with which an update runs, in steps of a tenth from the planned number."""

    def runs(rows: int) -> bool:
        ppo = settings["ppo"] | {"rollout_batch": rows, "minibatch": rows, "microbatch": rows, "ppo_epochs": 1}
        try:
            make_trainer(fields, settings | {"ppo": ppo | {"microbatch_tokens": None}}).step()
        except torch.OutOfMemoryError:
            return False
        finally:
            torch.cuda.empty_cache()
        return True

    rows = max(1, planned)
    if runs(rows):
        while rows < MOST_ROWS and runs(larger := rows + max(1, rows // 10)):
            rows = larger
        return rows
    while rows > 1:
        rows -= max(1, rows // 10)
        if runs(rows):
            return rows
    return 0


def make_card(
    model: str,
    device: torch.device | None,
    gpu: str | None,
    memory: int,
    overrides: Sequence[str],
    folder: Path,
    log: Log,
) -> dict[str, Any]:
    """Write card.json and card.png to `folder` and return the card; without a `device`, it has the prediction only.

    Raises:
        ValueError: an unknown model, or no settings fit the memory.
    """
    fields = fields_of(model)
    chosen = strategy_for(fields, gpu, memory, overrides)
    plan, w = chosen.plan, chosen.plan.workload
    card: dict[str, Any] = {
        "format": FORMAT,
        "model": model,
        "parameters": w.policy.parameters,
        "device": f"{gpu}, {size(memory)}" if device is None else device_name(device),
        "memory_bytes": memory,
        "workload": workload_words(w).partition(", ")[2],
        "changes": chosen.words,
        "predicted": predicted(plan),
        "measured": None,
        "note": "",
    }
    if device is None:
        card["note"] = (
            "Not measured: this machine does not have the device. Half of the data sheet's product rate is assumed, and "
            "utilisation is of the whole."
        )
    elif w.quant != "none":
        card["note"] = "Not measured: quantised weights are read from a folder, and these are random."
    else:
        card["measured"] = measured(fields, chosen.settings(), device, card["predicted"]["largest_batch"], log)
        card["note"] = "Measured utilisation is of the matrix rate of the same run."
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "card.json", card)
    plot_card(card, folder / "card.png")
    return card
