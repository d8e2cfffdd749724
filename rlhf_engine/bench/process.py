"""Cases in separate processes, which run at the same time and receive requests for steps in turn over pipes.

A case whose memory is measured needs its own process: resident memory that an earlier case left would count.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MB = 1e6


@dataclass
class Row:
    """One row of a result: a case, its times and, if measured, its memory."""

    name: str
    """Name of the case."""
    seconds: list[float] = field(default_factory=list)
    """One entry per round."""
    extra_mb: float | None = None
    """Peak resident memory above the baseline that the case set, in 1e6 bytes."""
    device_mb: float | None = None
    """Peak memory allocated by torch on a GPU, in 1e6 bytes."""
    error: str | None = None
    """Reason why there is no figure."""
    note: str = ""
    """Settings that a reader must know to interpret the figure."""

    @property
    def best(self) -> float:
        """Seconds of the fastest round."""
        return min(self.seconds)

    @property
    def median(self) -> float:
        """Median of the seconds."""
        return statistics.median(self.seconds)


class Session:
    """The worker's end of the pipe. A case calls `begin` before each step and `end` after it."""

    def __init__(self) -> None:
        # The protocol uses the original stdout; anything that a peer prints is redirected to stderr.
        self._out = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)
        self._baseline = self._started = 0.0

    def send(self, **message: object) -> None:
        """Send a message to the parent."""
        print(json.dumps(message), file=self._out, flush=True)

    def baseline(self, *, expected_bytes: int = 0) -> None:
        """Set the baseline of memory: what is resident now plus `expected_bytes` (gradients that every case must hold)."""
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to what is resident now
        self._baseline = _status_bytes("VmRSS") + expected_bytes

    def ready(self) -> None:
        """Report that the case is set up."""
        self.send(ready=True)

    def begin(self) -> bool:
        """Wait for the parent's request for a step; return False if it sends no more."""
        if sys.stdin.readline().strip() != "step":
            return False
        self._started = time.perf_counter()
        return True

    def end(self, *, peak_bytes: float = 0.0) -> None:
        """Send the seconds and the memory of a step.

        A step that resets VmHWM passes in `peak_bytes` the largest resident set that it read before a reset.
        """
        seconds = time.perf_counter() - self._started
        facts = {"seconds": seconds, "extra_mb": (max(_status_bytes("VmHWM"), peak_bytes) - self._baseline) / MB}
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_available():
            facts["device_mb"] = torch.cuda.max_memory_allocated() / MB
        self.send(**facts)


def _status_bytes(key: str) -> int:
    line = next(s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith(key))
    return int(line.split()[1]) * 1024


class Worker:
    """The parent's end of the pipe: one subprocess that runs `module:function(session, **kwargs)`."""

    FOLDER: Path | None = None
    """Folder in which the process starts, and from which it can import; None: that of this process."""

    def __init__(
        self, name: str, target: str, kwargs: dict[str, Any], *, start_limit: float, step_limit: float, note: str = ""
    ) -> None:
        self.row = Row(name, note=note)
        self._step_limit = step_limit
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115  closed in close
        command = [sys.executable, "-m", "rlhf_engine.bench.process", target, json.dumps(kwargs)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            cwd=self.FOLDER,
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._in, self._out = self._process.stdin, self._process.stdout
        self._read(start_limit, "start")

    def _read(self, limit: float, what: str) -> dict:
        if not select.select([self._out], [], [], limit)[0]:
            return self._give_up(f"{what} took more than {limit:.0f} s")
        line = self._out.readline()
        if not line:
            return self._give_up(
                f"the process died in its {what}, exit code {self._process.wait()}: {self._last_words()}"
            )
        message = json.loads(line)
        if "error" in message:
            return self._give_up(message["error"])
        return message

    def _last_words(self) -> str:
        self._log.seek(0)
        return next((line.strip() for line in reversed(self._log.readlines()) if line.strip()), "no output")

    def _give_up(self, reason: str) -> dict:
        self.row.error = reason
        self._process.kill()
        self._process.wait()
        return {}

    def step(self, *, count: bool = True) -> None:
        """Request a step; with `count`, its seconds are a sample."""
        if self.row.error:
            return
        self._in.write("step\n")
        self._in.flush()
        message = self._read(self._step_limit, "step")
        if message and count:
            self.row.seconds.append(message["seconds"])
        if message:
            self.row.extra_mb, self.row.device_mb = message["extra_mb"], message.get("device_mb")

    def close(self) -> Row:
        """End the process and return its row."""
        if not self.row.error:
            self._in.close()
            try:
                self._process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._log.close()
        return self.row


def alternate_workers(workers: Sequence[Worker], *, rounds: int, warmup: int = 1, slow: float = 15.0) -> list[Row]:
    """Run the workers' steps in alternation; memory is a worker's peak over all of its steps, warm-up included.

    A worker whose step takes more than `slow` seconds is measured in the first round only.
    """
    for index in range(warmup + rounds):
        for worker in workers:
            if not worker.row.seconds or worker.row.seconds[0] <= slow:
                worker.step(count=index >= warmup)
    return [worker.close() for worker in workers]


def _worker_main(target: str, kwargs: str) -> None:
    session = Session()
    module, function = target.split(":")
    try:
        getattr(importlib.import_module(module), function)(session, **json.loads(kwargs))
    except (ImportError, NotImplementedError) as error:  # the peer is not installed, or does not support this machine
        session.send(error=f"{type(error).__name__}: {str(error).splitlines()[0]}")


if __name__ == "__main__":
    _worker_main(*sys.argv[1:3])
