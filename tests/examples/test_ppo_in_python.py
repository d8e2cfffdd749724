"""The example of the Python API runs, learns something, and stays a short script."""

import importlib.util
import math
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "examples" / "ppo_in_python.py"


def test_three_updates_through_the_python_api(tmp_path):
    spec = importlib.util.spec_from_file_location("ppo_in_python", SCRIPT)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    example.make_model(tmp_path)
    logs = example.train(tmp_path)
    assert len(logs) == 3 and all(math.isfinite(log["score_mean"]) for log in logs)
    assert abs(logs[0]["kl"]) < 1e-4 and abs(logs[2]["kl"]) > 1e-3  # the policy differs from its frozen copy


def test_it_imports_the_public_api_only():
    text = SCRIPT.read_text()
    assert len(text.splitlines()) <= 40 and "rlhf_engine." not in text
