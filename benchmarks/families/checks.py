"""What a family can do, compared with the model's own forward pass in float64.

Each check returns the largest difference that it found, and raises ValueError where the engine refuses the family.
Legend: B sequences, V vocabulary.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from benchmarks.families.configs import FLOAT32, VOCABULARY, build
from rlhf_engine.config import OptimConfig, PPOConfig, RolloutConfig, RunConfig
from rlhf_engine.model import ActorCritic
from rlhf_engine.model.pretrained import load_pretrained
from rlhf_engine.model.saving import save_policy
from rlhf_engine.ppo.build import build_trainer
from rlhf_engine.rollout import Generator, Rollout
from rlhf_engine.rollout.decode.cpu import other_experts

PROMPTS, RESPONSE = (26, 5, 3, 11), 14
"""Lengths of the prompts, and of all responses: the first sequence crosses every boundary, the second to fourth do not."""
LONGEST = max(PROMPTS) + RESPONSE


def prompts(seed: int = 0) -> list[Tensor]:
    """Return prompts of the lengths `PROMPTS`."""
    stream = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (length,), generator=stream) for length in PROMPTS]


def own_logprobs(model: PreTrainedModel, ids: Tensor) -> Tensor:  # (S,) -> (S - 1,)
    """Return the log-prob of each token but the first by the model's own forward pass in float64.

    The sequence is extended to `LONGEST` tokens, because some rotary embeddings depend on the longest position of a pass.
    """
    wide = torch.cat([ids, ids[-1:].expand(LONGEST - len(ids))])
    logits = model(input_ids=wide[None], use_cache=False).logits[0, : len(ids) - 1]
    return logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0]


def in_float64(family: str, **changes: Any) -> PreTrainedModel:
    """Return the model of `build` in float64 if its code can run so, with transformers' loop over experts."""
    model = build(family, **changes)
    if family not in FLOAT32:
        model.double()
    model.config.get_text_config()._experts_implementation = "eager"
    return model


def generator_of(policy: ActorCritic, cache: str = "slots", batch_size: int = 4, response: int = RESPONSE) -> Generator:
    """Return a sampler of responses of `response` tokens, which nothing ends."""
    config = RolloutConfig(
        max_prompt_tokens=max(PROMPTS), max_response_tokens=response, batch_size=batch_size, cache=cache
    )
    return Generator(policy, config, eos_token_ids=VOCABULARY, pad_token_id=0, seed=0)


def differences(own: PreTrainedModel, rollout: Rollout, logprobs: Tensor) -> float:
    """Return the largest difference of a rollout's log-probs from those of the model's own forward pass."""
    largest = 0.0
    for row, (prompt, response) in enumerate(zip(rollout.prompts(), rollout.responses(), strict=True)):
        with torch.no_grad():
            expected = own_logprobs(own, torch.tensor([*prompt, *response]))[len(prompt) - 1 :]
        largest = max(largest, float((expected - logprobs[row, : len(response)]).abs().max()))
    return largest


def sampled(family: str, cache: str, **changes: Any) -> float:
    """Compare sampled log-probs, of sequences together and each by itself, with the model's own."""
    policy, own = ActorCritic(build(family, **changes)), in_float64(family, **changes)
    generator, given = generator_of(policy, cache), prompts()
    together = generator.generate(given, torch.arange(len(given)))
    found = differences(own, together, together.logprobs)
    for row, prompt in enumerate(given):
        alone = generator.generate([prompt], torch.tensor([row]))
        if not torch.equal(alone.response_ids[0], together.response_ids[row]):
            return float("inf")
        found = max(found, float((alone.logprobs[0] - together.logprobs[row]).abs().max()))
    return found


def a_rollout(policy: ActorCritic) -> Rollout:
    """Return prompts with random responses, with the sampler's limits set in the policy."""
    policy.limit_positions(LONGEST)
    stream = torch.Generator().manual_seed(1)
    given = prompts()
    width, zeros = max(PROMPTS), torch.zeros(len(given), RESPONSE)
    ids = torch.randint(3, VOCABULARY, (len(given), RESPONSE), generator=stream)
    return Rollout(
        prompt_ids=torch.stack([torch.nn.functional.pad(one, (0, width - len(one))) for one in given]),
        prompt_lengths=torch.tensor(PROMPTS),
        response_ids=ids,
        mask=torch.ones_like(ids, dtype=torch.bool),
        logprobs=zeros,
        sampling_logprobs=zeros,
        values=zeros,
        stop_reason=torch.zeros(len(given), dtype=torch.int64),
    )


def scored(family: str, **changes: Any) -> float:
    """Compare log-probs of a forward pass, of sequences together and each by itself, with the model's own."""
    policy, own = ActorCritic(build(family, **changes)), in_float64(family, **changes)
    rollout, found = a_rollout(policy), 0.0
    for parts in (torch.arange(len(rollout)).split(1), [torch.arange(len(rollout))]):
        for rows in parts:
            chosen = rollout.take(rows)
            with torch.no_grad():
                flat = policy(chosen.batch(torch.arange(len(rows))), ("logprobs",)).logprobs
            found = max(found, differences(own, chosen, flat.view(len(rows), RESPONSE)))
    return found


def gradients(family: str, *, checkpointing: bool = False, **changes: Any) -> float:
    """Compare the gradient of a policy's loss with the one of the model's own forward pass in float64.

    The difference is relative to the largest element of the gradient's tensor.
    """
    policy = ActorCritic(build(family, **changes), gradient_checkpointing=checkpointing).train()
    own, rollout = in_float64(family, **changes), a_rollout(policy)
    batch = rollout.batch(torch.arange(len(rollout)))
    assert batch.ids is not None
    count = len(batch.ids)
    weights = torch.randn(count, generator=torch.Generator().manual_seed(2))
    loss = {
        "old_logprobs": torch.zeros(count),
        "advantages": weights,
        "mask": torch.ones(count, dtype=torch.bool),
        "objective": "policy_gradient",
        "num_tokens": count,
    }
    result = policy(batch, ("loss",), loss=loss).loss
    assert result is not None
    result.loss.backward()
    rows = zip(rollout.prompts(), rollout.responses(), strict=True)
    parts = [own_logprobs(own, torch.tensor([*p, *r]))[len(p) - 1 :] for p, r in rows]
    (-(torch.cat(parts) * weights).sum() / count).backward()
    expected = {name: one.grad for name, one in own.named_parameters() if one.grad is not None}
    found = dict(policy.model.named_parameters())
    largest = max(float(one.abs().max()) for one in expected.values())
    return max(
        float(((0 if found[name].grad is None else found[name].grad) - one).abs().max()) / largest
        for name, one in expected.items()
    )


def trained(family: str, **changes: Any) -> float:
    """Run one PPO update and return `logprob_deviation`, the difference of sampled log-probs from recomputed ones."""
    policy = ActorCritic(build(family, **changes))
    ppo = PPOConfig(updates=1, rollout_batch=4, minibatch=4, microbatch=2, ppo_epochs=2, optim=OptimConfig(lr=1e-3))
    rollout = RolloutConfig(max_prompt_tokens=max(PROMPTS), max_response_tokens=RESPONSE, batch_size=4)
    trainer = build_trainer(
        policy,
        None,
        lambda sampled: sampled.response_lengths.float(),
        prompts(),
        RunConfig(seed=0, ppo=ppo, rollout=rollout),
        generator=generator_of(policy),
    )
    before = {name: one.detach().clone() for name, one in policy.named_parameters()}
    log = trainer.step()
    changed = sum(not torch.equal(before[name], one) for name, one in policy.named_parameters())
    return log["logprob_deviation"] if changed else float("inf")


def saved(family: str, **changes: Any) -> float:
    """Compare log-probs before saving and after loading."""
    policy = ActorCritic(build(family, **changes))
    rollout = a_rollout(policy)
    batch = rollout.batch(torch.arange(len(rollout)))
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        save_policy(Path(folder), policy, None)
        again = ActorCritic(load_pretrained(AutoModelForCausalLM, folder, attention=None))
        again.limit_positions(LONGEST)
        logprobs = [one(batch, ("logprobs",)).logprobs for one in (policy, again)]
    return float((logprobs[0] - logprobs[1]).abs().max())


def depends_on_batch(
    family: str, dtype: torch.dtype = torch.float32, count: int = 6, response: int = 8, **changes: Any
) -> float:
    """Return the number of sequences whose bits differ between batches of `count`, 4 (the first 16) and 1 (the first 8)."""
    model = build(family, **changes).to(dtype)
    policy, different = ActorCritic(model), 0
    if kind := other_experts(policy.trunk):
        raise ValueError(f"a log line states that the bits of a sequence may depend on the batch, because of {kind}")
    stream = torch.Generator().manual_seed(3)
    given = [torch.randint(3, VOCABULARY, (3 + n % 9,), generator=stream) for n in range(count)]
    whole, *others = [
        generator_of(policy, "slots", size, response).generate(given[:rows], torch.arange(rows))
        for size, rows in ((count, count), (4, min(count, 16)), (1, min(count, 8)))
    ]
    for row in range(count):
        compared = [other.logprobs[row] for other in others if row < len(other.logprobs)]
        different += any(not torch.equal(whole.logprobs[row], found) for found in compared)
    return float(different)


CHECKS: dict[str, tuple[Callable[..., float], float]] = {
    "scored": (scored, 1e-4),
    "slots": (partial(sampled, cache="slots"), 1e-4),
    "pages": (partial(sampled, cache="paged"), 1e-4),
    "gradient": (gradients, 1e-4),
    "recomputed": (partial(gradients, checkpointing=True), 1e-4),
    "PPO": (trained, 1e-4),
    "saved": (saved, 0.0),
    "float32": (depends_on_batch, 0.0),
    "bfloat16": (partial(depends_on_batch, dtype=torch.bfloat16), 0.0),
}
"""Checks of a family and the largest result that is right."""


def row(family: str, names: Collection[str] = tuple(CHECKS)) -> dict[str, str]:
    """Return "yes" for each check that a family passes, the engine's reason where it refuses, or the wrong number."""
    cells = {}
    for name in names:
        check, allowed = CHECKS[name]
        try:
            found = check(family)
            cells[name] = "yes" if found <= allowed else f"wrong: {found:.1e}"
        except ValueError as error:
            cells[name] = str(error)
    return cells
