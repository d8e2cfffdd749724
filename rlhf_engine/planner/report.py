"""A memory plan as text: bytes of each item and phase, whether it fits, and which settings would fit."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf_engine.planner.cluster import RankPlan
from rlhf_engine.planner.plan import PHASES, MemoryPlan
from rlhf_engine.planner.strategies import Strategy, fitting_or_smallest
from rlhf_engine.planner.workload import Workload

GIB = 2**30
_LISTED = 3
_COLUMN = 12


def size(count: float) -> str:
    """Return a number of bytes as text: `1.25 GiB`, small numbers in MiB, and those that would round to 0 MiB in bytes."""
    if abs(count) >= GIB / 10:
        return f"{count / GIB:.2f} GiB"
    return f"{count / 2**20:.1f} MiB" if abs(count) >= 2**20 / 10 else f"{count:.0f} bytes"


def items_table(plan: MemoryPlan) -> str:
    """Return a table of every item in every phase, in GiB at the phase's largest moment."""
    lines = [_line("GiB", PHASES)]
    lines += [_line(name, [f"{count / GIB:.2f}"] * len(PHASES)) for name, count in plan.persistent.items()]
    lines.append(_line("= persistent", [f"{plan.kept / GIB:.2f}"] * len(PHASES)))
    names = dict.fromkeys(name for phase in plan.phases.values() for name in phase.items)
    for name in names:
        counts = [phase.items.get(name, 0) for phase in plan.phases.values()]
        lines.append(_line(name, [f"{count / GIB:.2f}" if count else "" for count in counts]))
    lines.append(_line("= peak", [f"{(plan.kept + phase.total) / GIB:.2f}" for phase in plan.phases.values()]))
    lines.append(_line("at its", [phase.moment for phase in plan.phases.values()]))
    return "\n".join(lines)


def _line(name: str, cells: Sequence[str]) -> str:
    return f"{name:20}" + "".join(f"{cell:>{max(_COLUMN, len(cell) + 2)}}" for cell in cells).rstrip()


def workload_words(w: Workload) -> str:
    """Return a description of the planned workload in one line."""
    batch = f"{w.microbatch} sequences" if w.microbatch_tokens is None else f"{w.microbatch_tokens} tokens"
    numbers = w.dtype if not w.autocast else f"{w.dtype}, products in {w.compute_dtype}"
    numbers = numbers if w.quant == "none" else f"{w.quant} and {numbers}"
    if w.train_layers is not None:
        numbers += f", the top {w.train_layers} of {w.policy.layers} layers trained"
    return (
        f"{w.policy.parameters / 1e9:.3g}e9 weights in {numbers}, value {w.value}, {w.prompt} + {w.response} tokens, rollout "
        f"batch {w.rollout_batch}, minibatch {w.minibatch}, micro-batch {batch}, {w.slots} decoded together, optimizer state "
        f"{w.optimizer_state}, gradient checkpointing {'on' if w.gradient_checkpointing else 'off'}, {w.device}"
    )


def verdict(plan: MemoryPlan) -> str:
    """Return whether the plan fits and by how many bytes; if a sequence fits, its KV pool and the largest micro-batch."""
    w, phase = plan.workload, plan.phases[plan.largest]
    peak = f"peak {size(plan.peak)} ({plan.largest}, {phase.moment})"
    if w.budget is None:
        return peak
    words = f"{peak} of {size(w.budget)}: "
    if plan.slots == 0:
        excess = f", {size(plan.missing)} too much" if plan.missing else ""
        return f"{words}does not fit{excess}; not even one sequence fits next to what persists"
    if plan.fits:
        words += f"fits, {size(w.budget - plan.peak)} to spare"
    else:
        words += f"does not fit, {size(plan.missing)} too much"
    pool = f"KV pool of {size(plan.kv_bytes)} for {plan.slots} of {w.slots} sequences of at most {w.length} tokens"
    return f"{words}\n{pool}; largest micro-batch {plan.largest_microbatch()} of {w.minibatch} sequences"


def strategies_words(workload: Workload) -> str:
    """Return the fastest strategies that fit the workload's budget, by estimate; the smallest peak if none fits.

    The first with adapters and the first with top layers are listed in any case.
    """
    fits, least = fitting_or_smallest(workload)
    if not fits:
        return f"no strategy that was tried fits; the smallest peak is {size(least.plan.peak)} with {least.words}"
    shown = fits[:_LISTED]
    shown += [one for kind in (1, 2) for one in _first_of(kind, fits) if one not in shown]
    return "\n".join(
        ["what fits, fastest first by estimate:", *(f"  {size(one.plan.peak):>10}  {one.words}" for one in shown)]
    )


def _first_of(kind: int, fits: Sequence[Strategy]) -> list[Strategy]:
    return [one for one in fits if one.kind == kind][:1]


def refuse(plan: MemoryPlan) -> None:
    """Raise ValueError if the plan does not fit its budget.

    The message gives the missing bytes, and the fastest settings that would fit.
    """
    if plan.fits and plan.slots:
        return
    w = plan.workload
    assert w.budget is not None  # without a budget every plan fits
    short = f"{size(plan.missing)} too small"
    if plan.slots == 0:
        short += f" and leaves no room for the keys and values of one sequence of {w.length} tokens,"
    # Only the fastest strategy, so that the message is one line.
    found, least = fitting_or_smallest(w)
    if found:
        way = f"{found[0].words} would fit ({size(found[0].plan.peak)})"
    else:
        way = f"no strategy that was tried fits, the smallest peak is {size(least.plan.peak)} with {least.words}"
    need = f"for the planned peak of {size(plan.peak)} ({plan.largest}, {plan.phases[plan.largest].moment})"
    raise ValueError(f"memory.budget: got {size(w.budget)}, which is {short} {need}; {way}")


# ---- several GPUs ----


def ranks_words(plan: RankPlan) -> str:
    """Return bytes per rank, bytes over each link and seconds of an update on several GPUs, as text."""
    c, w = plan.cluster, plan.share
    copies = (
        f"{c.copies} {'copy' if c.copies == 1 else 'copies'}, sharded over {c.shard}" if c.shard > 1 else "whole copies"
    )
    lines = [
        f"{c.gpus} x {w.gpu}, {c.gpu.per_node} per node, {copies}; predicted from data sheets, not measured",
        f"per rank and update: {w.rollout_batch} sequences, {plan.steps} optimizer steps of {w.minibatch}, {plan.passes} "
        f"micro-batches of {w.train_rows}",
        "",
        _line("GiB per rank", PHASES),
    ]
    lines += [_line(name, [f"{count / GIB:.2f}"] * len(PHASES)) for name, count in plan.persistent.items()]
    found = plan.phase_items()
    for name in dict.fromkeys(item for phase in found.values() for item in phase):
        lines.append(_line(name, [f"{found[p][name] / GIB:.2f}" if found[p].get(name) else "" for p in PHASES]))
    lines.append(_line("= peak", [f"{plan.peaks[phase] / GIB:.2f}" for phase in PHASES]))
    spare = c.gpu.memory - plan.peak
    lines += [
        "",
        f"peak {size(plan.peak)} of {size(c.gpu.memory)}: "
        + (f"fits, {size(spare)} to spare" if spare >= 0 else f"does not fit, {size(-spare)} too much"),
    ]
    if plan.traffic:
        lines += ["", "received per rank and update:"]
    for one in plan.traffic:
        lines.append(
            f"  {one.phase:9}{one.operation:15}{one.what:11}{size(one.count):>12} over {one.link} of {one.ranks} ranks, "
            f"{one.calls} calls, {_seconds(one.seconds)}"
        )
    parts = ", ".join(f"{name} {_seconds(time)}" for name, time in plan.seconds.items())
    return "\n".join([*lines, "", f"seconds of an update: {_seconds(plan.total)} ({parts})"])


def _seconds(time: float) -> str:
    return f"{time:.3g} s"
