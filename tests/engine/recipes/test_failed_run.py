"""What a run that fails leaves of the checkpoint that was there before it."""

from tests.engine.helpers.cli_run import new_model, new_run, read_lines, rlhf

REWARD = """
from pathlib import Path

CALLS = Path(__file__).with_name("calls")


def until(prompts, answers):
    left = int(CALLS.read_text())
    CALLS.write_text(str(left - 1))
    return [float(len(a)) if left > 0 else float("nan") for a in answers]
"""


def test_a_new_run_that_fails_leaves_another_run_s_checkpoint(tmp_path, capsys):
    new_run(tmp_path, new_model(tmp_path / "base"))
    (tmp_path / "reward.py").write_text(REWARD)
    sets = [f"reward.function={tmp_path / 'reward.py'}:until", "ppo.value_init=zero", "ppo.updates=2"]
    weights, calls = tmp_path / "out" / "ppo" / "model.safetensors", tmp_path / "calls"

    def run(good, *options):
        calls.write_text(str(good))
        return rlhf(capsys, "ppo", "--config", tmp_path / "run.yaml", *options, sets=sets)

    assert run(1)[0] == 2  # nothing was there: its one update is saved
    first = weights.read_bytes()
    code, _, err = run(9, "--resume")
    assert code == 0, err
    finished = weights.read_bytes()
    assert finished != first and len(read_lines(tmp_path / "out" / "metrics.jsonl")) == 2
    assert run(1)[0] == 2
    assert weights.read_bytes() == finished
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.name.startswith("ppo")) == ["ppo"]
