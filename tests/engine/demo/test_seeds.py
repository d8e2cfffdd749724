"""`python -m benchmarks.demo_seeds`: every seed and every missed bound are reported."""

import json
import runpy
import sys

import pytest


def run_of(folder, seed, rate, width=0.02, same=0.5):
    folder.mkdir()

    def found(rate):
        return {"rate": rate, "low": rate - width, "high": rate + width, "ties": 0.1, "prompts": 303}

    rates = {"PPO": rate, "SFT, best of 8 by the reward model": rate, "SFT against itself, resampled": same}
    report = {
        "seed": seed,
        "win_rates": {name: found(value) for name, value in rates.items()},
        "judge": {"ppo": {"kl": 4.0}},
        "seconds": {"ppo": 2.0},
    }
    (folder / "report.json").write_text(json.dumps(report))
    return folder


@pytest.mark.parametrize(
    ("rates", "others", "code"),
    [
        ([0.8, 0.76, 0.7], {}, 0),
        ([0.8, 0.9, 0.69], {}, 1),
        ([0.8, 0.74, 0.7], {"width": 0.1}, 1),
        ([0.8, 0.74, 0.7], {"same": 0.56}, 1),
        ([0.8, 0.74, 0.7], {"same": 0.44}, 1),
    ],
)
def test_the_bounds_hold_for_every_seed(tmp_path, monkeypatch, capsys, rates, others, code):
    runs = [run_of(tmp_path / f"{seed}", seed, rate, **others) for seed, rate in enumerate(rates)]
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
