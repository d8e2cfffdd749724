"""The cost of `rollout.exact` on a CPU, and the deviation of the sampled log-probs over 200 updates.

Setup of the cost: the model and the batch of the benchmark `ppo_step`, with 256 response tokens and one epoch, with and without
`exact` in alternation in one process. Sampling is the phase `generate`; learning is scoring and training. Setup of the
deviation: a model of 0.2M parameters, 16 prompts of 16 tokens, 24 response tokens, a learning rate of 1e-3.
"""

from __future__ import annotations

from benchmarks.bench_ppo_step import BATCH, MODEL, make_trainer
from benchmarks.harness import Check, Row, report

NAME = "exact"
SAMPLING, LEARNING = "sampling", "learning"
BOUNDS = {SAMPLING: 1.3, LEARNING: 1.5}
"""Upper bounds of the seconds with `exact` divided by those without."""
LONG = BATCH | {"response_tokens": 256, "epochs": 1, "tokens": 4 * 288}
SMALL = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 168,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
SHORT = {
    "prompts": 16,
    "prompt_tokens": 16,
    "response_tokens": 24,
    "epochs": 2,
    "tokens": 200,
    "lr": 1e-3,
    "checked": 16,
}


def measure(compute: str, rounds: int) -> None:
    """Time both phases with and without `exact`; the first update of each trainer is a warm-up."""
    model = MODEL | {"max_position_embeddings": 512}
    trainers = {exact: make_trainer(model, LONG | {"compute": compute, "exact": exact}) for exact in (False, True)}
    rows = {(phase, exact): Row(f"{phase}{', exact' if exact else ''}") for phase in BOUNDS for exact in trainers}
    for number in range(rounds + 1):
        for exact, trainer in trainers.items():
            log = trainer.step()
            if number:
                rows[SAMPLING, exact].seconds.append(log["seconds_collect"])
                rows[LEARNING, exact].seconds.append(log["seconds_score"] + log["seconds_update"])
    checks = [
        Check(f"{phase}: exact / not", rows[phase, True].best / rows[phase, False].best, bound)
        for phase, bound in BOUNDS.items()
    ]
    report(NAME, f"32 x (32+256) tokens, {compute}", list(rows.values()), checks=checks)


def deviation(compute: str, updates: int) -> None:
    """Train for `updates` updates, and report the largest deviation of all of their log-probs."""
    trainer = make_trainer(SMALL, SHORT | {"compute": compute, "exact": True})
    logs = [trainer.step() for _ in range(updates)]
    row = Row("updates", [log["seconds_collect"] + log["seconds_score"] + log["seconds_update"] for log in logs])
    moved = max(log["kl"] for log in logs)
    checks = [
        Check("largest deviation of a log-prob", max(log["logprob_deviation"] for log in logs), 0.0),
        Check("largest KL to the start, in nats", moved, 0.5, at_least=True),
    ]
    report(NAME, f"{updates} updates, {compute}", [row], checks=checks)


def main(*, quick: bool = False) -> None:
    """Measure both compute types."""
    for compute in ("float32", "bfloat16"):
        measure(compute, rounds=1 if quick else 5)
        deviation(compute, updates=3 if quick else 200)


def test_exact_update(benchmark) -> None:
    trainer = make_trainer(SMALL, SHORT | {"exact": True})
    assert benchmark(trainer.step)["logprob_deviation"] == 0.0
