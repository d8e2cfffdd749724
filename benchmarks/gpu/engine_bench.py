"""PPO updates of Qwen2-shaped models with random weights: phases, planned memory, TRL's trainer, and the bound of decoding.

Setup: 64 prompts of 1024 tokens, 1024 response tokens each (no response ends earlier), 4 epochs of one minibatch, bfloat16
weights with float32 masters. TRL's trainer keeps only bfloat16 weights and moments, and four models; ours keeps three models
and a value head.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch

from benchmarks.gpu.bench import Bench, ratio
from benchmarks.gpu.entries import Entry
from benchmarks.harness import Worker
from rlhf_engine.bench.trainer import PHASES, make_plan, make_trainer
from rlhf_engine.planner.presets import PRESETS
from rlhf_engine.ppo.trainer import PPOTrainer
from rlhf_engine.recipes.planning import RunPlan

BATCH = {"prompts": 64, "prompt_tokens": 1024, "response_tokens": 1024, "epochs": 4, "micro_batch": 4}
TINY = {"prompts": 4, "prompt_tokens": 8, "response_tokens": 6, "epochs": 1, "micro_batch": 2}
TINY_MODEL = {
    "model_type": "qwen2", "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": True,
}  # fmt: skip
TRL = "benchmarks.peers.trl_ppo:run"
SAMPLES = "samples a second"


def settings(bench: Bench, batch: dict, **ppo: object) -> dict:
    """Return the config of a run, as for `rlhf ppo`."""
    lengths = {"max_prompt_tokens": batch["prompt_tokens"], "max_response_tokens": batch["response_tokens"]}
    length = batch["prompt_tokens"] + batch["response_tokens"]
    return {
        "device": bench.device.type,
        "dtype": "bfloat16",
        "rollout": lengths | {"batch_size": batch["prompts"], "prefill_tokens": 16384, "temperature": 0.7},
        "ppo": {
            "updates": 1000,
            "rollout_batch": batch["prompts"],
            "minibatch": batch["prompts"],
            "microbatch_tokens": batch["micro_batch"] * length,
            "ppo_epochs": batch["epochs"],
        }
        | ppo,
    }


def updates(bench: Bench, fields: dict, batch: dict) -> Iterator[Entry]:
    """Measure the second update of a run: seconds per phase, and memory peaks against the plan. Then measure decoding."""
    run = settings(bench, batch)
    trainer = make_trainer(fields, run)
    planned = RunPlan(make_plan(fields, run)).metrics()
    _, log = (trainer.step() for _ in range(2))  # the first one warms up
    seconds = {phase: log[f"seconds_{phase}"] for phase in PHASES}
    for phase, took in seconds.items():
        yield Entry(f"seconds of {phase}", None if bench.dry_run else took, "s")
    whole = None if bench.dry_run else sum(seconds.values())
    tokens = batch["prompts"] * batch["response_tokens"]
    yield Entry("response tokens a second", ratio(tokens, whole), "1/s")
    for phase in PHASES.values():
        peak, plan = log[f"peak_{phase}_mb"], planned[f"planned_{phase}_mb"]
        note = f"measured {peak:.0f} MB, planned {plan:.0f} MB"
        bound = 0.05 if plan == max(planned[f"planned_{name}_mb"] for name in PHASES.values()) else None
        value = None if bench.dry_run else abs(plan / peak - 1)
        yield Entry(f"planned by measured peak of {phase}, from 1", value, bound=bound, note=note * (not bench.dry_run))
    if not bench.dry_run:
        yield Entry("largest log-prob deviation, sampled from fresh", log["logprob_deviation"])
        yield Entry("left in the pool by a phase", log.get("pool_held_mb"), "MB")
    yield Entry(SAMPLES, ratio(batch["prompts"], whole), "1/s")
    yield from decode(bench, trainer, batch)


def decode(bench: Bench, trainer: PPOTrainer, batch: dict) -> Iterator[Entry]:
    """Measure sampling without prefill against reading the weights and all keys and values once per token."""
    generator, policy, rows = trainer.generator, trainer.policy, batch["prompts"]
    prompts, sequence = trainer.prompts(0, rows), torch.arange(rows)

    def sample(tokens: int) -> float:
        start = time.perf_counter()
        kept = generator.config
        generator.config = replace(kept, max_response_tokens=tokens)
        try:
            generator.generate(prompts, sequence)
        finally:
            generator.config = kept
        return time.perf_counter() - start

    prefill = sample(1)
    sample(batch["response_tokens"])  # captures the decode step's graph for this length
    took = sample(batch["response_tokens"]) - prefill
    steps = batch["response_tokens"] - 1
    weights = sum(p.numel() * p.element_size() for p in policy.model.parameters())
    config = policy.model.config
    size = config.hidden_size // config.num_attention_heads
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * size * 2
    read = steps * weights + rows * token * sum(batch["prompt_tokens"] + step for step in range(1, steps + 1))
    if bench.dry_run:
        yield Entry("decode, of its bandwidth bound")
        return
    yield Entry("milliseconds of a decode step", took / steps * 1e3, "ms", note=f"{rows} rows")
    note = f"{read / steps / 1e9:.2f} GB a step: the weights, and keys and values"
    yield Entry(
        "decode, of its bandwidth bound", ratio(bench.copy_seconds(read), took), bound=0.6, at_least=True, note=note
    )


def named(name: str, entries: Iterator[Entry]) -> Iterator[Entry]:
    """Yield the entries with the model's name as prefix."""
    for entry in entries:
        yield replace(entry, name=f"{name}: {entry.name}")


def own(name: str, bench: Bench) -> Iterator[Entry]:
    """Measure only our trainer."""
    fields, batch = bench.size(PRESETS.get(name, TINY_MODEL), TINY_MODEL), bench.size(BATCH, TINY)
    yield from named(name, updates(bench, fields, batch))


def beside_trl(name: str, bench: Bench) -> Iterator[Entry]:
    """Measure our trainer, then TRL's in a separate process."""
    fields, batch = bench.size(PRESETS.get(name, TINY_MODEL), TINY_MODEL), bench.size(BATCH, TINY)
    ours = None
    for entry in named(name, updates(bench, fields, batch)):
        ours = entry.value if entry.name.endswith(SAMPLES) else ours
        yield entry
    gc.collect()
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()
    more = {"device": bench.device.type, "dtype": "bfloat16", "rollout_rows": batch["prompts"] // 2}
    kwargs = {"model": fields, "batch": batch | more}
    worker = Worker(f"{name}: TRL's PPOTrainer", TRL, kwargs, start_limit=120, step_limit=280)
    worker.step()
    row = worker.close()
    if row.error:
        yield Entry(row.name, error=row.error)
        return
    seconds = None if bench.dry_run else row.best
    yield Entry(f"{name}: seconds of an update, TRL", seconds, "s", note=f"peak {row.device_mb or 0:.0f} MB")
    share = None if seconds is None or not ours else ours * seconds / batch["prompts"]
    yield Entry(f"{name}: samples a second, ours / TRL", share, bound=5, at_least=True)


def phase_changes(bench: Bench) -> Iterator[Entry]:
    """Run twenty updates and check that allocated and reserved memory do not grow after the third."""
    fields = bench.size(PRESETS["qwen2.5-0.5b"], TINY_MODEL)
    batch = TINY | bench.size({"prompts": 16, "prompt_tokens": 256, "response_tokens": 24}, {})
    trainer, seen = make_trainer(fields, settings(bench, batch)), []
    for _ in range(bench.size(20, 4)):
        trainer.step()
        if bench.device.type == "cuda":
            gc.collect()
            seen.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    if bench.dry_run:
        yield Entry("20 updates without growth")
        return
    note = f"allocated and reserved MB after updates 3 and 20: {[round(x / 1e6) for x in (*seen[2], *seen[-1])]}"
    yield Entry("20 updates without growth", passed=seen[-1][0] <= seen[2][0] and seen[-1][1] <= seen[2][1], note=note)


PARTS = {
    "Qwen2.5 1.5B": partial(beside_trl, "qwen2.5-1.5b"),
    "phase changes": phase_changes,
    "Qwen2.5 0.5B": partial(own, "qwen2.5-0.5b"),
}
