# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false
# torch does not declare the types of `Tensor.tolist`.
"""TRL 0.12 to 1.12: the helpers of PPOTrainer and the arithmetic inside its `train`.

`trl_classic` has the PPOTrainer of releases up to 0.11, `trl_grpo` the GRPOTrainer. B sequences, T response positions,
V vocabulary. The docstring of `rlhf_kernels.integrations` explains `faithful`.
"""

from __future__ import annotations

import importlib
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._options import PPOOptions
from ..ops import checks, kl_penalty, logits_ppo_loss, ppo_loss, rollout_advantages, token_logprobs
from ..ops import masked_whiten as whiten
from .conventions import counted, mean, release, whiten_everywhere
from .trl_classic import Classic, ClassicMixin
from .trl_grpo import GRPOMixin

__all__ = [
    "PPO",
    "Classic",
    "ClassicMixin",
    "GRPOMixin",
    "Rollout",
    "fused_helpers",
    "masked_mean",
    "masked_whiten",
    "selective_log_softmax",
]

_STABLE, _EXPERIMENTAL = "trl.trainer.ppo_trainer", "trl.experimental.ppo.ppo_trainer"
PPO_MODULES = (
    {f"0.{minor}": _STABLE for minor in range(12, 29)}
    | {"0.29": _EXPERIMENTAL}
    | {f"1.{minor}": _EXPERIMENTAL for minor in range(13)}
)
"""Release -> the module that defines PPOTrainer, where the trainer looks up its helpers."""


def selective_log_softmax(logits: Tensor, index: Tensor) -> Tensor:
    """Return the log-probs of `index` (...) under `logits` (..., V), (...), in float32 for any dtype of the logits.

    TRL also supports several indices per position, (..., K); here they raise ValueError.
    """
    if index.dim() == logits.dim():
        raise ValueError(
            f"index: got shape {checks.shape(index)}, expected one index per position, {logits.shape[:-1]}"
        )
    return token_logprobs(logits, index).logprobs


def masked_mean(values: Tensor, mask: Tensor, axis: int | None = None, *, faithful: bool = False) -> Tensor:
    """Return the mean over the True entries of `mask`, in total or along `axis`; 0 (`faithful`: NaN) if there are none."""
    mask = counted("mask", mask, values)
    if axis is None:
        return mean(values, mask, faithful=faithful)
    count = mask.sum(axis)
    return torch.where(mask, values, 0).sum(axis) / (count if faithful else count.clamp(min=1))


def masked_whiten(values: Tensor, mask: Tensor, shift_mean: bool = True, *, faithful: bool = False) -> Tensor:
    """Return `values` with mean 0 and variance 1 over the True entries of `mask`.

    Masked entries are 0; with `faithful` they are shifted and scaled like the others.
    """
    mask = counted("mask", mask, values)
    if faithful:
        return whiten_everywhere(values, mask, shift_mean=shift_mean)
    return whiten(values, mask, shift_mean=shift_mean)


@contextmanager
def fused_helpers(*, version: str | None = None) -> Generator[tuple[str, ...], None, None]:
    """Replace the helpers of TRL's PPOTrainer inside a context, and yield the names of the replaced helpers.

        with fused_helpers():
            trainer.train()

    The originals are restored at the end of the context, also after an exception. Releases before 0.15 have no
    `selective_log_softmax`, so it is not replaced there.

    Raises:
        ValueError: the release `version` (None: the installed release) is not known.
    """
    module = importlib.import_module(release("trl", version, PPO_MODULES))
    ours = {f.__name__: f for f in (selective_log_softmax, masked_mean, masked_whiten)}
    theirs = {name: getattr(module, name) for name in ours if hasattr(module, name)}
    try:
        for name in theirs:
            setattr(module, name, ours[name])
        yield tuple(theirs)
    finally:
        for name, original in theirs.items():
            setattr(module, name, original)


class Rollout(NamedTuple):
    """The data of the responses that PPOTrainer computes before the first epoch; all (B, T)."""

    rewards: Tensor
    advantages: Tensor
    returns: Tensor
    kl: Tensor
    logprobs: Tensor
    values: Tensor
    mask: Tensor  # bool: the actions, including the end token
    value_mask: (
        Tensor  # bool: the actions and the position after the last, which has the score and whose value is trained
    )

    def take(self, indices: Tensor | Sequence[int]) -> Rollout:
        """Return the data of the sequences at `indices`."""
        return Rollout(*(x[indices] for x in self))


class PPO:
    """The computation of `PPOTrainer.train` between generation and optimizer; `args` is TRL's `PPOConfig`."""

    def __init__(self, args: Any, *, faithful: bool = False):
        checks.choice("args.kl_estimator", args.kl_estimator, ("k1", "k3"))
        self.args: Any = args
        self.faithful: bool = faithful

    def rollout(
        self,
        logprobs: Tensor,  # (B, T)
        ref_logprobs: Tensor,  # (B, T)
        values: Tensor,  # (B, T)
        scores: Tensor,  # (B,)
        sequence_lengths: Tensor,  # (B,), position of the last action; -1 for an empty response
    ) -> Rollout:
        """Return rewards, whitened advantages and returns.

        The score is at the position after the last action, or at the last action if the response fills the row.
        """
        args = self.args
        checks.floating("logprobs", logprobs, dims=(2,), what="[B, T]")
        last = sequence_lengths[:, None]
        position = torch.arange(logprobs.shape[1], device=logprobs.device)
        mask, value_mask = position <= last, position <= last + 1
        logprobs, ref_logprobs = (torch.where(mask, x, 0) for x in (logprobs, ref_logprobs))
        values = torch.where(value_mask, values, 0)
        found = rollout_advantages(
            scores,
            logprobs,
            ref_logprobs,
            values,
            value_mask,
            kl_coef=args.kl_coef,
            kl_estimator=args.kl_estimator,
            gamma=args.gamma,
            lam=args.lam,
            holes="zero",
            whiten_rewards=args.whiten_rewards,
            whiten_advantages=False,
        )
        if self.faithful:
            advantages = torch.where(mask, whiten_everywhere(found.advantages, mask), 0)
        else:
            advantages = whiten(found.advantages, mask)
        return Rollout(found.rewards, advantages, found.returns, found.kl, logprobs, values, mask, value_mask)

    def loss(
        self,
        logits: Tensor,  # (B, T, V), before the division by the temperature; differentiable
        responses: Tensor,  # (B, T)
        vpred: Tensor,  # (B, T), differentiable
        rollout: Rollout,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of one micro-batch and its statistics, under the names that TRL logs.

        Entropy, KL and ratio are means over the actions. With `faithful` they are means over all positions including
        padding, as in TRL.
        """
        args, r = self.args, rollout
        temperature = args.temperature + 1e-7
        options: PPOOptions = {
            "cliprange": args.cliprange,
            "values": torch.where(r.value_mask, vpred, 0),
            "old_values": r.values,
            "returns": r.returns,
            "value_mask": r.value_mask,
            "cliprange_value": args.cliprange_value,
            "vf_coef": args.vf_coef,
        }
        constants = (r.logprobs, r.advantages, r.mask)
        taken = None
        if self.faithful:
            taken = token_logprobs(logits, responses, temperature=temperature, entropy=True)
            loss, metrics = ppo_loss(taken.logprobs, *constants, **options)
        else:
            loss, metrics = logits_ppo_loss(logits, responses, *constants, temperature=temperature, **options)
        with torch.no_grad():
            stats = {
                "policy/clipfrac_avg": metrics["clipfrac"],
                "loss/policy_avg": metrics["policy_loss"],
                "loss/value_avg": metrics["value_loss"],
                "val/clipfrac_avg": metrics["value_clipfrac"],
            }
            if taken is None:
                return loss, stats | {
                    "policy/approxkl_avg": metrics["approx_kl"],
                    "policy/entropy_avg": metrics["entropy"],
                    "val/ratio": metrics["ratio_mean"],
                }
            assert taken.entropy is not None
            moved = torch.where(r.mask, taken.logprobs - r.logprobs, 0)
            stats["policy/approxkl_avg"] = kl_penalty(moved, torch.zeros_like(moved), estimator="k2").mean()
            stats["policy/entropy_avg"] = taken.entropy.mean()
            stats["val/ratio"] = moved.exp().mean()
        return loss, stats

    @staticmethod
    def metrics(
        rollout: Rollout, scores: Tensor, kl_coef: float, stats: Sequence[dict[str, Tensor]]
    ) -> dict[str, float]:
        """Return the metrics that TRL logs for an update, from its rollout and the statistics of its micro-batches."""
        r = rollout
        rewarded = (-kl_coef * r.kl).sum(1).mean()
        line = {
            "objective/kl": r.kl.sum(1).mean(),
            "objective/entropy": -torch.where(r.mask, r.logprobs, 0).sum(1).mean(),
            "objective/non_score_reward": rewarded,
            "objective/rlhf_reward": rewarded + scores.mean(),
            "objective/scores": scores.mean(),
        }
        line |= {name: torch.stack([s[name] for s in stats]).mean() for name in stats[0]}
        line["val/ratio_var"] = torch.stack([s["val/ratio"] for s in stats]).var()
        return dict(zip(line, torch.stack(list(line.values())).tolist(), strict=True))
