"""Numbers that are not finite: stopped before the optimizer, named, left out, written to a file and repeated from it."""

import json
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.families.configs import build
from rlhf_engine.checkpoint import check_settings
from rlhf_engine.config import MemoryConfig, PPOConfig, RunConfig, save_config
from rlhf_engine.ppo import minibatch as minibatches
from rlhf_engine.ppo import nonfinite
from rlhf_engine.ppo import update as ppo
from rlhf_engine.ppo.experience import score
from rlhf_engine.recipes.ppo import make_policy
from tests.engine.helpers.cli_run import new_model, new_run, read_lines, rlhf
from tests.engine.helpers.experience import make_experience
from tests.engine.helpers.pretraining import make_stream
from tests.engine.helpers.tiny_trainer import OnUpdate, make_trainer, weights_of

SMALL = {"minibatch": 8, "ppo_epochs": 1, "updates": 3}


def broken_advantages(monkeypatch, *rows, value=float("nan"), name="advantages"):
    """Replace a number of these rows of the next experience."""
    real = ppo.SurrogateSteps.__call__

    def call(self, experience, step):
        if step.number == 1:
            for row in rows:
                getattr(experience, name)[row, 0] = value
        return real(self, experience, step)

    monkeypatch.setattr(ppo.SurrogateSteps, "__call__", call)


@pytest.mark.parametrize("row", [0, 5, 15])
@pytest.mark.parametrize("name", ["advantages", "returns", "old_logprobs"])
def test_the_sample_and_its_tensor_are_named_and_the_weights_are_those_before(monkeypatch, row, name):
    """The update is undone if the minibatch is its first; the numbers of the run's second update start at 16."""
    trainer = make_trainer(**{**SMALL, "minibatch": 16})
    broken_advantages(monkeypatch, row, name=name)
    ends = []
    trainer.callbacks.append(OnUpdate(lambda number, log: ends.append(weights_of(trainer))))
    words = r"training diverged: got a gradient norm of \w+ at optimizer step 2, expected a finite one"
    with pytest.raises(FloatingPointError, match=rf"{words} \(sample {16 + row} of the run, first in {name}\); try a"):
        trainer.train()
    assert trainer.updates_done == 1 and trainer.whole
    assert all(torch.equal(weight, ends[0][name]) for name, weight in weights_of(trainer).items())
    assert all(parameter.grad is None for parameter in trainer.policy.parameters())


def test_several_samples_are_named(monkeypatch):
    trainer = make_trainer(**{**SMALL, "minibatch": 16})
    broken_advantages(monkeypatch, 3, 9, 10)
    with pytest.raises(FloatingPointError, match=r"sample 19, 25, 26 of the run, first in advantages"):
        trainer.train()


# ---- the operation ----


def of_forward(policy):
    """Let a module's output overflow for token 5."""
    layer = policy.model.model.layers[1].mlp

    def change(module, inputs, output):
        return output * torch.inf

    return layer.register_forward_hook(change), r"the output of model\.model\.layers\.1\.mlp \(\w*MLP\)"


def of_backward(policy):
    layer = policy.model.model.layers[1].mlp

    def change(module, inputs, output):
        output.register_hook(lambda gradient: gradient * torch.nan)

    return layer.register_forward_hook(change), r"the gradient of .*model\.model\.layers\.1"


def of_weight(policy):
    policy.model.model.norm.weight.data[3] = torch.inf
    return None, r"the weight model\.model\.norm\.weight"


@pytest.mark.parametrize("breaking", [of_forward, of_backward, of_weight])
def test_the_operation_is_named(breaking):
    trainer = make_trainer()
    experience = make_experience(trainer)
    everyone = torch.arange(16)

    def run():
        minibatches.minibatch_backward(trainer.policy, experience, everyone, trainer.config, 1.0)

    assert nonfinite.first_nonfinite(trainer.policy, nonfinite.tensors_of(experience), run) is None
    hook, words = breaking(trainer.policy)
    found = nonfinite.first_nonfinite(trainer.policy, nonfinite.tensors_of(experience), run)
    assert re.fullmatch(words + ".*", found), found
    assert all(parameter.grad is None for parameter in trainer.policy.parameters())
    if hook is not None:
        hook.remove()
        assert nonfinite.first_nonfinite(trainer.policy, {}, run) is None


def test_a_norm_that_overflows_is_no_bad_sample(monkeypatch):
    trainer = make_trainer(**SMALL)
    monkeypatch.setattr(ppo, "gradient_norm", lambda optimizer: torch.tensor(torch.inf))
    monkeypatch.setattr(ppo, "bad_sequences", lambda finite, sequences: [])
    with pytest.raises(
        FloatingPointError, match="all samples of the minibatch together, first in the sum over the minibat"
    ):
        trainer.train()


# ---- policies ----


def test_skip_leaves_the_optimizer_step_out(monkeypatch, caplog):
    trainer, logs = make_trainer(**SMALL, on_nonfinite="skip"), []
    broken_advantages(monkeypatch, 4)
    trainer.callbacks.append(OnUpdate(lambda number, log: logs.append(log)))
    trainer.train()
    assert [log["skipped_steps"] for log in logs] == [0, 1, 0] and trainer.update_rule.optimizer_steps == 5
    assert [log["left_out_sequences"] for log in logs] == [0, 0, 0]
    assert all(weight.isfinite().all() for weight in weights_of(trainer).values())
    (message,) = (one for one in caplog.messages if "left out" in one)
    assert (
        "(sample 20 of the run, first in advantages); try a lower learning rate; the optimizer step is left out"
        in message
    )


@pytest.mark.parametrize(
    "settings, words",
    [
        (
            {"on_nonfinite": "skip"},
            r"ppo.on_nonfinite skip\); resume with ppo.on_nonfinite halve, which .*, or begin a new",
        ),
        ({"on_nonfinite": "halve"}, r"ppo.on_nonfinite halve\); begin a new run with a lower ppo.optim.lr"),
        ({"ratio_guard": 1e-3}, r"ppo.ratio_guard 0.001\); resume with a higher ppo.ratio_guard$"),
    ],
)
def test_an_update_whose_steps_are_all_left_out_ends_the_run(monkeypatch, settings, words):
    trainer = make_trainer(**SMALL, **settings)
    update = 1 if "ratio_guard" in settings else 2
    if update == 2:
        broken_advantages(monkeypatch, *range(16))
    with pytest.raises(FloatingPointError, match=rf"every optimizer step of update {update} was left out \({words}"):
        trainer.train()
    assert trainer.updates_done == update - 1 and trainer.whole


@pytest.mark.parametrize("rows", [(4,), (0, 7, 8), (1, 2, 3, 15)])
def test_halve_steps_with_the_gradient_of_the_other_sequences(monkeypatch, rows):
    settings = {**SMALL, "minibatch": 16, "microbatch": 16, "updates": 2}
    trainer, taken = make_trainer(**settings, on_nonfinite="halve"), []
    broken_advantages(monkeypatch, *rows)
    real = ppo.optimizer_step

    def step(optimizer, config, number, schedule, norm):
        taken.append({name: p.grad.clone() for name, p in trainer.policy.named_parameters()})
        return real(optimizer, config, number, schedule, norm)

    logs = []
    trainer.callbacks.append(OnUpdate(lambda number, log: logs.append(log)))
    monkeypatch.setattr(ppo, "optimizer_step", step)
    trainer.step()
    order = trainer.update_rule.order(16, 1, 0)
    rest = torch.tensor([row for row in order.tolist() if row not in rows])
    found = []
    real_call = ppo.SurrogateSteps.__call__

    def call(self, experience, step):
        found.append({})
        minibatches.minibatch_backward(trainer.policy, experience, rest, trainer.config, 1.0)
        found[0] |= {name: p.grad.clone() for name, p in trainer.policy.named_parameters()}
        trainer.policy.zero_grad()
        return real_call(self, experience, step)

    monkeypatch.setattr(ppo.SurrogateSteps, "__call__", call)
    trainer.step()
    assert logs[-1]["left_out_sequences"] == len(rows) and logs[-1]["skipped_steps"] == 0
    assert all(torch.equal(gradient, found[0][name]) for name, gradient in taken[1].items())


def test_halve_reports_a_step_only_after_the_gradient_of_the_others_was_checked(monkeypatch, caplog):
    """Each of the other sequences is finite, and their sum is not."""
    trainer, logs = make_trainer(**SMALL, on_nonfinite="halve"), []
    broken_advantages(monkeypatch, 4)
    real = ppo.is_finite
    monkeypatch.setattr(ppo, "bad_sequences", lambda finite, sequences: [4])
    checks = []

    def finite(metrics, norm):
        checks.append(real(metrics, norm))
        return checks[-1] and False not in checks[-2:-1]  # nor is the one after the first that is not finite

    monkeypatch.setattr(ppo, "is_finite", finite)
    trainer.callbacks.append(OnUpdate(lambda number, log: logs.append(log)))
    trainer.train()
    assert [(log["skipped_steps"], log["left_out_sequences"]) for log in logs] == [(0, 0), (1, 0), (0, 0)]
    (message,) = (one for one in caplog.messages if "ppo.on_nonfinite" in one)
    assert message.endswith("; the optimizer step is left out (ppo.on_nonfinite)")


@pytest.mark.parametrize("minibatch", [1, 8])
def test_text_of_ptx_is_named_if_only_its_part_is_not_finite(monkeypatch, minibatch):
    trainer = make_trainer(**SMALL | {"minibatch": minibatch, "microbatch": 1}, pretrain=make_stream(), ptx_coef=5.0)
    real = ppo.ptx_backward

    def broken(*arguments, **options):
        metrics = real(*arguments, **options)
        next(trainer.policy.parameters()).grad[0, 0] = torch.nan
        return metrics

    monkeypatch.setattr(ppo, "ptx_backward", broken)
    words = r"\(the pretraining sequences of PPO-ptx, first in the gradient of .*\); try a lower learning rate or ppo.ptx_coef"
    with pytest.raises(FloatingPointError, match=words):
        trainer.train()


@pytest.mark.parametrize("name", ["old_logprobs", "ref_logprobs", "old_values"])
def test_log_probs_and_values_stop_or_leave_the_sequence_out(monkeypatch, name, caplog):
    def broken(*arguments, **options):
        scored = score(*arguments, **options)
        getattr(scored, name)[3, 0] = torch.nan
        return scored

    monkeypatch.setattr("rlhf_engine.ppo.trainer.score", broken)
    tried = "check the weights of the reference" if name == "ref_logprobs" else "try a lower learning rate"
    with pytest.raises(
        FloatingPointError,
        match=rf"diverged: {name} is nan at action 0, .* \(sample 3 of the run, first in {name}\); {tried}",
    ):
        make_trainer(**SMALL).step()
    trainer = make_trainer(**{**SMALL, "minibatch": 16}, on_nonfinite="skip")
    log = trainer.step()
    assert log["left_out_sequences"] == 1 and trainer.updates_done == 1
    assert any("sample 3 of the run" in one and "left out (ppo.on_nonfinite)" in one for one in caplog.messages)


# ---- the ratio guard ----


@pytest.mark.parametrize("action", ["skip", "stop"])
def test_a_minibatch_beyond_the_ratio_guard_makes_no_step(action, caplog):
    """The first minibatch of an update has ratio 1; the guard is below what one step with a large rate gives."""
    settings = {"ppo_epochs": 4, "updates": 1, "ratio_guard": 1.0001, "on_ratio": action}
    trainer = make_trainer(**settings)
    if action == "stop":
        with pytest.raises(
            FloatingPointError, match=r"mean ratio of optimizer step \d is .*, above ppo.ratio_guard 1.0001"
        ):
            trainer.train()
        return
    log = trainer.step()
    assert 0 < log["skipped_steps"] < 8 and trainer.update_rule.optimizer_steps == 8 - log["skipped_steps"]
    assert log["ratio_mean"] <= 1.0001
    assert make_trainer(**settings | {"ratio_guard": 10.0}).step()["skipped_steps"] == 0
    with pytest.raises(ValueError, match="on_ratio: got 'stop', expected 'skip'; only ratio_guard reads it"):
        make_trainer(on_ratio="stop")


def test_a_resumed_run_may_change_what_it_leaves_out(tmp_path):
    config = RunConfig(ppo=PPOConfig(ratio_guard=2.0))
    save_config(config, tmp_path / "config.yaml")
    for settings in ({"ratio_guard": 10.0}, {"ratio_guard": 2.0, "on_ratio": "stop"}, {"on_nonfinite": "halve"}, {}):
        check_settings(tmp_path, replace(config, ppo=PPOConfig(**settings)))


# ---- the file ----

REWARD = "def reward(prompts, responses):\n    return [float(len(r)) for r in responses]\n"
SETS = ["reward.function=rewards.py:reward", "ppo.value_init=zero", "ppo.updates=3"]


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rewards.py").write_text(REWARD)
    return new_run(tmp_path, new_model(tmp_path / "base"))


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_a_run_writes_a_file_that_rlhf_repro_repeats(run, capsys, monkeypatch, policy):
    with monkeypatch.context() as patch:
        broken_advantages(patch, 2)
        code, _, shown = rlhf(capsys, "ppo", "--config", "run.yaml", sets=[*SETS, f"ppo.on_nonfinite={policy}"])
    file = run / "out" / "repro" / "update-2-1.safetensors"
    assert file.is_file() and shown.count(f"`rlhf repro {file}` repeats it") == 1
    if policy == "stop":
        assert code == 1 and json.loads((run / "out" / "ppo" / "trainer.json").read_text())["updates_done"] == 1
    else:
        assert code == 0 and [row["skipped_steps"] for row in read_lines(run / "out" / "metrics.jsonl")] == [0, 1, 0]
    code, out, _ = rlhf(capsys, "repro", file)
    assert code == 1 and "in the run: training diverged: got a gradient norm of nan" in out
    assert re.search(r"^advantages: 1 of \d+ numbers are not finite, the first is nan at \[\d, 0\]$", out, re.M), out
    assert out.endswith("here: first in advantages\n")


def test_repro_and_a_run_have_the_same_loss_of_experts():
    config = RunConfig(ppo=PPOConfig(value_init="zero"))
    for on in (False, True):
        setting = replace(config, model=replace(config.model, router_aux_loss=on))
        model = build("olmoe", output_router_logits=True, router_aux_loss_coef=0.5)
        assert (make_policy(setting, model, None).balance is not None) == on


def test_a_repro_file_has_the_weights_of_that_moment(run, capsys, monkeypatch):
    """A layer overflows in the second update, with weights that no checkpoint has."""
    calls, real, seen = [], ppo.minibatch_backward, {}

    def backward(policy, *arguments, **options):
        calls.append(1)
        if len(calls) == 4:
            policy.model.model.layers[0].mlp.down_proj.weight.data.fill_(3e38)
            seen.update({name: weight.detach().clone() for name, weight in policy.named_parameters()})
        return real(policy, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(ppo, "minibatch_backward", backward)
        code, _, shown = rlhf(capsys, "ppo", "--config", "run.yaml", sets=SETS)
    assert code == 1 and "update 2 had changed weights" in shown
    (file,) = (run / "out" / "repro").iterdir()
    stored = {name.removeprefix("weight:"): x for name, x in load_file(file).items() if name.startswith("weight:")}
    assert all(torch.equal(stored[name], weight) for name, weight in seen.items())
    code, out, _ = rlhf(capsys, "repro", file)
    where = re.search(r"first in (the output of \S+ \(\w+\))", shown)
    assert code == 1 and where is not None and f"here: first in {where[1]}\n" in out, (shown, out)


@pytest.mark.parametrize("damage", ["cut", "foreign", "missing"])
def test_a_file_that_is_no_repro_file_is_refused(run, capsys, damage):
    file = run / "x.safetensors"
    if damage == "cut":
        file.write_bytes(b"abc")
    elif damage == "foreign":
        file.write_bytes((run / "base" / "model.safetensors").read_bytes())
    code, _, shown = rlhf(capsys, "repro", file)
    assert code == 2 and shown.count("\n") == 1 and str(file) in shown


def test_host_state_and_skipped_steps_agree(monkeypatch):
    """A step that is left out drops the state that was prefetched for it."""
    results = []
    for kind in ("resident", "host"):
        with monkeypatch.context() as patch:
            broken_advantages(patch, 4)
            trainer = make_trainer(**SMALL, on_nonfinite="skip", memory=MemoryConfig(optimizer_state=kind))
            trainer.train()
        results.append(weights_of(trainer))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
