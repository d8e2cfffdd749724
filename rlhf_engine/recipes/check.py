"""What is wrong with this machine and a config, with remedies, for `rlhf check` and for issues."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from rich.table import Table
from rich.text import Text

from rlhf_engine.config import RunConfig, byte_count
from rlhf_engine.data.summary import summarise
from rlhf_engine.evaluate.served import SERVED, ServedJudge
from rlhf_engine.files import read_model_config, require
from rlhf_engine.model.pretrained import base_folder
from rlhf_engine.planner import MemoryPlan
from rlhf_engine.planner.report import size
from rlhf_engine.recipes.evaluate import BY_HAND
from rlhf_engine.recipes.loading import placement
from rlhf_engine.recipes.planning import workload_of
from rlhf_engine.rewards.served import check_url
from rlhf_engine.trackers import import_trackers
from rlhf_kernels.info import build, choices, openmp_runtimes

LEAST_DISK = 2**30
"""Free bytes of the output folder's disk below which a warning is given."""
OPTIONAL = ("datasets", "pyarrow", "peft", "torchao", "bitsandbytes", "wandb", "trackio", "mlflow")
"""Packages of extras, whose versions are listed."""
_LEAST = {"torch": (2, 10), "transformers": (5, 17)}
_DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class Finding:
    """One thing that was checked."""

    level: Literal["ok", "note", "warning", "error"]
    about: str
    """What was checked, such as `triton` or `data.prompts`."""
    what: str
    remedy: str = ""


@dataclass(frozen=True)
class Report:
    """Everything that `rlhf check` found."""

    findings: list[Finding]
    machine: dict[str, Any]
    config: dict[str, Any] | None

    @property
    def ok(self) -> bool:
        """Whether there is no error."""
        return all(finding.level != "error" for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Return the report for JSON."""
        return {
            "findings": [asdict(finding) for finding in self.findings],
            "machine": self.machine,
            "config": self.config,
        }


def findings_view(report: Report) -> Table:
    """Return the findings as a table, errors first."""
    styles = {"error": "bold red", "warning": "yellow", "note": "cyan", "ok": "green"}
    table = Table(box=None, pad_edge=False, expand=True, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, max_width=24)
    table.add_column(ratio=1, overflow="fold")
    for finding in sorted(report.findings, key=lambda one: list(styles).index(one.level)):
        words = Text(finding.what)
        if finding.remedy:
            words.append(f"\n-> {finding.remedy}", style="bold")
        table.add_row(Text(finding.level, style=styles[finding.level]), Text(finding.about), words)
    return table


def run_check(config: Callable[[], RunConfig] | None = None) -> Report:
    """Check the machine, and the config that `config()` reads; None checks the machine only. Nothing is written or sent."""
    findings = [*_machine()]
    settings = None
    if config is not None:
        try:
            settings = config()
            findings += [Finding("ok", "config", "every setting is valid"), *_config(settings)]
        except ValueError as error:
            findings.append(_error("config", error))
    return Report(findings, _facts(), settings.to_dict() if settings is not None else None)


def _error(about: str, error: ValueError) -> Finding:
    """Return the finding of an error, whose part after the last semicolon is what to do."""
    what, mark, remedy = str(error).rpartition("; ")
    return Finding("error", about, what, remedy) if mark else Finding("error", about, str(error))


# ---- the machine ----


def _machine() -> Iterator[Finding]:
    rows = dict(build())
    for name, least in _LEAST.items():
        found = version(name)
        numbers = tuple(int(part) for part in found.split("+")[0].split(".")[:2] if part.isdecimal())
        wanted = ".".join(map(str, least))
        if numbers < least:
            yield Finding(
                "error", name, f"version {found}, at least {wanted} is needed", f"pip install '{name}>={wanted}'"
            )
        else:
            yield Finding("ok", name, f"version {found}")
    loaded = rows["extension"].startswith("loaded")
    yield (
        Finding("ok", "extension", rows["extension"])
        if loaded
        else Finding("warning", "extension", f"{rows['extension']}: slower on CPUs", "pip install . builds it")
    )
    yield from _gpu()
    runtimes = openmp_runtimes() if sys.platform == "linux" else []
    if len(runtimes) > 1:
        yield Finding(
            "warning",
            "OpenMP",
            f"{len(runtimes)} runtimes are loaded: {', '.join(runtimes)}",
            "install torch from one source",
        )


def _gpu() -> Iterator[Finding]:
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            name, memory = torch.cuda.get_device_name(index), torch.cuda.get_device_properties(index).total_memory
            yield Finding("ok", f"cuda:{index}", f"{name}, {size(memory)}")
        if find_spec("triton") is None:
            yield Finding("warning", "triton", "is not installed, so that GPUs use the reference", "pip install triton")
    elif _DRIVER.is_file() or shutil.which("nvidia-smi"):
        kind = "is a build for CPUs" if torch.version.cuda is None else f"for CUDA {torch.version.cuda} finds no device"
        yield Finding(
            "warning",
            "cuda",
            f"an NVIDIA driver is installed, but torch {torch.__version__} {kind}",
            "install torch for the CUDA version that nvidia-smi prints, and check CUDA_VISIBLE_DEVICES",
        )
    else:
        yield Finding("note", "cuda", "no NVIDIA driver: everything runs on the CPU")


def _facts() -> dict[str, Any]:
    """Return versions and sizes, without names of users and machines."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
    packages = {name: _version(name) for name in OPTIONAL}
    return {
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "memory_bytes": memory,
        "build": dict(build()),
        "packages": {name: found for name, found in packages.items() if found},
        "backends": [dict(zip(("op", "device", "dtypes", "auto", "because"), row, strict=True)) for row in choices()],
    }


def _version(name: str) -> str | None:
    for one in (name, f"{name}-skinny"):
        try:
            return version(one)
        except PackageNotFoundError:
            continue
    return None


# ---- the config ----


def _config(config: RunConfig) -> Iterator[Finding]:
    yield from _tried("device", lambda: str(placement(config)["device"]) + " can be used")
    for key, folder in (("model.path", config.model.path), ("reward.path", config.reward.path)):
        if folder is not None:
            yield from _tried(key, lambda folder=folder, key=key: _model(folder, key))
    for kind in ("demonstrations", "comparisons", "prompts", "pretraining"):
        key = "pretrain" if kind == "pretraining" else kind
        path = getattr(config.data, key)
        if path is not None:
            yield from _tried(f"data.{key}", lambda kind=kind, path=path: _records(kind, path))
    if config.reward.url is not None:
        yield from _tried("reward.url", lambda: _url(config.reward.url or ""))
    for section in (config.eval, config.iterate):
        name = section.judge
        if name is not None and name.startswith(SERVED):
            yield from _tried("judge", lambda name=name: _judge(config, name))
        elif name == BY_HAND:
            yield Finding("note", "judge", "responses are judged in a file, by people")
    yield from _tried("tracking.report_to", lambda: _trackers(config))
    yield from _disk(config)
    if config.model.path is not None:
        yield from _memory(config)


def _tried(about: str, check: Callable[[], str]) -> Iterator[Finding]:
    try:
        yield Finding("ok", about, check())
    except ValueError as error:
        yield _error(about, error)


def _model(folder: str, key: str) -> str:
    base = base_folder(folder)
    try:
        require(base, "config.json", "tokenizer_config.json")
        kind = read_model_config(base).model_type
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None
    return f"a model of type {kind}"


def _records(kind: str, path: str) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in summarise(kind, path).items())


def _url(url: str) -> str:
    check_url(url)
    return f"{url} is a URL; whether the server answers is not tried"


def _judge(config: RunConfig, name: str) -> str:
    judge = ServedJudge.load(name, config.http, None)
    return f"{judge.model} at {judge.server.url}; whether the server answers is not tried"


def _trackers(config: RunConfig) -> str:
    import_trackers(config.tracking)
    return ", ".join(config.tracking.report_to) or "none"


def _disk(config: RunConfig) -> Iterator[Finding]:
    folder = Path(config.output_dir).absolute()
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not os.access(there, os.W_OK):
        yield Finding("error", "output_dir", f"{there} cannot be written", "set a different output_dir")
        return
    free = shutil.disk_usage(there).free
    level = "ok" if free >= LEAST_DISK else "warning"
    yield Finding(level, "output_dir", f"{size(free)} are free on its disk", "" if level == "ok" else "free some space")


def _memory(config: RunConfig) -> Iterator[Finding]:
    try:
        plan = MemoryPlan.of(workload_of(config))
    except ValueError as error:
        yield Finding("note", "memory", f"the memory of rlhf ppo is not known: {error}")
        return
    what = f"rlhf ppo needs {size(plan.peak)}"
    budget = config.memory.budget
    limit = None if budget is None else byte_count(budget, "memory.budget")
    if limit is None and config.device.startswith("cuda") and torch.cuda.is_available():
        limit = torch.cuda.get_device_properties(torch.device(config.device)).total_memory
    if limit is None:
        yield Finding("ok", "memory", what)
    elif plan.peak > limit:
        yield Finding("error", "memory", f"{what}, more than {size(limit)}", "rlhf plan finds settings that fit")
    else:
        yield Finding("ok", "memory", f"{what} of {size(limit)}")
