"""PPO on CartPole-v1 in one file, with `sample_tokens`, `gae` and `logits_ppo_loss`. Reaches a return of 475.

An action is a token from a vocabulary of two, and an episode is a sequence. Episodes end inside a rollout, so sequences are
packed: one row has all steps of all environments, split where an episode or the rollout ends. A sequence that did not
terminate is bootstrapped with the value of its next state.
"""

from __future__ import annotations

import gymnasium
import torch
from torch import Tensor, nn

from rlhf_kernels import gae, logits_ppo_loss, masked_whiten, sample_tokens

ENVIRONMENTS, STEPS, UPDATES, EPOCHS = 8, 32, 390, 20
GAMMA, LAM, LEARNING_RATE, CLIPRANGE = 0.98, 0.8, 1e-3, 0.2


def network(outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, outputs))


class Worlds:
    """A list of environments; one whose episode ends is reset."""

    def __init__(self, count: int, seed: int):
        self.all = [gymnasium.make("CartPole-v1") for _ in range(count)]
        self.states = torch.tensor([list(w.reset(seed=seed + i)[0]) for i, w in enumerate(self.all)])

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return rewards, whether each episode ended, whether it ended because the pole fell, and the next states."""
        rewards, ended, fell, reached = [], [], [], []
        for i, (world, action) in enumerate(zip(self.all, actions.tolist(), strict=True)):
            state, reward, terminated, truncated, _ = world.step(action)
            reached.append(list(state))
            if terminated or truncated:
                state, _ = world.reset()
            self.states[i] = torch.tensor(list(state))
            rewards.append(reward)
            ended.append(terminated or truncated)
            fell.append(terminated)
        return torch.tensor(rewards), torch.tensor(ended), torch.tensor(fell), torch.tensor(reached)


def collect(worlds: Worlds, policy: nn.Module, value: nn.Module, first: int, seed: int) -> dict[str, Tensor]:
    """Return `STEPS` steps of every environment, packed to (N,) one environment after the other."""
    columns: dict[str, list[Tensor]] = {k: [] for k in ("states", "ids", "old_logprobs", "old_values", "rewards")}
    cut, later = [], []
    environment = torch.arange(len(worlds.all))
    for t in range(first, first + STEPS):
        states = worlds.states.clone()
        taken = sample_tokens(policy(states), seed=seed, sequence=environment, position=torch.full_like(environment, t))
        rewards, ended, fell, reached = worlds.step(taken.ids)
        step = (states, taken.ids, taken.logprobs, value(states).squeeze(-1), rewards)
        for column, x in zip(columns.values(), step, strict=True):
            column.append(x)
        cut.append(ended | (t == first + STEPS - 1))
        later.append(torch.where(fell, 0, value(reached).squeeze(-1)))
    cut, later = torch.stack(cut, 1).flatten(), torch.stack(later, 1).flatten()
    batch = {k: torch.stack(v, 1).flatten(0, 1) for k, v in columns.items()}
    batch["cu_seqlens"] = torch.cat([torch.zeros(1), cut.nonzero().flatten() + 1]).int()
    batch["bootstrap"] = later[cut]
    return batch


def train(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    worlds, policy, value = Worlds(ENVIRONMENTS, seed), network(2), network(1)
    parameters = [*policy.parameters(), *value.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=LEARNING_RATE)
    for update in range(UPDATES):
        left = 1 - update / UPDATES
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * left
        with torch.no_grad():
            b = collect(worlds, policy, value, update * STEPS, seed)
        every = torch.ones_like(b["ids"], dtype=torch.bool)
        advantages, returns = gae(
            b["rewards"],
            b["old_values"],
            every,
            gamma=GAMMA,
            lam=LAM,
            bootstrap=b["bootstrap"],
            cu_seqlens=b["cu_seqlens"],
        )
        advantages = masked_whiten(advantages, every)
        for _ in range(EPOCHS):
            values = value(b["states"]).squeeze(-1)
            loss, _ = logits_ppo_loss(
                policy(b["states"]),
                b["ids"],
                b["old_logprobs"],
                advantages,
                every,
                cliprange=CLIPRANGE * left,
                values=values,
                old_values=b["old_values"],
                returns=returns,
                cliprange_value=None,
                vf_coef=0.5,
            )
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 0.5)
            optimizer.step()
    return policy


@torch.no_grad()
def mean_return(policy: nn.Module, episodes: int = 20, seed: int = 10_000) -> float:
    """Return the mean return of the most likely actions over episodes that are not used in training; at most 500."""
    total = 0.0
    world = gymnasium.make("CartPole-v1")
    for episode in range(episodes):
        state, _ = world.reset(seed=seed + episode)
        done = False
        while not done:
            action = policy(torch.tensor(list(state))).argmax().item()
            state, reward, terminated, truncated, _ = world.step(action)
            total += reward
            done = terminated or truncated
    return total / episodes


if __name__ == "__main__":
    print(f"mean return of 20 episodes: {mean_return(train()):.1f}")
