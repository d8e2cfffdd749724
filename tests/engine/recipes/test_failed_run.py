"""A run that fails must keep the checkpoint of an earlier run."""

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
    """With --overwrite, an earlier run is replaced when the first update is finished, and not before."""
    new_run(tmp_path, new_model(tmp_path / "base"))
    (tmp_path / "reward.py").write_text(REWARD)
    sets = [f"reward.function={tmp_path / 'reward.py'}:until", "ppo.value_init=zero", "ppo.updates=2"]
    weights, calls = tmp_path / "out" / "ppo" / "model.safetensors", tmp_path / "calls"

    def run(good, *options):
        calls.write_text(str(good + 1))  # before it trains, a run tries the reward on two samples
        return rlhf(capsys, "ppo", "--config", tmp_path / "run.yaml", *options, sets=sets)

    def numbers():
        return [row["score_mean"] for row in read_lines(tmp_path / "out" / "metrics.jsonl")]

    code, _, err = run(1)  # there is no earlier run: the one finished update is saved
    assert (
        code == 2 and f"the checkpoint {weights.parent} holds 1 update, and a resumed run continues from there" in err
    )
    first = weights.read_bytes()
    code, _, err = run(9, "--resume")
    assert code == 0, err
    finished, rows = weights.read_bytes(), numbers()
    assert finished != first and len(rows) == 2
    code, _, err = run(9)
    assert code == 2 and "--resume" in err and "--overwrite" in err
    assert run(0, "--overwrite")[0] == 2
    assert weights.read_bytes() == finished and numbers() == rows
    assert run(1, "--overwrite")[0] == 2
    assert weights.read_bytes() == first and numbers() == rows[:1]
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.name.startswith("ppo")) == ["ppo"]
