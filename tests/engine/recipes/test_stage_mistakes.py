"""Mistakes in a user's files, through the command line: a message of one line, and no files are written."""

import shutil
import subprocess
import sys

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from tests.engine.helpers.cli_run import new_model, new_run, rlhf

HUB = "names of the Hub are not downloaded: save the model and its tokenizer to a folder with save_pretrained"


@pytest.fixture
def run(tmp_path, base):
    return new_run(tmp_path, base)


def test_resuming_before_the_first_checkpoint_begins_from_the_start(run, capsys):
    """A run that was killed before its first checkpoint is started again with the same command."""
    for command, folder in (("sft", "sft.checkpoint"), ("rm", "rm.checkpoint"), ("ppo", "ppo")):
        options = ("--set", f"reward.path={run / 'out' / 'rm'}", "--resume")
        code, _, shown = rlhf(capsys, command, "--config", run / "run.yaml", *options)
        begins = f"rlhf: {run / 'out' / folder}: there is no checkpoint yet, so the run begins from the start"
        assert code == 0 and shown.startswith(begins), shown


@pytest.mark.parametrize(
    "command, overrides, message",
    [
        ("sft", ["data.demonstrations=null"], "data.demonstrations is not set; give a file of demonstrations"),
        ("sft", ["data.demonstrations=nowhere.jsonl"], "rlhf: data.demonstrations: nowhere.jsonl: no such file"),
        ("rm", ["data.comparisons=nowhere.jsonl"], "rlhf: data.comparisons: nowhere.jsonl: no such file"),
        (
            "ppo",
            ["reward.path=nowhere", "data.prompts=nowhere.jsonl"],
            "rlhf: data.prompts: nowhere.jsonl: no such file",
        ),
        ("sft", ["model.path=null"], "model.path is not set; give the folder of a causal LM"),
        ("sft", ["model.path=nowhere"], f"model.path: nowhere: no such folder; {HUB}\n"),
        ("sft", ["model.path=no/where"], f"model.path: no/where: no such folder; {HUB}\n"),
        ("sft", ["model.path=/no/where"], "model.path: /no/where: no such folder\n"),
        ("sft", ["sft.epoch=3"], "unknown key 'sft.epoch'; did you mean 'sft.epochs'?"),
        ("sft", ["data.max_response_tokens=2"], "demonstrations.jsonl:3: response: got"),
        ("rm", ["rollout.max_prompt_tokens=1"], "demonstrations.jsonl:1: prompt: got"),
        ("sft", ["device=foo"], "rlhf: device: got 'foo', which torch cannot use here: "),
        ("sft", ["device=meta"], "rlhf: device: got 'meta', which torch cannot use here: "),
        ("ppo", [], "reward.path is not set; give the folder of a reward model (rlhf rm writes one), or "),
        ("ppo", ["reward.path=nowhere"], "reward.path: nowhere: no such folder"),
        ("ppo", ["ppo.minibatch=3"], "minibatch: got 3, expected a divisor of rollout_batch 4"),
    ],
)
def test_mistakes_are_reported_in_one_line_and_nothing_is_written(run, capsys, command, overrides, message):
    options = [option for override in overrides for option in ("--set", override)]
    code, _, shown = rlhf(capsys, command, "--config", run / "run.yaml", *options)
    assert code == 2
    assert message in shown and shown.startswith("rlhf: ")
    assert not (run / "out").exists()


def test_a_bad_line_is_named_and_nothing_is_written(run, capsys):
    with (run / "demonstrations.jsonl").open("a") as file:
        file.write('{"prompt": "q9"}\n')
    code, _, shown = rlhf(capsys, "sft", "--config", run / "run.yaml")
    assert code == 2
    assert f"{run / 'demonstrations.jsonl'}:9: no field 'response'" in shown
    assert not (run / "out").exists()


def test_a_folder_without_weights_is_named(run, capsys, tmp_path, base):
    (tmp_path / "half").mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "half" / name).write_bytes((base / name).read_bytes())
    code, _, shown = rlhf(capsys, "sft", "--config", run / "run.yaml", "--set", f"model.path={tmp_path / 'half'}")
    assert code == 2 and "half: the file model.safetensors is missing" in shown


def test_training_that_diverges_ends_in_one_line(run, capsys):
    options = ("sft.optim.lr=1", "sft.optim.weight_decay=1e30")
    arguments = [part for option in options for part in ("--set", option)]
    code, _, shown = rlhf(capsys, "sft", "--config", run / "run.yaml", *arguments)
    assert code == 1 and shown.startswith("rlhf: training diverged: got a gradient norm of ") and shown.count("\n") == 1
    assert not (run / "out" / "sft").exists()


def test_a_missing_weight_is_one_line_on_the_terminal(run, tmp_path, base):
    """The command runs in a separate process, because transformers' table would bypass pytest's capture."""
    shutil.copytree(base, tmp_path / "torn")
    tensors = load_file(base / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "torn" / "model.safetensors", metadata={"format": "pt"})
    command = ["-m", "rlhf_engine.cli", "sft", "--config", run / "run.yaml", "--set", f"model.path={tmp_path / 'torn'}"]
    found = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    assert found.returncode == 2 and found.stdout == ""
    message = "the weight model.norm.weight is missing (1 missing in all)"
    assert found.stderr == f"rlhf: model.path: {tmp_path / 'torn'}: {message}\n"


def test_line_numbers_count_empty_lines(run, capsys):
    path = run / "demonstrations.jsonl"
    path.write_text("\n\n" + path.read_text())
    code, _, shown = rlhf(capsys, "sft", "--config", run / "run.yaml", "--set", "data.max_response_tokens=2")
    assert code == 2 and f"{path}:5: response: got" in shown


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(run, capsys):
    option = f"model.path={new_model(run / 'small', rows=259)}"
    code, _, shown = rlhf(capsys, "sft", "--config", run / "run.yaml", "--set", option)
    largest = len(AutoTokenizer.from_pretrained(run / "small")) - 1
    assert code == 2 and f"small: got token id {largest} in its tokenizer, expected ids below 259" in shown
    assert not (run / "out").exists()


@pytest.mark.parametrize("family, positions", [("gpt2", "n_positions"), ("llama_tied", "max_position_embeddings")])
def test_sequences_longer_than_the_models_positions_are_refused(run, capsys, family, positions):
    """A prompt of 8 and a response of 6 tokens are scored with an EOS appended: 15 tokens."""
    short = new_model(run / "short", family=family, **{positions: 14})
    command = ("--config", run / "run.yaml", "--set", f"model.path={short}")
    reward = ("--set", f"reward.path={run / 'out' / 'rm'}")
    assert rlhf(capsys, "rm", *command)[0] == 0
    code, _, shown = rlhf(capsys, "ppo", *command, *reward)
    assert code == 2
    assert "max_prompt_tokens 8 and max_response_tokens 6, expected at most 13 together, the models' positions" in shown
    assert rlhf(capsys, "ppo", *command, *reward, "--set", "rollout.max_prompt_tokens=7")[0] == 0
    new_model(run / "short", family=family, **{positions: 4})
    code, _, shown = rlhf(capsys, "sft", *command)
    assert code == 2 and "demonstrations.jsonl:1: prompt and response: got 5 tokens, expected at most 4" in shown


@pytest.mark.parametrize("changes", [{"texts": ["zebra crossing quux"] * 9}, {"rows": 320}])
def test_a_reward_model_that_reads_other_ids_is_refused(run, capsys, changes):
    reward = run / "out" / "rm"
    assert rlhf(capsys, "rm", "--config", run / "run.yaml")[0] == 0
    other = new_model(run / "other", **changes)
    options = ("--set", f"reward.path={reward}", "--set", f"model.path={other}")
    code, _, shown = rlhf(capsys, "ppo", "--config", run / "run.yaml", *options)
    assert code == 2 and f"{reward} (reward.path)" in shown and f"{run / 'other'} (model.path)" in shown
    assert not (run / "out" / "ppo").exists()


def test_unknown_options_exit_with_2(capsys):
    assert rlhf(capsys, "demo", "--sed", "3")[0] == 2
    assert rlhf(capsys, "demo", "--seed", "-1")[0] == 2


def test_an_interrupted_command_exits_with_130(run, capsys, monkeypatch):
    def interrupted(config, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("rlhf_engine.recipes.run_sft", interrupted)
    code, _, err = rlhf(capsys, "sft", "--config", run / "run.yaml")
    assert code == 130 and err.strip() == "rlhf: interrupted"
