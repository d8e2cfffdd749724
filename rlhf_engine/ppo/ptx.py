"""PPO-ptx: pretraining gradients in the optimizer step of PPO (Ouyang et al. 2022, equation 2).

    L = L_PPO - gamma E_{x ~ pretraining}[log pi(x)]

The backward pass of the second term runs directly after its forward pass, so the activations of the two terms are never in
memory together. The second term is computed at temperature 1, not at the temperature of the rollout.
Shapes: M sequences in total, B per step, L tokens per sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_engine.data.streams import shuffled_stream
from rlhf_engine.distributed.ranks import ONE, Ranks
from rlhf_engine.model import Policy, TokenBatch


class PretrainStream:
    """Sequences of plain text in random order, reshuffled after each pass; `position` counts the sequences used so far."""

    def __init__(self, sequences: Tensor, seed: int) -> None:  # (M, L), integers
        self.sequences, self.position = sequences, 0
        self._take = shuffled_stream(len(sequences), seed, "pretraining")

    def take(self, count: int) -> Tensor:  # (B, L), int64
        """Return the next `count` sequences."""
        rows = self._take(self.position, count)
        self.position += count
        return self.sequences[rows].long()


def language_model_loss(
    policy: Policy,
    sequences: Tensor,  # (B, L), without padding
    *,
    num_tokens: int,
) -> Tensor:  # ()
    """Return `-sum log pi(x_s | x_<s) / num_tokens` over all tokens but the first of each sequence, at temperature 1.

    It is computed as a policy-gradient loss with advantages 1: the fused op computes the gradient in the forward pass, without
    an [N, V] tensor.
    """
    ids = sequences[:, 1:].flatten()
    ones = torch.ones(len(ids), device=ids.device)
    loss = {
        "old_logprobs": torch.zeros_like(ones),
        "advantages": ones,
        "mask": torch.ones_like(ids, dtype=torch.bool),
        "objective": "policy_gradient",
        "num_tokens": num_tokens,
    }
    result = policy(TokenBatch(input_ids=sequences[:, :-1], ids=ids), ("loss",), loss=loss).loss
    assert result is not None
    return result.loss


def ptx_backward(
    policy: Policy,
    sequences: Tensor,
    *,
    coef: float,
    microbatch: int,
    microbatch_tokens: int | None = None,
    ranks: Ranks = ONE,
) -> dict[str, Tensor]:
    """Add the gradient of `-coef` times the mean log-prob of the sequences' tokens; return the loss in nats per token.

    The first token of a sequence has no state before it and does not count. The denominator is the token count of all
    `sequences`, so the gradient does not depend on the micro-batches of `microbatch` sequences or `microbatch_tokens` tokens.
    """
    num_tokens = sequences[:, 1:].numel()
    loss = torch.zeros((), device=policy.device)
    if microbatch_tokens is not None:
        microbatch = max(1, microbatch_tokens // (sequences.shape[1] - 1))
    shares = ranks.shares(torch.full((len(sequences),), sequences.shape[1]))
    ours = sequences[shares[ranks.rank]].to(policy.device)
    for number in range(-(-len(shares[0]) // microbatch)):
        part = ours[number * microbatch : (number + 1) * microbatch]
        # A rank without sequences left runs the pass with weight 0: all ranks must run as many (`Rollout.parts`).
        weight = 1.0 if len(part) else 0.0
        nll = language_model_loss(policy, part if weight else sequences[:1].to(policy.device), num_tokens=num_tokens)
        (coef * weight * nll).backward()
        loss += weight * nll.detach()
    return ranks.sum_metrics({"ptx_loss": loss})
