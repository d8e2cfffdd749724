"""PPO-ptx: the pretraining gradient equals the formula, is part of the same step, and a resumed run continues its stream."""

import pytest
import torch

from rlhf_engine.checkpoint import resume, save_checkpoint
from rlhf_engine.config import OptimConfig, RunConfig
from rlhf_engine.model import ActorCritic
from rlhf_engine.ppo.build import prompt_stream
from rlhf_engine.ppo.minibatch import minibatch_backward
from rlhf_engine.ppo.ptx import PretrainStream, language_model_loss, ptx_backward
from tests.engine.helpers.experience import make_experience
from tests.engine.helpers.pretraining import make_stream
from tests.engine.helpers.tiny_models import tiny
from tests.engine.helpers.tiny_trainer import make_trainer, weights_of


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["llama", "gpt2_tied", "gemma2"])
@pytest.mark.parametrize("microbatch", [1, 3, 8])
def test_s9_gradient_is_gamma_times_the_language_model_loss(family, microbatch):
    policy, batch = ActorCritic(tiny(family)), make_stream().take(8)
    metrics = ptx_backward(policy, batch, coef=27.8, microbatch=microbatch)
    ours = gradients(policy.model)
    model = tiny(family).double()
    logprobs = model(input_ids=batch[:, :-1]).logits.log_softmax(-1).gather(-1, batch[:, 1:, None])
    (-27.8 * logprobs.mean()).backward()
    assert float(metrics["ptx_loss"]) == pytest.approx(float(-logprobs.mean().detach()), rel=1e-5)
    for name, expected in gradients(model).items():
        scale = float(expected.abs().max())
        torch.testing.assert_close(ours[name].double(), expected, rtol=1e-3, atol=1e-4 * scale + 1e-8, msg=name)


def test_s9_both_gradients_are_in_the_same_optimizer_step():
    """Every optimizer step gets the sum of both gradients."""
    settings = {"minibatch": 16, "ppo_epochs": 1, "optim": OptimConfig(lr=1e-3, max_grad_norm=None)}
    trainer = make_trainer(pretrain=make_stream(), ptx_coef=5.0, ptx_ratio=0.5, **settings)
    expected = make_trainer(**settings)
    minibatch_backward(expected.policy, make_experience(expected), torch.arange(16), expected.config, 1.0)
    ptx_backward(expected.policy, make_stream().take(8), coef=5.0, microbatch=8)
    expected = gradients(expected.policy)
    steps, step = [], trainer.update_rule.optimizer.step
    trainer.update_rule.optimizer.step = lambda: steps.append(gradients(trainer.policy)) or step()
    log = trainer.step()
    assert len(steps) == trainer.update_rule.optimizer_steps == 1 and trainer.update_rule.pretrain.position == 8
    for name, gradient in expected.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(steps[0][name], gradient, rtol=1e-3, atol=1e-4 * scale + 1e-8, msg=name)
    assert log["ptx_loss"] > 1.0


def test_s9_keeps_the_language_model():
    """After the same number of updates, the pretraining loss is lower with the term than without it."""
    losses = []
    for coef, stream in ((0.0, None), (2.0, make_stream(8))):
        trainer = make_trainer(pretrain=stream, ptx_coef=coef, updates=4, optim=OptimConfig(lr=5e-3))
        trainer.train()
        batch = make_stream(8).take(8)
        losses.append(float(language_model_loss(trainer.policy, batch, num_tokens=batch[:, 1:].numel()).detach()))
    assert losses[1] < losses[0] - 0.1


def test_s9_every_pass_has_a_different_order():
    stream = make_stream()
    passes = [torch.cat([stream.take(5), stream.take(19)]) for _ in range(2)]
    rows = [sorted(map(tuple, taken.tolist())) for taken in passes]
    assert rows[0] == rows[1] == sorted(map(tuple, stream.sequences.tolist()))
    assert not torch.equal(*passes) and stream.position == 48


def test_s9_every_stream_of_a_run_has_a_different_order():
    """One seed, with equal numbers of prompts, text sequences and responses: the three orders still differ."""
    prompts = prompt_stream([torch.tensor([number]) for number in range(24)], RunConfig(seed=1), 24)(0, 24)
    text = PretrainStream(torch.arange(24)[:, None], 1).take(24)
    answers = make_trainer().update_rule.order(24, 0, 0)
    orders = [torch.cat(prompts).tolist(), text[:, 0].tolist(), answers.tolist()]
    assert all(sorted(order) == list(range(24)) for order in orders)
    assert len(set(map(tuple, orders))) == 3


def test_s9_a_resumed_run_continues_the_text_stream(tmp_path):
    settings = {"ptx_coef": 1.0, "updates": 2, "ppo_epochs": 2, "stop_kl": 1e-6}

    def make():
        return make_trainer(pretrain=make_stream(), **settings)

    straight, first, second = make(), make(), make()
    straight.step()
    log = straight.step()
    first.step()
    save_checkpoint(tmp_path / "checkpoint", first, None, RunConfig())
    resume(tmp_path / "checkpoint", second, RunConfig())
    assert (
        second.update_rule.pretrain.position == first.update_rule.pretrain.position == 16
    )  # `stop_kl` skipped the second epoch
    assert second.step()["ptx_loss"] == log["ptx_loss"]
    for name, parameter in weights_of(straight).items():
        assert torch.equal(parameter, weights_of(second)[name]), name


def test_s9_coefficient_and_stream_require_each_other():
    with pytest.raises(ValueError, match=r"pretrain: got no stream with ptx_coef 1\.0"):
        make_trainer(ptx_coef=1.0)
    with pytest.raises(ValueError, match=r"pretrain: got a stream with ptx_coef 0\.0"):
        make_trainer(pretrain=make_stream())
