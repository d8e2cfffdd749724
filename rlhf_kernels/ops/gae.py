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
    lam: float | Tensor = 0.95,  # (B,) if a tensor
    value_gamma: float | None = None,
    value_lam: float | Tensor | None = None,  # (B,) if a tensor
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

    λ is one number, or a tensor of one number per sequence, such as `length_adaptive_lam`. If `value_gamma` or
    `value_lam` is not None, the returns use them instead of `gamma` and `lam` (decoupled GAE), from a second pass:

        returns_t = A'_t + V_t,   A' = A of value_gamma and value_lam, where None is the policy's

    Source: Schulman et al. 2016, "High-Dimensional Continuous Control Using GAE", eq. 16; PPO (2017) eq. 11-12. Yuan et
    al. 2025 (VC-PPO) and Yue et al. 2025 (VAPO), section 4.1, for decoupled GAE with `value_lam` 1.

    Raises:
        ValueError: a shape, dtype, device, range or choice that does not fit, with the argument's name.
    """
    checks.floating("rewards", rewards, dims=(1, 2), what="[B, T] or [N]")
    b = checks.sequences(rewards, cu_seqlens, name="rewards")
    like: checks.Like = {"like": rewards, "expected": rewards.shape, "what": "the shape of rewards"}
    checks.tensor("values", values, **like)
    checks.mask("mask", mask, **like)
    checks.recursion(gamma, lam, value_gamma, value_lam, bootstrap, holes, rewards, b)
    chosen = resolve("gae", backend, rewards)
    if chosen == "reference":
        from .. import reference

        return reference.gae(
            checks.wide(rewards),
            checks.wide(values),
            mask,
            gamma=gamma,
            lam=checks.wide_lam(lam),
            value_gamma=value_gamma,
            value_lam=checks.wide_lam(value_lam),
            bootstrap=checks.wide(bootstrap),
            holes=holes,
            cu_seqlens=cu_seqlens,
        )

    def estimate(gamma: float, lam: float | Tensor) -> Advantages:
        tokens = rewards, values, mask, gamma, *checks.split_lam(lam), bootstrap
        return Advantages(*_op(*tokens, holes == "skip", cu_seqlens, chosen))

    policy = estimate(gamma, lam)
    if value_gamma is None and value_lam is None:
        return policy
    value = estimate(gamma if value_gamma is None else value_gamma, lam if value_lam is None else value_lam)
    return Advantages(policy.advantages, value.returns)


def length_adaptive_lam(
    mask: Tensor,  # (B, T) or (N,), bool
    *,
    alpha: float = 0.05,
    cu_seqlens: Tensor | None = None,  # (B + 1,), int32
) -> Tensor:  # (B,)
    """Return the λ of each sequence that grows with the number l of its actions (True tokens), in float32.

        λ = max(0, 1 - 1 / (alpha l))

    so that the weights λ^k of the later steps sum to 1 / (1 - λ) = alpha l. The paper has no maximum; without it λ would be
    negative for fewer than 1 / alpha actions, which are 20 by default. A sequence without an action has λ = 0.

    Source: Yue et al. 2025 (VAPO), section 4.2, eq. 5; `alpha` is 0.05 there (section 5.1).

    Raises:
        ValueError: a shape, dtype or device that does not fit, or `alpha` that is not a number above 0.
    """
    checks.floating("mask", mask, dims=(1, 2), what="[B, T] or [N]", dtypes=checks.BOOL)
    checks.sequences(mask, cu_seqlens, name="mask")
    checks.number("alpha", alpha, above=0)
    if cu_seqlens is None:
        lengths = mask.sum(1)
    else:
        before = torch.nn.functional.pad(mask.cumsum(0), (1, 0))
        lengths = before[cu_seqlens.long()].diff()
    return (1 - 1 / (alpha * lengths.double())).clamp(min=0).float()


def _run(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float, lams: Tensor | None,
    bootstrap: Tensor | None, skip_holes: bool, cu_seqlens: Tensor | None, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    tensors = checks.dense(rewards), checks.dense(values), mask.contiguous()
    bootstrap = None if bootstrap is None else checks.dense(bootstrap)
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
    recursion = gamma, lam if lams is None else checks.dense(lams)
    return kernels(backend).gae(*tensors, *recursion, bootstrap, skip_holes, cu_seqlens)


def _fake(rewards: Tensor, *_: object) -> tuple[Tensor, ...]:
    return tuple(rewards.new_empty(rewards.shape, dtype=torch.float32) for _ in range(2))


_op = define(
    "gae(Tensor rewards, Tensor values, Tensor mask, float gamma, float lam, Tensor? lams, Tensor? bootstrap,"
    " bool skip_holes, Tensor? cu_seqlens, str backend) -> (Tensor advantages, Tensor returns)",
    run=_run,
    fake=_fake,
)
