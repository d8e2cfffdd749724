"""`python -m benchmarks.gpu_suite --out DIR`: build, test, sanitize and measure on a machine with a GPU, in minutes.

Each step has a time budget and a separate process. Each entry is written to `DIR/results.json` and `DIR/report.md` as soon as
it is known, so an interrupted run keeps its results. `--dry-run` runs the same steps on a CPU, with tiny shapes in Triton's
interpreter, and measures nothing. Device settings (clocks, power, modes) are read and never changed.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from benchmarks.gpu.entries import COPY, MATMUL, Entry
from benchmarks.gpu.plots import plot
from benchmarks.gpu.results import Results
from benchmarks.gpu.tools import tool_path

ROOT = Path(__file__).parents[1]
GRACE = 5.0
"""Seconds beyond its budget after which a step is killed."""
DRY_RUN_PATIENCE = 4
"""Factor of the budgets in a dry run, because the interpreter is slow and the machine may be busy."""


@dataclass(frozen=True)
class Step:
    name: str
    seconds: float
    """Time budget."""
    least: float
    """Minimum of remaining seconds: with fewer, the step is skipped."""
    run: Callable[[Suite, float], Iterator[Entry | dict]]
    """Generator of the step's entries."""


class CutOff(Exception):
    """A step's process ran past its budget, or died."""


class Suite:
    """One run of the suite, with its deadline and its results."""

    def __init__(self, out: Path, *, dry_run: bool, minutes: float):
        self.out, self.dry_run = out, dry_run
        self.deadline = time.monotonic() + 60 * minutes
        self.results = Results(out, dry_run=dry_run)

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()

    def run(self, steps: Sequence[Step]) -> None:
        """Run the steps in order; a step for which there is no time left is recorded as skipped."""
        for step in steps:
            if self.left < step.least:
                print(f"{step.name}: skipped, {self.left:.0f} s left", flush=True)
                self.results.skip(step.name, f"{max(self.left, 0):.0f} s were left, it needs {step.least:.0f}")
                continue
            self._run(step)
        self.results.finish()

    def _run(self, step: Step) -> None:
        budget = min(step.seconds * (DRY_RUN_PATIENCE if self.dry_run else 1), self.left)
        print(f"{step.name}: at most {budget:.0f} s", flush=True)
        self.results.begin(step.name, budget)
        start, state, reason = time.monotonic(), "done", ""
        try:
            for entry in step.run(self, budget):
                self.results.add(entry if isinstance(entry, dict) else entry.record())
        except (LookupError, OSError, RuntimeError, subprocess.SubprocessError, ValueError) as error:
            state, reason = "failed", f"{type(error).__name__}: {error}"
        except CutOff as error:
            state, reason = "cut off", str(error)
        self.results.end(state, reason, time.monotonic() - start)
        plot(self.results.folder, self.results.steps, dry_run=self.dry_run)

    def worker(self, group: str, seconds: float) -> list[str]:
        """Return the command that runs a group of `gpu/worker.py`."""
        command = [sys.executable, "-m", "benchmarks.gpu.worker", group, "--seconds", f"{0.8 * seconds:.0f}"]
        command += ["--dry-run"] * self.dry_run
        for flag, name in (("--copy-rate", COPY), ("--matmul-rate", MATMUL)):
            value = self.results.value("ceilings", name)
            command += [flag, str(value * 1e12)] if isinstance(value, float) else []
        return command


# ---- steps ----


def environment(suite: Suite, seconds: float) -> Iterator[Entry]:
    from benchmarks.gpu import environment

    yield from environment.environment(dry_run=suite.dry_run)


def build(suite: Suite, seconds: float) -> Iterator[Entry]:
    from benchmarks.gpu import environment

    yield from environment.build(suite.out, dry_run=suite.dry_run, seconds=seconds)
    yield from environment.extension_facts()


def tests(suite: Suite, seconds: float) -> Iterator[Entry]:
    """Run the kernel tests of the GPU backends; a dry run only collects them, because `make test` runs them on a CPU."""
    if find_spec("pytest") is None:
        yield Entry("tests", error="pytest is not installed")
        return
    files = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests/kernels").glob("test_gpu_*.py"))
    files += ["tests/kernels/test_paged_attention.py"] * bool(files)  # an op with kernels only for GPUs
    if not files:
        yield Entry("tests", error="there is no tests/kernels/test_gpu_*.py")
        return
    yield from _pytest(suite, seconds, "tests of the GPU backends", files)


def marked_tests(suite: Suite, seconds: float) -> Iterator[Entry]:
    """Run all other tests that are marked `gpu`."""
    if find_spec("pytest") is None:
        yield Entry("tests", error="pytest is not installed")
        return
    # Only the files that name the mark, because collecting all tests imports every module of the project.
    named = [path for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text(encoding="utf-8")]
    files = sorted(
        str(path.relative_to(ROOT)) for path in named if not path.name.startswith(("test_gpu_", "test_structure"))
    )
    yield from _pytest(suite, seconds, "tests marked gpu", [*files, "-m", "gpu"])


def _pytest(suite: Suite, seconds: float, name: str, selection: list[str]) -> Iterator[Entry]:
    """Run pytest and count results from the lines of its log, so that an interrupted run also has counts."""
    log = suite.out / f"{name.replace(' ', '_')}.log"
    options = ["-o", "addopts=", "--tb=short", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, *selection]
    command += ["--collect-only", "-q"] if suite.dry_run else ["-v", *_processes()]
    ended = True
    with log.open("w") as file:
        try:
            code = subprocess.run(
                command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, timeout=seconds, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            ended, code = False, 0
    lines = log.read_text(errors="replace").splitlines()
    if suite.dry_run:
        collected = sum("::" in line for line in lines)
        yield Entry(name, f"{collected} collected, none run", passed=code in (0, 5), note="a dry run")
        return
    counts = {word: sum(word in line.split() and "::" in line for line in lines) for word in ("PASSED", "SKIPPED")}
    failed = [line for line in lines if "::" in line and ("FAILED " in line or " FAILED" in line or "ERROR " in line)]
    failed = list(dict.fromkeys(next(word for word in line.split() if "::" in word) for line in failed))
    note = ", ".join(f"{count} {word.lower()}" for word, count in counts.items()) + f", {len(failed)} failed"
    # Exit code 5: no test was selected.
    yield Entry(name, note, passed=code in (0, 5) and ended and not failed, note=f"see {log.name}")
    for test in failed[:40]:
        yield Entry(test, passed=False)
    if not ended:
        raise CutOff(f"the tests took more than {seconds:.0f} s; the last line of {log.name} shows where they stopped")


def _processes() -> list[str]:
    """Return pytest's options for parallel processes: most of a test's time is the compilation of its kernels on the host."""
    count = min(12, 3 * (os.cpu_count() or 1) // 4)
    return [] if count < 2 or find_spec("xdist") is None else ["--numprocesses", str(count), "--dist", "load"]


def group(name: str) -> Callable[[Suite, float], Iterator[dict]]:
    """Return the function of a step that runs a group of `gpu/worker.py`."""

    def run(suite: Suite, seconds: float) -> Iterator[dict]:
        with (suite.out / f"{name}.log").open("w") as log:
            process = subprocess.Popen(suite.worker(name, seconds), cwd=ROOT, stdout=subprocess.PIPE, stderr=log)
            try:
                yield from _messages(process, time.monotonic() + seconds + GRACE)
            finally:
                process.kill()
                process.wait()

    return run


def _messages(process: subprocess.Popen, deadline: float) -> Iterator[dict]:
    """Yield the messages of a process until it sends `done`, without waiting for its exit."""
    rest = b""
    while True:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([process.stdout], [], [], left)[0]:
            raise CutOff("the process ran past its budget and was killed")
        chunk = os.read(process.stdout.fileno(), 65536)
        if not chunk:
            raise CutOff(f"the process died with exit code {process.wait()}")
        *lines, rest = (rest + chunk).split(b"\n")
        for message in map(json.loads, lines):
            if message.get("done"):
                return
            yield message


def sanitizer(tool: str) -> Callable[[Suite, float], Iterator[Entry]]:
    """Return the function of a step that runs every op on small shapes under one tool of compute-sanitizer."""

    def run(suite: Suite, seconds: float) -> Iterator[Entry]:
        if suite.dry_run:
            yield Entry(tool, skipped="a dry run has no device; the step correctness runs the same cases")
            return
        program = tool_path("compute-sanitizer")
        if program is None:
            yield Entry(tool, skipped="compute-sanitizer is neither on PATH nor in the folder of nvcc")
            return
        log = suite.out / f"{tool}.log"
        watch = [program, "--tool", tool, "--error-exitcode", "9"]
        # With PyTorch's cache, a read past the end of a tensor could stay inside a larger block and go undetected.
        surroundings = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        with log.open("w") as file:
            code = subprocess.run(
                [*watch, *suite.worker("sanitize", seconds)], cwd=ROOT, env=surroundings, stdout=file, stderr=subprocess.STDOUT,
                timeout=seconds, check=False,
            ).returncode  # fmt: skip
        lines = log.read_text(errors="replace").splitlines()
        summary = next((line for line in reversed(lines) if " SUMMARY: " in line), "")
        yield Entry(
            tool, passed=code == 0 and summary != "", note=f"exit code {code}: {summary.strip('= ')}; see {log.name}"
        )

    return run


def report(suite: Suite, seconds: float) -> Iterator[Entry]:
    """Record the clocks again and write the plots; everything else is already written."""
    from benchmarks.gpu import environment

    if not suite.dry_run:
        yield from environment.clocks("after")
    names = plot(suite.results.folder, suite.results.steps, dry_run=suite.dry_run)
    yield Entry("plots", ", ".join(names) if names else None, skipped="" if names else "matplotlib is not installed")


STEPS = (
    Step("environment", 30, 0, environment),
    Step("build", 120, 30, build),
    Step("tests", 180, 30, tests),
    Step("correctness", 60, 20, group("correctness")),
    Step("ceilings", 30, 15, group("ceilings")),
    Step("trials", 90, 20, group("trials")),
    Step("heads", 70, 25, group("heads")),
    Step("tokens", 50, 20, group("tokens")),
    Step("peers", 70, 25, group("peers")),
    # After the benchmarks, because the sanitizers are slow and the first steps that a short run can omit.
    Step("memcheck", 60, 30, sanitizer("memcheck")),
    Step("racecheck", 60, 30, sanitizer("racecheck")),
    Step("other tests", 120, 20, marked_tests),
    Step("report", 10, 0, report),
)
ENGINE = Step("engine", 540, 60, group("engine"))
"""PPO updates of language models, ours and TRL's. They take minutes, so they run only if `--only` names them."""
NAMES = [*(step.name for step in STEPS), ENGINE.name]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suite; return 0, or 1 if a test or a check failed (figures are then not valid). Exit with 2 on wrong usage."""
    options = _parse(arguments)
    suite = Suite(options.out, dry_run=options.dry_run, minutes=options.minutes)
    suite.run([step for step in (*STEPS[:-1], ENGINE, STEPS[-1]) if step.name in options.only])
    print((options.out / "report.md").read_text())
    steps = [step for step in suite.results.steps if step["name"] in ("tests", "correctness", "memcheck", "racecheck")]
    return 1 if any(entry.get("met") is False for step in steps for entry in step["entries"]) else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_suite", description=__doc__)
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder for the results; created if missing"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="run on a CPU, in Triton's interpreter; measures nothing"
    )
    parser.add_argument("--minutes", type=float, default=9, help="time limit of the whole run; 9 by default")
    parser.add_argument(
        "--only", nargs="+", metavar="STEP", help=f"some of {', '.join(NAMES)}; all but engine by default"
    )
    options = parser.parse_args(arguments)
    options.only = set(options.only or NAMES) - (set() if options.only else {ENGINE.name})
    if options.only - set(NAMES):
        parser.error(
            f"--only: got {', '.join(sorted(options.only - set(NAMES)))}, expected some of the steps that --help lists"
        )
    if options.only & {"trials", "heads", "tokens", "engine"}:
        options.only.add("ceilings")  # the bounds of these steps are fractions of the ceilings
    if not 0 < options.minutes < 24 * 60:
        parser.error(f"--minutes: got {options.minutes:g}, expected more than 0 and less than a day")
    if options.out.exists() and not options.out.is_dir():
        parser.error(f"--out: {options.out} is a file, expected a folder")
    if not options.out.exists() and not options.out.parent.is_dir():
        parser.error(f"--out: the folder {options.out.parent} does not exist")
    if find_spec("torch") is None:
        parser.error("torch is not installed")
    if options.dry_run:
        # Must be set before Triton is imported, here or in the process of a step. A GPU stays unused.
        os.environ.update(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
    elif os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        parser.error("TRITON_INTERPRET is set, so nothing would run on the GPU; unset it")
    import torch  # after CUDA_VISIBLE_DEVICES is set

    from rlhf_kernels.backend import why_no_triton

    if why_no_triton():
        parser.error(why_no_triton())

    if not options.dry_run and not torch.cuda.is_available():
        parser.error("torch finds no GPU; pass --dry-run to run the steps on a CPU")
    options.out.mkdir(exist_ok=True)
    options.out = options.out.resolve()
    return options


if __name__ == "__main__":
    raise SystemExit(main())
