"""The command `rlhf`: data, training, evaluation, settings, the demo. A user's mistake is one line on stderr and exit code 2.

Training that diverges is one line and exit code 1.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from rlhf_engine.cli import evaluate
from rlhf_engine.cli.config import config_app
from rlhf_engine.cli.options import ConfigOption, SetOption, quiet, read_config
from rlhf_engine.cli.plan import plan

app = typer.Typer(add_completion=False, no_args_is_help=True, help="RLHF from demonstrations to PPO.")
app.add_typer(config_app, name="config")
data_app = typer.Typer(no_args_is_help=True, help="Cleans and checks data sets.")
app.add_typer(data_app, name="data")


_INTERRUPTED = 130
"""Exit code that typer gives to Ctrl-C."""


# Imports sit inside the commands, so that `rlhf --help` and a mistyped option answer without loading torch.


@app.command()
def info() -> None:
    """Prints what is built and which backend every operation would use here."""
    raise typer.Exit(subprocess.run([sys.executable, "-m", "rlhf_kernels.info"], check=False).returncode)


@app.command()
def sft(config: ConfigOption, overrides: SetOption = None) -> None:
    """Fine-tunes model.path on data.demonstrations; writes OUTPUT_DIR/sft."""
    report = _run("run_sft", config, overrides)
    typer.echo(f"validation loss {report.best.validation_loss:.4f} nats a token at step {report.best.step}")


@app.command()
def rm(config: ConfigOption, overrides: SetOption = None) -> None:
    """Trains a reward model from model.path on data.comparisons; writes OUTPUT_DIR/rm."""
    last = _run("run_rm", config, overrides)[-1]
    typer.echo(f"held-out accuracy {last.accuracy:.4f}, margin {last.margin:.4f}, loss {last.loss:.4f}")


@app.command()
def ppo(
    config: ConfigOption,
    overrides: SetOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in OUTPUT_DIR/ppo.")] = False,
) -> None:
    """Trains model.path with PPO on data.prompts against reward.path or reward.function; writes OUTPUT_DIR/ppo."""
    history = _run("run_ppo", config, overrides, resume=resume)
    if not history:
        typer.echo("nothing left to do: the checkpoint has all of ppo.updates")
        return
    last = history[-1]
    typer.echo(f"score {last['score_mean']:.4f}, KL {last['kl']:.4f} nats a sequence")


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for models, metrics, plots and the report.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything.")] = 0,
    overrides: SetOption = None,
) -> None:
    """Runs the miniature InstructGPT: SFT, reward model, PPO, and a judged comparison (minutes, no GPU, no network)."""
    quiet()
    from rlhf_engine.demo.run import run_demo

    typer.echo("\n" + run_demo(output, seed, tuple(overrides or ()), typer.echo))
    typer.echo(f"\nreport, answers and plots: {output}")


@data_app.command()
def clean(
    source: Annotated[Path, typer.Option("--in", help="Prompts: JSONL, or a folder that save_to_disk wrote.")],
    output: Annotated[Path, typer.Option("--out", help="New folder for prompts.jsonl and report.json.")],
    config: Annotated[Path | None, typer.Option("--config", "-c", help="YAML file; data.hygiene counts.")] = None,
    overrides: SetOption = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Truncate to its rollout.max_prompt_tokens tokens.")] = None,
) -> None:
    """Deduplicates prompts, limits them per user, splits them by user, and filters personal information out of train."""
    quiet()
    from rlhf_engine.data.hygiene import clean_prompts

    settings, codec = read_config(config, overrides), None
    if tokenizer is not None:
        from rlhf_engine.data import Codec
        from rlhf_engine.model.pretrained import load_tokenizer

        codec = Codec(load_tokenizer(tokenizer), settings.data.prompt_template, settings.rollout.max_prompt_tokens)
    typer.echo(clean_prompts(source, output, settings.data.hygiene, codec).table())


@data_app.command()
def check(
    kind: Annotated[str, typer.Argument(help="demonstrations, comparisons, prompts or pretraining.")],
    path: Annotated[Path, typer.Argument(help="The file, or a folder that save_to_disk wrote.")],
) -> None:
    """Reads every record of a file and counts; the first bad one is named with its line."""
    quiet()
    from rlhf_engine.data.summary import summarise

    typer.echo("\n".join(f"{name}: {count:,}" for name, count in summarise(kind, path).items()))


app.command("eval")(evaluate.evaluate)
app.command()(evaluate.iterate)
app.command()(evaluate.generate)
app.command()(evaluate.figure)
app.command()(plan)


def _run(stage: str, config: Path, overrides: list[str] | None, **options: bool) -> Any:
    quiet()
    from rlhf_engine import recipes

    return getattr(recipes, stage)(read_config(config, overrides), **options)


def main(arguments: list[str] | None = None) -> None:
    """Entry point; `arguments` are those of the command line unless given. Always ends in SystemExit."""
    try:
        app(args=arguments)
    except SystemExit as end:
        if end.code == _INTERRUPTED:
            print("rlhf: interrupted", file=sys.stderr)
        raise
    except (ValueError, OSError) as error:
        print(f"rlhf: {error}", file=sys.stderr)
        sys.exit(2)
    except FloatingPointError as error:
        print(f"rlhf: {error}", file=sys.stderr)
        sys.exit(1)
