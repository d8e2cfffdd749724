"""Optimizer steps of an update in the order of TRL 1.12.0's PPOTrainer, with the losses of the fused head.

A loss is the mean over the tokens of a micro-batch, divided by `gradient_accumulation_steps`. An optimizer step follows every
`gradient_accumulation_steps` micro-batches, also across minibatches. At the last batch of a pass over the dataset it follows
every micro-batch, as in accelerate, which TRL uses.
Shapes: B sequences, T response width, N rows of a micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf_engine.compat.trl_lookups import rows_added
from rlhf_engine.compat.trl_rollout import Batch
from rlhf_engine.memory import AnyArena, gradients_in
from rlhf_engine.model import ActorCritic
from rlhf_engine.optim.adamw import Optimizer, gradient_norm
from rlhf_engine.rollout import Rollout

CPU_PASS_TOKENS = 512
"""Most tokens of one pass on a CPU, unless a sequence has more."""

_LOSSES = {"loss/policy_avg": "policy_loss", "loss/value_avg": "value_loss"}
_SHARES = {
    "policy/clipfrac_avg": "clipfrac",
    "val/clipfrac_avg": "value_clipfrac",
    "policy/entropy_avg": "entropy",
    "policy/approxkl_avg": "ref_kl",
    "val/ratio": "ratio_mean",
}


class Update:
    """The optimizer steps of an update.

    Args:
        policy: the model, with its value function.
        optimizer: its optimizer.
        args: the `PPOConfig`, with the batch sizes that `PPOTrainer` computes.
    """

    def __init__(self, policy: ActorCritic, optimizer: Optimizer, args: Any) -> None:
        self.policy, self.optimizer, self.args = policy, optimizer, args
        self.trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        self.counted = 0
        """Micro-batches since the last reset of accelerate's counter."""

    def __call__(self, batch: Batch, arena: AnyArena, *, last_of_pass: bool) -> dict[str, float]:
        """Train on a batch; return the metrics of its micro-batches.

        `last_of_pass` states whether the batch is the last one of a pass over the dataset.

        Raises:
            FloatingPointError: a gradient is not finite. The weights are those of the last step.
        """
        args, found = self.args, []
        with arena.phase("train"), gradients_in(arena, self.trained) as places, rows_added(self.policy, places):
            for _ in range(args.num_ppo_epochs):
                order = torch.from_numpy(np.random.permutation(args.local_batch_size)).to(batch.mask.device)
                for minibatch in order.split(args.local_mini_batch_size):
                    for sequences in minibatch.split(args.per_device_train_batch_size):
                        with arena.transients():
                            found.append(self._backward(batch, sequences))
                        self._count(last_of_pass)
        return averages(found)

    def _count(self, last_of_pass: bool) -> None:
        """Step the optimizer where accelerate's `accumulate` does."""
        self.counted = 0 if last_of_pass else self.counted + 1
        if self.counted % self.args.gradient_accumulation_steps:
            return
        norm = gradient_norm(self.optimizer)
        if not bool(norm.isfinite()):
            raise FloatingPointError(
                f"training diverged: got a gradient norm of {float(norm)}, expected a finite one; try a lower learning_rate"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _backward(self, batch: Batch, sequences: Tensor) -> dict[str, Tensor]:
        """Add the gradient of a micro-batch; return its metrics."""
        mask, steps = batch.mask[sequences], self.args.gradient_accumulation_steps
        tokens, states = int(mask.sum()), int(batch.rollout.mask[sequences].sum())
        denominators = {"num_tokens": max(1, tokens) * steps, "num_value_tokens": states * steps}
        found = [self._pass(batch, part, denominators) for part in _passes(sequences, batch.rollout)]
        sums = {name: torch.stack([one[name] for one in found]).sum(0) for name in found[0]}
        return _trl_metrics(sums, steps, tokens / mask.numel())

    def _pass(self, batch: Batch, sequences: Tensor, denominators: dict[str, int]) -> dict[str, Tensor]:
        """Run one forward and backward pass; return its share of the metrics of the micro-batch."""
        args, inputs = self.args, batch.rollout.batch(sequences)
        assert inputs.ids is not None and inputs.source is not None

        def rows(x: Tensor, source: Tensor = inputs.source) -> Tensor:  # (B, T) -> (N,)
            return x.reshape(-1)[source]

        mask, old_logprobs = rows(batch.mask), rows(batch.old_logprobs)
        loss = {
            "old_logprobs": old_logprobs,
            "advantages": rows(batch.advantages),
            "mask": mask,
            "cliprange": args.cliprange,
            "old_values": rows(batch.old_values),
            "returns": rows(batch.returns),
            "value_mask": torch.ones_like(mask),
            "cliprange_value": args.cliprange_value,
            "vf_coef": args.vf_coef,
            **denominators,
            # Not in the loss: half of the mean square of the log-ratio is the metric `policy/approxkl_avg`.
            "ref_logprobs": old_logprobs,
            "kl_estimator": "k2",
        }
        result = self.policy(inputs, ("loss",), temperature=args.sampling_temperature, loss=loss).loss
        assert result is not None
        result.loss.backward()
        return result.metrics


def _passes(sequences: Tensor, rollout: Rollout) -> Sequence[Tensor]:
    """Return the sequences of a micro-batch in the passes that compute its gradient.

    The gradients of the passes add up to that of the micro-batch. On a CPU, products of a few hundred rows are as fast per row
    as larger ones, and a pass needs less memory for activations.
    """
    if sequences.device.type != "cpu":
        return [sequences]
    width = rollout.prompt_ids.shape[1] + rollout.response_ids.shape[1]
    return sequences.chunk(-(-len(sequences) * width // CPU_PASS_TOKENS))


def _trl_metrics(metrics: dict[str, Tensor], steps: int, share: float) -> dict[str, Tensor]:
    """Return the metrics of a micro-batch as TRL computes them; `share` is that of actions among all (B, T) positions.

    TRL averages KL and ratio over all positions, with KL 0 and ratio 1 after the end of a response.
    """
    found = {name: metrics[ours] * steps for name, ours in (_LOSSES | _SHARES).items()}
    found["policy/approxkl_avg"] = found["policy/approxkl_avg"] * share
    found["val/ratio"] = found["val/ratio"] * share + (1.0 - share)
    return found


def averages(found: list[dict[str, Tensor]]) -> dict[str, float]:
    """Return the means over all micro-batches, and the variance of their mean ratios (NaN for a single one)."""
    table = torch.stack([torch.stack(list(one.values())) for one in found]).double().cpu()
    means = dict(zip(found[0], table.mean(0).tolist(), strict=True))
    ratios = table[:, list(found[0]).index("val/ratio")]
    return means | {"val/ratio_var": ratios.var().item() if len(found) > 1 else math.nan}
