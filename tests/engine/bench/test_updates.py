"""The suites `rollout`, `step`, `memory` and `scaling` with a model of a few hundred weights."""

import json

import pytest

from rlhf_engine.bench import process, suites, updates
from rlhf_engine.bench.run import GateError, Run
from rlhf_engine.bench.scaling import fit


def silent(line):
    pass


def cases_of(folder, suite):
    return json.loads((folder / "bench.json").read_text())["suites"][suite]["cases"]


def test_an_update_has_phases_rates_and_peaks_next_to_the_plan(tmp_path, settings):
    Run(settings("step"), tmp_path, silent).run(suites.SUITES)
    (case,) = cases_of(tmp_path, "step")
    assert case["shape"] == "llama-7m, 4 x (4 + 4) tokens, 1 epochs"
    assert case["phases"].keys() == {"generate", "score", "train"} and len(case["samples"]) == 2
    parts = sum(phase["seconds"]["least"] for phase in case["phases"].values())
    assert 0 < parts <= case["seconds"]["least"] * 1.0001
    assert case["tokens_per_second"] == pytest.approx(16 / case["seconds"]["least"])
    # 1 layer: 4 x 16 x 16 + 3 x 16 x 32 numbers; head 40 x 16. 32 tokens, 16 actions.
    layer, head = 4 * 16 * 16 + 3 * 16 * 32, 40 * 16
    assert case["model_flops"] == 2 * (32 * layer * (1 + 1 + 1 + 3) + 16 * head * (1 + 1 + 3))
    assert case["planned_bytes"] == max(phase["planned_bytes"] for phase in case["phases"].values()) > 0
    assert case["gate"]["error"] <= 1e-5 and case["mfu"] > 0
    assert "| **PPO update** | llama-7m, 4 x (4 + 4) tokens" in (tmp_path / "bench.md").read_text()


def test_wrong_sampled_logprobs_stop_the_report(tmp_path, settings, monkeypatch):
    monkeypatch.setattr(updates, "logprob_deviation", lambda *args, **more: 0.01)
    with pytest.raises(GateError, match=r"sampling: a sampled log-prob differs by 1\.000e-02 nats"):
        Run(settings("rollout"), tmp_path, silent).run(suites.SUITES)


def test_sampling_is_measured_next_to_transformers(tmp_path, settings):
    Run(settings("rollout"), tmp_path, silent).run(suites.SUITES)
    (case,) = cases_of(tmp_path, "rollout")
    assert len(case["samples"]) == case["eager_seconds"]["count"] == 2 and case["gate"]["error"] < 1e-5
    layer, head = 4 * 16 * 16 + 3 * 16 * 32, 40 * 16
    assert case["flops"] == 2 * 4 * (8 * layer + 4 * head)
    assert case["bytes"] == 4 * (4 * (layer + head) + 4 * (4 + 5 + 6 + 7) * 2 * 16)


def test_peaks_are_measured_in_separate_processes(tmp_path, settings, monkeypatch):
    class Here(process.Session):
        """A session without pipes: one step."""

        def __init__(self):
            self._baseline = self._started = 0.0
            self.steps, self.found = 1, {}

        def send(self, **message):
            self.found |= message

        def begin(self):
            self.steps -= 1
            return self.steps == 0

    class Fake:
        def __init__(self, name, target, kwargs, **limits):
            assert target == updates.WORKER
            self.session, self.kwargs = Here(), kwargs

        def step(self):
            updates.memory_worker(self.session, **self.kwargs)

        def close(self):
            found = self.session.found
            return process.Row("", [found["seconds"]], extra_mb=found["extra_mb"])

    monkeypatch.setattr(updates, "Worker", Fake)
    monkeypatch.setattr(updates, "return_freed_blocks", lambda: None)  # stays for the whole process
    monkeypatch.setattr(updates, "find_spec", lambda name: None)
    Run(settings("memory"), tmp_path, silent).run(suites.SUITES)
    full, checkpointed, adapters = cases_of(tmp_path, "memory")
    assert full["planned_bytes"] > 0 and full["largest_phase"] in ("generate", "score", "train")
    assert "peak_bytes" in checkpointed and "pip install 'rlhf-kernels[adapters]'" in adapters["skipped"]


def test_a_model_that_does_not_fit_is_skipped_with_its_plan(tmp_path, settings, monkeypatch):
    monkeypatch.setattr(updates, "available_bytes", lambda device: 10**9)
    Run(settings("step", "rollout", "memory", model="qwen2.5-7b"), tmp_path, silent).run(suites.SUITES)
    for suite in ("step", "rollout", "memory"):
        for case in cases_of(tmp_path, suite):
            assert case["skipped"].startswith("needs ") and case["skipped"].endswith("by its plan, 0.93 GiB are free")


def test_growth_is_a_fitted_exponent(tmp_path, settings):
    assert fit([(1, 2.0), (2, 8.0), (4, 32.0)]) == pytest.approx((2.0, 0.0), abs=1e-9)
    exponent, error = fit([(1, 1.0), (2, 2.0), (4, 5.0)])
    assert exponent == pytest.approx(1.161, abs=1e-3) and 0 < error < 0.2
    Run(settings("scaling"), tmp_path, silent).run(suites.SUITES)
    found = {case["name"]: case for case in cases_of(tmp_path, "scaling")}
    assert [x for x, _ in found["linear_ppo_loss over N"]["points"]] == [4, 8, 16]
    assert [x for x, _ in found["PPO update over sequences"]["points"]] == [1, 2, 4]
    assert len(found) == 6 and all("exponent" in case for case in found.values())
