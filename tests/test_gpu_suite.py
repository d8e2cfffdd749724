"""The GPU suite without a GPU: its dry run, and that its results are on disk however a run ends."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_suite
from benchmarks.gpu import ceilings, environment, head_bench, peer_bench, plots, token_bench
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.entries import Entry
from benchmarks.gpu.results import Results, report, value_of
from benchmarks.gpu.timing import Timer
from benchmarks.gpu_suite import CutOff, Step, Suite
from rlhf_engine.bench import timing

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    """Run the command from end to end; return its output folder and its results."""
    out = tmp_path_factory.mktemp("suite") / "out"
    surroundings = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.gpu_suite", "--out", str(out), "--dry-run"]
    done = subprocess.run(command, cwd=ROOT, env=surroundings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out, json.loads((out / "results.json").read_text())


def entries(results: dict) -> list[dict]:
    return [entry for step in results["steps"] for entry in step["entries"]]


def test_a_dry_run_goes_through_every_step(dry_run):
    _, results = dry_run
    assert [step["name"] for step in results["steps"]] == [step.name for step in gpu_suite.STEPS]
    states = {step["name"]: (step["state"], step.get("reason")) for step in results["steps"]}
    assert all(state == "done" for state, _ in states.values()), states
    assert results["finished"]


def test_a_dry_run_finds_no_error(dry_run):
    """Missing tools (nvcc, pybind11) are reported by the first two steps and are not errors of the ops."""
    _, results = dry_run
    for step in results["steps"]:
        if step["name"] not in ("environment", "build"):
            failed = [entry for entry in step["entries"] if entry.get("error") or entry["met"] is False]
            assert not failed, f"{step['name']}: {failed}"


def test_a_dry_run_has_no_figures(dry_run):
    out, results = dry_run
    assert results["dry_run"] and "nothing was measured" in results["note"]
    assert "**DRY RUN" in (out / "report.md").read_text()
    figures = [entry for entry in entries(results) if isinstance(entry["value"], (int, float))]
    assert not figures
    assert not [entry for entry in entries(results) if "bound" in entry and entry["met"] is not None]
    assert not [step for step in results["steps"] if "seconds" in step]
    assert not [
        entry for entry in entries(results) if "GB/s" in entry.get("note", "") or "TFLOP/s" in entry.get("note", "")
    ]


@pytest.mark.parametrize(
    "name, bound",
    [
        ("linear_ppo_loss / three products", 1.08),
        ("linear_ppo_loss half inactive, compact / none inactive", 0.75),
        ("linear_ppo_loss workspace", 1.2),
        ("moving 6NV bytes / logits_ppo_loss forward+backward, triton", 0.85),
        ("gae 3x40, triton", 8),
        ("gae 2x70, triton", 70),
        ("rollout_advantages 3x40, triton / moving 29 bytes an element", 1.25),
        ("rollout_advantages 3x40, whitened, triton / moving 37 bytes an element", 1.25),
    ],
)
def test_a_dry_run_reaches_each_bound(dry_run, name, bound):
    _, results = dry_run
    (found,) = [entry for entry in entries(results) if entry["name"] == name]
    assert found["bound"] == bound


def test_a_dry_run_writes_plots(dry_run):
    pytest.importorskip("matplotlib")
    out, _ = dry_run
    for name in plots.FIGURES:
        assert (out / name).read_bytes().startswith(b"\x89PNG")


def labels(axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_plots_show_time_and_memory_of_the_committed_run():
    pytest.importorskip("matplotlib")
    measured = entries(json.loads((ROOT / "benchmarks/results/h200/results.json").read_text()))
    time, memory = plots.head_peers(measured).axes
    assert [tick.get_text() for tick in time.get_yticklabels()][:3] == [
        *("torch.compile of eager *", "linear_ppo_loss", "TRL selective_log_softmax *")
    ]
    assert labels(time) == ["20.8", "21.3", "21.4", "24.3", "40.0", "48.1", "925.2 (bar cut off)"]
    assert labels(memory) == ["3.15", "3.25", "2.13", "6.30", "1.20", "1.09", "4.24"]
    time, memory = plots.ppo_step(measured).axes
    assert [round(bar.get_width(), 1) for bar in time.patches] == [4.0, 2.1, 13.8, 138.8]
    assert labels(time) == ["19.9", "138.8"] and labels(memory) == ["32.7", "36.6", "61.1", "130.4"]


def test_results_are_on_disk_before_the_run_ends(tmp_path):
    results = Results(tmp_path, dry_run=False)
    results.begin("heads", 10)
    results.add(Entry("linear_ppo_loss / three products", 1.05, bound=1.08).record())
    on_disk = json.loads((tmp_path / "results.json").read_text())
    assert on_disk["steps"][0]["state"] == "running" and on_disk["steps"][0]["entries"][0]["met"] is True
    text = (tmp_path / "report.md").read_text()
    assert "not finished" in text and "| linear_ppo_loss / three products | 1.05 | <= 1.08 | yes |" in text
    assert not list(tmp_path.glob("*.part"))


def test_a_step_without_time_is_recorded_as_skipped(tmp_path):
    suite = Suite(tmp_path, dry_run=False, minutes=5 / 60)
    suite.run([Step("long", 60, 30, None), Step("short", 60, 0, lambda suite, seconds: iter([Entry("it", "ran")]))])
    long, short = suite.results.steps
    assert long["state"] == "skipped" and "it needs 30" in long["reason"]
    assert short["state"] == "done" and short["entries"][0]["value"] == "ran"
    assert short["budget_seconds"] <= 5


@pytest.mark.parametrize(
    "ending, reason",
    [
        ("time.sleep(60)", "ran past its budget"),
        ("os._exit(3)", "died with exit code 3"),
        ("os.kill(os.getpid(), 11)", "died with exit code -11"),
    ],
)
def test_a_group_that_hangs_or_dies_keeps_its_entries(tmp_path, monkeypatch, ending, reason):
    program = f'import os, time; print(\'{{"name": "first", "value": 1, "met": null}}\', flush=True); {ending}'
    monkeypatch.setattr(gpu_suite, "GRACE", 0.0)
    monkeypatch.setattr(Suite, "worker", lambda *_: [sys.executable, "-c", program])
    suite = Suite(tmp_path, dry_run=False, minutes=1)
    start = time.monotonic()
    suite.run(
        [Step("broken", 3, 0, gpu_suite.group("heads")), Step("next", 5, 0, lambda *_: iter([Entry("it", "ran")]))]
    )
    assert time.monotonic() - start < 30
    broken, following = suite.results.steps
    assert broken["state"] == "cut off" and reason in broken["reason"], broken
    assert [entry["name"] for entry in broken["entries"]] == ["first"]
    assert following["state"] == "done"


def test_the_suite_does_not_wait_for_the_exit_of_a_group_that_is_done(tmp_path, monkeypatch):
    program = "import time; print('{\"done\": true}', flush=True); time.sleep(60)"
    monkeypatch.setattr(Suite, "worker", lambda *_: [sys.executable, "-c", program])
    suite = Suite(tmp_path, dry_run=False, minutes=1)
    suite.run([Step("done", 20, 0, gpu_suite.group("heads"))])
    assert suite.results.steps[0]["state"] == "done" and suite.results.steps[0]["seconds"] < 15


def test_a_failing_step_does_not_stop_the_others(tmp_path):
    def fail(suite, seconds):
        yield Entry("before", "known")
        raise CutOff("no device left")

    suite = Suite(tmp_path, dry_run=False, minutes=1)
    suite.run([Step("failing", 5, 0, fail), Step("next", 5, 0, lambda *_: iter([Entry("it", "ran")]))])
    assert [step["state"] for step in suite.results.steps] == ["cut off", "done"]
    assert suite.results.steps[0]["entries"][0]["value"] == "known"


@pytest.mark.parametrize("processes", [[], ["--numprocesses", "2"]])
def test_failed_tests_are_named(tmp_path, monkeypatch, processes):
    """Runs a test file with one passing, one failing and one skipped test."""
    monkeypatch.setattr(gpu_suite, "_processes", lambda: processes)
    file = tmp_path / "test_three.py"
    file.write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert False\n"
        "@pytest.mark.skip(reason='no device')\ndef test_skipped(): pass\n"
    )
    suite = Suite(tmp_path, dry_run=False, minutes=1)
    suite.run([Step("tests", 40, 0, lambda suite, seconds: gpu_suite._pytest(suite, seconds, "three", [str(file)]))])
    summary, failed = suite.results.steps[0]["entries"]
    assert summary["met"] is False and summary["value"] == "1 passed, 1 skipped, 1 failed"
    assert failed["name"].endswith("test_three.py::test_bad")


class FakeEvent:
    """An event on a device whose calls take 5, 1, 2, 9, 3 milliseconds; the first call is a warm-up."""

    durations = (5.0, 1.0, 2.0, 9.0, 3.0)
    made = 0

    def __init__(self, enable_timing):
        assert enable_timing
        self.index = FakeEvent.made
        FakeEvent.made += 1

    def record(self):
        pass

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        assert end.index == self.index + 1, "the two events are not the start and the end of one call"
        return self.durations[self.index // 2]


def test_a_time_is_the_median_without_the_warm_up(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(FakeEvent, "made", 0)
    calls = []
    monkeypatch.setattr(timing, "in_front", lambda device: lambda: calls.append("in front"))
    seconds = Timer(dry_run=False).once(lambda: calls.append("timed"), rounds=3, warmup=1)
    assert seconds == 2e-3 and calls == ["in front", "timed"] * 4


class CountingTimer(Timer):
    """A timer without a clock: the first call of each comparison takes 1 ms, the second 2 ms, and so on."""

    def __init__(self):
        super().__init__(dry_run=False)

    def alternate(self, cases, **_):
        for call in cases.values():
            call()
        return {name: 1e-3 * (index + 1) for index, name in enumerate(cases)}

    def replayed(self, calls, **_):
        return self.alternate({"": calls[0]})[""]

    def on_host(self, call, **_):
        return self.once(call)


class TinyBench(Bench):
    """A bench that measures as on a device, at the sizes of a dry run."""

    def size(self, full, tiny):
        return tiny

    def why_no_cuda(self, op):
        return "no device"

    def peak_bytes(self, call):
        call()
        return 10**9


@pytest.fixture(scope="module")
def figures():
    """Return the entries that the benchmarks compute from known times."""
    if torch.cuda.is_available():
        pytest.skip("Triton's interpreter is used only on machines without a GPU")
    bench = TinyBench(torch.device("cpu"), False, CountingTimer(), copy_rate=1e6, matmul_rate=1e9)
    parts = (
        ceilings.copy_bandwidth, ceilings.matrix_rate, head_bench.linear_time, head_bench.linear_memory,
        head_bench.logits_level, token_bench.gae_time, token_bench.rollout_time, peer_bench.gae_peer,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        # Filling a device's L2 cache with tensors of these sizes would take a hundred thousand of them.
        patch.setattr(token_bench, "copies_to_fill_l2", lambda *_, **__: 2)
        return {entry.name: entry for part in parts for entry in part(bench)}


@pytest.mark.parametrize(
    "name, value",
    [
        ("copy bandwidth", 2 * 2**16 / 1e-3 / 1e12),
        ("bf16 matrix rate", 2 * 64**3 / 1e-3 / 1e12),
        ("linear_ppo_loss forward+backward: ours", 3.0),  # the third of four cases
        ("linear_ppo_loss / three products", 3.0),
        ("linear_ppo_loss half inactive, compact / none inactive", 4 / 3),
        ("float32 logits / bf16 logits, the three products", 1 / 2),
        ("linear_ppo_loss workspace", (1e9 - 2 * (24 * 16 + 160 * 16) - 4 * 160 * 16) / 1e9),
        ("moving 6NV bytes / logits_ppo_loss forward+backward, triton", 6 * 12 * 300 / 1e6 / 1e-3),
        ("gae 3x40, triton", 1000.0),
        ("rollout_advantages 3x40, triton / moving 29 bytes an element", 1e-3 / (29 * 120 / 1e6)),
        ("rollout_advantages 3x40, whitened, triton / moving 37 bytes an element", 1e-3 / (37 * 120 / 1e6)),
        ("rollout_advantages 3x40, triton / block copy", 2.0),  # the timed call copies two blocks
        ("gae as a Python loop, 3x40", 1.0),
    ],
)
def test_figures_are_computed_from_the_measured_seconds(figures, name, value):
    assert figures[name].value == pytest.approx(value)


def test_rates_are_reported_as_fractions_of_the_ceilings(figures):
    flops = 6 * 24 * 16 * 160 / 3e-3
    assert f"{flops / 1e9:.3f} of the ceiling" in figures["linear_ppo_loss forward+backward: ours"].note
    assert f"{17 * 120 / 1e-3 / 1e6:.3f} of the copy's rate" in figures["gae 3x40, triton"].note


def test_a_dry_run_times_nothing_and_calls_once():
    calls = []
    timer = Timer(dry_run=True)
    assert timer.alternate({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}) == {"a": None, "b": None}
    assert timer.replayed([lambda: calls.append("c")]) is None
    assert calls == ["a", "b", "c"]


@pytest.mark.parametrize(
    "entry, met, shown",
    [
        (Entry("a", 1.0, bound=2.0), True, "1"),
        (Entry("a", 3.0, "ms", bound=2.0), False, "3 ms"),
        (Entry("a", 3.0, bound=2.0, at_least=True), True, "3"),
        (Entry("a", 1.0, bound=2.0, at_least=True), False, "1"),
        (Entry("a", bound=2.0), None, "ran"),
        (Entry("a", 1.0, "ms"), None, "1 ms"),
        (Entry("a", passed=False), False, "**no**"),
        (Entry("a", bound=2.0, error="out of memory"), False, "error: out of memory"),
        (Entry("a", bound=2.0, skipped="no nvcc"), None, "skipped: no nvcc"),
    ],
)
def test_bounds(entry, met, shown):
    assert entry.met is met
    assert value_of(entry.record()) == shown
    step = {"name": "s", "state": "done", "entries": [entry.record()]}
    lines = report({"dry_run": False, "started": "", "finished": None}, [step])
    assert any(shown in line for line in lines)


@pytest.mark.skipif(
    not (Path(torch.__file__).parent / "include/pybind11/pybind11.h").exists(),
    reason="torch ships no headers of pybind11",
)
def test_without_pybind11_the_headers_of_torch_are_used(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "find_spec", lambda name: None)
    folder, where = environment.pybind11_headers(tmp_path)
    assert "torch ships" in where
    question = "import pybind11; print(pybind11.__file__, pybind11.get_include())"
    surroundings = os.environ | {"PYTHONPATH": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", question], env=surroundings, capture_output=True, text=True, check=True
    )
    file, include = done.stdout.split()
    assert file.startswith(str(tmp_path)) and (Path(include) / "pybind11/pybind11.h").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--out", "FILE"], "is a file, expected a folder"),
        (["--out", "FILE/missing/folder"], "does not exist"),
        (["--out", "OUT", "--minutes", "0"], "expected more than 0"),
        (["--out", "OUT", "--only", "cooking"], "--only: got cooking"),
        ([], "--out"),
    ],
)
def test_usage_errors_are_exit_code_two(arguments, message, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    places = {"FILE": str(tmp_path / "file"), "OUT": str(tmp_path / "out")}
    arguments = [argument.replace("FILE", places["FILE"]).replace("OUT", places["OUT"]) for argument in arguments]
    with pytest.raises(SystemExit) as error:
        gpu_suite.main(arguments)
    assert error.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_message_names_the_dry_run(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(SystemExit) as error:
        gpu_suite.main(["--out", str(tmp_path / "out")])
    assert error.value.code == 2 and "--dry-run" in capsys.readouterr().err


def test_it_refuses_to_time_the_interpreter(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit) as error:
        gpu_suite.main(["--out", str(tmp_path / "out")])
    assert error.value.code == 2 and "TRITON_INTERPRET is set" in capsys.readouterr().err
