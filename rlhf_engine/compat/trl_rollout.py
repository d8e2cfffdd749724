"""Sampled responses and their advantages, by the conventions of TRL 1.12.0's PPOTrainer.

A response ends before its first pad id. The score is added to the reward of the position after the last action, or of the last
action if the response fills the row. The value of that position is trained too.
Shapes: B sequences, P prompt width, T response width.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rlhf_engine.config import RolloutConfig
from rlhf_engine.memory import AnyArena
from rlhf_engine.model import ActorCritic, LanguageModel
from rlhf_engine.model.reward_model import RewardModel
from rlhf_engine.model.roles import Reference
from rlhf_engine.rollout import Generator, Rollout, recompute, reference_logprobs
from rlhf_engine.rollout.decode.protocol import new_memory
from rlhf_kernels import masked_whiten, rollout_advantages

_WIDTH = 32
"""A sampler is built for prompts of a multiple of this many tokens, so that it is seldom rebuilt for a longer one."""


@dataclass(frozen=True)
class Responses:
    """What was sampled for a batch of prompts."""

    prompts: list[Tensor]  # B of (length,), without padding
    ids: Tensor  # (B, T), padded with the pad id
    logprobs: Tensor  # (B, T), float32; not read outside of the response


@dataclass(frozen=True)
class Batch:
    """The training data of one update; all (B, T) tensors are 0 where their mask is False."""

    rollout: Rollout  # its mask is that of the trained values: the actions and the position after the last one
    mask: Tensor  # (B, T), bool: the actions
    old_logprobs: Tensor  # (B, T)
    old_values: Tensor  # (B, T)
    advantages: Tensor  # (B, T)
    returns: Tensor  # (B, T)
    metrics: dict[str, Tensor]


class Sampler:
    """Sampler of responses with the random numbers of `seed`.

    Args:
        policy: the model.
        length: most tokens of a response.
        temperature: divisor of the logits.
        stop_id: the id that ends a response; None: none does.
        pad_id: the id after the end of a response.
        seed: seed of the random numbers.
        together: number of sequences that are decoded together.
        tokenizer: the policy's tokenizer.
    """

    def __init__(
        self,
        policy: LanguageModel,
        *,
        length: int,
        temperature: float,
        stop_id: int | None,
        pad_id: int,
        seed: int,
        together: int,
        tokenizer: Any,
    ) -> None:
        self.policy, self.stop_id, self.pad_id, self.seed, self.tokenizer = policy, stop_id, pad_id, seed, tokenizer
        self.settings: dict[str, Any] = {
            "max_response_tokens": length,
            "temperature": temperature,
            "batch_size": together,
            "check_sequences": 0,
        }
        self.generator: Generator | None = None

    def fit(self, prompts: Sequence[Tensor]) -> bool:
        """Build the generator if it is too small for these prompts; return whether it was built.

        Raises:
            ValueError: a prompt is empty, or too long for the positions of the policy.
        """
        longest = max(len(prompt) for prompt in prompts)
        if min(len(prompt) for prompt in prompts) == 0:
            raise ValueError(
                "train_dataset: got a prompt without tokens; remove rows whose input_ids are empty or all pad"
            )
        if self.generator is not None and longest <= self.generator.config.max_prompt_tokens:
            return False
        config = RolloutConfig(max_prompt_tokens=-(-longest // _WIDTH) * _WIDTH, **self.settings)
        self.generator = Generator(
            self.policy,
            config,
            eos_token_ids=[] if self.stop_id is None else [self.stop_id],
            pad_token_id=self.pad_id,
            seed=self.seed,
            tokenizer=self.tokenizer,
        )
        # TRL samples every id of the output layer, also those that are no token of the tokenizer.
        self.policy.restrict(range(self.policy.lm_weight.shape[0]))
        return True

    def __call__(self, prompts: list[Tensor], numbers: Tensor, arena: AnyArena | None = None) -> Responses:
        """Return a response per prompt; `numbers` (B,) select the random numbers of each.

        Keys and values are in the phase `generate` of the arena, if one is given.
        """
        assert self.generator is not None
        with nullcontext() if arena is None else arena.phase("generate"):
            memory = new_memory if arena is None else arena.memory
            found = self.generator.generate(prompts, numbers, allocate=memory)
        return Responses(prompts, found.response_ids, found.logprobs)


def unpadded(ids: Tensor, pad_id: int) -> list[Tensor]:  # (B, P)
    """Return the prompts without their pads: TRL masks pads and counts positions without them."""
    return [row[row != pad_id] for row in ids]


def truncated(ids: Tensor, stop_id: int | None, pad_id: int) -> Tensor:  # (B, T) -> (B, T)
    """Return the responses with pads after the first stop id."""
    if stop_id is None:
        return ids
    stopped = (ids == stop_id).long()
    return ids.masked_fill(stopped.cumsum(1) - stopped > 0, pad_id)


def response_lengths(ids: Tensor, pad_id: int) -> Tensor:  # (B, T) -> (B,)
    """Return the number of ids before the first pad of each row."""
    return (ids != pad_id).long().cumprod(1).sum(1)


def scores_of(reward: RewardModel, prompts: Sequence[Tensor], ids: Tensor, pad_id: int, chunk: int) -> Tensor:  # (B,)
    """Return the score of each response at its last token, or at that of the prompt if the response is empty."""
    rows = [
        torch.cat([prompt, row[:length]])
        for prompt, row, length in zip(prompts, ids, response_lengths(ids, pad_id).tolist(), strict=True)
    ]
    lengths = torch.tensor([len(row) for row in rows], device=ids.device)
    with torch.no_grad():
        return reward.score_rows(pad_sequence(rows, batch_first=True), lengths, chunk)


def training_rollout(responses: Responses, ids: Tensor, pad_id: int) -> tuple[Rollout, Tensor]:
    """Return the rollout whose mask is that of the values, and the mask of the actions (B, T).

    Pads become id 0, because a pad may have an id that the model does not have. They are no input of a pass.
    """
    lengths = response_lengths(ids, pad_id)[:, None]
    position = torch.arange(ids.shape[1], device=ids.device)
    mask, value_mask = position < lengths, position <= lengths
    zeros, prompts = torch.zeros_like(responses.logprobs), responses.prompts
    rollout = Rollout(
        prompt_ids=pad_sequence(prompts, batch_first=True),
        prompt_lengths=torch.tensor([len(prompt) for prompt in prompts], device=ids.device),
        response_ids=torch.where(mask, responses.ids, 0),
        mask=value_mask,
        logprobs=torch.where(mask, responses.logprobs, 0),
        sampling_logprobs=zeros,
        values=zeros,
        stop_reason=torch.zeros_like(lengths[:, 0]),
    )
    return rollout, mask


def score_batch(
    responses: Responses,
    args: Any,
    *,
    policy: ActorCritic,
    reference: Reference,
    reward: RewardModel,
    stop_id: int | None,
    pad_id: int,
    eos_id: int,
    arena: AnyArena,
) -> Batch:
    """Score the responses and compute reference log-probs, values, advantages and the metrics `objective/...`."""
    ids = truncated(responses.ids, stop_id, pad_id)
    rollout, mask = training_rollout(responses, ids, pad_id)
    size = args.local_rollout_forward_batch_size
    with arena.phase("score"):
        scores = scores_of(reward, responses.prompts, ids, pad_id, size)
        with arena.transients():
            temperature = args.sampling_temperature
            ref = reference_logprobs(reference, rollout, temperature=temperature, microbatch=size)
            values = recompute(policy, rollout, ("values",), microbatch=size)["values"]
        ref, values = torch.where(mask, ref, 0), values.clone()  # the next phase reuses the memory of this one
    if args.missing_eos_penalty is not None:
        scores = scores - args.missing_eos_penalty * (ids != eos_id).all(1)
    found = rollout_advantages(
        scores,
        rollout.logprobs,
        ref,
        values,
        rollout.mask,
        kl_coef=args.kl_coef,
        kl_estimator=args.kl_estimator,
        gamma=args.gamma,
        lam=args.lam,
        holes="zero",
        whiten_rewards=args.whiten_rewards,
        whiten_advantages=False,
        backend=policy.backend,
    )
    kl = found.kl.sum(1).mean()
    metrics = {
        "objective/kl": kl,
        "objective/entropy": -rollout.logprobs.sum(1).mean(),
        "objective/non_score_reward": -args.kl_coef * kl,
        "objective/rlhf_reward": scores.mean() - args.kl_coef * kl,
        "objective/scores": scores.mean(),
        "val/num_eos_tokens": (responses.ids == eos_id).sum(),
    }
    advantages = masked_whiten(found.advantages, mask)
    return Batch(rollout, mask, rollout.logprobs, values, advantages, found.returns, metrics)
