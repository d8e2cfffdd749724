"""PPO updates of a 48M-parameter model with adapters of rank 16 and with full fine-tuning, in alternation.

Setup: a Llama of 47 million parameters (random weights), 32 prompts of 32 tokens, 64 response tokens each (no response ends
earlier), 4 epochs of one minibatch as in `ppo_step`, in passes of 4 sequences, float32. Full fine-tuning has a frozen copy as
reference and a separate reward model; with adapters the reference is the policy without its adapter, and the reward model is
an adapter and a head. Values are a head on the policy's trunk. Memory is the peak resident set above that after the imports,
in a process that returns freed blocks at once, as with `memory.budget`.

The last case has four roles with adapters, values by a separate one, and counts the bytes of all tensors that persist.
"""

from __future__ import annotations

from dataclasses import replace
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch._dynamo  # the first call of a custom op would import it during an update
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.harness import MB, Check, Session, Worker, alternate_workers, ratio, report
from rlhf_engine.config import AdapterConfig, PPOConfig, RolloutConfig, RunConfig
from rlhf_engine.memory.malloc import return_freed_blocks
from rlhf_engine.model.adapters import Adapters, import_peft
from rlhf_engine.model.heads import ValueHead
from rlhf_engine.model.pretrained import load_pretrained
from rlhf_engine.model.reward_model import RewardModel
from rlhf_engine.model.roles import REWARD
from rlhf_engine.model.top_layers import train_top
from rlhf_engine.ppo.build import build_trainer
from rlhf_engine.ppo.trainer import PPOTrainer
from rlhf_engine.recipes.ppo import make_policy
from rlhf_engine.rollout import Generator, Rollout

NAME = "adapters"
MODEL = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 128,
}
SMALL = MODEL | {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2}
CASES = {
    "full fine-tuning": {"rank": 0, "merge": "never"},
    "rank 16, separate products in sampling": {"rank": 16, "merge": "never"},
    "rank 16, merged weights in sampling": {"rank": 16, "merge": "always"},
}
"""Name -> rank of the adapters, and `rollout.merge_adapters`."""
SEQUENCES, PROMPT, RESPONSE, EPOCHS, PASS = 32, 32, 64, 4, 4


def make_config(rank: int, merge: str, **ppo: Any) -> RunConfig:
    rollout = RolloutConfig(
        max_prompt_tokens=PROMPT, max_response_tokens=RESPONSE, batch_size=SEQUENCES, merge_adapters=merge
    )
    sizes = {"rollout_batch": SEQUENCES, "minibatch": SEQUENCES, "microbatch": PASS, "ppo_epochs": EPOCHS}
    return replace(
        RunConfig(),
        adapter=AdapterConfig(rank=rank),
        rollout=rollout,
        ppo=PPOConfig(**{"updates": 10_000} | sizes | ppo),
    )


def make_model(sizes: dict, config: RunConfig) -> PreTrainedModel:
    """Return a language model with random weights, quantised by `config.model.quant`."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    if config.model.quant == "none":
        return model
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_pretrained(AutoModelForCausalLM, folder, quant=config.model.quant, dtype=torch.float32)


def make_reward_model(model: PreTrainedModel, rank: int) -> RewardModel:
    """Return a reward model with its own weights, or with `rank` an adapter and a head on the weights of `model`."""
    if not rank:
        return RewardModel.from_causal_lm(model, seed=1)
    adapters = Adapters.start(model, AdapterConfig(rank=rank), seed=0)
    adapters.add(REWARD, 1, trained=False)
    head = ValueHead.from_weights(torch.randn(model.config.hidden_size), 0.0).requires_grad_(False)
    return RewardModel.sharing(adapters, REWARD, head)


def make_trainer(model: dict, config: RunConfig) -> PPOTrainer:
    """Return the trainer of a case, with random weights and prompts."""
    language_model = make_model(model, config)
    reward_model = make_reward_model(language_model, config.adapter.rank)
    if config.model.train_layers is not None:
        train_top(language_model, config.model.train_layers)
    policy = make_policy(config, language_model, reward_model)
    vocab = model["vocab_size"]

    @torch.no_grad()
    def reward(rollout: Rollout) -> torch.Tensor:
        # All prompts have the same length.
        ids = torch.cat([rollout.prompt_ids, rollout.response_ids], 1)
        return reward_model.score_rows(ids, rollout.prompt_lengths + rollout.response_lengths)

    return build_trainer(
        policy,
        None,
        reward,
        lambda first, count: list(torch.randint(0, vocab, (count, PROMPT))),
        config,
        # An end token outside the vocabulary is never sampled.
        generator=Generator(policy, config.rollout, eos_token_ids=vocab, pad_token_id=0, seed=0),
    )


def worker(session: Session, *, model: dict, rank: int, merge: str) -> None:
    """Run one case: one update per step of the session."""
    import_peft()  # its modules are part of the baseline
    return_freed_blocks()
    session.baseline()
    trainer = make_trainer(model, make_config(rank, merge))
    session.ready()
    while session.begin():
        log = trainer.step()
        # Each phase resets the high-water mark that the session reads.
        session.end(peak_bytes=1e6 * max(log[f"peak_{phase}_mb"] for phase in ("generate", "score", "train")))


def persistent_bytes(model: dict) -> tuple[int, int]:
    """Return the bytes that persist with four roles after an update, and those of one set of weights and what is trained."""
    trainer = make_trainer(model, make_config(16, "never", value_model="backbone"))
    trainer.step()
    optimizer = trainer.update_rule.optimizer
    trained = [p for p in trainer.policy.parameters() if p.requires_grad]
    state = [t for p in trained for t in optimizer.tensors_of(p).values()]
    reward_model = [p for name in (REWARD,) for p in trainer.policy.adapters.tensors(name).values()]
    tensors = [*trainer.policy.parameters(), *(t for _, t in trainer.reference.weights()), *reward_model, *state]
    everything = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    weights = sum(p.numel() * p.element_size() for p in LlamaForCausalLM(LlamaConfig(**model)).parameters())
    own = sum(t.numel() * t.element_size() for t in (*trained, *state))
    return sum(everything.values()), weights + own


def main(*, quick: bool = False) -> None:
    """Time and measure all cases, in alternation."""
    model = SMALL if quick else MODEL
    workers = [
        Worker(name, "benchmarks.bench_adapters:worker", {"model": model, **case}, start_limit=300, step_limit=300)
        for name, case in CASES.items()
    ]
    full, separate, merged = alternate_workers(workers, rounds=1 if quick else 3, slow=60)
    checks = []
    for row in (separate, merged):
        memory = None if row.error or full.error else row.extra_mb / full.extra_mb
        checks.append(Check(f"seconds, {row.name} / full", ratio(row, full), 0.85))
        checks.append(Check(f"extra MB, {row.name} / full", memory, 0.40))
    found, least = persistent_bytes(model)
    checks.append(
        Check("persistent bytes of four roles / one set of weights, adapters and their state", found / least, 1.1)
    )
    title = (
        f"PPO updates, {SEQUENCES} x ({PROMPT}+{RESPONSE}) tokens, {EPOCHS} epochs in passes of {PASS} sequences; "
        f"four roles persist in {found / MB:.0f} MB"
    )
    report(NAME, title, [full, separate, merged], checks=checks)


def test_adapters(benchmark) -> None:
    trainer = make_trainer(SMALL, make_config(16, "always"))
    benchmark(trainer.step)
