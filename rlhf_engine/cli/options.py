"""Options that the commands share (`--config`, `--set`, `--overwrite`), reading the config, and silencing libraries."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rlhf_engine.distributed.launch import process_rank
from rlhf_engine.notices import print_notices

if TYPE_CHECKING:
    from rlhf_engine.config import RunConfig

ConfigOption = Annotated[Path, typer.Option("--config", "-c", help="YAML file; see rlhf_engine/examples.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="Override a setting, such as ppo.kl_coef=0.05; repeatable.")
]

GpusOption = Annotated[
    int | None,
    typer.Option(
        "--gpus", help="Start this many processes on this machine, each with one GPU; with device cpu, on its cores."
    ),
]
OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="Replace the results of an earlier run in OUTPUT_DIR.")
]


def read_config(config: Path | None, overrides: list[str] | None) -> RunConfig:
    """Return the config of a command. Imports the config only when called, so that `--help` does not load torch."""
    from rlhf_engine.config import load_config

    return load_config(config, overrides or ())


def quiet() -> None:
    """Turn off the progress bars and tables that transformers prints while it loads; our own checks report errors in one line.

    Print our notices on stderr. transformers imports torchao and peft imports bitsandbytes if they are installed, which log
    warnings about kernels for other machines; they are hidden too.
    """
    for name in ("torchao", "bitsandbytes", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if process_rank() == 0:
        print_notices("rlhf: ")
    else:  # the first rank prints what concerns all
        logging.getLogger("rlhf_engine").setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
