"""Every plot with its ticks, which the tests of the stages do not draw."""

import pytest

from rlhf_engine import plots
from rlhf_engine.evaluate import WinRate

CURVE = {"a curve": [(1, 2.0), (2, 3.0)], "one point": [(1, 0.5)]}
RATE = WinRate(rate=0.6, low=0.5, high=0.7, ties=0.1, prompts=12)


@pytest.fixture(scope="module", autouse=True)
def plots_without_ticks():
    """Draw the ticks, unlike the fixture of the same name in conftest.py."""


@pytest.mark.parametrize(
    "draw",
    [
        lambda path: plots.plot_curves({"some": CURVE, "more": CURVE}, path, x_label="step", mark=1.5),
        lambda path: plots.plot_win_rates({"PPO": RATE, "SFT": RATE}, "the base", path),
        lambda path: plots.plot_win_rate_lines(
            {"PPO": [(16, RATE), (32, RATE)]}, path, x_label="width", baseline="SFT", log_x=True
        ),
        lambda path: plots.plot_trade_off({"PPO": (0.1, RATE)}, path, x_label="perplexity"),
        lambda path: plots.plot_memory({"run": ({"weights": 2**30}, {"train": {"gradients": 2**29}}, 2**31)}, path),
        lambda path: plots.plot_calibration([(0.2, 0.1, 3), (0.7, 0.8, 5)], 0.75, path),
        lambda path: plots.plot_histograms({"PPO": [0.1, 0.2], "SFT": [0.3]}, path, x_label="score"),
    ],
    ids=("curves", "win_rates", "win_rate_lines", "trade_off", "memory", "calibration", "histograms"),
)
def test_a_plot_is_drawn(tmp_path, draw):
    draw(tmp_path / "plots" / "one.png")
    assert (tmp_path / "plots" / "one.png").read_bytes().startswith(b"\x89PNG")
