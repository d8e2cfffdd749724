"""Time per call on 8 x 128 tokens, ours and the same in eager PyTorch, forward and with the gradient.

At this size the arithmetic takes a few microseconds, so the ratios show what a call costs outside of its kernel: checks,
dispatch, autograd, metrics. Each pair runs in alternation in one process, with one thread.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.harness import Check, alternate, ratio, report
from benchmarks.peers import eager_losses as eager
from benchmarks.peers.gae_loop import gae_loop
from rlhf_kernels import (
    gae,
    group_advantages,
    importance_weights,
    kl_penalty,
    masked_mean,
    masked_whiten,
    ppo_loss,
    rollout_advantages,
    token_logprobs,
    top_entropy_mask,
)
from rlhf_kernels.integrations import openrlhf, torchtune, verl
from rlhf_kernels.integrations.deepspeed_chat import PPO as DeepSpeedPPO

NAME = "call_overhead"
SHAPE = (8, 128)
BOUND = 1.5


class Case(NamedTuple):
    """The same computation in two forms; the first result, or the result, is what a gradient starts from."""

    ours: Callable[[], object]
    eager: Callable[[], object]
    leaves: tuple[Tensor, ...] = ()  # empty: there is no gradient


class Tokens(NamedTuple):
    """The tensors of a step, (8, 128); `flag` and `mask` are the same tokens in bool and float32."""

    new: Tensor  # requires a gradient
    old: Tensor
    values: Tensor  # requires a gradient
    old_values: Tensor
    returns: Tensor
    advantages: Tensor
    flag: Tensor
    mask: Tensor

    @classmethod
    def make(cls) -> Tokens:
        torch.manual_seed(0)
        old, values, advantages, returns = -torch.rand(SHAPE), *torch.randn(3, *SHAPE)
        flag = torch.arange(SHAPE[1]) < torch.randint(SHAPE[1] // 2, SHAPE[1], (SHAPE[0], 1))
        new = (old + 0.1 * torch.randn(SHAPE)).requires_grad_()
        moved = (values + 0.1 * torch.randn(SHAPE)).requires_grad_()
        return cls(new, old, moved, values, returns, advantages, flag, flag.float())


def op_cases(x: Tokens) -> dict[str, Case]:
    """Return the ops of the package."""
    leaf = (x.new,)
    scores, groups = torch.randn(SHAPE[0]), torch.arange(SHAPE[0]) // 4
    constant, logits = x.new.detach(), torch.randn(*SHAPE, 256, requires_grad=True)
    ids, entropy = torch.randint(256, SHAPE), torch.rand(SHAPE)
    rollout = scores, constant, x.old, x.old_values, x.flag
    both = (x.new, x.values)
    values = {"values": x.values, "old_values": x.old_values, "returns": x.returns}

    def eager_rollout() -> Tensor:
        rewards = eager.trl_rewards(scores, constant, x.old, x.mask)
        return eager.masked_whiten(gae_loop(rewards, x.old_values, 1.0, 0.95)[0], x.mask)

    return {
        "masked_mean": Case(lambda: masked_mean(x.new, x.flag), lambda: eager.masked_mean(x.new, x.mask), leaf),
        "masked_whiten": Case(lambda: masked_whiten(x.new, x.flag), lambda: eager.masked_whiten(x.new, x.mask), leaf),
        "kl_penalty": Case(lambda: kl_penalty(x.new, x.old), lambda: x.new - x.old, leaf),
        "kl_penalty k3": Case(
            lambda: kl_penalty(x.new, x.old, estimator="k3"), lambda: (x.old - x.new).exp() - 1 + x.new - x.old, leaf
        ),
        "ppo_loss": Case(
            lambda: ppo_loss(x.new, x.old, x.advantages, x.flag),
            lambda: eager.openrlhf_policy(x.new, x.old, x.advantages, x.mask),
            leaf,
        ),
        "ppo_loss with values": Case(
            lambda: ppo_loss(x.new, x.old, x.advantages, x.flag, **values),
            lambda: eager.torchtune_ppo(
                x.old, x.new, x.advantages, x.old_values, x.values, x.returns, x.mask
            ),
            both,
        ),
        "token_logprobs, V=256": Case(
            lambda: token_logprobs(logits, ids, entropy=True), lambda: eager.token_logprobs(logits, ids), (logits,)
        ),
        "gae": Case(
            lambda: gae(x.returns, x.old_values, x.flag), lambda: gae_loop(x.returns, x.old_values, 1.0, 0.95)
        ),
        "rollout_advantages": Case(lambda: rollout_advantages(*rollout, kl_coef=0.05), eager_rollout),
        "group_advantages": Case(
            lambda: group_advantages(scores, groups, kind="grpo"), lambda: eager.group_advantages(scores, 4)
        ),
        "importance_weights": Case(
            lambda: importance_weights(constant, x.old, x.flag, high=2.0),
            lambda: eager.truncated_weights(constant, x.old, x.mask),
        ),
        "top_entropy_mask": Case(
            lambda: top_entropy_mask(entropy, x.flag, entropy_quantile=0.2), lambda: eager.entropy_mask(entropy, x.mask)
        ),
    }  # fmt: skip


def adapter_cases(x: Tokens) -> dict[str, Case]:
    """Return the functions of the integrations that run at every step."""
    policy, value, deepspeed = openrlhf.PolicyLoss(), openrlhf.ValueLoss(0.2), DeepSpeedPPO()
    tune = torchtune.PPOLoss()
    tokens, of_values = (x.new, x.old, x.advantages, x.mask), (x.values, x.old_values, x.returns, x.mask)
    swapped = x.old, x.new, x.advantages, x.mask
    all_tokens = x.old, x.new, x.advantages, x.old_values, x.values, x.returns
    leaf, leaf_value = (x.new,), (x.values,)
    return {
        "OpenRLHF PolicyLoss": Case(lambda: policy(*tokens), lambda: eager.openrlhf_policy(*tokens), leaf),
        "OpenRLHF ValueLoss": Case(lambda: value(*of_values), lambda: eager.clipped_values(*of_values), leaf_value),
        "OpenRLHF compute_approx_kl": Case(
            lambda: openrlhf.compute_approx_kl(x.new, x.old), lambda: (x.new - x.old).clamp(-10, 10), leaf
        ),
        "verl compute_policy_loss": Case(
            lambda: verl.compute_policy_loss(*swapped, 0.2), lambda: eager.verl_policy(*swapped), leaf
        ),
        "verl compute_value_loss": Case(
            lambda: verl.compute_value_loss(x.values, x.returns, x.old_values, x.mask, 0.2),
            lambda: eager.verl_values(x.values, x.returns, x.old_values, x.mask),
            leaf_value,
        ),
        "verl kl_penalty low_var_kl": Case(
            lambda: verl.kl_penalty(x.new, x.old, "low_var_kl"), lambda: eager.verl_kl(x.new, x.old), leaf
        ),
        "DeepSpeed-Chat actor_loss_fn": Case(
            lambda: deepspeed.actor_loss_fn(*tokens), lambda: eager.deepspeed_actor(*tokens), leaf
        ),
        "DeepSpeed-Chat critic_loss_fn": Case(
            lambda: deepspeed.critic_loss_fn(*of_values), lambda: eager.clipped_values(*of_values), leaf_value
        ),
        "torchtune PPOLoss": Case(
            lambda: tune(*all_tokens, x.flag, x.flag),
            lambda: eager.torchtune_ppo(*all_tokens, x.mask),
            (x.new, x.values),
        ),
    }


def _with_gradient(run: Callable[[], object], leaves: tuple[Tensor, ...]) -> Callable[[], object]:
    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        found = run()
        first = found if isinstance(found, Tensor) else found[0]
        (first if first.dim() == 0 else first.sum()).backward()

    return step


def measure(name: str, case: Case, rounds: int) -> None:
    """Time both forms of a case, forward only and with the gradient."""
    modes = {"forward": (case.ours, case.eager)}
    if case.leaves:
        pair = (_with_gradient(case.ours, case.leaves), _with_gradient(case.eager, case.leaves))
        modes["forward and backward"] = pair
    for mode, (ours, theirs) in modes.items():
        rows = alternate({"ours": ours, "eager": theirs}, rounds=rounds, round_seconds=0.02)
        report(NAME, f"{name}, {mode}", rows, checks=[Check(f"{name}, {mode}, ours / eager", ratio(*rows), BOUND)])


def main(*, quick: bool = False) -> None:
    """Measure every case with one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        x = Tokens.make()
        for name, case in (op_cases(x) | adapter_cases(x)).items():
            measure(name, case, rounds=2 if quick else 15)
    finally:
        torch.set_num_threads(threads)


def test_value_loss(benchmark) -> None:
    case = adapter_cases(Tokens.make())["OpenRLHF ValueLoss"]
    benchmark(_with_gradient(case.ours, case.leaves))
