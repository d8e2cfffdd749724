"""TRL up to 0.11: `compute_rewards`, `compute_advantages` and `loss` of its PPOTrainer, as a mixin and as an object.

B sequences, T positions, V vocabulary. The docstring of `rlhf_kernels.integrations` explains `faithful`.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from ..ops import checks, gae, masked_whiten, ppo_loss, token_logprobs
from ..ops import kl_penalty as estimate_kl
from .conventions import counted, mean, value_loss, variance, whiten_everywhere

_ESTIMATORS = {"kl": "k1", "abs": "abs", "mse": "k2"}


class ClassicMixin:
    """A mixin that replaces three functions of PPOTrainer and uses the trainer's config and KL controller.

    class Trainer(ClassicMixin, PPOTrainer): ...
    """

    faithful: bool = False
    # Attributes of the trainer.
    config: Any
    kl_ctl: Any

    def compute_rewards(
        self,
        scores: Tensor,  # (B,)
        logprobs: Tensor,  # (B, T)
        ref_logprobs: Tensor,  # (B, T)
        masks: Tensor,  # (B, T)
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the rewards with the score at the last action, the rewards without it, and the KL; all (B, T).

        Raises:
            ValueError: `config.kl_penalty` is "full", which is not supported.
            IndexError: a row of the mask has no True entry and `faithful` is set (on CPU), as in TRL.
        """
        checks.choice("config.kl_penalty", self.config.kl_penalty, tuple(_ESTIMATORS))
        checks.floating("logprobs", logprobs, dims=(2,), what="[B, T]")
        mask = counted("masks", masks, logprobs)
        if self.faithful and checks.values_visible(mask) and not bool(mask.any(1).all()):
            raise IndexError("masks: got a row without a True entry: faithful=True raises here because TRL does")
        kl = estimate_kl(logprobs, ref_logprobs, estimator=_ESTIMATORS[self.config.kl_penalty])
        plain = -self.kl_ctl.value * kl
        position = torch.arange(mask.shape[1], device=mask.device)
        last = torch.where(mask, position, -1).amax(1, keepdim=True)
        scores = torch.as_tensor(scores, dtype=kl.dtype, device=kl.device)
        return plain + torch.where(position == last, scores[:, None], 0), plain, kl

    def compute_advantages(
        self,
        values: Tensor,  # (B, T)
        rewards: Tensor,  # (B, T)
        mask: Tensor,  # (B, T)
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the values (0 where masked), the whitened advantages and the returns; all (B, T).

        GAE treats masked positions inside a response as steps. With `faithful`, whitening also shifts and scales masked
        entries. If rewards are whitened, those after a response then change the advantages inside it, as in TRL.
        """
        checks.floating("rewards", rewards, dims=(2,), what="[B, T]")
        mask = counted("mask", mask, rewards)
        values, rewards = (torch.where(mask, x, 0) for x in (values, rewards))
        if self.config.whiten_rewards:
            whiten = whiten_everywhere if self.faithful else masked_whiten
            rewards = whiten(rewards, mask, shift_mean=False)
        everything = torch.ones_like(mask)
        advantages, returns = gae(rewards, values, everything, gamma=self.config.gamma, lam=self.config.lam)
        return values, (whiten_everywhere if self.faithful else masked_whiten)(advantages, mask), returns

    def loss(
        self,
        old_logprobs: Tensor,  # (B, T)
        values: Tensor,  # (B, T), old
        logits: Tensor,  # (B, T, V), for the entropy
        vpreds: Tensor,  # (B, T), differentiable
        logprobs: Tensor,  # (B, T), differentiable
        mask: Tensor,  # (B, T)
        advantages: Tensor,  # (B, T)
        returns: Tensor,  # (B, T)
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return the policy loss, the weighted value loss and the statistics.

        Both losses are 0 if the mean ratio is above `ratio_threshold`. TRL warns in that case. The warning needs a
        synchronization with the device, so only `faithful` gives it.
        """
        c = self.config
        mask = counted("mask", mask, logprobs)
        pg_loss, policy = ppo_loss(logprobs, old_logprobs, advantages, mask, cliprange=c.cliprange)
        vf_loss, vf_clipfrac = value_loss(vpreds, values, returns, mask, c.cliprange_value)
        trusted = policy["ratio_mean"] <= c.ratio_threshold
        if self.faithful:
            pg_loss, vf_loss = pg_loss / mask.any(), vf_loss / mask.any()
            if not bool(trusted):
                warnings.warn(
                    f"The average ratio of batch ({policy['ratio_mean'].item():.2f}) exceeds threshold {c.ratio_threshold}."
                    " Skipping batch.",
                    stacklevel=2,
                )
        pg_loss, vf_loss = (torch.where(trusted, x, 0) for x in (pg_loss, vf_loss))
        with torch.no_grad():
            stats = self._statistics(old_logprobs, values, logits, vpreds, logprobs, mask, advantages, returns)
        stats |= {
            "loss/policy": pg_loss.detach(),
            "loss/value": vf_loss.detach(),
            "loss/total": (pg_loss + c.vf_coef * vf_loss).detach(),
            "policy/policykl": policy["approx_kl"],
            "policy/clipfrac": policy["clipfrac"],
            "val/clipfrac": vf_clipfrac,
        }
        return pg_loss, c.vf_coef * vf_loss, stats

    def _statistics(
        self, old_logprobs: Tensor, values: Tensor, logits: Tensor, vpreds: Tensor, logprobs: Tensor, mask: Tensor,
        advantages: Tensor, returns: Tensor,
    ) -> dict[str, Tensor]:  # fmt: skip
        def average(x: Tensor) -> Tensor:
            return mean(x, mask, faithful=self.faithful)

        ids = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
        entropy = token_logprobs(logits, ids, mask=mask, entropy=True).entropy
        assert entropy is not None
        return {
            "policy/entropy": average(entropy),
            "policy/approxkl": average(estimate_kl(logprobs, old_logprobs, estimator="k2")),
            "policy/advantages": advantages.detach(),
            "policy/advantages_mean": average(advantages),
            "policy/ratio": (logprobs - old_logprobs).exp().detach(),
            "returns/mean": average(returns),
            "returns/var": variance(returns, mask),
            "val/vpred": average(vpreds),
            "val/error": average((vpreds - returns).square()),
            "val/mean": average(values),
            "val/var": variance(values, mask),
        }


class Classic(ClassicMixin):
    """The same three functions without the trainer."""

    def __init__(self, config: Any, kl_ctl: Any, *, faithful: bool = False):
        self.config: Any = config
        self.kl_ctl: Any = kl_ctl
        self.faithful: bool = faithful
