"""The table of what fits: models of 8 to 70 billion weights on four sizes of GPU, by the planner."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from docs._tables import table
from rlhf_engine.config import RunConfig, load_config
from rlhf_engine.config.memory import byte_count
from rlhf_engine.planner import Workload
from rlhf_engine.planner.report import size
from rlhf_engine.planner.strategies import Strategy, fitting
from rlhf_engine.recipes.planning import workload_of

MODELS = ("llama-3.1-8b", "qwen2.5-14b", "qwen2.5-32b", "llama-3.1-70b")
GPUS = ("24GB", "48GB", "80GB", "141GB")
RESERVE = 0.95
"""Share of a GPU's memory that a plan may use: the plan does not count what an allocator loses."""
SETTINGS = ("dtype=bfloat16", "rollout.max_prompt_tokens=1024", "rollout.max_response_tokens=1024")


@cache
def _fastest(model: str, gpu: str) -> Strategy | None:
    """Return the fastest strategy for a model on a GPU, full fine-tuning before adapters; None if none fits."""
    config = load_config(None, SETTINGS, kind=RunConfig)
    room = int(RESERVE * byte_count(gpu, "gpu"))
    workload: Workload = replace(workload_of(config, model), device="cuda", budget=room)
    return next(iter(fitting(workload)), None)


def _method(one: Strategy) -> str:
    workload = one.plan.workload
    if not workload.adapter:
        return "full"
    return "LoRA" if workload.quant == "none" else f"LoRA, {workload.quant}"


def glance() -> str:
    """Return what is trained by the fastest strategy that fits, for README.md."""
    rows = []
    for model in MODELS:
        found = [_fastest(model, gpu) for gpu in GPUS]
        rows.append((model, *("-" if one is None else _method(one) for one in found)))
    return table(("model", *GPUS), rows)


def settings() -> str:
    """Return the settings and the peak of the fastest strategy that fits."""
    rows = []
    for model in MODELS:
        for gpu in GPUS:
            one = _fastest(model, gpu)
            rows.append(
                (model, gpu, "nothing fits", "") if one is None else (model, gpu, f"`{one.words}`", size(one.plan.peak))
            )
    return table(("model", "GPU", "settings", "planned peak"), rows)
