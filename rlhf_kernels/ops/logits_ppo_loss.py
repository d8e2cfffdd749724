"""The PPO objective from logits."""

from typing import Unpack

from torch import Tensor

from .._options import PPOOptions
from ..backend import resolve
from ..launch_args import PPOLoss, Transform
from . import checks, objective
from .fused_logits_loss import fused_logits_ppo_loss, why_two_passes
from .ppo_loss import fused_ppo_loss
from .token_logprobs import check_logits, fused_token_logprobs


def logits_ppo_loss(
    logits: Tensor,  # (B, T, V) or (N, V), differentiable
    ids: Tensor,  # (B, T) or (N,)
    old_logprobs: Tensor,  # (B, T) or (N,)
    advantages: Tensor,  # (B, T) or (N,)
    mask: Tensor,  # (B, T) or (N,), bool
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    inplace: bool = False,
    backend: str = "auto",
    **options: Unpack[PPOOptions],
) -> PPOLoss:
    """Return `ppo_loss` of `token_logprobs(logits, ids)`, with the entropy of the same read of the logits.

    `inplace=True` lets the gradient take the bytes of `logits`, whose values are lost. The CUDA kernel computes the gradient
    in the forward pass; for sequence-level ratios, and in place of float16 logits, `"auto"` takes Triton's. `options` are those
    of `ppo_loss`, without `entropy`.

    Raises:
        ValueError: as `token_logprobs` and `ppo_loss`.
    """
    temperature = checks.constant(temperature)
    args = objective.parse("logits_ppo_loss", options)
    check_logits(logits, ids, temperature, softcap, logit_scale, mask)
    objective.check(args, ids, old_logprobs, advantages, mask, name="ids", computes_entropy=True)
    chosen = resolve("logits_ppo_loss", backend, logits, logits.shape[-1])
    if chosen == "reference":
        from .. import reference

        of_logits = {"temperature": temperature, "softcap": softcap, "logit_scale": logit_scale}
        return reference.logits_ppo_loss(
            logits, ids.long(), old_logprobs, advantages, mask, **of_logits, **objective.as_options(args)
        )
    transform = Transform.of(temperature, softcap, logit_scale)
    if chosen == "cuda":
        refused = why_two_passes(args, logits, inplace)
        if not refused:
            return fused_logits_ppo_loss(logits, ids, transform, args, old_logprobs, advantages, mask, inplace=inplace)
        if backend == "cuda":
            raise ValueError(f"backend: 'cuda' cannot serve this call: {refused}; use 'triton' or 'auto'")
        chosen = "triton"  # which computes the gradient in backward
    taken = fused_token_logprobs(logits, ids, transform, mask, chosen, entropy=True, inplace=inplace)
    return fused_ppo_loss(taken.logprobs, taken.entropy, args, old_logprobs, advantages, mask, chosen)
