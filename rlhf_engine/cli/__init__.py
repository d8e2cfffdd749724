"""The command `rlhf`: data, training, evaluation, settings, the demo. A user's mistake is one line on stderr and exit code 2.

Training that diverges is one line and exit code 1. While a stage trains, Ctrl-C, SIGTERM and SIGHUP save what is finished, and
one line says what is saved and how to resume. Ctrl-C ends in exit code 130, the others in 0 if everything that was finished is
in a checkpoint and in 128 plus the signal's number otherwise.
"""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from rlhf_engine.cli import evaluate
from rlhf_engine.cli.config import config_app
from rlhf_engine.cli.options import ConfigOption, OverwriteOption, SetOption, quiet, read_config
from rlhf_engine.cli.plan import plan

INTERRUPTED = 130
"""Exit code of Ctrl-C."""


class _Commands(TyperGroup):
    """The commands; a signal that ends one of them is reported in a line."""

    def invoke(self, ctx: Any) -> Any:  # a context of click, or of the click that newer versions of typer contain
        """Run the command of a command line, whose arguments are `ctx.obj`."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:
            # Signals end a training as KeyboardInterrupts with a number.
            signum = getattr(interrupt, "signum", signal.SIGINT)
            saved = getattr(interrupt, "saved", False)
            how = f"; to continue: {_resuming(ctx.obj)}" if saved else ""
            print(f"rlhf: {str(interrupt) or 'interrupted'}{_notes(interrupt)}{how}", file=sys.stderr)
            ended = 0 if saved else 128 + signum
            raise typer.Exit(INTERRUPTED if signum == signal.SIGINT else ended) from None


app = typer.Typer(cls=_Commands, add_completion=False, no_args_is_help=True, help="RLHF from demonstrations to PPO.")
app.add_typer(config_app, name="config")
data_app = typer.Typer(no_args_is_help=True, help="Cleans and checks data sets.")
app.add_typer(data_app, name="data")


RESUMABLE = ("sft", "rm", "ppo")
"""Commands with the option --resume; the others continue when they are called again, or begin again."""

ResumeOption = Annotated[
    bool, typer.Option("--resume", help="Continue from the checkpoint with the numbers of an unbroken run.")
]

# Imports sit inside the commands, so that `rlhf --help` and a mistyped option answer without loading torch.


@app.command()
def info() -> None:
    """Prints what is built and which backend every operation would use here."""
    raise typer.Exit(subprocess.run([sys.executable, "-m", "rlhf_kernels.info"], check=False).returncode)


@app.command()
def sft(
    config: ConfigOption,
    overrides: SetOption = None,
    resume: ResumeOption = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Fine-tunes model.path on data.demonstrations; writes OUTPUT_DIR/sft; OUTPUT_DIR/sft.checkpoint until then."""
    report = _run("run_sft", config, overrides, resume=resume, overwrite=overwrite)
    typer.echo(f"validation loss {report.best.validation_loss:.4f} nats a token at step {report.best.step}")


@app.command()
def rm(
    config: ConfigOption,
    overrides: SetOption = None,
    resume: ResumeOption = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Trains a reward model from model.path on data.comparisons; writes OUTPUT_DIR/rm; OUTPUT_DIR/rm.checkpoint until then."""
    last = _run("run_rm", config, overrides, resume=resume, overwrite=overwrite)[-1]
    typer.echo(f"held-out accuracy {last.accuracy:.4f}, margin {last.margin:.4f}, loss {last.loss:.4f}")


@app.command()
def ppo(
    config: ConfigOption,
    overrides: SetOption = None,
    resume: ResumeOption = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Trains model.path with PPO on data.prompts against reward.path or reward.function; writes OUTPUT_DIR/ppo."""
    history = _run("run_ppo", config, overrides, resume=resume, overwrite=overwrite)
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
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a finished demo in the folder.")] = False,
) -> None:
    """Runs the miniature InstructGPT: SFT, reward model, PPO, and a judged comparison (minutes, no GPU, no network)."""
    quiet()
    from rlhf_engine.demo.run import run_demo

    typer.echo("\n" + run_demo(output, seed, tuple(overrides or ()), typer.echo, overwrite=overwrite))
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
    given = sys.argv[1:] if arguments is None else arguments
    try:
        app(args=given, obj=given)
    except (ValueError, OSError) as error:
        print(f"rlhf: {error}{_notes(error)}", file=sys.stderr)
        sys.exit(2)
    except FloatingPointError as error:
        print(f"rlhf: {error}{_notes(error)}", file=sys.stderr)
        sys.exit(1)


def _notes(error: BaseException) -> str:
    """What was saved, which a training session adds to whatever ends it."""
    return "".join(f"; {note}" for note in getattr(error, "__notes__", ()))


def _resuming(arguments: list[str]) -> str:
    """The command that continues the one with these arguments."""
    kept = [argument for argument in arguments if argument not in ("--resume", "--overwrite")]
    return shlex.join(["rlhf", *kept, *(["--resume"] if kept[0] in RESUMABLE else [])])
