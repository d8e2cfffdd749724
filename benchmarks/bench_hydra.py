"""The reference `hydra` of a policy of which the top layers are trained, and updates with it and with a frozen copy.

Setup: a Llama with the top K of N layers trained (random weights), prompts and responses of fixed lengths, one minibatch, all
cases in one process in alternation. The first group is scoring of one rollout: the log-probs of the reference from the stored
states on, the same of a model that has only K layers (the lower bound: its pass starts at the embedding, which costs almost
nothing), the pass of the frozen layers that stores the states, which a rollout has once, and the log-probs of a frozen copy.
The second group is whole updates, sampling included.
"""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.harness import Check, alternate, ratio, report
from rlhf_engine.config import OptimConfig, PPOConfig, RolloutConfig, RunConfig
from rlhf_engine.model import ActorCritic, FrozenCopy
from rlhf_engine.model.references import Hydra
from rlhf_engine.model.top_layers import train_top
from rlhf_engine.ppo.build import build_trainer
from rlhf_engine.ppo.trainer import PPOTrainer
from rlhf_engine.rollout import Generator, Rollout, reference_logprobs

NAME = "hydra"
MODEL = {
    "vocab_size": 8192,
    "hidden_size": 256,
    "intermediate_size": 672,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
}
LAYERS, TRAINED = 8, 2
PROMPTS, PROMPT, RESPONSE, EPOCHS = 64, 96, 96, 2
REFERENCE_BOUND, UPDATE_BOUND = 1.15, 1.0
"""Upper bounds of the seconds of the reference divided by those of K layers, and of an update by that with a frozen copy."""
QUICK = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 256}


def make_policy(layers: int, trained: int | None, model: dict) -> ActorCritic:
    """Return a policy with random weights and `layers` layers, of which the top `trained` ones are trained."""
    torch.manual_seed(0)
    language_model = LlamaForCausalLM(LlamaConfig(**model, num_hidden_layers=layers)).eval()
    if trained is not None:
        train_top(language_model, trained)
    return ActorCritic(language_model)


def make_trainer(reference: str, model: dict, prompts: int) -> PPOTrainer:
    """Return a trainer of the top layers with a reward that takes no time."""
    policy = make_policy(LAYERS, TRAINED, model)
    rollout = RolloutConfig(
        max_prompt_tokens=PROMPT, max_response_tokens=RESPONSE, batch_size=prompts, check_sequences=0
    )
    ppo = PPOConfig(
        updates=10_000,
        rollout_batch=prompts,
        minibatch=prompts,
        microbatch=min(8, prompts),
        ppo_epochs=EPOCHS,
        reference=reference,
        optim=OptimConfig(lr=1e-6),
    )
    stream = torch.Generator().manual_seed(1)
    ids = torch.randint(0, model["vocab_size"], (prompts, PROMPT), generator=stream)
    return build_trainer(
        policy,
        None,
        lambda rollout: rollout.response_ids.remainder(7).float().mean(1),
        lambda first, count: list(ids),
        RunConfig(ppo=ppo, rollout=rollout),
        # An end token outside the vocabulary is never sampled.
        generator=Generator(policy, rollout, eos_token_ids=model["vocab_size"], pad_token_id=0, seed=0),
    )


def score(rollout: Rollout, model: dict, rounds: int, microbatch: int) -> None:
    """Time the parts of scoring a rollout."""
    policy, shallow = make_policy(LAYERS, TRAINED, model), make_policy(TRAINED, None, model)
    hydra, copied, bound = Hydra(policy), FrozenCopy(policy), FrozenCopy(shallow)
    stored = rollout.starting_from(hydra, microbatch)
    names = (
        f"hydra: the top {TRAINED} of {LAYERS} layers and the head",
        f"floor: a model of {TRAINED} layers and a head",
        "the frozen layers, with their states stored",
        f"frozen copy: {LAYERS} layers and the head",
    )
    cases = {
        names[0]: lambda: reference_logprobs(hydra, stored, microbatch=microbatch),
        names[1]: lambda: reference_logprobs(bound, rollout, microbatch=microbatch),
        names[2]: lambda: rollout.starting_from(hydra, microbatch),
        names[3]: lambda: reference_logprobs(copied, rollout, microbatch=microbatch),
    }
    rows = alternate(cases, rounds=rounds)
    checks = [Check("seconds of hydra by those of its layers and the head", ratio(rows[0], rows[1]), REFERENCE_BOUND)]
    title = f"log-probs of the reference over a rollout of {len(rollout)} x ({PROMPT} + {RESPONSE}) tokens"
    report(NAME, title, rows, floor=rows[1], checks=checks)


def main(*, quick: bool = False) -> None:
    """Time the reference, then updates; if `quick`, with a tiny model."""
    model, prompts, rounds = MODEL | (QUICK if quick else {}), 8 if quick else PROMPTS, 2 if quick else 7
    trainers = {name: make_trainer(name, model, prompts) for name in ("hydra", "frozen_copy")}
    rollout = trainers["hydra"].collect()
    score(rollout, model, rounds, min(8, prompts))
    rows = alternate({f"update with {name}": trainer.step for name, trainer in trainers.items()}, rounds=rounds)
    checks = [Check("seconds of an update with hydra by those with a copy", ratio(*rows), UPDATE_BOUND)]
    report(NAME, f"an update with {EPOCHS} epochs, the top {TRAINED} of {LAYERS} layers trained", rows, checks=checks)


def test_hydra(benchmark) -> None:
    policy = make_policy(LAYERS, TRAINED, MODEL | QUICK)
    benchmark(Hydra, policy)
