"""`samples.jsonl`: the first responses of every update, also of a run that was resumed."""

import pytest

from rlhf_engine.recipes.ppo import SAMPLES
from tests.engine.helpers.cli_run import new_model, new_run, read_lines, rlhf

REWARD = "def reward(prompts, responses):\n    return [len(one) for one in responses]\n"


@pytest.fixture
def train(tmp_path, capsys):
    """Return a function that trains in the folder `name`, and returns the exit code and stderr."""
    run = new_run(tmp_path, new_model(tmp_path / "base"))
    (run / "lengths.py").write_text(REWARD)

    def train(name, updates, *options, samples=2):
        sets = [f"output_dir={run / name}", f"reward.function={run / 'lengths.py'}:reward", "ppo.value_init=zero"]
        sets += [f"ppo.updates={updates}", f"ppo.log_samples={samples}"]
        code, _, shown = rlhf(capsys, "ppo", "--config", run / "run.yaml", *options, sets=sets)
        return code, shown, run / name / SAMPLES

    return train


def test_each_update_keeps_its_first_responses(train):
    code, _, path = train("out", 2)
    rows = read_lines(path)
    assert code == 0 and [row["update"] for row in rows] == [1, 1, 2, 2]
    for row in rows:
        assert row["prompt"].startswith("q") and row["score"] == len(row["response"]) and isinstance(row["kl"], float)
    assert all(row["kl"] == 0 for row in rows[:2])  # the policy is still the reference


def test_a_resumed_run_has_the_samples_of_an_uninterrupted_one(train):
    whole = train("whole", 4)[2].read_bytes()
    path = train("broken", 2)[2]
    with path.open("ab") as file:  # of an update that the resumed run repeats, and a line that was cut off
        file.write(b'{"update": 3, "prompt": "q1", "response": "", "score": 0.0, "kl": 0.0}\n{"update": 4, "pro')
    assert train("broken", 4, "--resume")[0] == 0 and path.read_bytes() == whole


def test_lines_that_were_lost_are_restored_from_the_checkpoint(train):
    """A power cut, for example, may lose the end of a file."""
    whole = train("whole", 3)[2].read_bytes()
    path = train("broken", 2)[2]
    path.write_bytes(path.read_bytes()[:100] + bytes(50))
    assert train("broken", 3, "--resume")[0] == 0 and path.read_bytes() == whole


def test_zeros_within_a_line_are_restored_and_a_users_line_is_refused(train):
    whole = train("whole", 3)[2].read_bytes()
    path = train("broken", 2)[2]
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1][:20] + bytes(30) + b"\n" + b"".join(lines[2:]))
    assert train("broken", 3, "--resume")[0] == 0 and path.read_bytes() == whole
    path.write_bytes(whole + b'["mine"]\n')
    code, shown, _ = train("broken", 4, "--resume")
    assert code == 2 and "not a line of sampled responses; move the file away" in shown
    assert path.read_bytes() == whole + b'["mine"]\n'


def test_overwriting_begins_a_new_file_and_a_users_file_is_refused(train):
    path = train("out", 1)[2]
    assert train("out", 1, "--overwrite")[0] == 0 and [row["update"] for row in read_lines(path)] == [1, 1]
    path.write_text('["mine"]\n')
    code, shown, _ = train("out", 1, "--overwrite")
    assert code == 2 and f"{path}:1: not a line of sampled responses; move the file away" in shown
    assert path.read_text() == '["mine"]\n'


def test_no_samples_are_kept_with_a_count_of_0(train):
    code, _, path = train("out", 1, samples=0)
    assert code == 0 and path.read_text() == ""
