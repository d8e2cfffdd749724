"""What the commands share: the options `--config` and `--set`, and how a command reaches the code that does its work."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rlhf_engine.config import RunConfig

ConfigOption = Annotated[Path, typer.Option("--config", "-c", help="YAML file; see rlhf_engine/examples.")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="Override, such as ppo.kl_coef=0.05; repeatable.")]

OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace what an earlier run left in OUTPUT_DIR.")]


def read_config(config: Path | None, overrides: list[str] | None) -> RunConfig:
    """The config of a command. Imports sit inside, so that `--help` and a mistyped option answer without loading torch."""
    from rlhf_engine.config import load_config

    return load_config(config, overrides or ())


def quiet() -> None:
    """Turns off the bars and tables that transformers prints as it loads: what is wrong there, we refuse in one line.

    It imports torchao where that is installed, which tells of kernels for GPUs that are not here.
    """
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
