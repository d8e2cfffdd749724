"""The command `rlhf`: data, training, evaluation, settings and the demo.

A user's mistake prints one line on stderr and exits with code 2. A run that fails for a different reason (training diverged,
memory is short, a library failed in a way that no check foresaw) prints one line and exits with code 1. `--traceback` prints
the traceback of the original exception before that line.
While a stage trains, Ctrl-C, SIGTERM and SIGHUP save the finished steps, and one line reports what is saved and how to resume.
SIGTERM, with which batch systems ask a process to end, exits with code 0 if everything finished is saved. Otherwise a signal
exits with code 128 plus its number (Ctrl-C 130, SIGHUP 129, SIGTERM without a checkpoint 143).
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

from rlhf_engine.cli import ENGINE, evaluate, share
from rlhf_engine.cli.bench import bench_app
from rlhf_engine.cli.config import config_app
from rlhf_engine.cli.failures import TRACEBACK, notes, one_line_errors
from rlhf_engine.cli.options import ConfigOption, GpusOption, OverwriteOption, SetOption, quiet, read_config
from rlhf_engine.cli.plan import plan
from rlhf_engine.distributed.launch import check_count, process_count, process_rank, start


class _Commands(TyperGroup):
    """The group of all commands; it reports a signal that ends a command in one line."""

    def invoke(self, ctx: Any) -> Any:  # a context of click, or of the click that newer versions of typer contain
        """Run a command; `ctx.obj` has the arguments of the command line."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:
            # A signal during training raises a KeyboardInterrupt with the attributes `signum` and `saved`.
            signum = getattr(interrupt, "signum", signal.SIGINT)
            saved = getattr(interrupt, "saved", False)
            how = f"; to continue: {_resuming(ctx.obj)}" if saved else ""
            if process_rank() == 0:
                print(f"rlhf: {str(interrupt) or 'interrupted'}{notes(interrupt)}{how}", file=sys.stderr)
            raise typer.Exit(0 if saved and signum == signal.SIGTERM else 128 + signum) from None


app = typer.Typer(cls=_Commands, add_completion=False, no_args_is_help=True)
app.add_typer(config_app, name="config")
app.add_typer(bench_app, name="bench")
data_app = typer.Typer(no_args_is_help=True, help="Clean and check data sets.")
app.add_typer(data_app, name="data")


@app.callback()
def _everywhere(
    context: typer.Context,
    traceback: Annotated[
        bool, typer.Option(TRACEBACK, help="Print the traceback of the exception that ends a command; valid anywhere.")
    ] = False,
) -> None:
    """RLHF from demonstrations to PPO."""
    command = context.invoked_subcommand
    if process_count() > 1 and command not in DISTRIBUTED:
        raise ValueError(
            f"rlhf {command}: got {process_count()} processes of torchrun, and only rlhf {', '.join(DISTRIBUTED)} runs on "
            "several; start it without torchrun"
        )


DISTRIBUTED = ("sft", "rm", "ppo")
"""Commands that run on several ranks."""
RESUMABLE = ("sft", "rm", "ppo", "iterate", "generate")
"""Commands with the option --resume. The others start again when they are called again."""

ResumeOption = Annotated[
    bool, typer.Option("--resume", help="Continue from the checkpoint, with the same numbers as an uninterrupted run.")
]

FormatOption = Annotated[
    str | None,
    typer.Option("--format", help="Name of the format, such as alpaca, for a file whose columns fit several."),
]

# Each command imports what it needs, so that `rlhf --help` and the error for a mistyped option do not load torch.


@app.command()
def info() -> None:
    """Print which backends are built, and the backend that each operation uses on this machine."""
    raise typer.Exit(subprocess.run([sys.executable, "-m", "rlhf_kernels.info"], check=False).returncode)


@app.command()
def sft(
    context: typer.Context,
    config: ConfigOption,
    overrides: SetOption = None,
    resume: ResumeOption = False,
    overwrite: OverwriteOption = False,
    gpus: GpusOption = None,
) -> None:
    """Fine-tune model.path on data.demonstrations. Writes OUTPUT_DIR/sft, and OUTPUT_DIR/sft.checkpoint until training ends."""
    _start_ranks(context, gpus, config, overrides)
    report = _run("run_sft", config, overrides, resume=resume, overwrite=overwrite)
    typer.echo(f"validation loss {report.best.validation_loss:.4f} nats per token at step {report.best.step}")
    _results(config, overrides, "sft", "rm", "model.path")


@app.command()
def rm(
    context: typer.Context,
    config: ConfigOption,
    overrides: SetOption = None,
    resume: ResumeOption = False,
    overwrite: OverwriteOption = False,
    gpus: GpusOption = None,
) -> None:
    """Train a reward model from model.path on data.comparisons.

    Writes OUTPUT_DIR/rm, and OUTPUT_DIR/rm.checkpoint until training ends.
    """
    _start_ranks(context, gpus, config, overrides)
    last = _run("run_rm", config, overrides, resume=resume, overwrite=overwrite)[-1]
    typer.echo(f"held-out accuracy {last.accuracy:.4f}, margin {last.margin:.4f}, loss {last.loss:.4f}")
    _results(config, overrides, "rm", "ppo", "reward.path")


@app.command()
def ppo(
    context: typer.Context,
    config: ConfigOption,
    overrides: SetOption = None,
    resume: ResumeOption = False,
    overwrite: OverwriteOption = False,
    gpus: GpusOption = None,
) -> None:
    """Train model.path with PPO on data.prompts, with the reward of reward.path or reward.function. Writes OUTPUT_DIR/ppo."""
    _start_ranks(context, gpus, config, overrides)
    history = _run("run_ppo", config, overrides, resume=resume, overwrite=overwrite)
    if not history:
        typer.echo("nothing left to do: the checkpoint has completed all ppo.updates")
    else:
        first, last = (
            {name: round(one[name], 4) + 0.0 for name in ("score_mean", "kl")} for one in (history[0], history[-1])
        )
        typer.echo(
            f"score {first['score_mean']:.4f} -> {last['score_mean']:.4f}, KL {last['kl']:.4f} nats per sequence"
        )
    _results(config, overrides, "ppo", "generate", "model.path")


@app.command()
def repro(
    file: Annotated[Path, typer.Argument(help="A file of OUTPUT_DIR/repro.")],
    device: Annotated[str | None, typer.Option(help="torch device. Default: that of the run.")] = None,
) -> None:
    """Repeat the computation of a number that was not finite; exits with code 1 if one is not finite here either."""
    quiet()
    from rlhf_engine.recipes.repro import run_repro

    lines, found = run_repro(file, device=device)
    typer.echo("\n".join(lines))
    raise typer.Exit(int(found))


@app.command()
def merge(
    source: Annotated[Path, typer.Argument(help="Folder of an adapter or of top layers, such as OUTPUT_DIR/ppo.")],
    output: Annotated[Path, typer.Argument(help="New folder for the model.")],
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16. Default: that of the model under the adapter.")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let Python code from the folder of the model run.")
    ] = False,
) -> None:
    """Add an adapter, or the top layers of an unfinished run, to its model; write a complete one, with its values or head."""
    quiet()
    from rlhf_engine.recipes.merge import merge_adapter

    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise ValueError(f"--dtype: got {dtype!r}, expected float32, bfloat16 or float16")
    merge_adapter(source, output, dtype, trust_remote_code=trust_remote_code)
    typer.echo(f"merged model: {output}")


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for models, metrics, plots and the report.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(min=0, help="Seed of all random numbers.")] = 0,
    overrides: SetOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a finished demo in the folder.")] = False,
    from_scratch: Annotated[
        bool, typer.Option("--from-scratch", help="Pretrain the base model instead of loading the one in the package.")
    ] = False,
) -> None:
    """Run a miniature InstructGPT: SFT, reward model, PPO, and a comparison by a judge (minutes, no GPU, no network)."""
    quiet()
    from rlhf_engine.demo.run import next_commands, run_demo

    report = run_demo(output, seed, tuple(overrides or ()), typer.echo, overwrite=overwrite, from_scratch=from_scratch)
    typer.echo(f"\n{report}\n\nreport, responses and plots: {output}\n\n{next_commands(output)}")


@data_app.command()
def clean(
    source: Annotated[Path, typer.Option("--in", help="Prompts: JSONL, or a folder written by save_to_disk.")],
    output: Annotated[Path, typer.Option("--out", help="New folder for prompts.jsonl and report.json.")],
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="YAML file, of which data.hygiene is used.")
    ] = None,
    overrides: SetOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the result of an earlier call.")] = False,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Folder of a tokenizer; truncates prompts to rollout.max_prompt_tokens.")
    ] = None,
) -> None:
    """Deduplicate prompts, limit their number per user, split them by user, and filter personal information from train."""
    quiet()
    from rlhf_engine.data.hygiene import clean_prompts

    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise ValueError(
            f"--out: {output} is not empty; replace an earlier result with --overwrite, or give a new folder"
        )
    settings, codec = read_config(config, overrides), None
    if tokenizer is not None:
        from rlhf_engine.data import Codec
        from rlhf_engine.model.pretrained import load_tokenizer

        trusted = settings.model.trust_remote_code
        codec = Codec(
            load_tokenizer(tokenizer, trust_remote_code=trusted),
            settings.data.prompt_template,
            settings.rollout.max_prompt_tokens,
        )
    typer.echo(
        clean_prompts(source, output, settings.data.hygiene, codec, allow=settings.data.allowed_columns()).table()
    )
    typer.echo(f"prompts: {output / 'prompts.jsonl'}")


@data_app.command()
def check(
    kind: Annotated[str, typer.Argument(help="Kind of records: demonstrations, comparisons, prompts or pretraining.")],
    path: Annotated[Path, typer.Argument(help="The file, or a folder written by save_to_disk.")],
    strict: Annotated[bool, typer.Option("--strict", help="Refuse columns that are not part of a format.")] = False,
    form: FormatOption = None,
) -> None:
    """Check every record of a file and print counts; an error names the line of the first invalid record."""
    quiet()
    from rlhf_engine.data.summary import summarise

    counts = summarise(kind, path, strict=strict, form=form)
    typer.echo("\n".join(f"{name}: {count:,}" for name, count in counts.items()))


@data_app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="JSONL, CSV, TSV, Parquet, or a folder written by save_to_disk.")],
    output: Annotated[Path, typer.Argument(help="New JSONL file.")],
    form: FormatOption = None,
    kind: Annotated[
        str | None, typer.Option(help="demonstrations, comparisons, prompts or pretraining. Default: by the columns.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file OUTPUT.")] = False,
) -> None:
    """Write a file of any format in ours. All commands read the other formats too; this is needed where two of them fit."""
    quiet()
    from rlhf_engine.data.convert import convert

    if output.exists() and not overwrite:
        raise ValueError(f"{output}: exists; replace it with --overwrite, or give a new file")
    found, count = convert(source, output, kind=kind, form=form)
    typer.echo(f"{count:,} {found}: {output}")


app.command("eval")(evaluate.evaluate)
app.command()(evaluate.iterate)
app.command()(evaluate.generate)
app.command()(evaluate.figure)
app.command()(plan)
app.command()(share.chat)
app.command("check")(share.check)
app.command()(share.push)


def _run(stage: str, config: Path, overrides: list[str] | None, **options: bool) -> Any:
    quiet()
    from rlhf_engine import recipes

    found = getattr(recipes, stage)(read_config(config, overrides), **options)
    if process_rank() > 0:
        raise typer.Exit  # the first rank reports the result
    return found


def _start_ranks(context: typer.Context, gpus: int | None, config: Path, overrides: list[str] | None) -> None:
    """Run this command again in `gpus` processes and exit with their code; return if `gpus` is None."""
    if gpus is None:
        return
    check_count(gpus, read_config(config, overrides).device)
    arguments: list[str] = [*context.obj, *(word for word in sys.argv if word == TRACEBACK)]
    at = next(place for place, word in enumerate(arguments) if word.split("=")[0] == "--gpus")
    del arguments[at : at + (1 if "=" in arguments[at] else 2)]
    raise typer.Exit(start(gpus, arguments))


def _results(config: Path, overrides: list[str] | None, stage: str, following: str, key: str) -> None:
    """Print the folder of a stage's model and the command that reads it: `following`, with the folder as setting `key`."""
    found = read_config(config, overrides)
    folder = Path(found.output_dir) / stage
    unread = (f"{key}=",) if following != "generate" else (f"{key}=", "ppo.", "reward.")
    kept = [one for one in overrides or () if not one.startswith(unread)]
    words = ["rlhf", following, "--config", str(config)]
    words += [word for one in (*kept, f"{key}={folder}") for word in ("--set", one)]
    if following == "generate":
        words += ["--prompts", str(found.data.prompts), "--output", str(folder.parent / "answers.jsonl")]
    typer.echo(f"model: {folder}\nnext:  {shlex.join(words)}")


def run(arguments: list[str] | None = None) -> None:
    """Run the command line `arguments`, by default those of the process. Always ends in SystemExit.

    Raises:
        ModuleNotFoundError: a package of the extra `engine` is not installed.
    """
    everything = sys.argv[1:] if arguments is None else arguments
    given = [argument for argument in everything if argument != TRACEBACK]
    with one_line_errors(whole=len(given) < len(everything), packages=ENGINE):
        app(args=given, obj=given)


def _resuming(arguments: list[str]) -> str:
    """Return the command that continues the command with these arguments."""
    kept = [argument for argument in arguments if argument not in ("--resume", "--overwrite")]
    return shlex.join(["rlhf", *kept, *(["--resume"] if kept[0] in RESUMABLE else [])])
