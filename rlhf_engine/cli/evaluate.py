"""`rlhf generate`, `rlhf eval`, `rlhf iterate`, `rlhf figure`: what comes after training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rlhf_engine.cli.options import ConfigOption, OverwriteOption, SetOption, quiet, read_config


def generate(
    config: ConfigOption,
    prompts: Annotated[Path, typer.Option(help='JSONL of {"prompt": ..., "user_id": ...}.')],
    output: Annotated[
        Path,
        typer.Option(
            help='JSONL to write: {"prompt": ..., "answers": [...], "ended": [...], "stop_reason": [...], "logprobs": [[...]]}.'
        ),
    ],
    samples: Annotated[int, typer.Option(min=1, help="Answers to each prompt.")] = 1,
    temperature: Annotated[float | None, typer.Option(help="Short for --set rollout.temperature=...")] = None,
    seed: Annotated[int | None, typer.Option(help="Short for --set seed=...")] = None,
    split: Annotated[str | None, typer.Option(help="Only the prompts of this split.")] = None,
    overrides: SetOption = None,
) -> None:
    """Answers a file of prompts with model.path, sampling as the section rollout says."""
    quiet()
    from rlhf_engine.recipes.generate import generate_file

    short = [f"rollout.temperature={temperature}"] * (temperature is not None) + [f"seed={seed}"] * (seed is not None)
    count, cut = generate_file(read_config(config, [*(overrides or []), *short]), prompts, output, samples, split)
    typer.echo(f"{count} prompts, {cut} of them cut on the left, {samples} answers each: {output}")


def evaluate(config: ConfigOption, overrides: SetOption = None, overwrite: OverwriteOption = False) -> None:
    """Win rate of eval.candidate over eval.baseline by eval.judge; writes OUTPUT_DIR/eval."""
    quiet()
    from rlhf_engine.recipes.evaluate import run_eval

    typer.echo(run_eval(read_config(config, overrides), overwrite=overwrite)[1])


def figure(
    output: Annotated[Path, typer.Option(help="Folder for models, plot, table and numbers.")] = Path("runs/figure"),
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Next to no training: does it run?")] = False,
    overrides: SetOption = None,
) -> None:
    """Win rate over model size for base, prompted base, SFT, PPO and PPO-ptx; does what OUTPUT does not have yet."""
    quiet()
    from rlhf_engine.demo.figure import run_figure

    typer.echo("\n" + run_figure(output, seed, tuple(overrides or ()), quick=quick, say=typer.echo))
    typer.echo(f"\nplot and numbers: {output / 'figure.png'}, {output / 'figure.json'}")


def iterate(config: ConfigOption, overrides: SetOption = None) -> None:
    """Rounds of generate, rank, reward model and PPO from model.path; does what OUTPUT_DIR does not have yet."""
    quiet()
    from rlhf_engine.recipes.iterate import run_iterate

    typer.echo(run_iterate(read_config(config, overrides), typer.echo).table())
