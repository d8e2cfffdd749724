"""`rlhf plan`: predicted memory of a PPO run."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rlhf_engine.cli.options import SetOption, quiet, read_config
from rlhf_engine.notices import notice

if TYPE_CHECKING:
    from rlhf_engine.planner import MemoryPlan, Workload
    from rlhf_engine.planner.cluster import RankPlan


def plan(
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="YAML file. Default: the default values.")
    ] = None,
    overrides: SetOption = None,
    model: Annotated[
        str | None, typer.Option(help="Folder with a config.json, or the name of a size such as qwen2.5-7b.")
    ] = None,
    gpu_memory: Annotated[
        list[str] | None,
        typer.Option(
            "--gpu-memory", help="Memory of a GPU to plan for instead of memory.budget, such as 24GiB; repeatable."
        ),
    ] = None,
    gpus: Annotated[
        int | None, typer.Option("--gpus", help="Also print bytes, traffic and seconds per rank on this many GPUs.")
    ] = None,
    gpu: Annotated[
        str, typer.Option("--gpu", help="GPU of --gpus: a100, h100, h200, l4 or 4090, by its data sheet.")
    ] = "h100",
    shard: Annotated[
        int | None,
        typer.Option(
            "--shard",
            help="Ranks that share one copy of the weights. Default: as in `distributed`, or all, or 1 with adapters.",
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for plan.json and plan.png.")] = None,
) -> None:
    """Print the bytes of every item in every phase of `rlhf ppo`, whether they fit, and settings that fit. Needs no GPU."""
    quiet()
    from rlhf_engine.config.memory import byte_count
    from rlhf_engine.distributed.placement import Placement
    from rlhf_engine.planner import MemoryPlan
    from rlhf_engine.planner.cluster import RankPlan
    from rlhf_engine.planner.report import items_table, ranks_words, size, strategies_words, verdict, workload_words
    from rlhf_engine.recipes.planning import workload_of

    if output is not None and output.exists() and not output.is_dir():
        raise ValueError(f"--output: {output} is a file; give a folder for plan.json and plan.png")
    for text in gpu_memory or []:
        if re.search(r"\d\s*GB$", text.strip(), re.IGNORECASE):
            found = size(byte_count(text, "--gpu-memory"))
            notice(f"--gpu-memory {text} is {found}; nvidia-smi prints what a card has, in MiB")
    if gpus is None and shard is not None:
        raise ValueError("--shard is set, but --gpus is not; give the number of GPUs")
    if gpus is not None and gpu_memory:
        raise ValueError("--gpu-memory and --gpus are both set; name a GPU with --gpu, which has its memory")
    settings = read_config(config, overrides)
    workload = workload_of(settings, model)
    if gpus is not None and gpus > 0 and shard is None:
        parts = bool(settings.adapter.rank) or settings.model.train_layers is not None
        shard = Placement.planned(settings, gpus, parts=parts).shard
    ranks = None if gpus is None else RankPlan.of(workload, gpu, gpus, shard)
    if ranks is not None:
        typer.echo(ranks_words(ranks))
        if output is not None:
            _write_ranks(output, ranks)
        return
    workloads = [
        replace(workload, device="cuda", budget=byte_count(text, "--gpu-memory")) for text in gpu_memory or []
    ] or [workload]
    whole = MemoryPlan.of(replace(workloads[0], budget=None))
    typer.echo(f"{workload_words(whole.workload)}\n\n{items_table(whole)}\n\n{verdict(whole)}")
    for one in workloads:
        if one.budget is not None:
            typer.echo(f"\n{verdict(MemoryPlan.of(one))}\n{strategies_words(one)}")
    if output is not None:
        _write(output, whole, workloads)
        typer.echo(f"\nnumbers and plot: {output / 'plan.json'}, {output / 'plan.png'}")


def _write(output: Path, whole: MemoryPlan, workloads: list[Workload]) -> None:
    """Write plan.json with the plan of the config, and plan.png with that plan and the fastest plan for each budget."""
    from rlhf_engine.files import write_json
    from rlhf_engine.planner.report import size
    from rlhf_engine.planner.strategies import fitting_or_smallest
    from rlhf_engine.plots import plot_memory

    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "plan.json", whole.to_dict())
    panels: dict[str, tuple[MemoryPlan, int | None]] = {"as it is": (whole, None)}
    for workload in workloads:
        if workload.budget is not None:
            fits, least = fitting_or_smallest(workload)
            found = fits or [least]
            note = "" if found[0].plan.fits else "DOES NOT FIT: "
            panels[f"{size(workload.budget)}, {note}{found[0].words}"] = (found[0].plan, workload.budget)
    plot_memory(
        {
            title: (plan.persistent, {name: phase.items for name, phase in plan.phases.items()}, budget)
            for title, (plan, budget) in panels.items()
        },
        output / "plan.png",
    )


def _write_ranks(output: Path, plan: RankPlan) -> None:
    """Write plan.json and plan.png with the plan of a rank."""
    from rlhf_engine.files import write_json
    from rlhf_engine.plots import plot_memory

    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "plan.json", plan.to_dict())
    title = f"a rank of {plan.cluster.gpus} x {plan.workload.gpu}"
    plot_memory({title: (plan.persistent, plan.phase_items(), plan.cluster.gpu.memory)}, output / "plan.png")
