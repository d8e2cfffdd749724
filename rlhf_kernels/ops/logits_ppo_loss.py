"""The PPO objective from logits."""

from typing import Unpack

from torch import Tensor

from .._options import PPOOptions
from ..backend import resolve
from ..launch_args import PPOLoss, Transform
from . import checks, objective
from .fused_logits_loss import fused_logits_ppo_loss, why_two_passes
from .ppo_loss import fused_ppo_loss
from .row_terms import tokens_of
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
    """Return the PPO loss from logits.

        logprobs, entropy = token_logprobs(logits, ids, temperature=..., softcap=..., logit_scale=..., entropy=True)

    The loss is that of `ppo_loss(logprobs, ..., entropy=entropy)`. `options` are the options of `ppo_loss` except
    `entropy`, which this op computes. The loss is differentiable in `logits` and in the option `values`.

    `inplace=True` writes the gradient over `logits`, so that their values are lost. The CUDA kernel computes the
    gradient in the forward pass. It does not support sequence-level ratios, a function as objective, nor
    `inplace=True` with float16 logits; `backend="auto"` uses the Triton kernels for these.

    Source: as `ppo_loss`.

    Raises:
        ValueError: as `token_logprobs` and `ppo_loss`.
        TypeError: an unknown option; the message names the nearest option.
    """
    temperature = checks.constant(temperature)
    args = objective.parse("logits_ppo_loss", options)
    seen = tokens_of(args.nll_mask, mask)
    check_logits(logits, ids, temperature, softcap, logit_scale, seen)
    objective.check(args, ids, old_logprobs, advantages, mask, name="ids", computes_entropy=True)
    chosen = resolve("logits_ppo_loss", backend, logits, logits.shape[-1])
    if chosen == "reference":
        from .. import reference

        of_logits = {"temperature": temperature, "softcap": softcap, "logit_scale": logit_scale}
        return reference.logits_ppo_loss(
            logits, ids.long(), old_logprobs, advantages, mask, **of_logits, **objective.as_options(args, mask)
        )
    transform = Transform.of(temperature, softcap, logit_scale)
    if chosen == "cuda":
        refused = why_two_passes(args, logits, inplace)
        if not refused:
            return fused_logits_ppo_loss(logits, ids, transform, args, old_logprobs, advantages, mask, inplace=inplace)
        if backend == "cuda":
            raise ValueError(f"backend: 'cuda' cannot serve this call: {refused}; use 'triton' or 'auto'")
        chosen = "triton"  # computes the gradient in backward
    taken = fused_token_logprobs(logits, ids, transform, seen, chosen, entropy=True, inplace=inplace)
    return fused_ppo_loss(taken.logprobs, taken.entropy, args, old_logprobs, advantages, mask, chosen)
