"""`rlhf chat`, `rlhf check` and `rlhf push`: talk to a model, find what is wrong here, and publish a model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from rlhf_engine.cli.options import SetOption, quiet, read_config

_Config = Annotated[Path | None, typer.Option("--config", "-c", help="YAML file. Default: the default values.")]


def chat(
    models: Annotated[list[Path], typer.Argument(help="Folder of a model, or of two to read side by side.")],
    config: _Config = None,
    overrides: SetOption = None,
    system: Annotated[str | None, typer.Option(help="System message of the conversation.")] = None,
) -> None:
    """Talk to a checkpoint, or to two at once, with the settings of section rollout. Reads lines from stdin."""
    quiet()
    from rich.console import Console

    from rlhf_engine.recipes.chat import Chat, run_chat, typed_lines

    if len(models) > 2:
        raise ValueError(f"MODELS: got {len(models)} folders, expected one or two")
    settings = read_config(config, [*(overrides or []), f"model.path={models[0]}"])
    console = Console()
    conversation = Chat(settings, [str(model) for model in models], system)
    run_chat(conversation, typed_lines(console) if sys.stdin.isatty() else sys.stdin, console)


def check(
    config: _Config = None,
    overrides: SetOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, to attach to an issue.")] = False,
) -> None:
    """Report what is wrong with this machine and with a config, and what to do. Exit code 1 if there is an error."""
    quiet()
    from rich.console import Console

    from rlhf_engine.recipes.check import findings_view, run_check

    given = config is not None or bool(overrides)
    report = run_check((lambda: read_config(config, overrides)) if given else None)
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=2))
    else:
        Console().print(findings_view(report))
    raise typer.Exit(0 if report.ok else 1)


def push(
    folder: Annotated[Path, typer.Argument(help="Folder of a model that rlhf sft, rlhf rm or rlhf ppo wrote.")],
    repo: Annotated[str, typer.Argument(help="Repository on the Hub, such as name/model.")],
    base: Annotated[str | None, typer.Option(help="Name of the base model on the Hub.")] = None,
    license_id: Annotated[str | None, typer.Option("--license", help="Licence, such as apache-2.0, or other.")] = None,
    license_name: Annotated[str | None, typer.Option(help="Name of a licence that is `other`.")] = None,
    license_link: Annotated[str | None, typer.Option(help="Link to a licence that is `other`.")] = None,
    evaluation: Annotated[
        Path | None,
        typer.Option("--eval", help="Folder of rlhf eval. Default: OUTPUT_DIR/eval, if it is of this model."),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Create a private repository.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the card and the files, and send nothing.")] = False,
) -> None:
    """Publish a model on the Hugging Face Hub, with a card generated from the run (README.md in FOLDER replaces it)."""
    quiet()
    from rlhf_engine.recipes.hub import License, model_card, published
    from rlhf_engine.recipes.hub import push as upload

    fields = License(license_id, license_name, license_link)
    card = model_card(folder, base=base, license=fields, evaluation=evaluation)
    if dry_run:
        names = "\n".join(f"{path.stat().st_size:>14,}  {path.relative_to(folder)}" for path in published(folder))
        typer.echo(f"{card}\n{names}")
        return
    typer.echo(f"commit: {upload(folder, repo, card=card, private=private)}")
