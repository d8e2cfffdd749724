"""Reading and writing of a run's files: atomic writes of files and folders, and errors that name the file."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoConfig, PreTrainedConfig

from rlhf_engine.errors import foreign_errors

OPTIMIZER = "optimizer.safetensors"
"""File name of the optimizer's state in a checkpoint."""

_OTHER_FORMATS = {
    "adapter_config.json": "adapters of peft: merge them into their model with merge_and_unload() and save that",
    "pytorch_model*.bin": "weights in pickle files, which are not read: load it with transformers and save it again",
    "*.gguf": "a GGUF file, which is not read: give the original checkpoint",
}
"""Files of other formats, and what to do with them."""


def require(folder: Path, *names: str) -> None:
    """Raise ValueError with the first file that is missing in `folder`, and how to get it if a different format is there."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    for name in names:
        if not (folder / name).is_file():
            others = _OTHER_FORMATS.items() if name in ("config.json", "model.safetensors") else ()
            advice = next((f"; the folder holds {what}" for other, what in others if any(folder.glob(other))), "")
            raise ValueError(f"{folder}: the file {name} is missing{advice}")


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; raise ValueError with the file's name if it is not a JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: got {type(content).__name__}, expected an object")
    return content


def read_json_lines(path: Path) -> list[Any]:
    """Return the JSON values in the lines of a file. Only a line feed ends a line, not the other line breaks of Unicode."""
    with path.open("rb") as file:
        return [json.loads(line) for line in file if line.strip()]


def write_json(path: Path, content: object) -> None:
    """Write `content` as indented JSON."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_model_config(folder: str | Path, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Return transformers' config of a folder; raise ValueError with the path of config.json and transformers' error."""
    path = Path(folder) / "config.json"
    require(Path(folder), path.name)
    read_json(path)
    with remote_code_off(path, trust_remote_code), foreign_errors(str(path)):
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)


@contextmanager
def remote_code_off(path: Path, trusted: bool) -> Iterator[None]:
    """Name the setting that allows code of the model's folder, if an error in the block is that it is not `trusted`."""
    try:
        yield
    except ValueError as error:
        if trusted or "trust_remote_code" not in str(error.__cause__):
            raise
        raise ValueError(
            f"{path}: the model needs Python code from its folder (auto_map), which runs only with "
            "model.trust_remote_code=true; read that code first, because it can do anything that you can"
        ) from error


def read_tensors(path: Path, *, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Return the tensors of a safetensors file; raise ValueError with the file's name if it is broken."""
    try:
        return load_file(path, device=device)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file: {error}") from None


def with_new_file(path: str | Path, write: Callable[[Path], object]) -> None:
    """Write a file atomically: call `write(new)` on a path in the same folder, sync the file, and rename it to `path`."""
    path = Path(path)
    new, _ = _beside(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        write(new)
        _sync(new)
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)
    _sync(path.parent)


def with_new_folder(folder: str | Path, write: Callable[[Path], object]) -> None:
    """Replace a folder atomically: call `write(new)` on an empty folder next to it, sync the contents, and rename the folder.

    After a crash `folder` is the old or the new one, or it is absent and `recover` renames one of the two to it.

    Raises:
        OSError: for a failed write.
    """
    folder = Path(folder)
    new, old = _beside(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    recover(folder)
    for left in (new, old):
        if left.exists():
            shutil.rmtree(left)
    new.mkdir()
    whole = False
    try:
        write(new)
        for path in [*new.rglob("*"), new]:
            _sync(path)
        whole = True
    except SafetensorError as error:
        raise OSError(f"{folder}: could not be written: {error}") from None
    finally:
        if not whole:
            shutil.rmtree(new)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    _sync(folder.parent)
    if old.exists():
        shutil.rmtree(old)


def recover(folder: Path) -> None:
    """Complete a `with_new_folder` that crashed after its first rename; otherwise do nothing.

    The old folder is renamed only after the new one is complete, so if both exist and `folder` does not, the new one is renamed
    to `folder`. A new folder without an old one may be incomplete and is never used. An old folder next to `folder` is deleted.
    """
    new, old = _beside(folder)
    if not old.is_dir():
        return
    if folder.exists():
        shutil.rmtree(old)
        return
    (new if new.is_dir() else old).rename(folder)
    _sync(folder.parent)


def remove(folder: Path) -> None:
    """Delete a folder and the remains of an interrupted `with_new_folder` of it, if they exist."""
    for path in (folder, *_beside(folder)):
        if path.is_dir():
            shutil.rmtree(path)


def _beside(folder: Path) -> tuple[Path, Path]:
    return folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
