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
    assert (
        f"rlhf: eval: 6 of 6 prompts are in the training file of {trained / 'out' / 'ppo'}" in shown
        and "judge" not in shown
    )


def test_prompts_that_sft_was_trained_on(evaluate, trained):
    shown = evaluate(trained / "out" / "sft", "test", f"{trained / 'judging.py'}:longer")
    assert f"2 of 4 prompts are in the training file of {trained / 'out' / 'sft'}" in shown


def test_the_judge_that_rewarded_the_policy_also_with_the_answers_of_an_earlier_call(evaluate, trained, capsys):
    """The function is no judge, so the first call fails after it has sampled; the second one judges the same answers."""
    name = f"{trained / 'rewarding.py'}:reward"
    sets = [
        f"eval.candidate={trained / 'out' / 'ppo'}",
        f"eval.baseline={trained / 'out' / 'sft'}",
        f"eval.judge={name}",
    ]
    seen = f"the judge {name} is the reward that {trained / 'out' / 'ppo'} was trained to maximise"
    for _ in range(2):
        code, _, shown = rlhf(capsys, "eval", "--config", trained / "run.yaml", "--overwrite", sets=sets)
        assert code == 2 and seen in shown, shown
    assert (trained / "out" / "unjudged").is_dir()


def test_what_cannot_be_compared_is_reported(evaluate, trained):
    prompts = trained / "prompts.jsonl"
    kept = trained / "copy.jsonl"
    kept.write_bytes(prompts.read_bytes())
    stored = trained / "out" / "ppo" / "config.yaml"
    text = stored.read_text()
    stored.write_text(text.replace(str(prompts), str(trained / "gone.jsonl")))
    try:
        shown = evaluate(trained / "out" / "ppo", "test", f"{trained / 'judging.py'}:longer")
        assert (
            f"the training file of {trained / 'out' / 'ppo'} cannot be read from here" in shown
            and "gone.jsonl" in shown
        )
        stored.write_text("ppo: {no_such_setting: 1}")
        shown = evaluate(trained / "out" / "ppo", "test", f"{trained / 'judging.py'}:longer")
        assert "is of another release, so its training data was not compared" in shown
    finally:
        stored.write_text(text)


def test_ppo_from_the_base_of_the_sft_model_is_reported(evaluate, trained, capsys):
    out = trained / "out"
    assert rlhf(capsys, "rm", "--config", trained / "run.yaml", sets=[f"model.path={out / 'sft'}"])[0] == 0
    sets = [f"reward.path={out / 'rm'}", f"output_dir={trained / 'forgot'}"]
    code, _, shown = rlhf(capsys, "ppo", "--config", trained / "run.yaml", sets=sets)
    assert code == 0 and f"set model.path={out / 'sft'} to train that one" in shown
    sets += [f"model.path={out / 'sft'}", f"output_dir={trained / 'right'}"]
    code, _, shown = rlhf(capsys, "ppo", "--config", trained / "run.yaml", sets=sets)
    assert code == 0 and "to train that one" not in shown


def test_new_prompts_and_another_judge_give_no_notice(evaluate, trained):
    assert "eval:" not in evaluate(trained / "out" / "ppo", "test", f"{trained / 'judging.py'}:longer")
