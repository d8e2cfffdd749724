"""torchtune 0.6: `PPOLoss` of `torchtune.rlhf.loss` and `estimate_advantages` of `torchtune.rlhf`, with the same signatures.

B sequences, T response positions. torchtune's masks are True where a token counts, in spite of their name. The docstring
of `rlhf_kernels.integrations` explains `faithful`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops import checks, gae, masked_whiten, ppo_loss
from .conventions import counted, whiten_everywhere


class PPOLoss(nn.Module):
    """PPO's clipped policy loss plus `value_coeff` times the clipped value loss.

    `epsilon` is the clip range of the ratio, `value_clip_range` that of the values.
    """

    def __init__(
        self,
        epsilon: float = 0.1,
        value_clip_range: float = 0.2,
        value_coeff: float = 0.1,
        *,
        faithful: bool = False,
    ):
        super().__init__()
        self.epsilon: float = epsilon
        self.value_clip_range: float = value_clip_range
        self.value_coeff: float = value_coeff
        self.faithful: bool = faithful

    def forward(
        self,
        pi_old_logprobs: Tensor,  # (B, T)
        pi_logprobs: Tensor,  # (B, T), differentiable
        advantages: Tensor,  # (B, T)
        phi_old_values: Tensor,  # (B, T)
        phi_values: Tensor,  # (B, T), differentiable
        returns: Tensor,  # (B, T)
        padding_masks: Tensor | None = None,  # (B, T), True where a token has a policy loss
        value_padding_masks: Tensor | None = None,  # (B, T), True where a token has a value loss
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return the loss, the policy loss, the value loss, the mean ratio and the fraction of clipped ratios.

        The mean ratio is over the tokens that count; with `faithful` it is over all positions, as in torchtune.
        """
        mask = counted("padding_masks", padding_masks, pi_logprobs, from_start=not self.faithful)
        value_mask = counted("value_padding_masks", value_padding_masks, phi_values, from_start=not self.faithful)
        loss, metrics = ppo_loss(
            pi_logprobs,
            pi_old_logprobs,
            advantages,
            mask,
            cliprange=self.epsilon,
            values=phi_values,
            old_values=phi_old_values,
            returns=returns,
            value_mask=value_mask,
            cliprange_value=self.value_clip_range,
            vf_coef=self.value_coeff,
        )
        ratio = metrics["ratio_mean"]
        if self.faithful:
            ratio = (pi_logprobs.detach() - pi_old_logprobs).exp().mean()
        return loss, metrics["policy_loss"], metrics["value_loss"], ratio, metrics["clipfrac"]


def estimate_advantages(
    values: Tensor,  # (B, T)
    rewards: Tensor,  # (B, T)
    gamma: float,
    lmbda: float,
    masks: Tensor | None = None,  # (B, T), True where a token counts
    *,
    faithful: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return advantages by GAE, scaled to variance 1 over `masks` with their mean unchanged, and returns.

    The recursion runs over all T positions: set values and rewards after a response to 0, as torchtune's recipe does.
    Advantages are 0 where `masks` is False; returns are defined at every position, because the value after the last
    action is trained. A single True entry keeps its advantage; with `faithful` it is NaN, as in torchtune.
    """
    checks.floating("values", values, dims=(2,), what="[B, T]")
    mask = counted("masks", masks, values, from_start=not faithful)
    advantages, returns = gae(rewards, values, torch.ones_like(mask), gamma=float(gamma), lam=float(lmbda))
    if not faithful:
        return masked_whiten(advantages, mask, shift_mean=False), returns
    if checks.values_visible(mask) and not bool(mask.any()):
        return torch.zeros_like(advantages), returns
    return torch.where(mask, whiten_everywhere(advantages, mask, shift_mean=False), 0), returns
