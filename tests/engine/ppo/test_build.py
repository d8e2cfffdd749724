"""`build_trainer`: the parts that it creates, the parts that it accepts, and arguments that it refuses."""

import pytest
import torch

from rlhf_engine.checkpoint import resume, save_checkpoint
from rlhf_engine.config import OptimConfig, PPOConfig, RolloutConfig, RunConfig
from rlhf_engine.model import ActorCritic
from rlhf_engine.ppo.build import build_trainer
from rlhf_engine.rollout import Generator
from tests.engine.helpers.tiny_models import VOCABULARY, tiny
from tests.engine.helpers.tiny_trainer import ROLLOUT, SETTINGS, target_share, weights_of

CONFIG = RunConfig(rollout=ROLLOUT, ppo=PPOConfig(**SETTINGS, optim=OptimConfig(lr=1e-2, schedule="linear")))
PROMPTS = [[3, 4, 5], [6], [7, 8]]


def make_policy(seed=0):
    return ActorCritic(tiny("llama", seed=seed, initializer_range=0.1))


def sampler(policy):
    return Generator(policy, ROLLOUT, eos_token_ids=(2, 7), pad_token_id=0, seed=0)


def build(policy=None, *, prompts=PROMPTS, config=CONFIG, generator=sampler, optimizer=None, **options):
    policy = policy or make_policy()
    parts = {"generator": generator and generator(policy), "optimizer": optimizer and optimizer(policy)}
    return build_trainer(policy, None, target_share, prompts, config, **parts, **options)


class EveryPrompt:
    """A plan without a bound."""

    kv_bytes = None

    def within(self, config):
        return config


def without_the_head(policy):
    return torch.optim.SGD(policy.model.parameters(), lr=0.1)


def of_a_second_policy(policy):
    return torch.optim.SGD([*policy.parameters(), *make_policy(1).parameters()], lr=0.1)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"generator": None}, "pass `codec` or `generator`"),
        ({"generator": lambda policy: sampler(make_policy(1))}, "the generator samples from a different model"),
        ({"plan": EveryPrompt()}, "pass `generator` or `plan`, not both"),
        ({"optimizer": without_the_head}, r"optimizer: value.weight is missing \(2 missing in all\)"),
        (
            {"optimizer": of_a_second_policy},
            "optimizer: 23 of its parameters are frozen or not parameters of the policy",
        ),
        ({"prompts": []}, "prompts: got an empty sequence"),
        ({"prompts": [[3], []]}, r"prompts\[1\]: got shape \(0,\)"),
        ({"prompts": [[3] * 9]}, r"prompts\[0\]: got shape \(9,\), expected 1 to 8 token ids"),
        ({"prompts": [[3], [4, VOCABULARY]]}, rf"prompts\[1\]: got the id {VOCABULARY}, expected ids from 0"),
        ({"prompts": [[-1]]}, r"prompts\[0\]: got the id -1"),
        ({"prompts": ["a text"]}, r"prompts\[0\]: got str, expected token ids"),
        ({"prompts": [torch.ones(3)]}, r"prompts\[0\]: got torch.float32"),
        ({"prompts": [[[3, 4]]]}, r"prompts\[0\]: got shape \(1, 2\)"),
        (
            {"config": RunConfig(rollout=ROLLOUT, ppo=PPOConfig(**SETTINGS, objective="trpo"))},
            "model.attention: got 'sdpa' with ppo.objective 'trpo', expected 'eager'",
        ),
        (
            {"config": RunConfig(rollout=ROLLOUT, ppo=PPOConfig(**SETTINGS, ptx_coef=1.0))},
            "pretrain: got no stream with ptx_coef 1.0",
        ),
    ],
)
def test_an_argument_that_does_not_fit_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_a_custom_optimizer_keeps_its_learning_rates():
    """The schedule multiplies the learning rate of each group, so the ratio between two groups stays constant."""
    rates = []

    def two_groups(policy):
        groups = [
            {"params": list(policy.model.parameters()), "lr": 0.4},
            {"params": list(policy.value.parameters()), "lr": 0.1},
        ]
        optimizer = torch.optim.SGD(groups)
        optimizer.register_step_pre_hook(lambda *_: rates.append([group["lr"] for group in optimizer.param_groups]))
        return optimizer

    trainer = build(optimizer=two_groups)
    trainer.train()
    assert (
        rates[0] == [0.4, 0.1] and len(rates) == 8
    )  # the first step of a linear schedule without warm-up has the full learning rate
    assert all(policy == pytest.approx(4.0 * value) for policy, value in rates)
    assert rates[-1][0] < 0.1


@pytest.mark.parametrize("kind", [{"momentum": 0.9}, {"momentum": 0.0}, None])
def test_any_optimizer_resumes(tmp_path, kind):
    """SGD's momentum has a different name than AdamW's moments, Adagrad has one tensor and a step count, plain SGD none."""

    def make(policy):
        if kind is None:
            return torch.optim.Adagrad(policy.parameters(), lr=1e-2)
        return torch.optim.SGD(policy.parameters(), lr=1e-2, **kind)

    straight, first, second = build(optimizer=make), build(optimizer=make), build(optimizer=make)
    straight.train()
    first.step()
    save_checkpoint(tmp_path / "checkpoint", first, None, CONFIG)
    resume(tmp_path / "checkpoint", second, CONFIG)
    second.train()
    expected = weights_of(straight)
    assert all(torch.equal(found, expected[name]) for name, found in weights_of(second).items())


def test_prompts_can_be_a_function():
    """Prompts are requested by number, so that a resumed run gets the following ones."""
    asked = []

    def prompts(first, count):
        asked.append((first, count))
        return [torch.tensor([3])] * count

    trainer = build(prompts=prompts)
    trainer.train()
    assert asked == [(0, 16), (16, 16)]


def test_collect_and_score_can_be_called_separately():
    """`collect` and `score` work without `step`."""
    trainer = build(config=RunConfig(rollout=RolloutConfig(max_prompt_tokens=8, max_response_tokens=4), ppo=CONFIG.ppo))
    scored, _ = trainer.score(trainer.collect())
    assert len(scored.rollout) == 16 and scored.scores.shape == (16,)
    assert trainer.updates_done == 0 and trainer.step()["kl"] == pytest.approx(0.0, abs=1e-5)
