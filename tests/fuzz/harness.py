"""Running of cases: what a case is, the limits on its time, its memory and its message, and the report of a fault."""

from __future__ import annotations

import contextlib
import faulthandler
import io
import resource
import signal
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import ClassVar

from rlhf_engine.cli import ENGINE
from rlhf_engine.cli.failures import LONGEST, MISTAKE, one_line_errors

SECONDS = 10
"""Limit on the processor time of a case."""
WAITING = 600
"""Limit on the time of a case, which includes that of other processes on a busy machine."""
MEGABYTES = 512
"""Limit on the growth of resident memory in a case."""
_ADDRESSES = 8 << 30
"""Limit on the growth of the address space in a case, so that a fault does not exhaust the machine."""


@dataclass(frozen=True)
class Case:
    """Changes to the valid files of a kind, and overrides of the config."""

    files: Mapping[str, bytes | None] = field(default_factory=dict)
    """New content by path; None deletes the file."""
    overrides: tuple[str, ...] = ()


class Wrong(AssertionError):
    """A case was accepted with a result that differs from its content."""


class Kind(ABC):
    """Valid files, seeded changes of them, and the function that a command calls with them."""

    name: ClassVar[str]
    share: ClassVar[int]
    """Cases of this kind per 100 cases."""
    accepted: bool = False
    """Whether the last case was accepted."""

    def __init__(self, folder: Path) -> None:
        """Write the valid files into `folder`."""
        self.folder = folder

    @abstractmethod
    def case(self, random: Random) -> Case:
        """Return a case; equal random numbers give equal cases."""

    @abstractmethod
    def run(self, case: Case) -> None:
        """Call what the command calls; raise `Wrong` if it accepts the case and its result is not that of the content."""

    def names(self, case: Case) -> Collection[str]:
        """Return texts of which an error must contain one, such as the names of the files."""
        return [str(self.folder)]


class _Hang(GeneratorExit):
    """The time of a case is over. `one_line_errors` lets this type pass, and no code of the project catches it."""


def _on_alarm(signum: int, frame: object) -> None:
    raise _Hang


def run_case(kind: Kind, seed: int, number: int) -> str | None:
    """Run one case; return what is wrong, or None."""
    kind.accepted = False
    case = kind.case(Random(f"{kind.name} {seed} {number}"))
    before = {name: _content(kind.folder / name) for name in case.files}
    _write(kind.folder, case.files)
    try:
        return _judge(kind, case)
    finally:
        _write(kind.folder, before)


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _write(folder: Path, contents: Mapping[str, bytes | None]) -> None:
    for name, content in contents.items():
        if content is None:
            (folder / name).unlink(missing_ok=True)
        else:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)


def _judge(kind: Kind, case: Case) -> str | None:
    errors = io.StringIO()
    before, start = _resident("VmRSS"), time.process_time()
    try:
        with _limits(), contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            with one_line_errors(whole=False, packages=ENGINE):
                kind.run(case)
            code = 0
    except SystemExit as exit_:
        code = exit_.code
    except _Hang:
        return f"no end after {SECONDS} s of processor time"
    except BaseException as error:  # one_line_errors lets interrupts pass, which no input may cause
        if isinstance(error, KeyboardInterrupt):
            raise
        return f"{type(error).__name__}: {error}"
    grown = (_resident("VmHWM") - before) / 1024
    if grown > MEGABYTES:
        return f"memory grew by {grown:,.0f} MB in {time.process_time() - start:.1f} s"
    kind.accepted = code == 0
    return None if code == 0 else _fault_of(errors.getvalue(), code, kind.names(case))


def _fault_of(message: str, code: object, names: Collection[str]) -> str | None:
    """Return what is wrong with a refusal; None if nothing is."""
    shown = message if len(message) < 2_000 else f"{message[:1_500]} ... {message[-400:]}"
    if code != MISTAKE or "rlhf: an error in " in message:
        return f"exit code {code}: {shown}"
    if not message.startswith("rlhf: ") or message.count("\n") != 1:
        return f"not one line: {shown}"
    if len(message) > LONGEST + len("rlhf: \n"):
        return f"{len(message):,} characters: {shown}"
    squeezed = "".join(message.split())  # the command joins lines
    named = any("".join(name.split()) in squeezed for name in names)
    return None if named else f"names none of {', '.join(names)}: {shown}"


@contextlib.contextmanager
def _limits() -> Iterator[None]:
    """Limit time and address space. Code that does not return to Python ends the process, with the stacks on stderr."""
    handler = signal.signal(signal.SIGPROF, _on_alarm)
    faulthandler.dump_traceback_later(WAITING, exit=True)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    space = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_resident("VmSize") * 1024 + _ADDRESSES, space[1]))
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM counts from now
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, space)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGPROF, handler)


def _resident(field: str) -> int:
    """Return a size of this process in KiB."""
    status = Path("/proc/self/status").read_text()
    return int(status[status.index(field) :].split(None, 2)[1])


@dataclass
class Report:
    """Counts of the cases of one call."""

    accepted: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    seconds: Counter[str] = field(default_factory=Counter)
    """Processor time of all cases of each kind."""
    slowest: dict[str, float] = field(default_factory=dict)
    """Processor time of the slowest case of each kind."""
    faults: list[str] = field(default_factory=list)
    """One text per fault, with the command that repeats it."""

    def add_fault(self, name: str, number: int, seed: int, what: str) -> None:
        self.faults.append(f"{name}: {what}\n    python -m tests.fuzz --seed {seed} --kind {name} --case {number}")

    def table(self) -> str:
        """Return a Markdown table of the counts."""
        lines = ["| kind | cases | accepted | refused | mean, ms | slowest, s |", "|---|---:|---:|---:|---:|---:|"]
        for name in sorted(self.slowest):
            cases = self.accepted[name] + self.refused[name]
            counts = f"{cases:,} | {self.accepted[name]:,} | {self.refused[name]:,}"
            lines.append(f"| {name} | {counts} | {1_000 * self.seconds[name] / cases:.1f} | {self.slowest[name]:.2f} |")
        return "\n".join(lines)
