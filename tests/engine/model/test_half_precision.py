"""Weights in bfloat16: gradients and masters in float32, learning, and bitwise equality after a resume."""

import pytest
import torch
from safetensors.torch import load_file

from rlhf_engine.checkpoint import resume, save_checkpoint
from rlhf_engine.config import MemoryConfig, OptimConfig, RewardConfig, RunConfig, SFTConfig, load_config
from rlhf_engine.data import Example
from rlhf_engine.model import ActorCritic
from rlhf_engine.model.reward_model import RewardModel
from rlhf_engine.optim import build
from rlhf_engine.ppo import update as ppo
from rlhf_engine.recipes import run_ppo, run_sft
from rlhf_engine.supervised.reward_model import RankedPrompt, fit_reward_model
from rlhf_engine.supervised.sft import fit_language_model
from tests.engine.helpers.cli_run import new_model, new_run
from tests.engine.helpers.tiny_models import tiny
from tests.engine.helpers.tiny_trainer import make_trainer, weights_of

HALF = torch.bfloat16
EXAMPLES = [Example((3 + n % 5, 9), (5, 6 + n % 3, 2)) for n in range(24)]


@pytest.mark.parametrize("state", ["resident", "host"])
@pytest.mark.parametrize("family", ["llama", "gpt2_tied"])
def test_a_resumed_run_in_bfloat16_is_bitwise_the_same(tmp_path, monkeypatch, family, state):
    settings = {"dtype": HALF, "memory": MemoryConfig(optimizer_state=state), "ema_decay": 0.9}
    config = RunConfig(dtype="bfloat16", memory=settings["memory"])
    seen = set()

    def watched(optimizer, *args, step=ppo.optimizer_step):
        seen.update((p.dtype, p.grad.dtype) for group in optimizer.param_groups for p in group["params"])
        return step(optimizer, *args)

    monkeypatch.setattr(ppo, "optimizer_step", watched)
    straight, first, second = (make_trainer(family, **settings) for _ in range(3))
    straight.train()
    first.step()
    save_checkpoint(tmp_path / "run", first, None, config)
    resume(tmp_path / "run", second, config)
    second.step()
    assert seen == {(HALF, torch.float32), (torch.float32, torch.float32)}  # the value head is always float32
    theirs, began = weights_of(straight), weights_of(make_trainer(family, **settings))
    assert all(torch.equal(weight, theirs[name]) for name, weight in weights_of(second).items())
    assert any(not torch.equal(weight, began[name]) for name, weight in theirs.items())
    for parameter, other in zip(straight.policy.parameters(), second.policy.parameters(), strict=True):
        ours, theirs = straight.update_rule.optimizer.state[parameter], second.update_rule.optimizer.state[other]
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        if parameter.dtype == HALF:
            assert torch.equal(parameter, ours["master"].to(HALF)) and not torch.equal(
                parameter.float(), ours["master"]
            )
    averages = zip(
        straight.update_rule.average.model.parameters(), second.update_rule.average.model.parameters(), strict=True
    )
    assert all(a.dtype == torch.float32 and torch.equal(a, b) for a, b in averages)
    assert all(x.dtype == torch.float32 for x in load_file(tmp_path / "run" / "ema" / "model.safetensors").values())


def test_settings_reach_the_stages(tmp_path, monkeypatch):
    """bfloat16 with state in host memory, from config to output folders: SFT, then PPO, interrupted and resumed."""
    monkeypatch.chdir(tmp_path)
    run = new_run(tmp_path, new_model(tmp_path / "base"))
    (run / "rewards.py").write_text("def reward(prompts, answers):\n    return [float(len(a)) for a in answers]\n")
    given = [
        "dtype=bfloat16",
        "memory.optimizer_state=host",
        "reward.function=rewards.py:reward",
        "ppo.value_init=zero",
    ]
    made, staged = [], build.StagedAdamW
    monkeypatch.setattr(build, "StagedAdamW", lambda *a, **k: made.append(k["host"]) or staged(*a, **k))
    run_sft(load_config(run / "run.yaml", given))
    run_ppo(load_config(run / "run.yaml", [*given, "model.path=out/sft", "ppo.updates=1"]))
    run_ppo(load_config(run / "run.yaml", [*given, "model.path=out/sft", "ppo.updates=2"]), resume=True)
    run_ppo(load_config(run / "run.yaml", [*given, "model.path=out/sft", "ppo.updates=2", "output_dir=whole"]))
    assert made == [True] * 4
    whole, broken = (load_file(run / name / "ppo" / "optimizer.safetensors") for name in ("whole", "out"))
    assert "0.master" in whole and all(torch.equal(whole[name], broken[name]) for name in whole)
    weights = load_file(run / "out" / "ppo" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {HALF}


@pytest.mark.parametrize("state", ["resident", "host"])
def test_supervised_stages_learn_in_bfloat16(state):
    """Each loss falls by half, with steps that weights without float32 masters would mostly round away."""
    actor = ActorCritic(tiny("llama").to(HALF))
    optim = OptimConfig(lr=3e-3)
    report = fit_language_model(
        actor,
        EXAMPLES,
        EXAMPLES[:6],
        SFTConfig(epochs=12, batch_size=8, optim=optim),
        pad_id=0,
        seed=0,
        optimizer_state=state,
    )
    losses = [found.validation_loss for found in report.history]
    assert min(losses) < 0.5 * losses[0] and actor.lm_weight.dtype == HALF
    model = RewardModel.from_causal_lm(tiny("llama").to(HALF), seed=0)
    prompts = [
        RankedPrompt((Example((3 + n % 7,), (5, 5)), Example((3 + n % 7,), (8, 8))), ((0, 1),)) for n in range(16)
    ]
    config = RewardConfig(epochs=10, batch_size=8, evaluate_every=2, optim=optim)
    history = fit_reward_model(model, prompts, prompts, config, pad_id=0, seed=0, optimizer_state=state)
    assert history[-1].loss < 0.5 * history[0].loss
