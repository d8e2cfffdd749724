"""Implementation of `compile_check`: record what the Triton launchers launch, compile it and csrc/cuda, list problems."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from types import ModuleType

from triton.backends import backends

from benchmarks.gpu.recorder import BINDING, Form, Recording, kernels_of, recording
from benchmarks.gpu.resources import Usage, cuda_sources, cuda_usage, triton_usage, why_no_nvcc
from benchmarks.gpu.specimens import SIZES, Call, specimens
from benchmarks.gpu.token_specimens import selection_specimens
from benchmarks.gpu.trial_specimens import trial_specimens

PROCESSES = 2
REFUSALS = (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)
"""Errors of a launcher that does not accept its specimen; each becomes a problem of the report."""


@dataclass
class Findings:
    """The forms to compile, the resources that they use, and the problems found."""

    forms: dict[str, dict[str, tuple[Form, str]]] = field(default_factory=dict)
    """Kind of device -> key -> (form of a kernel, specimen that launches it)."""
    usages: list[Usage] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def check(
    package: ModuleType, architectures: Sequence[str], calls: Mapping[str, tuple[str, Call]] | None = None
) -> Findings:
    """Record, compile and list problems; if `calls` is None, use the specimens of rlhf_kernels."""
    findings = Findings()
    record(package, all_specimens() if calls is None else calls, findings)
    compile_triton(architectures, findings)
    compile_cuda(architectures, findings)
    findings.problems += [_problem(usage) for usage in findings.usages if not usage.clean]
    return findings


def all_specimens() -> dict[str, tuple[str, Call]]:
    """Return the specimens of every launcher of rlhf_kernels."""
    return specimens() | selection_specimens() | trial_specimens()


def _problem(usage: Usage) -> str:
    what = usage.error or f"{usage.spills} spilled, stack frame of {usage.stack} bytes" + f" ({usage.note})" * bool(
        usage.note
    )
    return f"{usage.kernel} on {usage.target} ({usage.specimen}): {what}"


# ---- recording of launches ----


def record(package: ModuleType, calls: Mapping[str, tuple[str, Call]], findings: Findings) -> None:
    """Make every call at every size; add the forms to compile and the problems to `findings`."""
    launched: set[str] = set()
    missing: set[str] = set()
    refusals: set[str] = set()
    for name, (launcher, call) in calls.items():
        if not hasattr(package, launcher):
            missing.add(launcher)
            continue
        recordings = _launches(package, name, call, findings)
        refusals |= {refusal for made in recordings for refusal in made.refusals}
        findings.problems += recompilations(name, recordings)
        for kind in BINDING:
            first: dict[Choice, list[Form]] = {}
            for made in recordings:
                for choice, forms in _by_choice(made.forms[kind]).items():
                    first.setdefault(choice, forms)
            for form in (form for forms in first.values() for form in forms):
                findings.forms.setdefault(kind, {}).setdefault(form.key, (form, name))
            launched |= {kernel for kernel, _ in first}
    findings.problems += sorted(refusals)
    findings.problems += [f"{package.__name__} has no launcher {launcher}" for launcher in sorted(missing)]
    unreached = sorted(kernels_of(package) - launched)
    findings.problems += [f"{kernel} is launched by no specimen, so it was not compiled" for kernel in unreached]


def _launches(package: ModuleType, name: str, call: Call, findings: Findings) -> list[Recording]:
    """Return the launches of a specimen at each size; a call that the launcher refuses is added as a problem."""
    recordings = []
    for size in SIZES:
        try:
            with recording() as made:
                call(package, size)
        except REFUSALS as error:
            findings.problems.append(f"{name}: refused at {size}: {type(error).__name__}: {error}")
            break
        recordings.append(made)
    return recordings


Choice = tuple[str, frozenset]
"""A kernel and its flags. A launcher may choose both by size, e.g. for long rows, because there are few of them."""


def _by_choice(forms: Iterable[Form]) -> dict[Choice, list[Form]]:
    found: dict[Choice, list[Form]] = {}
    for form in forms:
        flags = frozenset((path, value) for path, value in form.constexprs.items() if isinstance(value, bool))
        found.setdefault((form.name, flags), []).append(form)
    return found


def recompilations(name: str, recordings: Sequence[Recording]) -> list[str]:
    """Return the kernels that a different size, coefficient or seed recompiles with equal flags, and the argument at fault."""
    problems = []
    reference: dict[Choice, list[Form]] = {}
    for made in recordings:
        for choice, forms in _by_choice(made.forms["cuda"]).items():
            known = reference.setdefault(choice, forms)
            for form in forms:
                changes = min((_changes(before, form) for before in known), key=len)
                if changes:
                    problems.append(f"{form.name} would be compiled again ({name}): {'; '.join(changes)}")
    return sorted(set(problems))


def _changes(before: Form, after: Form) -> list[str]:
    """Return the differences between two forms of a kernel."""
    old, new = before.facts(), after.facts()
    return [f"{key}: {old.get(key)} -> {new.get(key)}" for key in {**old, **new} if old.get(key) != new.get(key)]


# ---- compilation ----


def compile_triton(architectures: Sequence[str], findings: Findings) -> None:
    """Compile every form for every architecture, `PROCESSES` at a time."""
    jobs = []
    for target in architectures:
        kind, plugin = ("hip", "amd") if target.startswith("gfx") else ("cuda", "nvidia")
        if plugin not in backends:
            findings.notes.append(f"{target}: this Triton has no {plugin} backend, so nothing was compiled for it")
            continue
        jobs += [(*found, target) for found in findings.forms.get(kind, {}).values()]
    findings.usages += _run_jobs(jobs)


_jobs: list[tuple[Form, str, str]] = []
"""Jobs of the forked processes, which inherit this list because a kernel cannot be pickled."""


def _run_jobs(jobs: list[tuple[Form, str, str]]) -> list[Usage]:
    """Run the jobs; if a compiler crashes its process, run the lost jobs again, each in a separate process."""
    _jobs[:] = jobs
    results: list[Usage] = []
    with _pool(PROCESSES) as pool:
        futures = [pool.submit(_compile_job, index) for index in range(len(jobs))]
        for index, future in enumerate(futures):
            try:
                results.append(future.result())
            except BrokenProcessPool:
                form, specimen, target = jobs[index]
                try:
                    with _pool(1) as alone:
                        results.append(alone.submit(_compile_job, index).result())
                except BrokenProcessPool:
                    results.append(Usage(form.name, specimen, target, error="the compiler's process died"))
    return results


def _pool(processes: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("fork"))


def _compile_job(index: int) -> Usage:
    return triton_usage(*_jobs[index])


def compile_cuda(architectures: Sequence[str], findings: Findings) -> None:
    """Compile every file of csrc/cuda for every NVIDIA architecture, if nvcc is installed."""
    reason = why_no_nvcc()
    if reason:
        findings.notes.append(f"CUDA C++ sources were not checked: {reason}")
        return
    jobs = [(source, target) for source in cuda_sources() for target in architectures if target.startswith("sm_")]
    with _pool(PROCESSES) as pool:
        for usages in pool.map(cuda_usage, *zip(*jobs, strict=True)) if jobs else ():
            findings.usages += usages
