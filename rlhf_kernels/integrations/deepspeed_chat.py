"""DeepSpeed-Chat: the four functions of its PPO trainer, as a mixin over that class and as an object of their own.

B sequences, T positions. A row of T covers prompt and answer, shifted by one; `start` is the first answer token's position.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..ops import checks, gae, ppo_loss, token_logprobs
from .conventions import counted, value_loss
from .head import fuse_head, token_logprobs_of


class PPOMixin:
    """`class Trainer(PPOMixin, DeepSpeedPPOTrainer)`: the trainer's own settings, our arithmetic.

    `faithful = True` gives its NaN for a mask without a True, and scores rows that have no action.
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
        """`-kl_ctl (log_probs - ref_log_probs)`, and the clipped score one position behind the answer's tokens.

        That is the first pad where pad is not the end token, and the end token where it is (its mask is False then); an
        answer that fills the row has it on its last token.
        """
        checks.floating("log_probs", log_probs, dims=(2,), what="[B, T]")
        mask = counted("action_mask", action_mask, log_probs)
        start, t = prompts.shape[1] - 1, log_probs.shape[1]
        lands = (start + mask[:, start:].sum(1, keepdim=True)).clamp(max=t - 1)
        score = reward_score.clamp(-self.clip_reward_value, self.clip_reward_value)[:, None].to(log_probs.dtype)
        at_score = torch.arange(t, device=mask.device) == lands
        return -self.kl_ctl * (log_probs - ref_log_probs) + torch.where(at_score, score, 0)

    def get_advantages_and_returns(self, values: Tensor, rewards: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """GAE over all positions from `start` on, (B, T - start); behind an answer must be zeros, as the trainer puts there."""
        checks.floating("rewards", rewards, dims=(2,), what="[B, T]")
        checks.number("start", start, least=0, most=rewards.shape[1], integer=True)
        rewards, values = rewards[:, start:], values[:, start:]
        everything = torch.ones_like(rewards, dtype=torch.bool)
        advantages, returns = gae(rewards, values, everything, gamma=self.gamma, lam=self.lam)
        return advantages, returns

    def actor_loss_fn(self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        """The clipped surrogate, a mean over the mask; all (B, T)."""
        mask = counted("mask", mask, logprobs)
        loss, _ = ppo_loss(logprobs, old_logprobs, advantages, mask, cliprange=self.cliprange)
        return loss / mask.any() if self.faithful else loss

    def critic_loss_fn(self, values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
        """Half the larger of the plain and the clipped squared error, a mean over the mask, in float32; all (B, T)."""
        mask = counted("mask", mask, values)
        loss, _ = value_loss(values, old_values, returns, mask, self.cliprange_value)
        return loss / mask.any() if self.faithful else loss


@dataclass
class PPO(PPOMixin):
    """The same four functions without the trainer, with its defaults."""

    kl_ctl: float = 0.1
    """Weight of the KL in the reward."""
    clip_reward_value: float = 5
    """Bound of the score on both sides."""
    cliprange: float = 0.2
    """Of the ratio."""
    cliprange_value: float = 0.2
    """Of the value around its old one."""
    gamma: float = 1.0
    """Discount."""
    lam: float = 0.95
    """Lambda of GAE."""
    faithful: bool = False
    """See `PPOMixin`."""


def gather_log_probs(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probs of the labels in float32: (..., V), (...) -> (...)."""
    return token_logprobs(logits, labels).logprobs


def fused_log_probs(actor: nn.Module, seq: Tensor, attention_mask: Tensor) -> Tensor:
    """`gather_log_probs(actor(seq, attention_mask).logits[:, :-1], seq[:, 1:])` from hidden states, (B, T) -> (B, T - 1).

    `actor` is a causal LM, or DeepSpeed's engine around one whose head `head.fuse_head` had replaced before.
    """
    head = fuse_head(getattr(actor, "module", actor))
    return token_logprobs_of(actor, seq, attention_mask, seq.shape[1] - 1, head=head).logprobs
