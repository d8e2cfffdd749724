"""A user's own files in the folders of a run: no stage deletes them."""

import json

import pytest

from tests.engine.helpers.cli_run import new_model, new_run, rlhf


@pytest.fixture
def run(tmp_path):
    folder = new_run(tmp_path, new_model(tmp_path / "base"), updates=2)
    (folder / "lengths.py").write_text("def reward(prompts, responses):\n    return [len(one) for one in responses]\n")
    return folder


def test_overwriting_a_result_with_a_users_file_is_refused(run, capsys):
    assert rlhf(capsys, "sft", "--config", run / "run.yaml")[0] == 0
    card = run / "out" / "sft" / "README.md"
    card.write_text("my model card")
    code, _, shown = rlhf(capsys, "sft", "--config", run / "run.yaml", "--overwrite")
    message = f"{card}: was not written by the run, and --overwrite would delete it; move it away"
    assert code == 2 and message in shown
    assert card.read_text() == "my model card" and (card.parent / "report.json").is_file()
    card.unlink()
    assert rlhf(capsys, "sft", "--config", run / "run.yaml", "--overwrite")[0] == 0


def test_a_checkpoint_keeps_the_files_that_a_user_put_there(run, capsys):
    sets = [f"reward.function={run / 'lengths.py'}:reward", "ppo.value_init=zero", "ppo.updates=1"]
    assert rlhf(capsys, "ppo", "--config", run / "run.yaml", sets=sets)[0] == 0
    notes = run / "out" / "ppo" / "notes" / "today.txt"
    notes.parent.mkdir()
    notes.write_text("good")
    sets[-1] = "ppo.updates=3"
    assert rlhf(capsys, "ppo", "--config", run / "run.yaml", "--resume", sets=[*sets, "ppo.checkpoint_every=1"])[0] == 0
    assert (
        notes.read_text() == "good"
        and json.loads((run / "out" / "ppo" / "trainer.json").read_text())["updates_done"] == 3
    )
    assert (
        str(notes.relative_to(run / "out" / "ppo"))
        not in json.loads((run / "out" / "ppo" / "manifest.json").read_text())["files"]
    )
    code, _, shown = rlhf(capsys, "ppo", "--config", run / "run.yaml", "--overwrite", sets=sets)
    assert code == 2 and f"{notes}: was not written by the run" in shown and notes.exists()


@pytest.mark.parametrize("command", ["generate", "clean"])
def test_results_of_an_earlier_call_are_replaced_on_request_only(run, capsys, command):
    output = run / "answers.jsonl" if command == "generate" else run / "clean"
    if command == "generate":
        call = ("generate", "--config", run / "run.yaml", "--prompts", run / "prompts.jsonl", "--output", output)
    else:
        call = ("data", "clean", "--in", run / "prompts.jsonl", "--out", output)
    assert rlhf(capsys, *call)[0] == 0
    file = output if command == "generate" else output / "prompts.jsonl"
    file.write_text("mine")
    code, _, shown = rlhf(capsys, *call)
    assert code == 2 and str(output) in shown and "--overwrite" in shown and file.read_text() == "mine"
    assert rlhf(capsys, *call, "--overwrite")[0] == 0 and file.read_text() != "mine"
