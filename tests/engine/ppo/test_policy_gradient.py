"""REINFORCE, REINFORCE with baseline, and actor-critic: on enumerable problems the expected update is the exact gradient.

The trainer is then run until convergence: to the optimum of a bandit, and to the reference if all rewards are equal.
"""

import itertools

import pytest
import torch
from torch import nn

from rlhf_engine.config import OptimConfig, PPOConfig, RolloutConfig, RunConfig, load_config
from rlhf_engine.config.describe import describe
from rlhf_engine.config.ppo import PRESETS
from rlhf_engine.ppo.experience import gradient_discounts
from rlhf_engine.ppo.minibatch import loss_options
from rlhf_kernels import gae, ppo_loss
from tests.engine.helpers.bandits import arm
from tests.engine.helpers.tiny_trainer import OnUpdate, make_trainer

ROWS = {"reinforce": "s16", "reinforce_baseline": "s17", "actor_critic": "s18"}


class Tabular(nn.Module):
    """A softmax policy and a value for every state, in float64."""

    def __init__(self, states, actions, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.theta = nn.Parameter(torch.randn(states, actions, generator=generator, dtype=torch.float64))
        self.values = nn.Parameter(torch.randn(states, generator=generator, dtype=torch.float64))


class Chain:
    """Three states in a row: action 0 moves to the next state, action 1 stays, action 2 ends the episode; at most three steps.

    The reward and the next state depend on state and action. A bandit is a chain of one state and one step.
    """

    def __init__(self, states=3, actions=3, steps=3):
        self.states, self.actions, self.steps = states, actions, steps
        generator = torch.Generator().manual_seed(1)
        self.rewards = torch.randn(states, actions, generator=generator, dtype=torch.float64) + 1.0

    def next_state(self, state, action):
        """Return the next state, or None if the episode ends."""
        following = (state + 1, state, None)[action] if self.actions == 3 and self.steps > 1 else None
        return None if following is None or following >= self.states else following

    def episodes(self):
        """Return all possible (states, actions)."""
        found = set()
        for actions in itertools.product(range(self.actions), repeat=self.steps):
            states, taken = [0], []
            for step, action in enumerate(actions):
                taken.append(action)
                following = self.next_state(states[-1], action)
                if following is None or step + 1 == self.steps:
                    break
                states.append(following)
            found.add((tuple(states), tuple(taken)))
        return sorted(found)

    def value(self, policy, state, steps, gamma):
        """Return the expected discounted return of the next `steps` steps, differentiable in theta."""
        probabilities = policy.theta[state].softmax(-1)
        total = 0.0
        for action in range(self.actions):
            following = self.next_state(state, action)
            later = 0.0 if following is None or steps == 1 else self.value(policy, following, steps - 1, gamma)
            total = total + probabilities[action] * (self.rewards[state, action] + gamma * later)
        return total


def expected_gradient(chain, policy, config, values=None):
    """Sum probability times loss gradient over all episodes; `values[step][state]` replaces the policy's values."""
    names = dict(policy.named_parameters())
    total = {name: torch.zeros_like(parameter) for name, parameter in names.items()}
    mass = 0.0
    for states, actions in chain.episodes():
        n = len(actions)
        logprobs = policy.theta[list(states)].log_softmax(-1)[range(n), list(actions)]
        rewards = chain.rewards[list(states), list(actions)][None]
        mask = torch.ones(1, n, dtype=torch.bool)
        v = policy.values[list(states)]
        given = v.detach() if values is None else torch.stack([values[step][s] for step, s in enumerate(states)])
        old_values = (torch.zeros_like(given) if config.baseline == "none" else given)[None]
        advantages, returns = gae(rewards, old_values, mask, gamma=config.gamma, lam=config.lam, backend="reference")
        loss = ppo_loss(
            logprobs[None],
            logprobs.detach()[None],
            advantages,
            mask,
            values=v[None],
            old_values=old_values,
            returns=returns,
            weights=gradient_discounts(mask, config.gamma).double() if config.discount_gradient else None,
            backend="reference",
            **{name: value for name, value in loss_options(config).items() if name != "entropy_coef"},
        ).loss
        probability = logprobs.sum().exp().item()
        mass += probability
        for name, gradient in zip(names, torch.autograd.grad(loss, list(names.values())), strict=True):
            total[name] += probability * gradient
    assert mass == pytest.approx(1.0, abs=1e-12)
    return total


def config_of(preset, **settings):
    return PPOConfig.from_dict({"preset": preset, "vf_coef": 0.0, **settings})


def analytic(chain, policy, gamma):
    (gradient,) = torch.autograd.grad(chain.value(policy, 0, chain.steps, gamma), [policy.theta])
    return -gradient  # losses are minimized


def check_exact(chain, policy, config, values=None):
    found = expected_gradient(chain, policy, config, values)["theta"]
    torch.testing.assert_close(found, analytic(chain, policy, config.gamma), rtol=0, atol=1e-6)


BANDIT, CHAIN = Chain(states=1, actions=5, steps=1), Chain()


def test_s16_reinforce_on_a_bandit_is_the_exact_gradient():
    policy = Tabular(1, 5)
    check_exact(BANDIT, policy, config_of("reinforce"))
    probabilities, rewards = policy.theta[0].softmax(-1), BANDIT.rewards[0]
    by_hand = -probabilities * (rewards - (probabilities * rewards).sum())
    torch.testing.assert_close(analytic(BANDIT, policy, 1.0)[0], by_hand.detach())


@pytest.mark.parametrize("gamma", [1.0, 0.7])
def test_s16_reinforce_on_a_chain_is_the_exact_gradient(gamma):
    check_exact(CHAIN, Tabular(3, 3), config_of("reinforce", gamma=gamma))


def test_s16_without_gamma_to_the_t_the_gradient_differs():
    policy, config = Tabular(3, 3), config_of("reinforce", gamma=0.7)
    loose = PPOConfig(**{**PRESETS["reinforce"], "gamma": 0.7, "discount_gradient": False})
    gap = expected_gradient(CHAIN, policy, loose)["theta"] - analytic(CHAIN, policy, 0.7)
    assert float(gap.abs().max()) > 0.01
    check_exact(CHAIN, policy, config)


@pytest.mark.parametrize("gamma", [1.0, 0.7])
@pytest.mark.parametrize("chain", [BANDIT, CHAIN])
def test_s17_a_baseline_does_not_change_the_expected_gradient(chain, gamma):
    for seed in range(3):  # random values, unrelated to the returns
        check_exact(chain, Tabular(chain.states, chain.actions, seed), config_of("reinforce_baseline", gamma=gamma))


def true_values(chain, policy, gamma):
    """Return `values[step][state]`, the expected return of the remaining steps."""
    with torch.no_grad():
        return [
            [chain.value(policy, state, chain.steps - step, gamma) for state in range(chain.states)]
            for step in range(chain.steps)
        ]


@pytest.mark.parametrize("gamma", [1.0, 0.7])
@pytest.mark.parametrize("chain", [BANDIT, CHAIN])
def test_s18_actor_critic_with_the_true_values_is_the_exact_gradient(chain, gamma):
    policy = Tabular(chain.states, chain.actions)
    config = config_of("actor_critic", gamma=gamma)
    check_exact(chain, policy, config, true_values(chain, policy, gamma))


def test_s18_actor_critic_is_biased_by_wrong_values():
    policy = Tabular(3, 3)
    gap = expected_gradient(CHAIN, policy, config_of("actor_critic"))["theta"] - analytic(CHAIN, policy, 1.0)
    assert float(gap.abs().max()) > 0.01


@pytest.mark.parametrize("preset", ["reinforce_baseline", "actor_critic"])
def test_s17_s18_values_have_the_gradient_of_their_targets(preset):
    """The gradient d loss / d v(s) sums probability times (v(s) - target) over visits, with target G or R + gamma v(s')."""
    policy, gamma = Tabular(3, 3), 0.7
    found = expected_gradient(CHAIN, policy, config_of(preset, gamma=gamma, vf_coef=1.0))["values"]
    expected, values = torch.zeros(3, dtype=torch.float64), policy.values.detach()
    for states, actions in CHAIN.episodes():
        rewards = CHAIN.rewards[list(states), list(actions)]
        probability = policy.theta[list(states)].softmax(-1)[range(len(states)), list(actions)].prod().detach()
        for t, state in enumerate(states):
            if preset == "actor_critic":
                target = rewards[t] + (gamma * values[states[t + 1]] if t + 1 < len(states) else 0.0)
            else:
                target = sum(gamma**k * reward for k, reward in enumerate(rewards[t:]))
            expected[state] += probability * (values[state] - target)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("preset", list(ROWS))
def test_s16_s17_s18_a_preset_sets_its_options(tmp_path, preset):
    config = load_config(None, [f"ppo.preset={preset}", "ppo.gamma=0.9"]).ppo
    assert all(getattr(config, name) == value for name, value in PRESETS[preset].items())
    assert PPOConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match=rf"lam: got 0\.5, expected .* with preset '{preset}'"):
        load_config(None, [f"ppo.preset={preset}", "ppo.lam=0.5"])
    with pytest.raises(ValueError, match="preset: got 'sarsa'"):
        load_config(None, ["ppo.preset=sarsa"])


@pytest.mark.parametrize("preset", list(ROWS))
def test_s16_s17_s18_a_preset_replaces_the_defaults_of_a_file(tmp_path, preset):
    """`rlhf config show` writes every option with its default, which must not conflict with the preset."""
    path = tmp_path / "shown.yaml"
    path.write_text(describe(RunConfig(), RunConfig()))
    assert load_config(path, [f"ppo.preset={preset}"]) == load_config(None, [f"ppo.preset={preset}"])
    with pytest.raises(ValueError, match=rf"lam: got 0\.5, expected .* with preset '{preset}'"):
        load_config(path, [f"ppo.preset={preset}", "ppo.lam=0.5"])
    with pytest.raises(ValueError, match=r"ppo_epochs: got True \(bool\), expected int"):
        load_config(path, [f"ppo.preset={preset}", "ppo.ppo_epochs=true"])


@pytest.mark.parametrize("preset", [None, *ROWS])
def test_s10_s16_s17_s18_without_a_kl_the_optimum_of_a_bandit_is_reached(preset):
    rollout = RolloutConfig(max_prompt_tokens=8, max_response_tokens=1, batch_size=128)
    settings = dict(PRESETS.get(preset, {}))
    trainer = make_trainer(
        rollout=rollout,
        reward=arm,
        preset=preset,
        **settings
        | {"updates": 30, "rollout_batch": 128, "minibatch": 128, "microbatch": 128, "kl_coef": 0.0}
        | {"optim": OptimConfig(lr=1e-2)},
    )
    scores = []
    trainer.callbacks.append(OnUpdate(lambda number, log: scores.append(log["score_mean"])))
    trainer.train()
    assert scores[0] < 0.45 and sum(scores[-3:]) / 3 > 0.97, scores


@pytest.mark.parametrize("preset", [None, "reinforce_baseline"])
def test_s7_s10_with_equal_rewards_the_policy_returns_to_the_reference(preset):
    """The reward is then only -beta KL plus a constant, so its optimum is the reference for any initial policy."""
    settings = {"updates": 25, "rollout_batch": 256, "minibatch": 128, "microbatch": 128, "kl_coef": 1.0}
    trainer = make_trainer(
        rollout=RolloutConfig(max_prompt_tokens=8, max_response_tokens=2, batch_size=256),
        reward=lambda rollout: torch.full((256,), 0.7),
        preset=preset,
        **dict(PRESETS.get(preset, {})) | settings | {"optim": OptimConfig(lr=3e-3)},
    )
    trainer.prompts = lambda first, count: [torch.tensor([4, 9])] * count
    noise = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in trainer.policy.model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=noise))
    kls = []
    trainer.callbacks.append(OnUpdate(lambda number, log: kls.append(log["kl"])))
    trainer.train()
    assert kls[0] > 0.8 and sum(kls[-5:]) / 5 < 0.15 * kls[0], kls
