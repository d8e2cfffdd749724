"""The suites `rollout`, `step` and `memory`: sampling and PPO updates of a whole model with random weights.

A model that needs more memory than the device has free, by its plan, is skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import torch
from transformers import GenerationConfig

from rlhf_engine.bench.process import Session, Worker
from rlhf_engine.bench.room import available_bytes, peak_of
from rlhf_engine.bench.run import Batch, GateError, Run
from rlhf_engine.bench.samples import spread
from rlhf_engine.bench.shapes import fields_of
from rlhf_engine.bench.trainer import PHASES, Fields, make_model, make_plan, make_trainer, make_workload
from rlhf_engine.config import RunConfig
from rlhf_engine.memory.arena import resident_mb
from rlhf_engine.memory.malloc import return_freed_blocks
from rlhf_engine.model import ActorCritic
from rlhf_engine.planner.report import size
from rlhf_engine.planner.work import model_flops
from rlhf_engine.rollout import Generator, logprob_deviation

Records = list[dict[str, Any]]
DEVIATION = {torch.float32: 1e-3, torch.bfloat16: 0.2}
"""Bound of the difference between a sampled log-prob and that of a forward pass with the same weights, in nats."""
STRATEGIES: dict[str, dict[str, Any]] = {
    "full fine-tuning": {},
    "gradient checkpointing": {"memory": {"gradient_checkpointing": True}},
    "adapters of rank 16": {"adapter": {"rank": 16}},
}
"""Settings of the suite `memory`."""
WORKER = "rlhf_engine.bench.updates:memory_worker"


def settings_of(device: str, dtype: str, batch: Batch, **sections: Any) -> dict[str, Any]:
    """Return the config of a PPO run with one minibatch per rollout."""
    lengths = {"max_prompt_tokens": batch.prompt, "max_response_tokens": batch.response}
    ppo = {
        "updates": 10_000,
        "rollout_batch": batch.prompts,
        "minibatch": batch.prompts,
        "microbatch": min(batch.microbatch, batch.prompts),
        "ppo_epochs": batch.epochs,
    }
    rollout = lengths | {"batch_size": batch.prompts}
    return {"device": device, "dtype": dtype, "rollout": rollout, "ppo": ppo} | sections


def _start(run: Run, **sections: Any) -> tuple[Fields, dict[str, Any], str]:
    """Return the fields of the model, the settings of its run and the description of both."""
    settings, batch = run.settings, run.settings.batch
    dtype = str(settings.dtype).removeprefix("torch.")
    words = f"{settings.trained}, {batch.prompts} x ({batch.prompt} + {batch.response}) tokens"
    return fields_of(settings.trained), settings_of(settings.device.type, dtype, batch, **sections), words


def _too_large(run: Run, fields: Fields, settings: dict[str, Any]) -> str:
    """Return why a run does not fit; empty if it does."""
    peak, free = make_plan(fields, settings).peak, available_bytes(run.settings.device)
    return f"needs {size(peak)} of memory by its plan, {size(free)} are free" if peak > free else ""


def _gate(run: Run, name: str, deviation: float) -> dict[str, Any]:
    bound = DEVIATION[run.settings.dtype]
    if not deviation <= bound:
        raise GateError(
            f"{name}: a sampled log-prob differs by {deviation:.3e} nats from a forward pass, expected at most {bound:g}"
        )
    return {"error": deviation, "bound": bound, "passed": True}


# ---- rollout ----


def rollout(run: Run) -> Iterator[Records]:
    """Time sampling with log-probs and values, and transformers' `generate` with the same model, in alternation."""
    fields, settings, words = _start(run)
    record: dict[str, Any] = {"name": "sampling", "shape": words, "backend": "engine"}
    if why := _too_large(run, fields, settings):
        yield [record | {"skipped": why}]
        return
    config, batch, device = RunConfig.from_dict(settings), run.settings.batch, run.settings.device
    model = make_model(fields, config)
    policy, vocab = ActorCritic(model), model.config.vocab_size
    generator = Generator(policy, config.rollout, eos_token_ids=vocab, pad_token_id=0, seed=0)
    prompts = torch.randint(0, vocab, (batch.prompts, batch.prompt), generator=torch.Generator().manual_seed(0))
    numbers = torch.arange(batch.prompts)
    theirs = GenerationConfig(
        max_new_tokens=batch.response, do_sample=True, top_k=0, eos_token_id=vocab, pad_token_id=vocab - 1
    )

    def ours() -> Any:
        return generator.generate(list(prompts), numbers)

    @torch.no_grad()
    def transformers() -> object:
        ids = prompts.to(device)
        return model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=theirs)  # pyright: ignore

    deviation = logprob_deviation(policy, ours(), sequences=4, microbatch=4, temperature=1.0)
    record["gate"] = _gate(run, "sampling", deviation)
    record |= decode_work(fields, config, batch)
    record["peak_bytes"] = peak_of(ours, device)
    calls: dict[str, Callable[[], object]] = {"samples": ours, "eager_samples": transformers}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    limits = run.limits()
    transformers()
    for _ in range(run.settings.effort.updates):
        for name, call in calls.items():
            run.add_limits(limits)
            samples[name].append(run.timer.many(call, 1))
        best = min(samples["samples"])
        record |= {"samples": list(samples["samples"]), "seconds": spread(samples["samples"])._asdict()}
        record["eager_seconds"] = spread(samples["eager_samples"])._asdict()
        record["tokens_per_second"] = batch.prompts * batch.response / best
        yield [record]


def decode_work(fields: Fields, config: RunConfig, batch: Batch) -> dict[str, int]:
    """Return the bytes that the decode steps read (weights, keys and values once per step) and the FLOPs of all products."""
    w = make_workload(fields, config)
    head, layers = w.policy.vocab * w.policy.hidden, w.policy.layer_matrices
    cached = batch.prompts * sum(batch.prompt + step for step in range(batch.response))
    numbers = batch.response * (layers + head) + cached * w.policy.kv_numbers
    flops = 2 * batch.prompts * ((batch.prompt + batch.response) * layers + batch.response * head)
    return {"bytes": numbers * w.weight_bytes, "flops": flops}


# ---- step ----


def step(run: Run) -> Iterator[Records]:
    """Measure PPO updates: seconds and peak of each phase, tokens per second and model FLOPs utilisation."""
    fields, settings, words = _start(run)
    batch = run.settings.batch
    record: dict[str, Any] = {"name": "PPO update", "shape": f"{words}, {batch.epochs} epochs"}
    if why := _too_large(run, fields, settings):
        yield [record | {"skipped": why}]
        return
    for found in measured_updates(run, fields, settings, run.settings.effort.updates):
        yield [record | found]


def measured_updates(run: Run, fields: Fields, settings: dict[str, Any], count: int) -> Iterator[dict[str, Any]]:
    """Yield what is known after each of `count` updates; one more before them warms up."""
    cpu = run.settings.device.type == "cpu"
    plan, limits = make_plan(fields, settings), run.limits()
    run.add_limits(limits)  # touches the blocks, which stay resident
    before = resident_mb() * 1e6 if cpu else 0.0
    flops, tokens = model_flops(plan.workload), plan.workload.rollout_batch * plan.workload.response
    kept = plan.kept - (0 if cpu else plan.persistent["context"])
    trainer = make_trainer(fields, settings)
    logs: list[dict[str, float]] = []
    trainer.step()
    for _ in range(count):
        run.add_limits(limits)
        logs.append(trainer.step())
        seconds = [sum(log[f"seconds_{phase}"] for phase in PHASES) for log in logs]
        phases = {
            name: {
                "seconds": spread([log[f"seconds_{phase}"] for log in logs])._asdict(),
                "peak_bytes": round(max(log[f"peak_{name}_mb"] for log in logs) * 1e6 - before),
                "planned_bytes": kept + plan.phases[name].total,
            }
            for phase, name in PHASES.items()
        }
        found = run.record["limits"]
        rate = found["product_flops"] / min(found["product"])
        best = min(seconds)
        yield {
            "samples": seconds,
            "seconds": spread(seconds)._asdict(),
            "phases": phases,
            "gate": _gate(run, "PPO update", max(log["logprob_deviation"] for log in logs)),
            "model_flops": flops,
            "tokens_per_second": tokens / best,
            "mfu": flops / best / rate,
            "peak_bytes": max(phase["peak_bytes"] for phase in phases.values()),
            "planned_bytes": max(phase["planned_bytes"] for phase in phases.values()),
        }


# ---- memory ----


def memory(run: Run) -> Iterator[Records]:
    """Measure the peak of an update for each of `STRATEGIES` in a separate process, next to its plan."""
    records: Records = []
    for name, sections in STRATEGIES.items():
        fields, settings, words = _start(run, **sections)
        record: dict[str, Any] = {"name": name, "shape": words}
        records.append(record)
        if "adapter" in sections and find_spec("peft") is None:
            record["skipped"] = "the package peft is not installed; pip install 'rlhf-kernels[adapters]'"
        elif why := _too_large(run, fields, settings):
            record["skipped"] = why
        else:
            record |= _peak(name, fields, settings)
        yield records


def _peak(name: str, fields: Fields, settings: dict[str, Any]) -> dict[str, Any]:
    plan = make_plan(fields, settings)
    case = {"fields": fields, "settings": settings}
    worker = Worker(name, WORKER, case, start_limit=600, step_limit=600)
    worker.step()
    row = worker.close()
    if row.error:
        return {"skipped": f"it failed: {row.error}"}
    measured = row.extra_mb if row.device_mb is None else row.device_mb
    context = 0 if plan.workload.device == "cpu" else plan.persistent["context"]
    return {
        "peak_bytes": round((measured or 0.0) * 1e6),
        "planned_bytes": plan.peak - context,
        "largest_phase": plan.largest,
        "seconds": spread(row.seconds)._asdict(),
    }


def memory_worker(session: Session, *, fields: Fields, settings: dict[str, Any]) -> None:
    """Run one case of the suite `memory`: two updates per step of the session."""
    return_freed_blocks()  # as `rlhf ppo` does on the CPU if `memory.budget` is set
    if RunConfig.from_dict(settings).adapter.rank:
        from rlhf_engine.model.adapters import import_peft

        import_peft()
    session.baseline()
    trainer = make_trainer(fields, settings)
    session.ready()
    while session.begin():
        logs = [trainer.step() for _ in range(2)]
        # Each phase resets the high-water mark that the session reads.
        session.end(peak_bytes=1e6 * max(log[f"peak_{name}_mb"] for log in logs for name in PHASES.values()))
