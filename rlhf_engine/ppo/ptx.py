"""PPO-ptx: pretraining gradients in the optimiser step of PPO (Ouyang et al. 2022, equation 2).

    L = L_PPO - gamma E_{x ~ pretraining}[log pi(x)]

The second term has a backward of its own straight after its forward, so that the activations of the two never coexist. It is
not a loss of the rollout's distribution: its logits are never divided by the rollout's temperature.
Shapes: M sequences in all, B of a step, L tokens of each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_engine.data.streams import shuffled_stream
from rlhf_engine.model import ActorCritic


class PretrainStream:
    """Sequences of plain text in a random order, a new one each time all have been used; `position` counts those taken."""

    def __init__(self, sequences: Tensor, seed: int) -> None:  # (M, L), integers
        self.sequences, self.position = sequences, 0
        self._take = shuffled_stream(len(sequences), seed, "pretraining")

    def take(self, count: int) -> Tensor:  # (B, L), int64
        """The next `count` sequences."""
        rows = self._take(self.position, count)
        self.position += count
        return self.sequences[rows].long()


def ptx_backward(
    policy: ActorCritic, sequences: Tensor, *, coef: float, microbatch: int, microbatch_tokens: int | None = None
) -> dict[str, Tensor]:
    """Add the gradient of `-coef` times the mean log-prob of the sequences' tokens; returns the loss in nats a token.

    The first token of a sequence has no state before it and does not count. The denominator is that of all `sequences`, so
    the gradient does not depend on the micro-batches, of `microbatch` sequences or of `microbatch_tokens` tokens.
    """
    num_tokens = sequences[:, 1:].numel()
    loss = torch.zeros((), device=policy.device)
    if microbatch_tokens is not None:
        microbatch = max(1, microbatch_tokens // (sequences.shape[1] - 1))
    for part in sequences.to(policy.device).split(microbatch):
        nll = policy.language_model_loss(part, num_tokens=num_tokens)
        (coef * nll).backward()
        loss += nll.detach()
    return {"ptx_loss": loss}
