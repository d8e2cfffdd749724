"""The start of a stage: one run at a time per output folder, on all of its ranks, and what an earlier run has left there."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Concatenate, ParamSpec, TypedDict, TypeVar

from rlhf_engine.checkpoint_folders import checkpoints, clean_up_checkpoints
from rlhf_engine.config import RunConfig, flat_settings
from rlhf_engine.distributed.ranks import current, joined
from rlhf_engine.files import FolderLock
from rlhf_engine.manifest import foreign_files

Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")

_PER_NODE = frozenset(("model.path", "reward.path"))
"""Settings that may differ between ranks, because a node may have a copy of a model; its content is compared."""


def exclusive(
    run: Callable[Concatenate[RunConfig, Arguments], Result],
) -> Callable[Concatenate[RunConfig, Arguments], Result]:
    """Let one run at a time use an output folder; a second one gets a ValueError. Open the process group of its ranks."""

    @functools.wraps(run)
    def locked(config: RunConfig, *arguments: Arguments.args, **options: Arguments.kwargs) -> Result:
        with joined(config.device, config.distributed.timeout) as ranks:
            ranks.check_equal(dict(flat_settings(config.to_dict(), _PER_NODE)))
            with FolderLock(config.output_dir) if ranks.first else nullcontext():
                ranks.each(None)  # the first rank has the folder
                return run(config, *arguments, **options)

    return locked


def check_start(result: Path, marker: str, *others: Path, resume: bool, overwrite: bool) -> None:
    """Raise ValueError unless a run may start: if an earlier run exists, `resume` or `overwrite` is required.

    `result` is the folder that the run writes. `marker` is a file that every result contains, so that a folder with a user's
    files is never replaced. `others` are further folders of an earlier run.
    """
    if resume and overwrite:
        raise ValueError("--resume and --overwrite exclude each other; pass one of them")
    if current().first:
        for folder in (result, *others):
            clean_up_checkpoints(folder)
    current().each(None)
    if result.exists() and not (result.is_dir() and ((result / marker).is_file() or not any(result.iterdir()))):
        raise ValueError(
            f"{result}: its contents are not those of an earlier run; move them away, or set a different output_dir"
        )
    for folder in (*others, result):
        if os.path.ismount(folder):
            raise ValueError(f"{folder}: is a mount point, which cannot be replaced; mount its parent folder instead")
        if checkpoints(folder) and not (resume or overwrite):
            kind = "an unfinished run" if folder in others else "an earlier run"
            raise ValueError(f"{folder}: {kind} is there; continue it with --resume, or replace it with --overwrite")
        foreign = foreign_files(folder) if overwrite else []
        if foreign:
            raise ValueError(f"{foreign[0]}: was not written by the run, and --overwrite would delete it; move it away")


class Start(TypedDict):
    """How a stage starts: keyword arguments of `run_sft`, `run_rm` and `run_ppo`."""

    resume: bool
    overwrite: bool


def continued(checkpoint: Path) -> Start:
    """Return the arguments of a stage that continues from its checkpoint, or starts anew if there is none."""
    found = bool(checkpoints(checkpoint))
    return {"resume": found, "overwrite": not found}
