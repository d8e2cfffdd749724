"""Child processes of the soak test, one per core, and the form of its checks."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

CORES = min(2, os.cpu_count() or 1)


def call(arguments: list[str], seconds: float | None = None) -> tuple[int, str, str]:
    """Run a module of the tests in a process with one thread; return its exit code (-1: it took longer), output and errors."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    try:
        run = subprocess.run(
            [sys.executable, "-m", *arguments],
            capture_output=True,
            text=True,
            check=False,
            env=environment,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired as late:
        return -1, _text(late.stdout), _text(late.stderr)
    return run.returncode, run.stdout, run.stderr


def calls(commands: Iterable[list[str]], seconds: float) -> Iterator[tuple[list[str], tuple[int, str, str]]]:
    """Yield every command with its result, as they end; begin no further one after so many `seconds`."""
    waiting, running, end = iter(commands), {}, time.monotonic() + seconds
    with ThreadPoolExecutor(CORES) as pool:

        def begin() -> None:
            command = None if time.monotonic() >= end else next(waiting, None)
            if command is not None:
                running[pool.submit(call, command)] = command

        for _ in range(CORES):
            begin()
        while running:
            done: set[Future]
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                command = running.pop(future)
                begin()
                yield command, future.result()


def check(name: str, value: float, bound: float, *, at_least: bool = False, unit: str = "") -> dict[str, Any]:
    """Return a check as a section reports it."""
    met = value >= bound if at_least else value <= bound
    return {"name": name, "value": value, "bound": bound, "at_least": at_least, "unit": unit, "met": met}


def _text(output: bytes | str | None) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""
