"""PPO: updates follow the formulas for any micro-batches, and a resumed run equals an uninterrupted one."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rlhf_engine.checkpoint import check_settings, resume, save_checkpoint
from rlhf_engine.config import MemoryConfig, OptimConfig, PPOConfig, RolloutConfig, RunConfig, load_config
from rlhf_engine.files import with_new_folder
from rlhf_engine.model.saving import load_policy
from rlhf_engine.ppo.experience import Scored, advantages, score
from tests.engine.helpers.experience import gradients, make_experience
from tests.engine.helpers.passes import hidden_of
from tests.engine.helpers.rollouts import sequence_of
from tests.engine.helpers.tiny_trainer import SETTINGS, OnUpdate, make_trainer, target_share, weights_of


@pytest.mark.parametrize("family", ["llama", "gpt2_tied"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"aggregation": "seq_mean_token_mean", "entropy_coef": 0.01},
        {"aggregation": "seq_mean_token_sum", "ratio_level": "sequence"},
        {"aggregation": "token_sum", "objective": "kl_penalty", "old_kl_coef": 0.5},
        {"objective": "cispo", "cliprange_high": 0.1},
        {"objective": "sapo", "tau_neg": 2.0},
        {"objective": "ipo", "divergence": 0.01, "log_ratio_coef": 0.1},
        {"objective": "dppo_tv", "divergence": 0.01, "ratio_limit": 1.1},
        {"objective": "dppo_kl", "divergence": 0.0, "divergence_high": 0.001},
        {"objective": "gspo_token", "aggregation": "seq_mean_token_mean", "cliprange": 0.02},
        {"objective": "gmpo", "aggregation": "seq_mean_token_mean", "cliprange": 0.1},
    ],
    ids=str,
)
def test_s10_micro_batches_add_up_to_the_minibatch(family, settings):
    trainer = make_trainer(family)
    experience = make_experience(trainer)
    # Change the policy after sampling, so that ratios differ from 1 and some are clipped.
    with torch.no_grad():
        for number, parameter in enumerate(trainer.policy.parameters()):
            noise = torch.Generator().manual_seed(number)
            parameter.add_(0.03 * torch.randn(parameter.shape, generator=noise))
    whole, metrics = gradients(trainer, experience, 16, **settings)
    without_clip = settings.get("objective") in ("kl_penalty", "sapo") or "ratio_level" in settings
    assert 0 < float(metrics["clipfrac"]) < 1 or without_clip
    for microbatch in (1, 5):
        parts, part_metrics = gradients(trainer, experience, microbatch, **settings)
        for name in whole:
            scale = float(whole[name].abs().max())
            torch.testing.assert_close(parts[name], whole[name], rtol=1e-4, atol=2e-5 * scale + 1e-8)
        for name in metrics:
            torch.testing.assert_close(part_metrics[name], metrics[name], rtol=1e-4, atol=1e-5)


def test_s11_s12_gradient_equals_that_of_the_formula():
    """The loss is the clipped surrogate plus half the squared value error, in float64 from the model's logits."""
    trainer = make_trainer()
    experience = make_experience(trainer)
    noise = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trainer.policy.parameters():
            parameter.add_(0.03 * torch.randn(parameter.shape, generator=noise))
    ours, _ = gradients(trainer, experience, 4)
    policy, rollout = trainer.policy.double(), experience.rollout
    policy.zero_grad()
    count, loss = rollout.mask.sum(), 0.0
    for i in range(16):
        ids = sequence_of(rollout, i)[None]
        p, n = int(rollout.prompt_lengths[i]), int(rollout.response_lengths[i])
        logprobs = policy.model(input_ids=ids).logits.log_softmax(-1)[0, p - 1 : -1].gather(-1, ids[0, p:, None])[:, 0]
        hidden = hidden_of(policy, ids)[0, p - 1 : -1]
        values = hidden @ policy.value.weight + policy.value.bias
        old, a, old_v, target = (
            x[i, :n].double()
            for x in (experience.old_logprobs, experience.advantages, experience.old_values, experience.returns)
        )
        ratio = (logprobs - old).exp()
        surrogate = torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a)
        clipped = values.clamp(old_v - 0.2, old_v + 0.2)
        error = torch.maximum((values - target) ** 2, (clipped - target) ** 2)
        loss = loss + (-surrogate + 0.1 * 0.5 * error).sum() / count
    loss.backward()
    for name, parameter in policy.named_parameters():
        scale = float(parameter.grad.abs().max())
        torch.testing.assert_close(ours[name].double(), parameter.grad, rtol=1e-3, atol=1e-4 * scale + 1e-8, msg=name)


def test_s11_a_clamped_log_ratio_stops_the_gradient():
    """Every ratio is shifted to e, beyond the clamp, so that only the gradient of the value loss remains."""
    trainer = make_trainer()
    experience = make_experience(trainer)
    shifted = replace(experience, old_logprobs=experience.old_logprobs - 1.0 * experience.rollout.mask)
    head = "model.lm_head.weight"
    free = gradients(trainer, shifted, 16, objective="ratio")[0]
    held = gradients(trainer, shifted, 16, objective="ratio", log_ratio_clamp=0.5)[0]
    assert float(free[head].abs().max()) > 0
    assert head not in held or float(held[head].abs().max()) == 0.0


def test_s6_s7_rewards_carry_the_penalties():
    trainer = make_trainer(missing_eos_penalty=3.0, kl_coef=0.5)
    rollout = trainer.generator.generate(trainer.prompts(0, 16), torch.arange(16))
    assert 0 < int(rollout.ended.sum()) < 16
    scored = score(rollout, trainer.policy, trainer.reference, target_share, trainer.config, 1.0)
    torch.testing.assert_close(scored.scores, target_share(rollout) - 3.0 * (~rollout.ended).float())
    ref_logprobs = rollout.logprobs - 0.25 * rollout.mask
    shifted = Scored(rollout, scored.scores, scored.raw_scores, rollout.logprobs, rollout.values, ref_logprobs)
    _, log = advantages(shifted, trainer.config, 0.5)
    assert log["kl"] == pytest.approx(0.25 * log["response_length"], rel=1e-5)
    assert log["reward_mean"] == pytest.approx(log["scaled_score_mean"] - 0.5 * log["kl"], rel=1e-4, abs=1e-4)


def test_s10_first_minibatch_has_ratio_one_and_no_kl():
    log = make_trainer(rollout_batch=16, minibatch=16, ppo_epochs=1, updates=1).step()
    assert log["ratio_mean"] == pytest.approx(1.0, abs=1e-5)
    assert log["ratio_max"] == pytest.approx(1.0, abs=1e-4)
    assert log["clipfrac"] == 0.0
    assert log["kl"] == pytest.approx(0.0, abs=1e-4)


def test_rescored_logprobs_have_ratio_one_exactly():
    log = make_trainer(minibatch=16, microbatch=16, ppo_epochs=1, updates=1, old_logprobs="rescored").step()
    assert log["ratio_max"] == 1.0


def test_s13_entropy_bonus_is_the_mean_entropy_of_the_states():
    """The coefficient adds `-c2 grad mean_t H(pi(. | s_t))` to the gradient, here computed from the model's logits."""
    trainer = make_trainer()
    experience = make_experience(trainer)
    with_bonus, metrics = gradients(trainer, experience, 4, entropy_coef=5.0)
    without, _ = gradients(trainer, experience, 4)
    rollout, policy, total = experience.rollout, trainer.policy, 0.0
    policy.zero_grad()
    for row in range(16):
        ids = sequence_of(rollout, row)[None]
        logprobs = policy.model(input_ids=ids).logits.log_softmax(-1)[0, int(rollout.prompt_lengths[row]) - 1 : -1]
        total = total - (logprobs.exp() * logprobs).sum()
    entropy = total / rollout.mask.sum()
    (-5.0 * entropy).backward()
    assert float(metrics["entropy"]) == pytest.approx(float(entropy.detach()), rel=1e-4)
    for name, parameter in policy.model.named_parameters():
        found = with_bonus[f"model.{name}"] - without[f"model.{name}"]
        scale = float(parameter.grad.abs().max())
        torch.testing.assert_close(found, parameter.grad, rtol=5e-3, atol=1e-3 * scale + 1e-7, msg=name)


def test_s12_value_loss_is_half_the_mean_squared_error():
    """Its coefficient adds `c1 grad mean_t 1/2 (V(s_t) - R_t)^2` to the gradient of the policy and of the value function."""
    trainer = make_trainer()
    experience = make_experience(trainer)
    with_values, metrics = gradients(trainer, experience, 4, vf_coef=3.0, cliprange_value=None)
    without, _ = gradients(trainer, experience, 4, vf_coef=0.0, cliprange_value=None)
    rollout, policy, total = experience.rollout, trainer.policy, 0.0
    policy.zero_grad()
    for row in range(16):
        ids = sequence_of(rollout, row)[None]
        values = policy.value(hidden_of(policy, ids))[0, int(rollout.prompt_lengths[row]) - 1 : -1]
        total = total + (values - experience.returns[row, : len(values)]).square().sum() / 2
    loss = total / rollout.mask.sum()
    (3.0 * loss).backward()
    assert float(metrics["value_loss"]) == pytest.approx(float(loss.detach()), rel=1e-4)
    for name, parameter in policy.named_parameters():
        if parameter.grad is not None:
            scale = float(parameter.grad.abs().max())
            found = with_values[name] - without[name]
            torch.testing.assert_close(found, parameter.grad, rtol=5e-3, atol=1e-3 * scale + 1e-7, msg=name)


def test_temperature_and_kept_set_enter_the_loss():
    rollout = RolloutConfig(max_prompt_tokens=8, max_response_tokens=10, batch_size=16, temperature=0.6, top_p=0.7)
    trainer = make_trainer(rollout=rollout, minibatch=16, ppo_epochs=1, importance_cap=2.0)
    weights = None
    original = trainer.update_rule

    def update(experience, step):
        nonlocal weights
        weights = experience.weights[experience.rollout.mask]
        return original(experience, step)

    update.state, update.load_state, update.optimizer = original.state, original.load_state, original.optimizer
    trainer.update_rule = update
    assert trainer.step()["ratio_max"] == pytest.approx(1.0, abs=1e-4)
    assert (weights <= 1.0 + 1e-5).all() and weights.min() < 0.9


def test_s10_training_raises_the_reward():
    trainer = make_trainer(
        updates=25, rollout_batch=64, minibatch=32, microbatch=32, kl_coef=0.0, optim=OptimConfig(lr=4e-3)
    )
    scores = []
    trainer.callbacks.append(OnUpdate(lambda number, log: scores.append(log["score_mean"])))
    trainer.train()
    assert len(scores) == 25
    assert sum(scores[-5:]) / 5 > 3 * sum(scores[:5]) / 5


def test_every_epoch_has_a_different_order():
    trainer, orders = make_trainer(), []
    for number in (0, 1):
        orders += [trainer.update_rule.order(16, number, epoch).tolist() for epoch in (0, 1)]
    assert all(sorted(order) == list(range(16)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4


def test_sequences_are_numbered_through_the_run():
    trainer, asked, sampled = make_trainer(), [], []
    prompts, generate = trainer.prompts, trainer.generator.generate
    trainer.prompts = lambda first, count: asked.append((first, count)) or prompts(first, count)
    trainer.generator.generate = lambda p, s, **where: sampled.extend(s.tolist()) or generate(p, s, **where)
    trainer.train()
    assert asked == [(0, 16), (16, 16)]
    assert sampled == list(range(32))


@pytest.mark.parametrize("family", ["llama", "gpt2_tied", "gemma2"])
def test_a_resumed_run_has_the_same_bits(tmp_path, family):
    straight = make_trainer(family)
    straight.step()
    log = straight.step()
    first = make_trainer(family)
    first.step()
    save_checkpoint(tmp_path / "checkpoint", first, None, RunConfig())
    second = make_trainer(family)
    resume(tmp_path / "checkpoint", second, RunConfig())
    assert (second.updates_done, second.update_rule.optimizer_steps) == (1, 4)
    resumed_log = second.step()
    after = weights_of(second)
    for name, parameter in weights_of(straight).items():
        assert torch.equal(parameter, after[name]), name
    for name in ("score_mean", "kl", "policy_loss", "value_loss", "grad_norm", "lr", "ratio_max"):
        assert resumed_log[name] == log[name], name


@pytest.mark.parametrize("before, after", [("resident", "host"), ("host", "resident")])
def test_a_resumed_run_may_move_the_optimizer_state(tmp_path, before, after):
    straight, configs = make_trainer(), {}
    straight.step()
    straight.step()
    for place in (before, after, "8bit"):
        configs[place] = RunConfig(memory=MemoryConfig(optimizer_state=place))
    first, second = (make_trainer(memory=configs[place].memory) for place in (before, after))
    first.step()
    save_checkpoint(tmp_path / "checkpoint", first, None, configs[before])
    resume(tmp_path / "checkpoint", second, configs[after])
    second.step()
    expected = weights_of(straight)
    assert all(torch.equal(weight, expected[name]) for name, weight in weights_of(second).items())
    with pytest.raises(ValueError, match=rf"memory.optimizer_state: got '8bit', expected {before!r} to go on"):
        check_settings(tmp_path / "checkpoint", configs["8bit"])
    with pytest.raises(ValueError, match=r"rollout.stop: got \['x'\], expected \[\] to go on"):
        check_settings(tmp_path / "checkpoint", RunConfig(rollout=RolloutConfig(stop=("x",))))
    check_settings(tmp_path / "checkpoint", load_config(None, ["data.hygiene.honorifics=[Dr]"]))


def test_a_checkpoint_loads_with_transformers(tmp_path):
    trainer = make_trainer()
    trainer.step()
    save_checkpoint(tmp_path / "run" / "checkpoint", trainer, None, RunConfig())
    ids = torch.arange(9)[None]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint").eval()
    assert torch.equal(model(input_ids=ids).logits, trainer.policy.model(input_ids=ids).logits)
    loaded = load_policy(tmp_path / "run" / "checkpoint")
    hidden = hidden_of(loaded, ids)
    assert torch.equal(loaded.value(hidden), trainer.policy.value(hidden_of(trainer.policy, ids)))


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "model.safetensors",
        "value_head.safetensors",
        "optimizer.safetensors",
        "trainer.json",
        "config.yaml",
    ],
)
def test_a_missing_file_is_named(tmp_path, name):
    trainer = make_trainer()
    save_checkpoint(tmp_path / "checkpoint", trainer, None, RunConfig())
    (tmp_path / "checkpoint" / name).unlink()
    with pytest.raises(ValueError, match=f"{name} is missing"):
        resume(tmp_path / "checkpoint", trainer, RunConfig())


@pytest.mark.parametrize("left", ["old and new", "old"])
def test_resume_recovers_from_a_crash_between_the_renames(tmp_path, left):
    trainer = make_trainer()
    folder, old, new = (tmp_path / f"checkpoint{end}" for end in ("", ".old", ".new"))
    trainer.step()
    save_checkpoint(folder, trainer, None, RunConfig())
    folder.rename(old)
    if left == "old and new":
        trainer.step()
        save_checkpoint(new, trainer, None, RunConfig())
    again = make_trainer()
    resume(folder, again, RunConfig())
    assert again.updates_done == (2 if left == "old and new" else 1)
    assert all(torch.equal(value, weights_of(trainer)[name]) for name, value in weights_of(again).items())


def test_a_half_written_first_checkpoint_is_not_resumed_from(tmp_path):
    save_checkpoint(tmp_path / "checkpoint.new", make_trainer(), None, RunConfig())
    with pytest.raises(ValueError, match="checkpoint: there is no checkpoint to resume from"):
        resume(tmp_path / "checkpoint", make_trainer(), RunConfig())


@pytest.mark.parametrize(
    "content, message",
    [("{}", "got None for updates_done, expected int"), ("[]", "got list, expected an object")],
)
def test_an_incomplete_state_is_named(tmp_path, content, message):
    trainer = make_trainer()
    save_checkpoint(tmp_path / "checkpoint", trainer, None, RunConfig())
    (tmp_path / "checkpoint" / "trainer.json").write_text(content)
    with pytest.raises(ValueError, match=rf"trainer\.json: {message}"):
        resume(tmp_path / "checkpoint", trainer, RunConfig())


@pytest.mark.parametrize("name", ["optimizer", "value_head", "model"])
def test_a_truncated_file_is_named(tmp_path, name):
    trainer = make_trainer()
    trainer.step()
    save_checkpoint(tmp_path / "checkpoint", trainer, None, RunConfig())
    path = tmp_path / "checkpoint" / f"{name}.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"checkpoint.* not a whole safetensors file"):
        resume(tmp_path / "checkpoint", trainer, RunConfig())


def test_a_resumed_run_needs_the_same_settings(tmp_path):
    began = RunConfig(ppo=PPOConfig(**SETTINGS))
    save_checkpoint(tmp_path / "checkpoint", make_trainer(), None, began)
    trainer = make_trainer()
    for config, message in (
        (replace(began, ppo=replace(began.ppo, kl_coef=0.5)), r"ppo\.kl_coef: got 0\.5, expected 0\.05 .*config\.yaml"),
        (replace(began, ppo=replace(began.ppo, rollout_batch=8)), r"ppo\.rollout_batch: got 8, expected 16 "),
        (
            replace(began, ppo=replace(began.ppo, optim=OptimConfig(lr=0.5))),
            r"ppo\.optim\.lr: got 0\.5, expected 9e-06 ",
        ),
        (replace(began, rollout=RolloutConfig(top_k=3)), r"rollout\.top_k: got 3, expected None "),
    ):
        with pytest.raises(ValueError, match=message):
            resume(tmp_path / "checkpoint", trainer, config)
    elsewhere = replace(began, output_dir="elsewhere", ppo=replace(began.ppo, updates=7, checkpoint_every=1))
    resume(tmp_path / "checkpoint", trainer, elsewhere)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda tensors: tensors.clear(), "got 0 tensors, expected"),
        (
            lambda tensors: tensors.update({"x.exp_avg": tensors.pop("0.exp_avg")}),
            r"the tensor x\.exp_avg of torch.float32 and shape",
        ),
        (
            lambda tensors: tensors.update({"0.exp_avg": torch.zeros(())}),
            r"the tensor 0\.exp_avg of torch.float32 and shape \(\)",
        ),
    ],
)
def test_incomplete_optimizer_state_is_refused(tmp_path, change, message):
    trainer = make_trainer()
    trainer.step()
    save_checkpoint(tmp_path / "checkpoint", trainer, None, RunConfig())
    path = tmp_path / "checkpoint" / "optimizer.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(ValueError, match=rf"optimizer\.safetensors: {message}"):
        resume(tmp_path / "checkpoint", trainer, RunConfig())


def test_a_missing_shard_or_a_broken_file_is_named(tmp_path):
    trainer = make_trainer()
    save_checkpoint(tmp_path / "checkpoint", trainer, None, RunConfig())
    (tmp_path / "checkpoint" / "trainer.json").write_text("{")
    with pytest.raises(ValueError, match=r"trainer\.json: not valid JSON"):
        resume(tmp_path / "checkpoint", trainer, RunConfig())
    trainer.policy.model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    load_policy(tmp_path / "sharded")
    shard = sorted((tmp_path / "sharded").glob("model-*.safetensors"))[-1]
    shard.unlink()
    with pytest.raises(ValueError, match=f"{shard.name} is missing"):
        load_policy(tmp_path / "sharded")


def test_a_different_seed_or_reference_is_refused(tmp_path):
    save_checkpoint(tmp_path / "checkpoint", make_trainer(), None, RunConfig())
    with pytest.raises(ValueError, match="seed 1, expected 2"):
        resume(tmp_path / "checkpoint", make_trainer(seed=2), RunConfig())
    with pytest.raises(ValueError, match="the reference policy of this run differs"):
        resume(tmp_path / "checkpoint", make_trainer(model_seed=1), RunConfig())
    with pytest.raises(ValueError, match="nowhere: there is no checkpoint to resume from"):
        resume(tmp_path / "nowhere", make_trainer(), RunConfig())


def test_a_failed_save_leaves_the_old_folder(tmp_path):
    trainer = make_trainer()
    save_checkpoint(tmp_path / "policy", trainer, None, RunConfig())
    before = sorted(path.name for path in (tmp_path / "policy").iterdir())

    def fail(folder):
        (folder / "half").write_text("x")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        with_new_folder(tmp_path / "policy", fail)
    assert sorted(path.name for path in (tmp_path / "policy").iterdir()) == before
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]
    save_checkpoint(tmp_path / "policy", trainer, None, RunConfig())
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]
