"""Generalised advantage estimation on padded or packed sequences."""

import torch
from torch import Tensor

from ..backend import define, kernels, resolve
from ..launch_args import Advantages
from . import checks


def gae(
    rewards: Tensor,  # (B, T) or (N,)
    values: Tensor,  # (B, T) or (N,)
    mask: Tensor,  # (B, T) or (N,), bool
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    bootstrap: Tensor | None = None,  # (B,)
    holes: str = "skip",
    cu_seqlens: Tensor | None = None,  # (B + 1,), int32
    backend: str = "auto",
) -> Advantages:
    """Return the advantage and the value target of each action.

        A_t = δ_t + γλ A_{t+1},   δ_t = r_t + γ V_{t+1} - V_t,   returns_t = A_t + V_t

    where actions are the tokens with a True mask, and t + 1 is the next action (`holes="skip"`: masked tokens between
    two actions are skipped) or the next token (`holes="zero"`: masked tokens between two actions are steps with reward
    0 and value 0). The value after the last action is `bootstrap`, or 0 if None. Rewards and values are ignored where
    the mask is False, and both results are 0 there. Results are float32, or float64 for float64 inputs. There is no
    gradient.

    Source: Schulman et al. 2016, "High-Dimensional Continuous Control Using GAE", eq. 16; PPO (2017) eq. 11-12.

    Raises:
        ValueError: a shape, dtype, device, range or choice that does not fit, with the argument's name.
    """
    checks.floating("rewards", rewards, dims=(1, 2), what="[B, T] or [N]")
    b = checks.sequences(rewards, cu_seqlens, name="rewards")
    like: checks.Like = {"like": rewards, "expected": rewards.shape, "what": "the shape of rewards"}
    checks.tensor("values", values, **like)
    checks.mask("mask", mask, **like)
    checks.recursion(gamma, lam, bootstrap, holes, rewards, b)
    chosen = resolve("gae", backend, rewards)
    if chosen == "reference":
        from .. import reference

        rewards, values, bootstrap = checks.wide(rewards), checks.wide(values), checks.wide(bootstrap)
        return reference.gae(
            rewards, values, mask, gamma=gamma, lam=lam, bootstrap=bootstrap, holes=holes, cu_seqlens=cu_seqlens
        )
    return Advantages(*_op(rewards, values, mask, gamma, lam, bootstrap, holes == "skip", cu_seqlens, chosen))


def _run(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float, bootstrap: Tensor | None, skip_holes: bool,
    cu_seqlens: Tensor | None, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    tensors = checks.dense(rewards), checks.dense(values), mask.contiguous()
    bootstrap = None if bootstrap is None else checks.dense(bootstrap)
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
    return kernels(backend).gae(*tensors, gamma, lam, bootstrap, skip_holes, cu_seqlens)


def _fake(rewards: Tensor, *_: object) -> tuple[Tensor, ...]:
    return tuple(rewards.new_empty(rewards.shape, dtype=torch.float32) for _ in range(2))


_op = define(
    "gae(Tensor rewards, Tensor values, Tensor mask, float gamma, float lam, Tensor? bootstrap, bool skip_holes,"
    " Tensor? cu_seqlens, str backend) -> (Tensor advantages, Tensor returns)",
    run=_run,
    fake=_fake,
)
