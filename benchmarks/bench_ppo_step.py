"""One PPO update, from prompts to optimizer: our trainer and TRL's PPOTrainer in alternation, each in a separate process.

Setup: a Llama of 7.3M parameters (7,309,568; random weights), 32 prompts of 32 tokens, 64 response tokens each (no response
ends earlier), 4 epochs of one minibatch, weights in float32, AdamW with a learning rate of 3e-6, temperature 0.7, kl_coef
0.05, no gradient clipping. TRL keeps four models: policy, reference, value model and reward model. Ours keeps the value head
on the policy's trunk, a frozen copy as reference and a reward model of the same size. Memory is peak RSS above the RSS after
the imports. The first update of each trainer is a warm-up.

Both trainers use the same 32 sequences in every optimizer step, split in the way that is best for each. TRL's loss is a mean
per micro-batch, so the micro-batch size is part of the case. Our loss does not depend on the split, so a token budget
determines it (`TOKENS`). Only ours runs with bfloat16 compute; TRL stays in float32. On a processor without bfloat16
instructions (avx512_bf16, amx_bf16), bfloat16 products are float32 products of rounded factors. The lower bound (`floor`) is
the time of only the matrix products of an update, in float32 and with our split (`benchmarks/ppo_products.py`). If it is
above the bound of a check, no update on that processor can meet that bound.
"""

from __future__ import annotations

import torch
import torch._dynamo  # TRL's imports load it; ours would at the first custom op, during an update
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.harness import Check, Session, Worker, alternate_workers, ratio, report
from rlhf_engine.config import OptimConfig, PPOConfig, RolloutConfig, RunConfig
from rlhf_engine.model import ActorCritic
from rlhf_engine.model.reward_model import RewardModel
from rlhf_engine.ppo.build import build_trainer
from rlhf_engine.ppo.trainer import PPOTrainer
from rlhf_engine.rollout import Generator, Rollout

NAME = "ppo_step"
MODEL = {
    "vocab_size": 8192,
    "hidden_size": 256,
    "intermediate_size": 672,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
}
BATCH = {"prompts": 32, "prompt_tokens": 32, "response_tokens": 64, "epochs": 4}
TOKENS = {32: 760, 8: 380}
"""TRL's sequences per pass -> our tokens per pass: 8 and 4 sequences of 95 inputs."""
OURS, TRL = "benchmarks.bench_ppo_step:worker", "benchmarks.peers.trl_ppo:run"
FLOOR = "floor: only its products, float32"
BOUNDS = {"float32": 0.5, "bfloat16": 0.3}
"""Compute type -> upper bound of our seconds divided by TRL's."""
MEMORY_BOUND = 0.35


def make_trainer(model: dict, batch: dict) -> PPOTrainer:
    """Return our trainer with the settings of TRL's."""
    torch.manual_seed(0)
    vocab_size, prompts = model["vocab_size"], batch["prompts"]
    language_model = LlamaForCausalLM(LlamaConfig(**model))
    compute = {"compute_dtype": getattr(torch, batch.get("compute", "float32"))}
    reward_model = RewardModel.from_causal_lm(language_model, seed=1).computing(**compute)
    policy = ActorCritic(language_model, **compute)
    rollout = RolloutConfig(
        max_prompt_tokens=batch["prompt_tokens"],
        max_response_tokens=batch["response_tokens"],
        temperature=0.7,
        batch_size=prompts,
        exact=batch.get("exact", False),
        check_sequences=batch.get("checked", 4),
    )
    ppo = PPOConfig(
        updates=10_000,
        rollout_batch=prompts,
        minibatch=prompts,
        microbatch_tokens=batch["tokens"],
        ppo_epochs=batch["epochs"],
        kl_coef=0.05,
        optim=OptimConfig(lr=batch.get("lr", 3e-6), betas=(0.9, 0.999), max_grad_norm=None),
    )

    @torch.no_grad()
    def reward(rollout: Rollout) -> torch.Tensor:
        # All prompts have the same length.
        ids = torch.cat([rollout.prompt_ids, rollout.response_ids], 1)
        return reward_model.score_rows(ids, rollout.prompt_lengths + rollout.response_lengths)

    return build_trainer(
        policy,
        None,
        reward,
        lambda first, count: list(torch.randint(0, vocab_size, (count, batch["prompt_tokens"]))),
        RunConfig(ppo=ppo, rollout=rollout),
        # An end token outside the vocabulary is never sampled.
        generator=Generator(policy, rollout, eos_token_ids=vocab_size, pad_token_id=0, seed=0),
    )


def worker(session: Session, *, model: dict, batch: dict) -> None:
    """Run our trainer: one update per step of the session."""
    session.baseline()
    trainer = make_trainer(model, batch)
    session.ready()
    while session.begin():
        log = trainer.step()
        # Each phase resets the high-water mark that the session reads.
        session.end(peak_bytes=1e6 * max(log[f"peak_{phase}_mb"] for phase in ("generate", "score", "train")))


def measure(micro_batch: int, batch: dict, rounds: int) -> None:
    """Compare TRL with `micro_batch` sequences per forward and backward pass with ours in both compute types."""
    batch = batch | {"micro_batch": micro_batch, "tokens": TOKENS[micro_batch]}
    cases = [(f"ours, {compute}", OURS, {"compute": compute}) for compute in BOUNDS]
    slow = "" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "this processor has no bfloat16 instructions"
    workers = [
        Worker(
            name,
            target,
            {"model": MODEL, "batch": batch | more},
            start_limit=120,
            step_limit=300,
            note=slow if "bfloat16" in name else "",
        )
        for name, target, more in [(FLOOR, "benchmarks.ppo_products:worker", {}), *cases, ("TRL PPOTrainer", TRL, {})]
    ]
    floor, *ours, trl = alternate_workers(workers, rounds=rounds, slow=60)
    title = (
        "PPO update, {prompts} x ({prompt_tokens}+{response_tokens}) tokens, {epochs} epochs, micro-batches of {micro_batch} "
        "sequences (TRL) and {tokens} tokens (ours)"
    )
    checks = []
    for row, (compute, bound) in zip(ours, BOUNDS.items(), strict=True):
        memory = None if row.error or trl.error else row.extra_mb / trl.extra_mb
        checks += [
            Check(f"seconds, ours in {compute} / TRL", ratio(row, trl), bound),
            Check(f"extra MB, ours in {compute} / TRL", memory, MEMORY_BOUND),
        ]
    report(NAME, title.format(**batch), [floor, *ours, trl], floor=floor, checks=checks)


def main(*, quick: bool = False) -> None:
    """Compare with TRL with the whole batch in one pass, then in passes of 8 sequences, which reduces TRL's memory."""
    if quick:
        measure(32, BATCH | {"response_tokens": 16}, rounds=1)
        return
    measure(32, BATCH, rounds=5)
    measure(8, BATCH, rounds=3)


def test_ppo_step(benchmark) -> None:
    tiny = {"prompts": 4, "prompt_tokens": 8, "response_tokens": 8, "epochs": 1, "tokens": 60}
    benchmark(make_trainer(MODEL | {"vocab_size": 512, "hidden_size": 64}, tiny).step)
