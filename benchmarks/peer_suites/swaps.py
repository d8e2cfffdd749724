"""Functions of peers for which the package has no adapter, computed by ours, and used only by the peers' own tests.

B sequences, T positions, N tokens, V vocabulary, H hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_kernels import gae, rollout_advantages, token_logprobs
from rlhf_kernels.integrations import torchtune, trl


def torchrl_gae(
    gamma: float | Tensor,
    lmbda: float | Tensor,
    state_value: Tensor,  # (..., T, F)
    next_state_value: Tensor,
    reward: Tensor,
    done: Tensor,
    terminated: Tensor | None = None,
    *,
    time_dim: int = -2,
) -> tuple[Tensor, Tensor]:
    """Return TorchRL's advantages and value targets: trajectories are packed sequences that end where `done` is True.

    TorchRL has the value of every next state, also inside a trajectory. Its difference to the value that `gae` reads there
    is added to the reward.
    """
    terminated = done if terminated is None else terminated
    rows = [x.movedim(time_dim, -1) for x in (state_value, next_state_value, reward, done, terminated)]
    values, following, rewards, ends, final = (x.reshape(-1, x.shape[-1]) for x in rows)
    ends = torch.cat([ends[:, :-1], torch.ones_like(ends[:, :1])], 1).flatten()
    following = torch.where(final, 0, following).flatten()
    read = torch.where(ends, following, values.flatten().roll(-1))
    starts = torch.nn.functional.pad(ends.nonzero().flatten() + 1, (1, 0)).int()
    advantages, _ = gae(
        rewards.flatten() + _number(gamma) * (following - read),
        values.flatten(),
        torch.ones_like(ends),
        gamma=_number(gamma),
        lam=_number(lmbda),
        bootstrap=following[ends],
        cu_seqlens=starts,
    )
    advantages = advantages.to(state_value.dtype).reshape(rows[0].shape).movedim(-1, time_dim)
    return advantages, advantages + state_value


def _number(x: float | Tensor) -> float:
    """Return a number, or the only value of a tensor."""
    if not isinstance(x, Tensor):
        return x
    first = x.flatten()[0].item()
    if (x != first).any():
        raise ValueError("gae takes one gamma and one lambda per call")
    return first


def torchtune_rewards(
    scores: Tensor,  # (B,)
    logprobs: Tensor,  # (B, T)
    ref_logprobs: Tensor,  # (B, T)
    kl_coeff: float,
    valid_score_idxs: Tensor | None = None,  # (B,)
) -> tuple[Tensor, Tensor, Tensor]:
    """Return torchtune's rewards, KL and the part of the rewards that the KL gives."""
    b, t = logprobs.shape
    index = torch.full((b,), t - 1) if valid_score_idxs is None else valid_score_idxs
    found = rollout_advantages(
        scores,
        logprobs,
        ref_logprobs,
        torch.zeros_like(logprobs),
        torch.ones(b, t, dtype=torch.bool),
        kl_coef=kl_coeff,
        score_index=index,
        whiten_advantages=False,
    )
    return found.rewards, found.kl, -kl_coeff * found.kl


def torchtune_advantages(
    values: Tensor, rewards: Tensor, gamma: float, lmbda: float, masks: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return torchtune's advantages and returns; its tests pass integers, which the adapter refuses."""
    return torchtune.estimate_advantages(values.float(), rewards.float(), gamma, lmbda, masks)


def torchtune_whiten(x: Tensor, mask: Tensor | None = None, shift_mean: bool = True) -> Tensor:
    """Return torchtune's whitened tensor; with `shift_mean` it keeps its mean, the opposite of TRL's option."""
    mask = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
    return trl.masked_whiten(x, mask, not shift_mean, faithful=True)


def slime_gae(rewards: Tensor, values: Tensor, gamma: float, lambd: float, chunk_size: int = 128) -> Any:
    """Return slime's advantages and returns."""
    return gae(rewards, values, torch.ones_like(rewards, dtype=torch.bool), gamma=gamma, lam=lambd)


def slime_logprobs(
    logits: Tensor,  # (N, V)
    tokens: Tensor,  # (N,)
    tp_group: Any,
    with_entropy: bool = False,
    chunk_size: int = -1,
    log_prob_keep_mask: Tensor | None = None,  # (N, V)
    with_entropy_grad: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Return slime's log-probs (N, 1), whose vocabulary `log_prob_keep_mask` limits, and entropies (N,), whose it does not."""
    if logits.shape[0] == 0:
        return logits.new_zeros(0), logits.new_zeros(0) if with_entropy else None
    found = token_logprobs(logits, tokens, entropy=with_entropy)
    logprobs = found.logprobs
    if log_prob_keep_mask is not None:
        keep = log_prob_keep_mask.clone()
        keep.scatter_(1, tokens[:, None], True)
        logprobs = token_logprobs(logits.masked_fill(~keep, float("-inf")), tokens).logprobs
    entropy = found.entropy
    return logprobs[:, None], entropy if entropy is None or with_entropy_grad else entropy.detach()


def trl_logprobs(logits: Tensor, index: Tensor) -> Tensor:
    """Return the adapter's log-probs in the dtype of the logits, which TRL's tests expect."""
    return trl.selective_log_softmax(logits, index).to(logits.dtype)


def trl_entropy(logits: Tensor, chunk_size: int = 128) -> Tensor:
    """Return the entropies (...) of logits (..., V), in their dtype."""
    entropy = token_logprobs(logits, torch.zeros(logits.shape[:-1], dtype=torch.int64), entropy=True).entropy
    assert entropy is not None
    return entropy.to(logits.dtype)
