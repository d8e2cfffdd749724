"""`rlhf bench`: throughput of the ops and of a PPO update on this machine."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from rlhf_engine.cli.options import SetOption, quiet


class _WithDefault(TyperGroup):
    """A group whose command `run` may be left out: `rlhf bench kernels` is `rlhf bench run kernels`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Insert `run` before arguments that name no command."""
        if not args or args[0] not in (*self.commands, "--help"):
            args = ["run", *args]
        return super().parse_args(ctx, args)


bench_app = typer.Typer(
    cls=_WithDefault,
    help="Measure the ops and PPO updates on this machine. `rlhf bench [SUITE...]` is `rlhf bench run [SUITE...]`.",
)


def _quiet() -> None:
    """Hide the notice that a policy has no tokenizer: models with random weights have none."""
    quiet()
    logging.getLogger("rlhf_engine.rollout.generator").setLevel(logging.ERROR)


@bench_app.command()
def run(
    suites: Annotated[
        list[str] | None,
        typer.Argument(metavar="SUITE", help="kernels, loss, rollout, step, memory or scaling. Default: all."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="At most three minutes on two cores.")] = False,
    full: Annotated[bool, typer.Option("--full", help="More rounds and larger shapes, for figures to keep.")] = False,
    model: Annotated[
        str | None, typer.Option(help="Name of a size such as qwen2.5-7b, or a folder with a config.json.")
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens of a call, instead of those of the effort.")] = None,
    hidden: Annotated[int | None, typer.Option(help="Hidden size, instead of the model's.")] = None,
    vocab: Annotated[int | None, typer.Option(help="Vocabulary, instead of the model's.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. Default: cuda if torch finds a GPU.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32 or bfloat16. Default: float32 on a CPU, bfloat16 on a GPU.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for bench.json and bench.md.")] = Path("runs/bench"),
) -> None:
    """Check every case against float64, measure it, and write bench.json and bench.md.

    Exits with code 1 if a case fails its check. An interrupted run keeps what was measured.
    """
    _quiet()
    from rlhf_engine.bench.run import EFFORTS, Run, Settings
    from rlhf_engine.bench.shapes import DTYPES, device_of, one_of
    from rlhf_engine.bench.suites import SUITES

    if quick and full:
        raise ValueError("pass --quick or --full, not both")
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output: {output} is a file; give a folder for bench.json and bench.md")
    where = device_of(device)
    settings = Settings(
        suites=tuple(one_of("suite", name, SUITES) for name in suites or SUITES),
        device=where,
        dtype=DTYPES[one_of("dtype", dtype or ("bfloat16" if where.type == "cuda" else "float32"), DTYPES)],
        effort=EFFORTS["quick" if quick else "full" if full else "standard"],
        model=model,
        tokens=tokens,
        hidden=hidden,
        vocab=vocab,
    )
    settings.shapes()  # refuses a wrong shape before anything is written
    Run(settings, output, typer.echo).run(SUITES)
    typer.echo(
        f"{(output / 'bench.md').read_text(encoding='utf-8')}\nreport: {output / 'bench.md'}, {output / 'bench.json'}"
    )


@bench_app.command()
def card(
    model: Annotated[str, typer.Option(help="Name of a size such as qwen2.5-7b, or a folder with a config.json.")],
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda. Default: cuda, predicted only if torch finds no GPU.")
    ] = None,
    gpu: Annotated[
        str | None, typer.Option(help="GPU to predict: a100, h100, h200, l4 or 4090. Default: the device, else h200.")
    ] = None,
    gpu_memory: Annotated[
        str | None, typer.Option("--gpu-memory", help="Memory to plan for, such as 80GiB. Default: that of the GPU.")
    ] = None,
    overrides: SetOption = None,
    output: Annotated[Path, typer.Option(help="Folder for card.json and card.png.")] = Path("runs/card"),
) -> None:
    """Predict tokens/s, utilisation, peak and the largest batch of PPO with a critic; measure them if the device is here."""
    _quiet()
    import torch

    from rlhf_engine.bench.card import GPUS, known_gpu, make_card
    from rlhf_engine.bench.machine import device_name
    from rlhf_engine.bench.room import available_bytes
    from rlhf_engine.bench.shapes import device_of, one_of
    from rlhf_engine.config.memory import byte_count

    if output.exists() and not output.is_dir():
        raise ValueError(f"--output: {output} is a file; give a folder for card.json and card.png")
    if gpu is not None and device is not None:
        raise ValueError("pass --gpu to predict a GPU, or --device to measure, not both")
    here = device_of(device) if device is not None or (gpu is None and torch.cuda.is_available()) else None
    if here is None:
        assumed: str | None = one_of("GPU", gpu or "h200", GPUS)
        memory = GPUS[assumed].memory
    else:
        assumed = None if here.type == "cpu" else known_gpu(device_name(here))
        memory = available_bytes(here)
    if gpu_memory is not None:
        memory = byte_count(gpu_memory, "--gpu-memory")
    found = make_card(model, here, assumed, memory, overrides or [], output, typer.echo)
    typer.echo(f"{found['model']}, {found['device']}: {found['workload']}")
    for name in ("predicted", "measured"):
        if part := found[name]:
            numbers = f"{part['tokens_per_second']:,.0f} response tokens/s, MFU {part['mfu']:.2f}"
            peak = f"peak {part['peak_bytes'] / 2**30:.1f} GiB"
            typer.echo(f"{name}: {numbers}, {peak}, largest batch {part['largest_batch'] or 'not tried'}")
    typer.echo(f"{found['note']}\ncard: {output / 'card.png'}, {output / 'card.json'}")


@bench_app.command()
def compare(
    before: Annotated[Path, typer.Argument(help="bench.json of the first run.")],
    after: Annotated[Path, typer.Argument(help="bench.json of the second run.")],
) -> None:
    """Print the change of every case in both runs; exit with code 1 if one is slower by more than the spread."""
    quiet()
    from rlhf_engine.bench.compare import compare as compare_runs
    from rlhf_engine.bench.compare import read_run

    found = compare_runs(read_run(before), read_run(after))
    typer.echo(found.text())
    raise typer.Exit(int(bool(found.slower)))
