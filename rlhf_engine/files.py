"""Reading and writing of a run's files: atomic writes of files and folders, a lock, and errors that name the file."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoConfig, PreTrainedConfig

from rlhf_engine.config.schema import shortened
from rlhf_engine.errors import foreign_errors

OPTIMIZER = "optimizer.safetensors"
"""File name of the optimizer's state in a checkpoint."""

LOCK = ".lock"
"""File in an output folder while a process writes into it."""

_OTHER_FORMATS = {
    "adapter_config.json": "adapters of peft: merge them into their model with merge_and_unload() and save that",
    "pytorch_model*.bin": "weights in pickle files, which are not read: load it with transformers and save it again",
    "*.gguf": "a GGUF file, which is not read: give the original checkpoint",
}
"""Files of other formats, and what to do with them."""


class FolderLock:
    """Context manager that lets one process at a time write into an output folder; a killed process releases it.

    The lock is the file `name` in the folder, which is deleted at the end, as is a folder that the lock created and that is
    still empty.

    Raises:
        ValueError: a different process holds the lock, or the folder cannot be written.
    """

    def __init__(self, folder: str | Path, name: str = LOCK) -> None:
        self.folder = Path(folder)
        self.path = self.folder / name
        self.descriptor = -1
        self.created: list[Path] = []

    def __enter__(self) -> Self:
        parents = [self.folder, *self.folder.parents]
        try:
            self.created = [parent for parent in parents if not parent.exists()]
            self.folder.mkdir(parents=True, exist_ok=True)
            while not self._is_current():
                self.descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
                self._lock()
        except OSError as error:
            raise ValueError(
                f"output_dir: {self.folder} cannot be written ({error}); set a different output_dir"
            ) from error
        os.ftruncate(self.descriptor, 0)
        os.write(self.descriptor, f"{os.getpid()} on {platform.node()}".encode())
        return self

    def _is_current(self) -> bool:
        """Return whether the open file is the one in the folder: its previous holder may have deleted it before the lock."""
        if self.descriptor < 0:
            return False
        try:
            current = os.path.samestat(os.fstat(self.descriptor), self.path.stat())
        except FileNotFoundError:
            current = False
        if not current:
            os.close(self.descriptor)
        return current

    def _lock(self) -> None:
        try:
            fcntl.lockf(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            holder = os.read(self.descriptor, 200).decode(errors="replace")
            os.close(self.descriptor)
            raise ValueError(
                f"{self.folder}: process {holder} is writing there; wait for its end, or set a different output_dir"
            ) from None

    def __exit__(self, *_: object) -> None:
        self.path.unlink(missing_ok=True)
        os.close(self.descriptor)
        for folder in self.created:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


class Disk:
    """The operations on which the safety of a run's files depends. Tests replace `disk` to simulate faults."""

    def sync(self, path: Path) -> None:
        """Write a file or a folder to the device, and let later reads of a file come from there."""
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            if hasattr(os, "posix_fadvise") and not path.is_dir():
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        """Rename a file or a folder."""
        source.replace(target)

    def delete(self, folder: Path) -> None:
        """Delete a folder with its contents."""
        shutil.rmtree(folder)

    def now(self) -> float:
        """Return the seconds of a clock that never goes back."""
        return time.monotonic()

    def digest(self, path: Path) -> str:
        """Return the SHA-256 of a file, as `sha256sum` prints it."""
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


disk = Disk()


def now() -> float:
    """Return the time of the disk's clock, by which checkpoints and metrics are due."""
    return disk.now()


_HUB = "; names of the Hub are not downloaded: save the model and its tokenizer to a folder with save_pretrained"
"""Advice for a model's folder that does not exist."""


def require(folder: Path, *names: str) -> None:
    """Raise ValueError with the first file that is missing in `folder`, and how to get it if a different format is there."""
    if not folder.is_dir():
        # The name of a model on the Hub has one or two parts.
        named = not folder.exists() and not folder.is_absolute() and len(folder.parts) <= 2
        advice = _HUB if named and not {"config.json", "tokenizer_config.json"}.isdisjoint(names) else ""
        raise ValueError(f"{folder}: no such folder{advice}")
    for name in names:
        if not (folder / name).is_file():
            others = _OTHER_FORMATS.items() if name in ("config.json", "model.safetensors") else ()
            advice = next((f"; the folder holds {what}" for other, what in others if any(folder.glob(other))), "")
            raise ValueError(f"{folder}: the file {name} is missing{advice}")


_NESTED = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[{]|[\]}]', re.DOTALL)
_DEEPEST = 400
"""Most arrays and objects of JSON inside each other."""


def parse_json(text: str | bytes, pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """Return the value of a JSON text. `pairs_hook` makes each object from its pairs of name and value.

    Raises:
        ValueError: the text is not JSON, or is nested more than 400 levels deep. Python's parser raises RecursionError for
            deep nesting, in a state in which a finalizer that runs by chance fails too and prints a traceback.
    """
    content = text.encode(errors="surrogatepass") if isinstance(text, str) else text
    depth = 0
    if content.count(b"[") + content.count(b"{") > _DEEPEST:
        for found in _NESTED.finditer(content):
            depth += {b"[": 1, b"{": 1, b"]": -1, b"}": -1}.get(found[0], 0)
            if depth > _DEEPEST:
                raise ValueError(f"nested too deeply, more than {_DEEPEST} levels")
    return json.loads(text, object_pairs_hook=pairs_hook)


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; raise ValueError with the file's name if it is not a JSON object."""
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: got {type(content).__name__}, expected an object")
    return content


def read_json_lines(path: Path) -> list[Any]:
    """Return the JSON values in the lines of a file. Only a line feed ends a line, not the other line breaks of Unicode."""
    with path.open("rb") as file:
        return [parse_json(line) for line in file if line.strip()]


def write_json(path: Path, content: object) -> None:
    """Write `content` as indented JSON."""
    path.write_text(json_text(content), encoding="utf-8")


def json_text(content: object) -> str:
    """Return what `write_json` writes."""
    return json.dumps(content, indent=2) + "\n"


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
    """Return the tensors of a safetensors file.

    Raises:
        ValueError: the file is broken, or a number in it is not finite. The message names the file and the tensor.
    """
    try:
        tensors = load_file(path, device=device)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file: {error}") from None
    broken = next((name for name, tensor in tensors.items() if not is_finite(tensor)), None)
    if broken is not None:
        raise ValueError(f"{path}: the tensor {shortened(broken, 200)} is not finite; restore the file from a copy")
    return tensors


def is_finite(tensor: torch.Tensor) -> bool:
    """Return whether all numbers of a tensor are finite. Unlike `isfinite().all()`, this needs no memory."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    least, largest = torch.aminmax(tensor.detach())  # both are NaN if a number is
    return bool(least.isfinite() & largest.isfinite())


def with_new_file(path: str | Path, write: Callable[[Path], object]) -> None:
    """Write a file atomically: call `write(new)` on a path in the same folder, sync the file, and rename it to `path`."""
    path = _target(Path(path))
    new, _ = _siblings(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        write(new)
        disk.sync(new)
        disk.rename(new, path)
    finally:
        new.unlink(missing_ok=True)
    disk.sync(path.parent)


def with_new_folder(
    folder: str | Path,
    write: Callable[[Path], object],
    *,
    check: Callable[[Path], object] | None = None,
    retire: Callable[[Path], object] | None = None,
) -> None:
    """Replace a folder atomically: call `write(new)` on an empty folder next to it, sync the contents, and rename the folder.

    `check(new)` is called on the synced folder and may raise, for example if it does not read back what was written.
    `retire(old)` gets the replaced folder, which is deleted if it is still there afterwards. A link is followed: the folder
    that it refers to is replaced.

    After a crash `folder` is the old or the new one, or it is absent and `recover` renames one of the two to it.

    Raises:
        OSError: for a failed write; `folder` is then as before.
    """
    folder = _target(Path(folder))
    if os.path.ismount(folder):
        raise OSError(f"{folder} is a mount point, which cannot be replaced; mount the folder that contains it instead")
    new, old = _siblings(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    recover(folder)
    for left in (new, old):
        if left.exists():
            disk.delete(left)
    new.mkdir()
    whole = False
    try:
        write(new)
        for path in [*new.rglob("*"), new]:
            disk.sync(path)
        if check is not None:
            check(new)
        whole = True
    except SafetensorError as error:
        raise _os_error(folder, error) from None
    finally:
        if not whole:
            disk.delete(new)
    _exchange(folder, new, old)
    if old.exists() and retire is not None:
        retire(old)
    if old.exists():
        disk.delete(old)


def _exchange(folder: Path, new: Path, old: Path) -> None:
    """Rename `folder` to `old` and `new` to `folder`; undo the first if the second fails."""
    replaced = folder.exists()
    if replaced:
        disk.rename(folder, old)
    try:
        disk.rename(new, folder)
    except OSError:
        if replaced:
            disk.rename(old, folder)
        disk.delete(new)
        raise
    disk.sync(folder.parent)


def _os_error(folder: Path, error: SafetensorError) -> OSError:
    """Return an OSError with the number of a failed write of safetensors, whose message ends in `(os error 28)`."""
    found = re.search(r"os error (\d+)", str(error))
    if found is None:
        return OSError(f"{folder}: could not be written: {error}")
    return OSError(int(found[1]), os.strerror(int(found[1])), str(folder))


def is_full(error: BaseException) -> bool:
    """Return whether an error is that of a full disk or an exhausted quota."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def recover(folder: Path) -> None:
    """Complete a `with_new_folder` that crashed after its first rename; otherwise do nothing.

    The old folder is renamed only after the new one is complete, so if both exist and `folder` does not, the new one is renamed
    to `folder`. A new folder without an old one may be incomplete and is never used. An old folder next to `folder` is deleted.
    """
    folder = _target(folder)
    new, old = _siblings(folder)
    if not old.is_dir():
        return
    if folder.exists():
        disk.delete(old)
        return
    disk.rename(new if new.is_dir() else old, folder)
    disk.sync(folder.parent)


def clean_up(folder: Path) -> None:
    """Complete or undo an interrupted `with_new_folder` or `remove`. No other process may be writing the folder."""
    recover(folder)
    new, _ = _siblings(_target(folder))
    if new.is_dir():
        disk.delete(new)


def remove(folder: Path) -> None:
    """Delete a folder if it exists. After a crash it is complete or absent, once `clean_up` has deleted the rest."""
    clean_up(folder)
    target = _target(folder)
    new, _ = _siblings(target)
    if target.is_dir():
        disk.rename(target, new)
        disk.delete(new)
    if folder.is_symlink():
        folder.unlink()


def _target(folder: Path) -> Path:
    """Return the folder that a link refers to, or else `folder`."""
    return folder.resolve() if folder.is_symlink() else folder


def _siblings(folder: Path) -> tuple[Path, Path]:
    return folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
