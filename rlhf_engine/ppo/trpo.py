"""Trust-region policy optimisation: the KL to the old policy is a constraint and not a price (Schulman et al. 2015).

    maximise E[r A]  subject to  E_s[KL(pi_old(.|s) || pi(.|s))] <= max_kl

The KL is that of the full vocabulary, the mean over the states of a rollout. The step is `s = sqrt(2 max_kl / x^T F x) x` with
`F x = g` solved by conjugate gradient, then halved until the surrogate has risen and the constraint holds.
Fisher-vector products differentiate the trunk twice: eager attention, torch's own operations for the head, and [n, V] logits of
a micro-batch. That is for models of up to about 50 million parameters; x, the residual, the direction and the product cost the
weights four times more, and the old policy once. Shapes: n actions of a micro-batch, P parameters in one vector.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rlhf_engine.config.ppo import TRPOConfig
from rlhf_engine.model import ActorCritic, frozen_copy
from rlhf_engine.model.layout import TokenBatch
from rlhf_engine.rollout import Rollout


def check_attention(attention: str | None) -> None:
    """Raise ValueError for an implementation of attention that cannot be differentiated twice."""
    if attention != "eager":
        raise ValueError(
            f"model.attention: got {attention!r} with ppo.objective 'trpo', expected 'eager', which can be differentiated "
            "twice"
        )


@dataclass(frozen=True)
class TrustRegionProblem:
    """A rollout, the advantages of its actions and the policy that is to move."""

    policy: ActorCritic
    rollout: Rollout
    old_logprobs: Tensor  # (B, T)
    advantages: Tensor  # (B, T)
    temperature: float
    microbatch: int
    microbatch_tokens: int | None = None

    def parameters(self) -> list[nn.Parameter]:
        """The language model's; the value function is none of TRPO's business."""
        return [parameter for parameter in self.policy.model.parameters() if parameter.requires_grad]

    def parts(self) -> Iterator[TokenBatch]:
        """The rollout in micro-batches, never packed."""
        everyone = torch.arange(len(self.rollout), device=self.rollout.mask.device)
        return self.rollout.batches(everyone, self.microbatch, self.microbatch_tokens)

    def log_softmax(self, policy: ActorCritic, batch: TokenBatch) -> Tensor:  # (n, V)
        """Log-probs of the whole vocabulary in the states of a micro-batch."""
        logits = policy(batch, ("logits",)).logits.float()
        return (logits / self.temperature).log_softmax(-1)

    def surrogate(self, batch: TokenBatch, logprobs: Tensor) -> Tensor:  # ()
        """This micro-batch's share of the mean of `exp(log pi - log pi_old) A`."""
        assert batch.ids is not None
        old, advantages = (x.reshape(-1)[batch.source] for x in (self.old_logprobs, self.advantages))
        taken = logprobs.gather(-1, batch.ids[:, None])[:, 0]
        return ((taken - old).exp() * advantages).sum() / self.rollout.mask.sum()

    def kl(self, old: Tensor, new: Tensor) -> Tensor:  # (n, V), (n, V) -> ()
        """This micro-batch's share of the mean KL(old || new)."""
        return (old.exp() * (old - new)).sum() / self.rollout.mask.sum()


def trpo_step(problem: TrustRegionProblem, config: TRPOConfig) -> dict[str, float]:
    """Move the policy's weights by one constrained step, or leave them where no step along the direction is allowed.

    Returns the KL and the gain of the surrogate after the step, and the share of the full step that was taken (0: none). Raises
    FloatingPointError, with the weights as they were, if the gradient or the curvature along the step is not finite.
    """
    gradient, before = surrogate_gradient(problem)
    if not bool(gradient.isfinite().all()):
        raise FloatingPointError(
            "training diverged: got a surrogate whose gradient is not finite, expected a finite one"
        )
    direction = conjugate_gradient(
        lambda v: fisher_product(problem, v, config.damping), gradient, config.cg_iterations, config.cg_tolerance
    )
    curvature = float(direction @ fisher_product(problem, direction, config.damping))
    if not math.isfinite(curvature):
        raise FloatingPointError(
            f"training diverged: got the curvature {curvature} along the step, expected a finite number; a larger "
            "ppo.trpo.damping keeps the Fisher matrix from being singular"
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
    """Gradient of the surrogate at the weights as they are."""
    parameters, value = problem.parameters(), 0.0
    total = torch.zeros_like(flat(parameters))
    for batch in problem.parts():
        share = problem.surrogate(batch, problem.log_softmax(problem.policy, batch))
        total += flat(torch.autograd.grad(share, parameters))
        value += share.item()
    return total, value


def fisher_product(problem: TrustRegionProblem, vector: Tensor, damping: float) -> Tensor:  # (P,) -> (P,)
    """`(F + damping I) v`, F the Hessian of the mean KL at the weights as they are, which is the Fisher matrix there."""
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
    """x with `product(x) = target`, after at most `iterations`, or when the residual's norm is `tolerance` of the target's.

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
    """The surrogate and the mean KL to `old` at the weights as they are."""
    surrogate = kl = 0.0
    for batch in problem.parts():
        logprobs = problem.log_softmax(problem.policy, batch)
        surrogate += problem.surrogate(batch, logprobs).item()
        kl += problem.kl(problem.log_softmax(old, batch), logprobs).item()
    return surrogate, kl


def flat(tensors: Sequence[Tensor]) -> Tensor:  # (P,)
    """One vector of many tensors."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


@torch.no_grad()
def assign(parameters: list[nn.Parameter], vector: Tensor) -> None:  # (P,)
    """The inverse of `flat`, into the parameters."""
    for parameter, part in zip(parameters, vector.split([p.numel() for p in parameters]), strict=True):
        parameter.copy_(part.view_as(parameter))
