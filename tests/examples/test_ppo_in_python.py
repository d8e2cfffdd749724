"""The example of the Python API runs, learns something, and stays a short script."""

import math

from tests.examples.helpers.scripts import EXAMPLES, example


def test_three_updates_through_the_python_api(tmp_path):
    script = example("ppo_in_python")
    script.make_model(tmp_path)
    logs = script.train(tmp_path)
    assert len(logs) == 3 and all(math.isfinite(log["score_mean"]) for log in logs)
    assert abs(logs[0]["kl"]) < 1e-4 and abs(logs[2]["kl"]) > 1e-3  # the policy differs from its frozen copy


def test_it_imports_the_public_api_only():
    text = (EXAMPLES / "ppo_in_python.py").read_text()
    assert len(text.splitlines()) <= 40 and "rlhf_engine." not in text
