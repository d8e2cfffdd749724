"""`python -m benchmarks.demo_seeds`: every seed and every missed bound are reported."""

import json
import runpy
import sys

import pytest


def run_of(folder, seed, rate):
    folder.mkdir()
    found = {"rate": rate, "low": rate - 0.02, "high": rate + 0.02, "ties": 0.1, "prompts": 303}
    names = ("PPO", "SFT, best of 16 by the reward model", "SFT against itself, resampled")
    report = {
        "seed": seed,
        "win_rates": dict.fromkeys(names, found),
        "judge": {"ppo": {"kl": 4.0}},
        "seconds": {"ppo": 2.0},
    }
    (folder / "report.json").write_text(json.dumps(report))
    return folder


@pytest.mark.parametrize(("rates", "code"), [([0.8, 0.76, 0.56], 0), ([0.8, 0.9, 0.54], 1), ([0.8, 0.74, 0.7], 1)])
def test_the_bounds_on_all_seeds(tmp_path, monkeypatch, capsys, rates, code):
    runs = [run_of(tmp_path / f"{seed}", seed, rate) for seed, rate in enumerate(rates)]
    monkeypatch.setattr(sys, "argv", ["demo_seeds", *map(str, reversed(runs)), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("benchmarks.demo_seeds", run_name="__main__")
    shown = capsys.readouterr().out
    assert ended.value.code == code
    assert [f"| {seed} | {rate:.3f} [" in shown for seed, rate in enumerate(rates)] == [True] * 3
    assert ("MISSED" in shown) == bool(code)
    numbers = json.loads((tmp_path / "out" / "demo_seeds.json").read_text())
    assert [one["seed"] for one in numbers["runs"]] == [0, 1, 2] and numbers["lowest"] == min(rates)
    assert (tmp_path / "out" / "demo_seeds.png").read_bytes().startswith(b"\x89PNG")
