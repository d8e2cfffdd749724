"""The planner's estimate of an update's time against measured updates on a CPU.

Setup: the model and the batch of the benchmark `adapters`, with one epoch. Every case changes some settings, as the planner
does, and is measured in alternation with the others. The estimate and the measurement of a case are divided by those of the
first case. The constants of `planner/work.py` are measured with single products, not with these cases.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers import LlamaConfig

from benchmarks.bench_adapters import MODEL, SMALL, make_config, make_trainer
from benchmarks.harness import Check, Row, Session, Worker, alternate_workers, report
from rlhf_engine.config import MemoryConfig, ModelConfig, RunConfig
from rlhf_engine.model.adapters import import_peft
from rlhf_engine.planner import ModelShape, Workload
from rlhf_engine.planner.work import update_time

NAME = "step_time"
CASES: dict[str, dict[str, Any]] = {
    "full fine-tuning": {},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "8-bit optimizer state": {"optimizer_state": "8bit"},
    "top 3 layers": {"train_layers": 3},
    "rank 16": {"rank": 16},
    "rank 16, gradient checkpointing": {"rank": 16, "gradient_checkpointing": True},
    "rank 16, int8": {"rank": 16, "quant": "int8"},
    "rank 16, nf4": {"rank": 16, "quant": "nf4"},
}
BOUND = 1.25
"""Upper bound of an estimate divided by its measurement, or the reverse."""
CLEAR = 1.1
"""Ratio of two measurements from which on the estimate has to order them in the same way."""


def config_of(case: dict[str, Any]) -> RunConfig:
    memory = {name: case[name] for name in ("gradient_checkpointing", "optimizer_state") if name in case}
    model = {name: case[name] for name in ("train_layers", "quant") if name in case}
    config = make_config(case.get("rank", 0), "never", ppo_epochs=1)
    return replace(config, memory=MemoryConfig(**memory), model=ModelConfig(**model))


def worker(session: Session, *, model: dict, case: dict[str, Any]) -> None:
    """Run one case: one update per step of the session."""
    import_peft()
    session.baseline()
    trainer = make_trainer(model, config_of(case))
    session.ready()
    while session.begin():
        trainer.step()
        session.end()


def estimate(model: dict, case: dict[str, Any]) -> float:
    """Return the planner's estimate of an update."""
    shape = ModelShape.from_config(LlamaConfig(**model))
    return update_time(Workload.of(config_of(case), shape, shape, reward_adapter=bool(case.get("rank"))))


def main(*, quick: bool = False) -> None:
    """Time all cases in alternation and compare the ratios."""
    model = SMALL | {"num_hidden_layers": 4} if quick else MODEL
    workers = [
        Worker(
            name, "benchmarks.bench_step_time:worker", {"model": model, "case": case}, start_limit=300, step_limit=300
        )
        for name, case in CASES.items()
    ]
    rows = alternate_workers(workers, rounds=1 if quick else 3, slow=60)
    expected = [estimate(model, case) / estimate(model, {}) for case in CASES.values()]
    rows = [replace(row, note=f"estimated x{value:.2f}") for row, value in zip(rows, expected, strict=True)]
    report(NAME, "PPO updates against the planner's estimate", rows, checks=_checks(rows, expected))


def _checks(rows: list[Row], expected: list[float]) -> list[Check]:
    if any(row.error for row in rows):
        return [Check("cases that failed", float(sum(bool(row.error) for row in rows)), 0)]
    measured = [row.median / rows[0].median for row in rows]
    checks = [
        Check(f"{row.name}: estimate / measured or the reverse", max(one / other, other / one), BOUND)
        for row, one, other in zip(rows[1:], expected[1:], measured[1:], strict=True)
    ]
    pairs = [(i, j) for i in range(len(rows)) for j in range(len(rows)) if measured[i] > CLEAR * measured[j]]
    wrong = sum(expected[i] <= expected[j] for i, j in pairs)
    return [*checks, Check(f"pairs in the wrong order, of {len(pairs)} that differ by a tenth", float(wrong), 0)]


def test_estimates_are_positive(benchmark) -> None:
    assert min(benchmark(lambda: [estimate(MODEL, case) for case in CASES.values()])) > 0
