"""The stages on a user's files, through the command line: what they write."""

import json
import shlex
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_engine.config import load_config
from rlhf_engine.demo.config import DemoRunConfig
from rlhf_engine.demo.run import next_commands, run_demo
from rlhf_engine.model.reward_model import RewardModel
from rlhf_engine.recipes import load_model, reward_function, rollout_examples
from rlhf_engine.recipes.ppo import make_policy
from rlhf_engine.rollout import EOS, LENGTH, Rollout
from tests.engine.helpers.cli_run import new_model, new_run, rlhf
from tests.engine.helpers.demo_data import with_few_examples


@pytest.fixture
def run(tmp_path, base):
    return new_run(tmp_path, base, prompts=8, epochs=2, updates=2)


def test_the_three_stages_one_after_the_other(run, capsys):
    out = run / "out"
    code, shown, _ = rlhf(capsys, "sft", "--config", run / "run.yaml")
    assert code == 0 and "validation loss" in shown
    following = f"next:  rlhf rm --config {run / 'run.yaml'} --set model.path={out / 'sft'}"
    assert shown.splitlines()[-2:] == [f"model: {out / 'sft'}", following]
    code, shown, _ = rlhf(capsys, "rm", "--config", run / "run.yaml", "--set", f"model.path={out / 'sft'}")
    assert code == 0 and "held-out accuracy" in shown
    sets = f"--set model.path={out / 'sft'} --set reward.path={out / 'rm'}"
    assert shown.splitlines()[-2:] == [f"model: {out / 'rm'}", f"next:  rlhf ppo --config {run / 'run.yaml'} {sets}"]
    overrides = ("--set", f"model.path={out / 'sft'}", "--set", f"reward.path={out / 'rm'}")
    code, shown, _ = rlhf(capsys, "ppo", "--config", run / "run.yaml", *overrides)
    assert code == 0 and "KL" in shown
    options = f"--set model.path={out / 'ppo'} --prompts {run / 'prompts.jsonl'} --output {out / 'answers.jsonl'}"
    assert shown.splitlines()[-1] == f"next:  rlhf generate --config {run / 'run.yaml'} {options}"

    weights = {}
    for name in ("sft", "ppo"):
        model = AutoModelForCausalLM.from_pretrained(out / name)
        weights[name] = torch.cat([parameter.flatten() for parameter in model.parameters()])
        assert AutoTokenizer.from_pretrained(out / name).eos_token_id == 0
    assert not torch.equal(weights["sft"], weights["ppo"])
    report = json.loads((out / "rm" / "report.json").read_text())
    assert 0 <= report["history"][-1]["accuracy"] <= 1
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert {row["stage"] for row in rows} == {"sft", "rm", "ppo"}
    assert [row["step"] for row in rows if row["stage"] == "ppo"] == [1, 2]
    assert sorted(path.name for path in out.iterdir()) == [
        "metrics.jsonl",
        "plan.json",
        "plots",
        "ppo",
        "rm",
        "samples.jsonl",
        "sft",
        "tensorboard",
    ]
    plots = ["ppo.png", "rm.png", "rm_calibration.png", "sft.png"]
    assert sorted(path.name for path in (out / "plots").iterdir()) == plots
    assert all((out / "plots" / name).read_bytes().startswith(b"\x89PNG") for name in plots)


def test_s3_rankings_that_are_all_ties_are_refused_with_the_name_of_the_file(run, capsys):
    path = run / "comparisons.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    tied = [row | {"ranking": " = ".join("ABCDEFGHI"[: len(row["completions"])])} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in tied))
    code, _, message = rlhf(capsys, "rm", "--config", run / "run.yaml")
    asked = f"data.comparisons: {path}: got 0 rankings that are not all ties of 0 prompts"
    assert code == 2 and asked in message
    assert not (run / "out" / "rm").exists()


def test_s19_long_prompts_are_cut_and_counted_by_every_stage(run, capsys):
    for name in ("demonstrations", "comparisons", "prompts"):
        path = run / f"{name}.jsonl"
        path.write_text(path.read_text().replace('"q0"', '"a very long prompt"'))
    code, _, message = rlhf(capsys, "sft", "--config", run / "run.yaml")
    assert code == 2 and "demonstrations.jsonl:1: prompt: got" in message
    out, cut = run / "out", ("--set", "data.long_prompts=truncate", "--set", "ppo.updates=1")
    assert rlhf(capsys, "sft", "--config", run / "run.yaml", *cut)[0] == 0
    assert rlhf(capsys, "rm", "--config", run / "run.yaml", *cut)[0] == 0
    assert rlhf(capsys, "ppo", "--config", run / "run.yaml", *cut, "--set", f"reward.path={out / 'rm'}")[0] == 0
    reports = [json.loads((out / stage / "report.json").read_text())["truncated_prompts"] for stage in ("sft", "rm")]
    assert reports == [1, 2]  # the reward model reads the demonstrations as well
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["stage"] == "ppo" and last["truncated_prompts"] == 1


def test_a_repeated_stage_replaces_its_metrics(run, capsys):
    for _ in range(2):
        assert rlhf(capsys, "sft", "--config", run / "run.yaml", "--overwrite")[0] == 0
    steps = [json.loads(line)["step"] for line in (run / "out" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 2, 3, 4, 4]


def test_a_model_that_has_learned_nothing_is_reported(run, capsys):
    code, _, shown = rlhf(capsys, "sft", "--config", run / "run.yaml", sets=["sft.optim.lr=1e-9"])
    assert code == 0 and "is not below 5.61 nats" in shown and "raise sft.optim.lr" in shown
    learned = ["sft.optim.lr=1e-2", "sft.epochs=4"]
    code, _, shown = rlhf(capsys, "sft", "--config", run / "run.yaml", "--overwrite", sets=learned)
    assert code == 0 and "nats" not in shown


def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(run, capsys):
    reward = run / "out" / "rm"
    assert rlhf(capsys, "rm", "--config", run / "run.yaml")[0] == 0
    ends = []
    for name, calls in (("whole", [(4, False)]), ("broken", [(2, False), (4, True)])):
        for updates, resume in calls:
            options = [f"reward.path={reward}", f"output_dir={run / name}", f"ppo.updates={updates}"]
            arguments = [part for option in options for part in ("--set", option)] + ["--resume"] * resume
            assert rlhf(capsys, "ppo", "--config", run / "run.yaml", *arguments)[0] == 0
        model = AutoModelForCausalLM.from_pretrained(run / name / "ppo")
        ends.append(torch.cat([parameter.flatten() for parameter in model.parameters()]))
        rows = [json.loads(line) for line in (run / name / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert torch.equal(*ends)
    code, shown, _ = rlhf(capsys, "ppo", "--config", run / "run.yaml", *arguments)
    assert code == 0 and "nothing left to do" in shown


def test_s9_ptx_runs_from_a_text_file(run, capsys):
    assert rlhf(capsys, "rm", "--config", run / "run.yaml")[0] == 0
    options = [f"reward.path={run / 'out' / 'rm'}", "ppo.ptx_coef=27.8", "ppo.ptx_ratio=2"]
    arguments = ["--config", run / "run.yaml", *(part for option in options for part in ("--set", option))]
    code, _, shown = rlhf(capsys, "ppo", *arguments)
    assert code == 2 and "data.pretrain is not set; give a file of pretraining text" in shown
    (run / "text.txt").write_text("I do not know")
    arguments += ["--set", f"data.pretrain={run / 'text.txt'}"]
    code, _, shown = rlhf(capsys, "ppo", *arguments)
    assert code == 2 and f"data.pretrain: {run / 'text.txt'}: got " in shown and "expected at least 14" in shown
    (run / "text.txt").write_text("\n\n".join(["I do not know"] * 30))
    assert rlhf(capsys, "ppo", *arguments)[0] == 0
    rows = [json.loads(line) for line in (run / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [row["ptx_loss"] > 0 for row in rows if row["stage"] == "ppo"] == [True, True]


def options(*overrides):
    return [part for override in overrides for part in ("--set", override)]


REWARD = """
def longest(prompts, answers):
    assert all(prompt.startswith("q") and len(prompt) == 2 for prompt in prompts), prompts
    return [float(len(answer)) for answer in answers]

def broken(prompts, answers):
    return [1.0] * len(answers)
"""


def test_s6_a_python_function_is_the_reward(run, capsys):
    (run / "rewards.py").write_text(REWARD)
    arguments = ("ppo", "--config", run / "run.yaml", "--set")
    function = f"reward.function={run / 'rewards.py'}"
    code, _, shown = rlhf(capsys, *arguments, f"{function}:longest")
    assert code == 2 and "ppo.value_init: got 'reward_model' with a reward.function, expected 'zero'" in shown
    zero = options("ppo.value_init=zero")
    assert rlhf(capsys, *arguments, f"{function}:longest", *zero)[0] == 0
    rows = [json.loads(line) for line in (run / "out" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and all(row["score_mean"] >= 0 for row in rows)
    before = load_file(run / "out" / "ppo" / "model.safetensors")
    more = [*zero, *options("ppo.updates=3"), "--resume"]
    code, _, shown = rlhf(capsys, *arguments, f"{function}:broken", *more)
    assert code == 2 and "longest' to go on with the run of" in shown
    # The same function name with a different body is accepted; here the body returns nan.
    (run / "rewards.py").write_text(
        REWARD.replace("float(len(answer)) for", '(i == 2 and float("nan")) for i,').replace(
            "in answers]", "in enumerate(answers)]"
        )
    )
    code, _, shown = rlhf(capsys, *arguments, f"{function}:longest", *more)
    assert code == 2 and "reward: got nan for sample 10 of the run (1 of 4" in shown
    after = load_file(run / "out" / "ppo" / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["reward.function=rewards"], "reward.function: got 'rewards', expected module:function or file.py:function"),
        (["reward.function=no_such_module:f"], "reward.function: No module named 'no_such_module'"),
        (["reward.function=nowhere.py:f"], "reward.function: nowhere.py: no such file"),
        (["reward.function=a:b", "reward.path=c"], "function is 'a:b' and path is 'c'; set only one of the two"),
    ],
)
def test_s6_a_function_that_cannot_be_imported_is_named(run, capsys, overrides, message):
    code, _, shown = rlhf(capsys, "ppo", "--config", run / "run.yaml", *options(*overrides))
    assert code == 2 and message in shown


def test_s22_a_reward_model_smaller_than_the_policy(run, capsys):
    """The reward model has one layer and half the width of the policy; a value model starts from its weights."""
    changes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "head_dim": 4}
    small = f"model.path={new_model(run / 'small', **changes)}"
    assert rlhf(capsys, "rm", "--config", run / "run.yaml", "--set", small)[0] == 0
    reward = f"reward.path={run / 'out' / 'rm'}"
    code, _, shown = rlhf(capsys, "ppo", "--config", run / "run.yaml", *options(reward))
    assert code == 2 and "whose hidden size is 16, for a head on the policy's trunk, whose hidden size is 32" in shown
    assert not (run / "out" / "ppo").exists()
    zero = options(reward, "ppo.value_init=zero")
    assert rlhf(capsys, "ppo", "--config", run / "run.yaml", *zero)[0] == 0
    backbone = options(reward, "ppo.value_model=backbone", f"output_dir={run / 'own'}")
    assert rlhf(capsys, "ppo", "--config", run / "run.yaml", *backbone)[0] == 0
    values, rewards = (RewardModel.load(path) for path in (run / "own" / "ppo" / "value_model", run / "out" / "rm"))
    assert values.trunk.config.hidden_size == 16 and len(values.trunk.layers) == 1
    assert not torch.equal(values.head.weight, rewards.head.weight)
    torch.testing.assert_close(
        values.head.weight, rewards.head.weight, rtol=0, atol=0.02
    )  # from there, four small steps
    more = [*backbone, *options("ppo.updates=3"), "--resume"]
    assert rlhf(capsys, "ppo", "--config", run / "run.yaml", *more)[0] == 0


def test_s15_trpo_requires_attention_that_can_be_differentiated_twice(run, capsys):
    assert rlhf(capsys, "rm", "--config", run / "run.yaml")[0] == 0
    arguments = options(f"reward.path={run / 'out' / 'rm'}", "ppo.objective=trpo")
    code, _, shown = rlhf(capsys, "ppo", "--config", run / "run.yaml", *arguments)
    assert code == 2 and "model.attention: got 'sdpa' with ppo.objective 'trpo', expected 'eager'" in shown
    eager = options("model.attention=eager", "ppo.trpo.max_kl=0.05")
    assert rlhf(capsys, "ppo", "--config", run / "run.yaml", *arguments, *eager)[0] == 0
    rows = [json.loads(line) for line in (run / "out" / "metrics.jsonl").read_text().splitlines()]
    assert all(0 <= row["trpo_kl"] <= 0.05 for row in rows if row["stage"] == "ppo")


def test_s8_the_value_function_starts_as_the_reward_model(run):
    """Both a head on the policy's trunk and a separate backbone copy the reward model's weights, or start from zeros."""

    def policy(**ppo):
        config = load_config(run / "run.yaml")
        config = replace(config, ppo=replace(config.ppo, **ppo))
        model, _ = load_model(config)
        return make_policy(config, model, reward_model)

    model, _ = load_model(load_config(run / "run.yaml"))
    reward_model = RewardModel.from_causal_lm(model, seed=1)
    reward_model.centre(0.7)
    with torch.no_grad():
        for parameter in reward_model.trunk.parameters():
            parameter.add_(0.01)
    head = policy().value
    assert torch.equal(head.weight, reward_model.head.weight) and torch.equal(head.bias, reward_model.head.bias)
    own = policy(value_model="backbone").value
    theirs = dict(reward_model.named_parameters())
    assert all(torch.equal(weight, theirs[name]) for name, weight in own.named_parameters())
    assert all(weight.data_ptr() != theirs[name].data_ptr() for name, weight in own.named_parameters())
    assert head.weight.data_ptr() != reward_model.head.weight.data_ptr()
    assert not policy(value_init="zero").value.weight.any()
    zero = policy(value_init="zero", value_model="backbone").value
    ours = dict(model.base_model.named_parameters())
    assert not zero.head.weight.any()
    assert all(torch.equal(weight, ours[name]) for name, weight in zero.trunk.named_parameters())


@pytest.mark.parametrize("preset", ["reinforce", "reinforce_baseline", "actor_critic"])
def test_s16_s17_s18_presets_run_from_the_command_line(run, capsys, preset):
    (run / "rewards.py").write_text(REWARD)
    arguments = [f"reward.function={run / 'rewards.py'}:longest", f"ppo.preset={preset}", "ppo.gamma=0.9"]
    if preset != "reinforce":
        arguments.append("ppo.value_init=zero")
    assert rlhf(capsys, "ppo", "--config", run / "run.yaml", *options(*arguments))[0] == 0
    assert load_config(run / "out" / "ppo" / "config.yaml").ppo.preset == preset
    code, _, shown = rlhf(capsys, "ppo", "--config", run / "run.yaml", *options(*arguments, "ppo.objective=ratio"))
    assert code == 2 and f"objective: got 'ratio', expected 'policy_gradient' with preset '{preset}'" in shown


def test_a_response_at_the_token_limit_is_scored_with_eos(run):
    model, codec = load_model(load_config(run / "run.yaml"))
    prompts, responses = torch.tensor([[5, 6, 1], [4, 5, 6]]), torch.tensor([[7, 8, 0], [7, 8, 9]])
    mask = torch.ones(2, 3, dtype=torch.bool)
    zeros = torch.zeros(2, 3)
    reasons = torch.tensor([EOS, LENGTH])
    rollout = Rollout(prompts, torch.tensor([2, 3]), responses, mask, zeros, zeros, zeros, reasons)
    examples = rollout_examples(rollout, codec)
    assert [(e.prompt, e.response) for e in examples] == [((5, 6), (7, 8, 0)), ((4, 5, 6), (7, 8, 9, 0))]
    scores = reward_function(RewardModel.from_causal_lm(model, seed=1), codec)(rollout)
    assert scores.shape == (2,) and scores.isfinite().all()


def test_the_demo_in_miniature(tmp_path, monkeypatch, capsys):
    """All stages with very little training: the files of the report exist and have valid numbers."""
    monkeypatch.setattr("rlhf_engine.demo.run.with_shipped_data", with_few_examples)
    overrides = [
        "demo.hidden_size=32",
        "demo.intermediate_size=48",
        "demo.layers=1",
        "demo.heads=2",
        "demo.vocab_size=600",
        "demo.samples=2",
        "demo.opponents=1",
        "demo.pretrain.epochs=1",
        "demo.pretrain.batch_size=256",
        "sft.epochs=1",
        "sft.batch_size=256",
        "reward.batch_size=128",
        "ppo.updates=1",
        "ppo.rollout_batch=8",
        "ppo.minibatch=8",
        "ppo.microbatch=8",
        "rollout.max_response_tokens=8",
        "data.max_response_tokens=200",
    ]
    table = run_demo(tmp_path / "demo", 3, tuple(overrides), from_scratch=True)
    assert "SFT against itself" in table and "best of 2" in table
    report = json.loads((tmp_path / "demo" / "report.json").read_text())
    assert report["seed"] == 3
    assert all(0 <= rate["low"] <= rate["rate"] <= rate["high"] <= 1 for rate in report["win_rates"].values())
    assert all(rate["prompts"] >= 200 for rate in report["win_rates"].values())
    assert load_config(tmp_path / "demo" / "config.yaml", kind=DemoRunConfig).demo.layers == 1
    plots = {path.name for path in (tmp_path / "demo" / "plots").iterdir()}
    stages = {"sft.png", "rm.png", "rm_calibration.png", "ppo.png"}
    assert plots == stages | {"win_rate.png", "pretrain.png", "reward_model.png", "marks.png"}
    for name in ("base", "sft", "ppo"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "demo" / name)
    for line in next_commands(tmp_path / "demo").replace("\\\n", "").splitlines()[2:]:
        code, _, shown = rlhf(capsys, *shlex.split(line, comments=True)[1:])
        assert code == 0, shown
    assert len((tmp_path / "demo" / "answers.jsonl").read_text().splitlines()) >= 200
    assert load_config(tmp_path / "demo" / "kl_0.1" / "ppo" / "config.yaml").ppo.kl_coef == 0.1
