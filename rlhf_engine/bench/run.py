"""A run of suites: every case is checked, measured and on disk before the next suite begins."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rlhf_engine.bench import cases
from rlhf_engine.bench.cases import Case
from rlhf_engine.bench.machine import device_name, machine
from rlhf_engine.bench.report import FORMAT, write
from rlhf_engine.bench.room import available_bytes, peak_of
from rlhf_engine.bench.samples import spread
from rlhf_engine.bench.shapes import Shape, fields_of
from rlhf_engine.bench.timing import LimitCalls, Timer, rounds_of
from rlhf_engine.planner import ModelShape
from rlhf_engine.planner.report import size

Log = Callable[[str], None]


class Batch(NamedTuple):
    """Sizes of a PPO update."""

    prompts: int
    prompt: int
    """Tokens of a prompt."""
    response: int
    """Tokens of a response."""
    epochs: int
    microbatch: int
    """Sequences of maximum length in one pass."""


@dataclass(frozen=True)
class Effort:
    """How long a run takes."""

    name: str
    rounds: int
    seconds: float
    """Seconds of a call in a round, or one call if it is longer."""
    tokens: int
    """Tokens of the cases on logits and hidden states, on a CPU."""
    rollout: tuple[int, int]
    """Sequences and positions of the cases on numbers per token, on a CPU."""
    batch: Batch
    """Sizes of an update, on a CPU."""
    updates: int


EFFORTS = {
    "quick": Effort("quick", 7, 0.03, 256, (128, 1024), Batch(16, 32, 32, 2, 8), 3),
    "standard": Effort("standard", 11, 0.1, 1024, (512, 1024), Batch(32, 32, 64, 4, 8), 5),
    "full": Effort("full", 21, 0.2, 2048, (512, 4096), Batch(64, 64, 128, 4, 8), 7),
}
EAGER_ROUNDS = 3
"""Rounds in which eager PyTorch is timed too; it is often many times slower."""
GPU_TOKENS, GPU_ROLLOUT, GPU_BATCH = 8192, (512, 8192), Batch(64, 1024, 1024, 4, 4)
"""Sizes on a GPU, for any effort: smaller ones do not fill it."""


Suite = Callable[["Run"], Iterator[list[dict[str, Any]]]]
"""A suite yields the records of its cases whenever there is something new to write."""


class GateError(FloatingPointError):
    """A case whose error against float64 exceeds its bound; its time would have no meaning."""


@dataclass(frozen=True)
class Settings:
    """What a run measures."""

    suites: tuple[str, ...]
    device: torch.device
    dtype: torch.dtype
    effort: Effort
    model: str | None = None
    """A name or a folder; None: one that fits the device and the suite."""
    tokens: int | None = None
    hidden: int | None = None
    vocab: int | None = None

    def record(self) -> dict[str, Any]:
        """Return the settings as plain values."""
        return {
            "suites": list(self.suites),
            "device": self.device.type,
            "dtype": str(self.dtype).removeprefix("torch."),
            "effort": self.effort.name,
            "model": self.model,
            "tokens": self.tokens,
            "hidden": self.hidden,
            "vocab": self.vocab,
        }

    @property
    def batch(self) -> Batch:
        """Sizes of an update."""
        return GPU_BATCH if self.device.type == "cuda" else self.effort.batch

    @property
    def trained(self) -> str:
        """Name of the model whose updates are measured."""
        return self.model or ("qwen2.5-1.5b" if self.device.type == "cuda" else "llama-7m")

    def shapes(self) -> tuple[Shape, Shape]:
        """Return the shape of the cases on logits and hidden states, and that of the cases on numbers per token."""
        gpu = self.device.type == "cuda"
        name = self.model or ("qwen2.5-7b" if gpu else "gpt2")
        model = ModelShape.from_fields(fields_of(name), name)
        tokens = self.tokens or (GPU_TOKENS if gpu else self.effort.tokens)
        shape = Shape.of(model, tokens, hidden=self.hidden, vocab=self.vocab)
        b, t = GPU_ROLLOUT if gpu else self.effort.rollout
        if self.tokens:
            b, t = shape.sequences, shape.positions
        return shape, Shape(b * t, shape.hidden, shape.vocab, t)


class Run:
    """A run and its record, which is on disk after every round."""

    def __init__(self, settings: Settings, folder: Path, log: Log) -> None:
        self.settings, self.folder, self.log = settings, folder, log
        self.timer = Timer(settings.device)
        self.record: dict[str, Any] = {
            "format": FORMAT,
            "device": device_name(settings.device),
            "machine": machine(),
            "settings": settings.record(),
            "started": time.strftime("%Y-%m-%dT%H:%M:%S"),
            "finished": None,
            "stopped": None,
            "limits": {"copy": [], "product": [], "copy_bytes": 0, "product_flops": 0},
            "suites": {},
        }

    def save(self) -> None:
        """Write bench.json and bench.md."""
        for case in (case for suite in self.record["suites"].values() for case in suite["cases"]):
            if "seconds" in case and "bytes" in case:
                case["limit_seconds"] = self._least_seconds(case["bytes"], case["flops"])
        write(self.record, self.folder)

    def limits(self) -> LimitCalls:
        """Return the calls whose times are the limits, and record what they move and compute."""
        calls = LimitCalls(self.settings.device, self.settings.dtype)
        self.record["limits"] |= {"copy_bytes": 2 * calls.bytes, "product_flops": 2 * calls.n**3}
        return calls

    def add_limits(self, calls: LimitCalls) -> None:
        """Measure the limits once more."""
        for name, took in calls.measure(self.timer).items():
            self.record["limits"][name].append(took)

    def _least_seconds(self, moved: int, flops: int) -> float:
        """Return the least time of moving bytes and of FLOPs, which can overlap, at the best rates of the run."""
        found = self.record["limits"]
        copy, product = min(found["copy"]) / found["copy_bytes"], min(found["product"]) / found["product_flops"]
        return max(moved * copy, flops * product)

    def run(self, suites: Mapping[str, Suite]) -> None:
        """Run the suites in order.

        Raises:
            GateError: a case failed its comparison with float64.
            KeyboardInterrupt: with the path of what was measured so far.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in self.settings.suites:
            part: dict[str, Any] = {"state": "running", "cases": []}
            self.record["suites"][name] = part
            start = time.perf_counter()
            try:
                for part["cases"] in suites[name](self):
                    part["seconds"] = time.perf_counter() - start
                    self.save()
                part["state"] = "done"
            except KeyboardInterrupt as interrupt:
                part["state"] = "interrupted"
                self.save()
                interrupt.args = (f"interrupted; what was measured so far is in {self.folder / 'bench.json'}",)
                raise
            except GateError as error:
                part["state"], self.record["stopped"] = "stopped", str(error)
                self.save()
                raise
            self.log(f"{name}: {len(part['cases'])} cases in {part.get('seconds', 0.0):.0f} s")
        self.record["finished"] = time.strftime("%Y-%m-%dT%H:%M:%S")
        self.save()


def gated(case: Case, device: torch.device, backend: str) -> cases.Gate:
    """Return the comparison of a case with float64.

    Raises:
        GateError: the error exceeds its bound.
    """
    gate = cases.check(case, device)
    if not gate.passed:
        raise GateError(
            f"{case.name}, {case.shape}, backend {backend}: the error against float64 is {gate.error:.3e}, expected at most "
            f"{gate.bound:.3e} (eager PyTorch: {gate.eager:.3e}); its times would have no meaning"
        )
    return gate


def measure(run: Run, found: Sequence[Case]) -> Iterator[list[dict[str, Any]]]:
    """Yield the records of the cases after the checks, the memory measurements and every round.

    A case that needs more memory than the device has free is skipped.

    Raises:
        GateError: an error exceeds its bound.
    """
    device, chosen = run.settings.device, cases.backends(run.settings.device)
    records, kept = [], []
    free = available_bytes(device)
    for case in found:
        record: dict[str, Any] = {"name": case.name, "op": case.op, "shape": case.shape, "backend": chosen[case.op]}
        record |= {"bytes": case.moved, "flops": case.flops}
        records.append(record)
        if case.need > free:
            record["skipped"] = f"needs {size(case.need)} of memory, {size(free)} are free"
            continue
        record["gate"] = asdict(gated(case, device, record["backend"]))
        kept.append((case, record))
        yield records
    for group in _groups(kept, free):
        yield from _timed(run, group, records)


def _groups(kept: list[tuple[Case, dict[str, Any]]], free: int) -> Iterator[list[tuple[Case, dict[str, Any]]]]:
    """Yield the cases in groups whose tensors fit the memory together, so that the cases of a group can alternate."""
    group: list[tuple[Case, dict[str, Any]]] = []
    for one in kept:
        if group and sum(case.need for case, _ in (*group, one)) > free // 2:
            yield group
            group = []
        group.append(one)
    if group:
        yield group


def _timed(
    run: Run, group: list[tuple[Case, dict[str, Any]]], records: list[dict[str, Any]]
) -> Iterator[list[dict[str, Any]]]:
    """Measure peaks, then time the cases of a group in rounds, each next to eager PyTorch."""
    device, effort = run.settings.device, run.settings.effort
    calls: dict[str, Callable[[], object]] = {}
    for case, record in group:
        inputs = case.make(case.tokens, device)
        for backend in ("auto", "reference") if case.eager else ("auto",):
            call = case.step(inputs, backend)
            call()  # keeps what a first call compiles and caches out of the peak
            for leaf in case.leaves:
                inputs[leaf].grad = None
            record["peak_bytes" if backend == "auto" else "eager_peak_bytes"] = peak_of(call, device)
            calls[f"{case.name}/{backend}"] = call
    few = {name for name in calls if name.endswith("/reference")}
    options = {"rounds": effort.rounds, "seconds": effort.seconds}
    limits, found = run.limits(), run.record["limits"]
    for series in rounds_of(calls, run.timer, limits, found, **options, few=few, few_rounds=EAGER_ROUNDS):
        for case, record in group:
            _add(record, case, series)
        yield records


def _add(record: dict[str, Any], case: Case, series: dict[str, list[float]]) -> None:
    ours, eager = series[f"{case.name}/auto"], series.get(f"{case.name}/reference")
    record["seconds"], record["samples"] = spread(ours)._asdict(), list(ours)
    if eager:
        record["eager_seconds"] = spread(eager)._asdict()
