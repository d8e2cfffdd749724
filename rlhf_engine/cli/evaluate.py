"""`rlhf generate`, `rlhf eval`, `rlhf figure` and `rlhf iterate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rlhf_engine.cli.options import ConfigOption, OverwriteOption, SetOption, quiet, read_config


def generate(
    config: ConfigOption,
    prompts: Annotated[Path, typer.Option(help='JSONL with lines {"prompt": ..., "user_id": ...}.')],
    output: Annotated[
        Path,
        typer.Option(
            help='JSONL to write: {"prompt": ..., "answers": [...], "ended": [...], "stop_reason": [...], "logprobs": [[...]]}.'
        ),
    ],
    samples: Annotated[int, typer.Option(min=1, help="Responses per prompt.")] = 1,
    temperature: Annotated[float | None, typer.Option(help="The same as --set rollout.temperature=...")] = None,
    seed: Annotated[int | None, typer.Option(help="The same as --set seed=...")] = None,
    split: Annotated[str | None, typer.Option(help="Use only the prompts of this split.")] = None,
    overrides: SetOption = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Require the settings of the interrupted call, and leave a complete file. A call without it continues too.",
        ),
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file OUTPUT of an earlier call.")] = False,
) -> None:
    """Sample responses of model.path to a file of prompts, with the settings of section rollout.

    An interrupted call leaves OUTPUT.partial; the same call continues from there and writes the same file.
    """
    quiet()
    from rlhf_engine.recipes.generate import generate_file

    short = [f"rollout.temperature={temperature}"] * (temperature is not None) + [f"seed={seed}"] * (seed is not None)
    settings = read_config(config, [*(overrides or []), *short])
    count, cut = generate_file(settings, prompts, output, samples, split, resume=resume, overwrite=overwrite)
    typer.echo(f"{count} prompts, {cut} of them truncated on the left, {samples} responses each: {output}")


def evaluate(config: ConfigOption, overrides: SetOption = None, overwrite: OverwriteOption = False) -> None:
    """Measure the win rate of eval.candidate over eval.baseline by eval.judge. Writes OUTPUT_DIR/eval."""
    quiet()
    from rlhf_engine.recipes.evaluate import run_eval

    typer.echo(run_eval(read_config(config, overrides), overwrite=overwrite)[1])


def figure(
    output: Annotated[Path, typer.Option(help="Folder for models, plot, table and numbers.")] = Path("runs/figure"),
    seed: Annotated[int, typer.Option(min=0, help="Seed of all random numbers.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Train for a few steps only, to check that it runs.")] = False,
    overrides: SetOption = None,
) -> None:
    """Plot win rate over model size for base, prompted base, SFT, PPO and PPO-ptx. Skips the steps that OUTPUT already has."""
    quiet()
    from rlhf_engine.demo.figure import run_figure

    typer.echo("\n" + run_figure(output, seed, tuple(overrides or ()), quick=quick, say=typer.echo))
    typer.echo(f"\nplot and numbers: {output / 'figure.png'}, {output / 'figure.json'}")


def iterate(
    config: ConfigOption,
    overrides: SetOption = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Report if there is no run to continue. One is continued without this option too."
        ),
    ] = False,
) -> None:
    """Run rounds of generate, rank, reward model and PPO from model.path. Skips the steps that OUTPUT_DIR already has."""
    quiet()
    from rlhf_engine.recipes.iterate import run_iterate

    typer.echo(run_iterate(read_config(config, overrides), typer.echo, resume=resume).table())
