"""A disk under a folder that fails as its fault describes, and what a crash leaves in the folder.

Every operation on the folder that Python's audit events report is counted: opening, renaming, deleting, making folders; and
the writes of files, the writes of safetensors (which are in Rust) and the syncs of `files.disk`. A fault happens at a number.

A killed process leaves the folder as it is. A power cut leaves metadata as of an operation since the last sync, because
journals keep the order of such operations, and of a file what was synced or more: all, a part, or zeros in the place of a part.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random

import safetensors.torch
from safetensors import SafetensorError

from rlhf_engine import files

WINDOW = 40
"""Operations before a power cut whose metadata may be lost."""


class Killed(BaseException):
    """The end of the process, which no code of the engine catches."""


@dataclass(frozen=True)
class Fault:
    """A fault at operation `at`, counted from 1; with `lasting` also at all later ones."""

    kind: str
    at: int
    lasting: bool = False


Image = dict[str, bytes | None]
"""Contents of a folder by relative path; None for a folder."""

DISK_FAULTS = ("kill", "power_cut", "torn_write", "short_writes", "eio", "enospc", "sigterm")
_WRITES = frozenset(("write", "tensors"))
_GROWS = _WRITES | {"os.mkdir"}
"""Operations that need space."""


class FaultyDisk(files.Disk):
    """The disk of a folder during one attempt to run a stage. `seconds` is the duration of every operation."""

    def __init__(self, root: Path, fault: Fault | None, rng: Random, *, seconds: float = 0.0) -> None:
        self.root, self.fault, self.rng, self.seconds = root, fault, rng, seconds
        self.prefix = f"{root}/"
        self.vault = root.with_name(root.name + ".vault")
        self.count, self.time, self.busy = 0, 0.0, False
        self.image: Image | None = None
        """What the crash left; None before one."""
        self.fired = False
        self.durable: dict[int, bytes] = {}
        self.trees: list[dict[str, int | None]] = []
        self.kinds: dict[str, int] = {}

    # ---- files.Disk ----

    def now(self) -> float:
        return self.time

    def sync(self, path: Path) -> None:
        self.operation("sync", path)
        if path.is_file():
            self.durable[path.stat().st_ino] = path.read_bytes()
        if self.image is None and self.trees:
            self.trees = []
            with self.uncounted():
                self._remember()

    def delete(self, folder: Path) -> None:
        """Delete the files of a folder one at a time, each of which is an operation."""
        for path in reversed(_paths(folder)):
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        folder.rmdir()

    # ---- operations ----

    def operation(self, name: str, path: object) -> None:
        """Count an operation on `path`, and raise if its fault is due."""
        if self.image is not None or self.busy or not self.has(path) or _in_a_thread():
            return
        self.count += 1
        self.time += self.seconds
        self.kinds[name] = self.kinds.get(name, 0) + 1
        fault = self.fault
        if fault is None:
            return
        if fault.kind == "power_cut" and fault.at - WINDOW <= self.count:
            with self.uncounted():
                self._remember()
        if self.count == fault.at or (fault.lasting and self.count > fault.at):
            self._fail(fault.kind, name, str(path))

    def has(self, path: object) -> bool:
        if isinstance(path, bytes):
            path = os.fsdecode(path)
        if not isinstance(path, str | os.PathLike):
            return False
        text = os.path.abspath(path)
        return text.startswith(self.prefix) or text == str(self.root)

    def _fail(self, kind: str, name: str, path: str) -> None:
        match kind:
            case "eio":
                self.fired = True
                raise OSError(errno.EIO, os.strerror(errno.EIO), path)
            case "enospc" if name in _GROWS:
                self.fired = True
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
            case "sigterm" if self.count == self.fault.at:
                self.fired = True
                signal.raise_signal(signal.SIGTERM)
            case "kill" | "power_cut":
                self.die(kind)
            case "torn_write" if name not in _WRITES:
                self.die("kill")

    def write(self, name: str, path: object, size: int) -> tuple[int, bool]:
        """Count a write of `size` bytes; return how many of them are written, and whether the process ends after those."""
        before = self.count
        self.operation(name, path)
        fault = self.fault
        if self.count == before or fault is None or size < 2:
            return size, False
        if fault.kind == "torn_write" and self.count == fault.at:
            return self.rng.randrange(1, size), True
        if fault.kind == "short_writes" and self.count >= fault.at and name == "write":
            self.fired = True
            return self.rng.randrange(1, size), False
        return size, False

    # ---- crashes ----

    def die(self, kind: str) -> None:
        """Take the image that a crash leaves, and end the process."""
        self.fired = True
        self.image = self._after_power_cut() if kind == "power_cut" else read_tree(self.root)
        raise Killed

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Count no operation within the block, which is one of the simulator."""
        before, self.busy = self.busy, True
        try:
            yield
        finally:
            self.busy = before

    def _remember(self) -> None:
        tree: dict[str, int | None] = {}
        self.vault.mkdir(exist_ok=True)
        for path in _paths(self.root):
            name = str(path.relative_to(self.root))
            if path.is_dir():
                tree[name] = None
                continue
            number = path.stat().st_ino
            tree[name] = number
            kept = self.vault / str(number)
            if not kept.exists():
                os.link(path, kept)
        self.trees.append(tree)

    def _after_power_cut(self) -> Image:
        tree = self.rng.choice(self.trees)
        return {
            name: None if number is None else self._survives(number, (self.vault / str(number)).read_bytes())
            for name, number in tree.items()
        }

    def _survives(self, number: int, content: bytes) -> bytes:
        """Return what a power cut leaves of a file."""
        base = self.durable.get(number, b"")
        if content == base:
            return content
        if not content.startswith(base):
            base = b""
        rest = content[len(base) :]
        size = self.rng.randrange(len(rest) + 1)
        return base + self.rng.choice([rest, b"", rest[:size], rest[:size] + bytes(len(rest) - size)])

    # ---- the operations of this process ----

    @contextmanager
    def mounted(self) -> Iterator[None]:
        """Use this disk for `root` within the block; the state that a crash has left is in `root` afterwards."""
        _hook_audit_events()
        self.durable = {path.stat().st_ino: path.read_bytes() for path in _paths(self.root) if path.is_file()}
        before = files.disk, io.open, safetensors.torch.serialize_file
        opened = _opened(self, io.open)
        files.disk, safetensors.torch.serialize_file = self, _serialised(self, before[2])
        io.open = builtins.open = opened
        _mounted.append(self)
        try:
            yield
        finally:
            _mounted.remove(self)
            files.disk, io.open, safetensors.torch.serialize_file = before
            builtins.open = before[1]
            if self.image is not None:
                write_tree(self.root, self.image)
            shutil.rmtree(self.vault, ignore_errors=True)


def read_tree(root: Path) -> Image:
    """Return the contents of a folder."""
    return {str(path.relative_to(root)): None if path.is_dir() else path.read_bytes() for path in _paths(root)}


def write_tree(root: Path, image: Image) -> None:
    """Replace the contents of a folder."""
    for path in root.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name, content in image.items():
        if content is None:
            (root / name).mkdir()
        else:
            (root / name).write_bytes(content)


def _paths(root: Path) -> list[Path]:
    """Return what is in a folder, each folder before its contents."""
    found = []
    for folder, names, others in os.walk(root):
        found += [Path(folder, name) for name in (*names, *others)]
    return found


class _RawFile(io.FileIO):
    """An unbuffered file whose writes are operations of a disk."""

    def __init__(self, disk: FaultyDisk, path: str, mode: str) -> None:
        self.disk, self.place = disk, path
        super().__init__(path, mode)

    def write(self, data) -> int:
        view = memoryview(data).cast("B")
        size, dies = self.disk.write("write", self.place, len(view))
        super().write(view[:size])
        if dies:
            self.disk.die("kill")
        return size


def _opened(disk: FaultyDisk, real):
    """Return `open`, with files of the disk that count their writes."""

    def opened(file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, closefd=True, opener=None):
        if not set(mode) & set("wax+") or opener is not None or not disk.has(file):
            return real(file, mode, buffering, encoding, errors, newline, closefd, opener)
        raw = _RawFile(disk, os.fspath(file), mode.replace("b", "").replace("t", ""))
        if buffering == 0:
            return raw
        buffer = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        if "b" in mode:
            return buffer
        text = io.TextIOWrapper(buffer, encoding, errors, newline)
        text.mode = mode
        return text

    return opened


def _serialised(disk: FaultyDisk, real):
    """Return safetensors' `serialize_file` as one write of the disk, with its kind of error."""

    def serialised(tensors, filename, *arguments, **options):
        try:
            share, dies = disk.write("tensors", filename, 1 << 16)
        except OSError as error:
            message = f"Error while serializing: I/O error: {error.strerror} (os error {error.errno})"
            raise SafetensorError(message) from None
        real(tensors, filename, *arguments, **options)
        if dies:
            with disk.uncounted():
                os.truncate(filename, Path(filename).stat().st_size * share >> 16)
            disk.die("kill")

    return serialised


_mounted: list[FaultyDisk] = []
_EVENTS = frozenset(("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "open"))
"""Audit events that are operations on their first argument."""
_hooked = False


def _in_a_thread() -> bool:
    return threading.current_thread() is not threading.main_thread()


def _hook_audit_events() -> None:
    """Add the audit hook, which stays until the process ends."""
    global _hooked
    if not _hooked:
        _hooked = True
        sys.addaudithook(_on_event)


def _on_event(event: str, arguments: tuple) -> None:
    if _mounted and event in _EVENTS:
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        _mounted[-1].operation(event, arguments[0])
