"""Measurement of cases in alternation; a case whose memory is measured runs in a separate process.

Omitted on purpose: statistics other than best and median, pinning, warm-up detection. A ratio is reliable because its two
cases ran in alternation, a fraction of a second apart, and not because the machine was idle.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import importlib.metadata
import json
import os
import platform
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "rlhf-kernels", "trl", "liger-kernel", "cut-cross-entropy", "numpy")
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
        return min(self.seconds)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class Check:
    """A measured value, usually a ratio, and its bound."""

    name: str
    value: float | None
    """None if one of its cases has no figure; the bound is then not met."""
    bound: float
    at_least: bool = False
    """True: the bound is a minimum; False: it is a maximum."""

    @property
    def met(self) -> bool:
        if self.value is None:
            return False
        return self.value >= self.bound if self.at_least else self.value <= self.bound


# ---- in one process: short cases whose memory is not measured ----


def alternate(cases: dict[str, Callable[[], object]], *, rounds: int, round_seconds: float = 0.05) -> list[Row]:
    """Time the cases in alternation for `rounds` rounds; a short case is repeated to fill `round_seconds` in a round."""
    repeats = {}
    for name, run in cases.items():
        run()
        start = time.perf_counter()
        run()
        repeats[name] = max(1, min(10_000, int(round_seconds / max(time.perf_counter() - start, 1e-7))))
    rows = {name: Row(name) for name in cases}
    for _ in range(rounds):
        for name, run in cases.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                run()
            rows[name].seconds.append((time.perf_counter() - start) / repeats[name])
    return list(rows.values())


# ---- one process per case: all processes run at the same time and receive requests for steps in turn over pipes ----


class Session:
    """The worker's end of the pipe. A case calls `begin` before each step and `end` after it."""

    def __init__(self) -> None:
        # The protocol uses the original stdout; anything that a peer prints is redirected to stderr.
        self._out = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)
        self._baseline = self._started = 0.0

    def send(self, **message: object) -> None:
        print(json.dumps(message), file=self._out, flush=True)

    def baseline(self, *, expected_bytes: int = 0) -> None:
        """Set the baseline of memory: what is resident now plus `expected_bytes` (gradients that every case must hold)."""
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to what is resident now
        self._baseline = _status_bytes("VmRSS") + expected_bytes

    def ready(self) -> None:
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

    def __init__(self, name: str, target: str, kwargs: dict, *, start_limit: float, step_limit: float, note: str = ""):
        self.row = Row(name, note=note)
        self._step_limit = step_limit
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115  closed in close
        command = [sys.executable, "-m", "benchmarks.harness", target, json.dumps(kwargs)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            cwd=Path(__file__).parents[1],
        )
        self._read(start_limit, "start")

    def _read(self, limit: float, what: str) -> dict:
        if not select.select([self._process.stdout], [], [], limit)[0]:
            return self._give_up(f"{what} took more than {limit:.0f} s")
        line = self._process.stdout.readline()
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
        if self.row.error:
            return
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        message = self._read(self._step_limit, "step")
        if message and count:
            self.row.seconds.append(message["seconds"])
        if message:
            self.row.extra_mb, self.row.device_mb = message["extra_mb"], message.get("device_mb")

    def close(self) -> Row:
        if not self.row.error:
            self._process.stdin.close()
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


# ---- report ----


def machine() -> dict:
    """Return versions, processor, threads and load, which a reader needs to interpret a figure."""
    import torch

    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "versions": versions,
        "load_average": os.getloadavg()[0],
        "time": time.strftime("%Y-%m-%dT%H:%M:%S"),
    }


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def ratio(row: Row, base: Row) -> float | None:
    """Return the median over rounds of `row`'s seconds divided by `base`'s in the same round, so a slowdown affects both."""
    if row.error or base.error:
        return None
    # A slow case has only its first round.
    return statistics.median(a / b for a, b in zip(row.seconds, base.seconds, strict=False))


def report(
    name: str, title: str, rows: Sequence[Row], *, floor: Row | None = None, checks: Sequence[Check] = ()
) -> None:
    """Print the table of one group of rows and append it to `results/<name>.json`."""
    print(f"\n## {title}")
    memory = any(row.extra_mb is not None for row in rows)
    print(f"{'':44}{'best':>11}{'median':>11}" + f"{'x floor':>9}" * bool(floor) + f"{'extra MB':>10}" * memory)
    for row in rows:
        if row.error:
            print(f"{row.name:44}{row.error}")
            continue
        line = f"{row.name:44}{_seconds(row.best):>11}{_seconds(row.median):>11}"
        line += f"{ratio(row, floor):9.2f}" if floor else ""
        line += f"{row.extra_mb:10.0f}" if row.extra_mb is not None else ""
        print(line + ("  " + row.note if row.note else ""))
    for check in checks:
        sign = ">=" if check.at_least else "<="
        value = "not measured" if check.value is None else f"{check.value:.3g}"
        print(f"  {'ok  ' if check.met else 'MISS'} {check.name}: {value} ({sign} {check.bound:g})")
    path = RESULTS / f"{name}.json"
    groups = json.loads(path.read_text())["groups"] if path.exists() else []
    groups.append(
        {
            "title": title,
            "floor": floor.name if floor else None,
            "rows": [_record(row, floor) for row in rows],
            "checks": [asdict(check) | {"met": check.met} for check in checks],
        }
    )
    path.write_text(json.dumps({"machine": machine(), "groups": groups}, indent=1) + "\n")


def _record(row: Row, floor: Row | None) -> dict:
    if row.error:
        return {"name": row.name, "error": row.error}
    relative = {"ratio_to_floor": ratio(row, floor)} if floor else {}
    return asdict(row) | {"best": row.best, "median": row.median} | relative


def _seconds(value: float) -> str:
    for unit, scale in (("s", 1), ("ms", 1e-3)):
        if value >= scale:
            return f"{value / scale:.3f} {unit}"
    return f"{value / 1e-6:.1f} us"


if __name__ == "__main__":
    _worker_main(*sys.argv[1:3])
