"""PPO updates of a TRL script: TRL's PPOTrainer, and `rlhf_engine.compat.trl` with the same arguments.

Setup: a Llama of 20M parameters (random weights, a vocabulary of 32,768), 8 prompts of 32 tokens, responses of 64 tokens, 4
epochs, micro-batches of 4, float32, fused AdamW. In a second shape, 64 sequences are one micro-batch, as in the command line of
TRL's example script, with one epoch. Both trainers run in alternation, each in a separate process; memory is peak
RSS above the RSS after the imports, and the first update is a warm-up. Then both train a small model for 20 updates, from the
same weights and prompts, and the mean scores of their responses are compared. Requires trl 1.12.
"""

from __future__ import annotations

import statistics

from benchmarks.bench_integrations import MODEL
from benchmarks.harness import Check, Row, Worker, alternate_workers, ratio, report
from benchmarks.peers.trl_ppo import scores

NAME = "trl_front"
BATCH = {"prompts": 8, "prompt_tokens": 32, "response_tokens": 64, "epochs": 4, "micro_batch": 4}
EXAMPLE = BATCH | {"prompts": 64, "epochs": 1, "micro_batch": 64}
"""`per_device_train_batch_size` 64 without accumulation, from TRL's examples/scripts/ppo/ppo.py."""
SMALL = MODEL | {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
LEARNING = {"prompts": 32, "prompt_tokens": 4, "response_tokens": 8, "epochs": 4, "micro_batch": 32}
UPDATES = 20
OURS, THEIRS = "rlhf_engine.compat.trl", "TRL PPOTrainer"


def main(*, quick: bool = False) -> None:
    small = {"response_tokens": 16, "epochs": 1} if quick else {}
    updates(BATCH | small, rounds=1 if quick else 5)
    if not quick:
        updates(EXAMPLE, rounds=2)
    curves(updates=4 if quick else UPDATES)


def updates(batch: dict, *, rounds: int) -> None:
    """Compare the time and the memory of updates."""
    target, shape = "benchmarks.peers.trl_ppo:run", {"model": MODEL, "batch": batch}
    workers = [
        Worker(name, target, shape | {"front": name == OURS}, start_limit=300, step_limit=300)
        for name in (OURS, THEIRS)
    ]
    ours, theirs = alternate_workers(workers, rounds=rounds, slow=60)
    memory = None if ours.error or theirs.error else ours.extra_mb / theirs.extra_mb
    checks = [Check("seconds, ours / theirs", ratio(ours, theirs), 0.5), Check("extra MB, ours / theirs", memory, 0.5)]
    title = "PPO update of {prompts} x ({prompt_tokens}+{response_tokens}) tokens, epochs: {epochs}, micro-batch: {micro_batch}"
    report(NAME, title.format(**batch), [ours, theirs], checks=checks)


def curves(*, updates: int) -> None:
    """Compare the rise of the scores, the mean of the last quarter minus that of the first, over three seeds."""
    part, found = max(1, updates // 4), {OURS: [], THEIRS: []}
    for seed in range(3):
        for name, rises in found.items():
            curve = scores(model=SMALL, batch=LEARNING, updates=updates, front=name == OURS, seed=seed)
            rises.append(statistics.mean(curve[-part:]) - statistics.mean(curve[:part]))
            print(f"{name}, seed {seed}: " + " ".join(f"{score:.3f}" for score in curve))
    rise = {name: statistics.mean(rises) for name, rises in found.items()}
    rows = [Row(name, note=f"rises by {rise[name]:.3f} in {updates} updates") for name in found]
    for row in rows:
        row.error = row.note  # no time is measured
    checks = [
        Check("rise of the score, TRL", rise[THEIRS], 0.0, at_least=True),
        Check("rise of the score, ours / TRL's", rise[OURS] / rise[THEIRS], 0.75, at_least=True),
    ]
    report(NAME, f"mean score over {updates} updates, three seeds", rows, checks=checks)
