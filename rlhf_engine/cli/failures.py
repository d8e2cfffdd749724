"""One line for the exception that ends a command, and the exit code: 2 for a user's mistake, 1 for a run that failed.

An exception of a library that no check foresaw is reported in one line too, with exit code 1 and the library's name.
"""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from types import TracebackType

from rlhf_engine.distributed.launch import process_count
from rlhf_engine.errors import is_out_of_memory

TRACEBACK = "--traceback"
MISTAKE, FAILED = 2, 1
LONGEST = 1_000
"""Characters of an error message without its notes; the middle of a longer one, such as a long value, is left out."""
_OURS = ("rlhf_engine", "rlhf_kernels")


class one_line_errors:
    """A context manager that ends in SystemExit with one line on stderr for any exception; with `whole`, after its traceback.

    SystemExit, KeyboardInterrupt and a missing package of the extra `engine` pass unchanged.
    """

    def __init__(self, *, whole: bool, packages: frozenset[str] = frozenset()) -> None:
        self.whole, self.packages = whole, packages

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, SystemExit | KeyboardInterrupt | GeneratorExit):
            return
        if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] in self.packages:
            return
        if self.whole:
            _print_traceback(error)
        from rlhf_engine.config.schema import shortened  # after the command has imported what it needs

        text, code = reported(error)
        line: str | None = f"{shortened(text, LONGEST - 60)}{notes(error)}"
        if process_count() > 1:
            from rlhf_engine.distributed.failure import report

            line = report(line, error)
        if line is not None:
            print(f"rlhf: {line}", file=sys.stderr)
        sys.exit(code)


def notes(error: BaseException) -> str:
    """Return the notes that a training session adds to the exception that ends it, such as what is saved."""
    return "".join(f"; {note}" for note in getattr(error, "__notes__", ()))


def reported(error: BaseException) -> tuple[str, int]:
    """Return the line of an exception and its exit code."""
    text, library = " ".join(str(error).split()), _library(error)
    if isinstance(error, FloatingPointError) and library is None:
        return text, FAILED
    if is_out_of_memory(error):
        return (
            f"out of memory: {text or type(error).__name__}; lower rollout.batch_size and the microbatch of the stage, set "
            "memory.gradient_checkpointing=true, or let `rlhf plan` find settings that fit",
            FAILED,
        )
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"the Python package {error.name} is not installed, and these settings need it", MISTAKE
    if isinstance(error, ValueError | OSError) and library is None:
        return text, MISTAKE
    where = "an error in rlhf itself" if library is None else f"an error in {library}"
    code = MISTAKE if isinstance(error, ValueError | OSError) else FAILED
    return f"{where}: {type(error).__name__}: {text}; {TRACEBACK} shows where it was raised", code


def _library(error: BaseException) -> str | None:
    """Return the name of the package whose code raised the exception; None for this project and the standard library."""
    frames = traceback.extract_tb(error.__traceback__)
    parts = Path(frames[-1].filename).parts if frames else ()
    if "site-packages" not in parts:
        return None
    package = parts[parts.index("site-packages") + 1].removesuffix(".py")
    return None if package in _OURS else package


def _print_traceback(error: BaseException) -> None:
    """Print the traceback with the original exceptions, which `raise ... from None` hides."""
    found: BaseException | None = error
    seen: set[int] = set()
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        found.__suppress_context__ = found.__cause__ is not None
        found = found.__cause__ or found.__context__
    traceback.print_exception(error)
