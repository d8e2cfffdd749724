"""DeepSpeed-Chat: four functions of its PPO trainer, as a mixin for its trainer class and as a stand-alone object.

B sequences, T positions. The T positions are those of prompt and response, shifted by one; `start` is the position of
the first response token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..ops import checks, gae, ppo_loss, token_logprobs
from .conventions import counted, value_loss
from .head import fuse_head, token_logprobs_of


class PPOMixin:
    """A mixin that replaces four functions of DeepSpeed-Chat's trainer and uses the trainer's settings.

        class Trainer(PPOMixin, DeepSpeedPPOTrainer): ...

    With `faithful = True` the losses of a mask without a True entry are NaN, as in DeepSpeed-Chat.
    """

    faithful: bool = False
    # Attributes of the trainer.
    kl_ctl: float
    clip_reward_value: float
    cliprange: float
    cliprange_value: float
    gamma: float
    lam: float

    def compute_rewards(
        self,
        prompts: Tensor,  # (B, P)
        log_probs: Tensor,  # (B, T)
        ref_log_probs: Tensor,  # (B, T)
        reward_score: Tensor,  # (B,)
        action_mask: Tensor,  # (B, T)
    ) -> Tensor:
        """Return the rewards `-kl_ctl (log_probs - ref_log_probs)`, plus the clipped score at one position, (B, T).

        That position is the one after the response's unmasked tokens: the first pad token, or the end token if pad and
        end token are the same (the end token is masked then). In a response without padding it is the last token, and
        in a row without an action it is `start`.
        """
        checks.floating("log_probs", log_probs, dims=(2,), what="[B, T]")
        mask = counted("action_mask", action_mask, log_probs)
        start, t = prompts.shape[1] - 1, log_probs.shape[1]
        lands = (start + mask[:, start:].sum(1, keepdim=True)).clamp(max=t - 1)
        score = reward_score.clamp(-self.clip_reward_value, self.clip_reward_value)[:, None].to(log_probs.dtype)
        at_score = torch.arange(t, device=mask.device) == lands
        return -self.kl_ctl * (log_probs - ref_log_probs) + torch.where(at_score, score, 0)

    def get_advantages_and_returns(self, values: Tensor, rewards: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Return advantages and returns by GAE over all positions from `start` on, (B, T - start).

        Rewards and values after the response must be zeros, which the trainer writes there.
        """
        checks.floating("rewards", rewards, dims=(2,), what="[B, T]")
        checks.number("start", start, least=0, most=rewards.shape[1], integer=True)
        rewards, values = rewards[:, start:], values[:, start:]
        everything = torch.ones_like(rewards, dtype=torch.bool)
        advantages, returns = gae(rewards, values, everything, gamma=self.gamma, lam=self.lam)
        return advantages, returns

    def actor_loss_fn(self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        """Return the clipped surrogate loss, a mean over the mask; all arguments are (B, T)."""
        mask = counted("mask", mask, logprobs)
        loss, _ = ppo_loss(logprobs, old_logprobs, advantages, mask, cliprange=self.cliprange)
        return loss / mask.any() if self.faithful else loss

    def critic_loss_fn(self, values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
        """Return the clipped value loss in float32; all arguments are (B, T).

        It is the mean over the mask of half the squared error or half the squared error of the clipped value, whichever
        is larger.
        """
        mask = counted("mask", mask, values)
        loss, _ = value_loss(values, old_values, returns, mask, self.cliprange_value)
        return loss / mask.any() if self.faithful else loss


@dataclass
class PPO(PPOMixin):
    """The same four functions without the trainer, with its defaults."""

    kl_ctl: float = 0.1
    """Weight of the KL penalty in the reward."""
    clip_reward_value: float = 5
    """The score is clipped to ± this number."""
    cliprange: float = 0.2
    """Clip range of the ratio."""
    cliprange_value: float = 0.2
    """Clip range of the value around the old value."""
    gamma: float = 1.0
    """Discount."""
    lam: float = 0.95
    """Lambda of GAE."""
    faithful: bool = False
    """See `PPOMixin`."""


def gather_log_probs(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the log-probs of `labels` (...) under `logits` (..., V), in float32, (...)."""
    return token_logprobs(logits, labels).logprobs


def fused_log_probs(actor: nn.Module, seq: Tensor, attention_mask: Tensor) -> Tensor:
    """Return the log-probs of the tokens `seq[:, 1:]` from hidden states, (B, T) -> (B, T - 1), without [B, T, V] logits.

    The result is that of `gather_log_probs(actor(seq, attention_mask).logits[:, :-1], seq[:, 1:])`. `actor` is a causal
    LM, or DeepSpeed's engine around a causal LM whose head was replaced by `head.fuse_head` before.
    """
    head = fuse_head(getattr(actor, "module", actor))
    return token_logprobs_of(actor, seq, attention_mask, seq.shape[1] - 1, head=head).logprobs
