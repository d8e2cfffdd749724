"""Notices about an evaluation on prompts, or with a judge, that the candidate was trained on."""

import pytest

from tests.engine.helpers.cli_run import new_model, new_run, rlhf

JUDGE = "def longer(prompts, a, b):\n    return [0.5] * len(a)\n"
REWARD = "def reward(prompts, responses):\n    return [float(len(one)) for one in responses]\n"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return the folder of a run with an SFT and a PPO model; its prompts q0 to q5 are those of the split train."""
    folder = new_run(tmp_path_factory.mktemp("run"), new_model(tmp_path_factory.mktemp("base")))
    (folder / "rewarding.py").write_text(REWARD)
    (folder / "judging.py").write_text(JUDGE)
    return folder


@pytest.fixture
def evaluate(trained, capsys):
    if not (trained / "out" / "ppo").exists():
        assert rlhf(capsys, "sft", "--config", trained / "run.yaml")[0] == 0
        reward = [f"reward.function={trained / 'rewarding.py'}:reward", "ppo.value_init=zero"]
        assert rlhf(capsys, "ppo", "--config", trained / "run.yaml", sets=reward)[0] == 0

    def evaluate(candidate, split, judge):
        files = {"candidate": candidate, "baseline": trained / "out" / "sft", "judge": judge, "split": split}
        sets = [f"eval.{name}={value}" for name, value in files.items()]
        code, _, shown = rlhf(capsys, "eval", "--config", trained / "run.yaml", "--overwrite", sets=sets)
        assert code == 0, shown
        return shown

    return evaluate


def test_prompts_that_ppo_was_trained_on(evaluate, trained):
    shown = evaluate(trained / "out" / "ppo", "train", f"{trained / 'judging.py'}:longer")
    assert f"rlhf: eval: 6 of 6 prompts were used to train {trained / 'out' / 'ppo'}" in shown and "judge" not in shown


def test_prompts_that_sft_was_trained_on(evaluate, trained):
    shown = evaluate(trained / "out" / "sft", "test", f"{trained / 'judging.py'}:longer")
    assert f"2 of 4 prompts were used to train {trained / 'out' / 'sft'}" in shown


def test_the_judge_that_rewarded_the_policy(evaluate, trained):
    (trained / "rewarding.py").write_text(REWARD + JUDGE)
    name = f"{trained / 'rewarding.py'}:reward"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlhf_engine.recipes.evaluate.configured_judge", lambda config, name: _Draw())
        shown = evaluate(trained / "out" / "ppo", "test", name)
    assert f"the judge {name} is the reward that {trained / 'out' / 'ppo'} was trained to maximise" in shown


def test_new_prompts_and_another_judge_give_no_notice(evaluate, trained):
    assert "eval:" not in evaluate(trained / "out" / "ppo", "test", f"{trained / 'judging.py'}:longer")


class _Draw:
    def compare(self, prompts, first, second):
        import torch

        return torch.full((len(prompts),), 0.5)
