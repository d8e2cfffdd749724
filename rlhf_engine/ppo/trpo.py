"""Trust-region policy optimization: the KL to the old policy is a constraint instead of a penalty (Schulman et al. 2015).

    maximise E[r A]  subject to  E_s[KL(pi_old(.|s) || pi(.|s))] <= max_kl

The KL is over the full vocabulary, averaged over the states of a rollout. The step is `s = sqrt(2 max_kl / x^T F x) x` with
`F x = g` solved by conjugate gradient. It is then multiplied by `ppo.trpo.shrink` until the surrogate has increased and the
constraint holds.
Fisher-vector products differentiate the trunk twice. This requires eager attention, torch operations for the head, and the
[n, V] logits of a micro-batch, so it suits models of up to about 50 million parameters. The solution x, the residual, the
direction and the product use four times the memory of the weights, and the old policy uses it once more.
Shapes: n actions of a micro-batch, P parameters in one vector.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rlhf_engine.config.trpo import TRPOConfig
from rlhf_engine.model import ActorCritic, frozen_copy
from rlhf_engine.model.layout import TokenBatch
from rlhf_engine.rollout import Rollout


def check_attention(attention: str | None) -> None:
    """Raise ValueError for an attention implementation that cannot be differentiated twice."""
    if attention != "eager":
        raise ValueError(
            f"model.attention: got {attention!r} with ppo.objective 'trpo', expected 'eager', which can be differentiated "
            "twice"
        )


@dataclass(frozen=True)
class TrustRegionProblem:
    """The policy to optimize, a rollout and the advantages of its actions."""

    policy: ActorCritic
    rollout: Rollout
    old_logprobs: Tensor  # (B, T)
    advantages: Tensor  # (B, T)
    temperature: float
    microbatch: int
    microbatch_tokens: int | None = None

    def parameters(self) -> list[nn.Parameter]:
        """Return the trained parameters of the language model, without those of the value function."""
        values = () if self.policy.value is None else self.policy.value.parameters()
        left_out = {id(parameter) for parameter in values}  # an adapter of the values is part of the model
        trained = (parameter for parameter in self.policy.model.parameters() if parameter.requires_grad)
        return [parameter for parameter in trained if id(parameter) not in left_out]

    def parts(self) -> Iterator[TokenBatch]:
        """Iterate over the micro-batches of the rollout, which are never packed."""
        everyone = torch.arange(len(self.rollout), device=self.rollout.mask.device)
        return self.rollout.batches(everyone, self.microbatch, self.microbatch_tokens)

    def log_softmax(self, policy: ActorCritic, batch: TokenBatch) -> Tensor:  # (n, V)
        """Return the log-probs of the full vocabulary in the states of a micro-batch."""
        logits = policy(batch, ("logits",)).logits.float()
        return (logits / self.temperature).log_softmax(-1)

    def surrogate(self, batch: TokenBatch, logprobs: Tensor) -> Tensor:  # ()
        """Return the contribution of this micro-batch to the mean of `exp(log pi - log pi_old) A`."""
        assert batch.ids is not None
        old, advantages = (x.reshape(-1)[batch.source] for x in (self.old_logprobs, self.advantages))
        taken = logprobs.gather(-1, batch.ids[:, None])[:, 0]
        return ((taken - old).exp() * advantages).sum() / self.rollout.mask.sum()

    def kl(self, old: Tensor, new: Tensor) -> Tensor:  # (n, V), (n, V) -> ()
        """Return the contribution of a micro-batch to the mean KL(old || new)."""
        return (old.exp() * (old - new)).sum() / self.rollout.mask.sum()


def trpo_step(problem: TrustRegionProblem, config: TRPOConfig) -> dict[str, float]:
    """Change the policy's weights by one constrained step, or leave them unchanged if no tested step is accepted.

    Return the KL and the gain of the surrogate after the step, and the accepted fraction of the full step (0: none).

    Raises:
        FloatingPointError: if the gradient or the curvature along the step is not finite. The weights are unchanged.
    """
    gradient, before = surrogate_gradient(problem)
    if not bool(gradient.isfinite().all()):
        raise FloatingPointError("training diverged: the gradient of the surrogate is not finite")
    direction = conjugate_gradient(
        lambda v: fisher_product(problem, v, config.damping), gradient, config.cg_iterations, config.cg_tolerance
    )
    curvature = float(direction @ fisher_product(problem, direction, config.damping))
    if not math.isfinite(curvature):
        raise FloatingPointError(
            f"training diverged: got the curvature {curvature} along the step, expected a finite number; increase "
            "ppo.trpo.damping, which keeps the Fisher matrix from being singular"
        )
    if not curvature > 0.0:  # a gradient of zero has no direction
        return {"trpo_kl": 0.0, "trpo_gain": 0.0, "trpo_step": 0.0}
    full = direction * (2.0 * config.max_kl / curvature) ** 0.5
    old, start, share = frozen_copy(problem.policy), flat(problem.parameters()), 1.0
    for _ in range(config.backtracks):
        assign(problem.parameters(), start + share * full)
        surrogate, kl = measure(problem, old)
        if surrogate > before and kl <= config.max_kl:  # false for NaN
            return {"trpo_kl": kl, "trpo_gain": surrogate - before, "trpo_step": share}
        share *= config.shrink
    assign(problem.parameters(), start)
    return {"trpo_kl": 0.0, "trpo_gain": 0.0, "trpo_step": 0.0}


def surrogate_gradient(problem: TrustRegionProblem) -> tuple[Tensor, float]:  # (P,), the surrogate
    """Return the gradient and the value of the surrogate at the current weights."""
    parameters, value = problem.parameters(), 0.0
    total = torch.zeros_like(flat(parameters))
    for batch in problem.parts():
        share = problem.surrogate(batch, problem.log_softmax(problem.policy, batch))
        total += flat(torch.autograd.grad(share, parameters))
        value += share.item()
    return total, value


def fisher_product(problem: TrustRegionProblem, vector: Tensor, damping: float) -> Tensor:  # (P,) -> (P,)
    """Return `(F + damping I) v`, where F is the Hessian of the mean KL at the current weights: the Fisher matrix."""
    parameters = problem.parameters()
    total = damping * vector
    for batch in problem.parts():
        logprobs = problem.log_softmax(problem.policy, batch)
        kl = problem.kl(logprobs.detach(), logprobs)
        slope = flat(torch.autograd.grad(kl, parameters, create_graph=True))
        total = total + flat(torch.autograd.grad(slope @ vector, parameters))
    return total


def conjugate_gradient(
    product: Callable[[Tensor], Tensor], target: Tensor, iterations: int, tolerance: float
) -> Tensor:  # (P,)
    """Solve `product(x) = target`: stop after `iterations`, or when the residual's norm is at most `tolerance` of the target's.

    Source: Hestenes & Stiefel 1952.
    """
    x, residual, direction = torch.zeros_like(target), target.clone(), target.clone()
    size = residual @ residual
    enough = tolerance**2 * size
    for _ in range(iterations):
        if not bool(size > enough):
            break
        image = product(direction)
        step = size / (direction @ image)
        x += step * direction
        residual -= step * image
        before, size = size, residual @ residual
        direction = residual + (size / before) * direction
    return x


@torch.no_grad()
def measure(problem: TrustRegionProblem, old: ActorCritic) -> tuple[float, float]:
    """Return the surrogate and the mean KL to `old` at the current weights."""
    surrogate = kl = 0.0
    for batch in problem.parts():
        logprobs = problem.log_softmax(problem.policy, batch)
        surrogate += problem.surrogate(batch, logprobs).item()
        kl += problem.kl(problem.log_softmax(old, batch), logprobs).item()
    return surrogate, kl


def flat(tensors: Sequence[Tensor]) -> Tensor:  # (P,)
    """Concatenate tensors into one vector."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


@torch.no_grad()
def assign(parameters: list[nn.Parameter], vector: Tensor) -> None:  # (P,)
    """Copy the parts of a vector into the parameters, the inverse of `flat`."""
    for parameter, part in zip(parameters, vector.split([p.numel() for p in parameters]), strict=True):
        parameter.copy_(part.view_as(parameter))
