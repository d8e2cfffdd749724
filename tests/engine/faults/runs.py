"""The runs that are disturbed: their settings, the command of each stage, and what two of them must have in common."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file

from rlhf_engine.config import RunConfig, load_config
from rlhf_engine.metrics import read_metrics
from rlhf_engine.recipes import run_ppo, run_rm, run_sft
from rlhf_engine.recipes.generate import generate_file
from rlhf_engine.recipes.iterate import run_iterate
from tests.engine.helpers.cli_run import new_model, new_run

SMALL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
"""Sizes of a model of 9 thousand parameters."""
CODE = """
from tests.engine.faults import points


def reward(prompts, answers):
    return points.reward([float(len(answer)) for answer in answers])


def judge(prompts, a, b):
    return points.reward([len(x) for x in a]), [len(x) for x in b]
"""
"""User code: the reward function and the judge."""

ANSWERS = "answers.jsonl"
TIMED = ("seconds", "per_second", "_mb")
"""Parts of the names of metrics that depend on time or memory."""


@dataclass(frozen=True)
class Case:
    """A stage with its settings."""

    stage: str
    settings: tuple[str, ...]

    @property
    def section(self) -> str | None:
        """Section of the config with `checkpoint_every`."""
        return {"sft": "sft", "rm": "reward", "ppo": "ppo"}.get(self.stage)


_PPO = ("ppo.updates=3", "reward.function=code.py:reward", "ppo.value_init=zero", "reward.timeout=600")
_JUDGE = ("iterate.judge=code.py:judge", "eval.judge=code.py:judge")
CASES = {
    "sft": Case("sft", ("sft.epochs=2", "sft.batch_size=2", "sft.patience=9", "sft.evaluate_every=2")),
    "rm": Case("rm", ("reward.epochs=3", "reward.batch_size=2", "reward.evaluate_every=2")),
    "ppo": Case("ppo", _PPO),
    "ppo, adaptive KL, average": Case(
        "ppo",
        (
            *_PPO,
            "ppo.kl_control=adaptive",
            "ppo.kl_target=1.0",
            "ppo.kl_horizon=20",
            "ppo.ema_decay=0.9",
            "ppo.score_scale=running",
            "ppo.objective=kl_penalty",
            "ppo.old_kl_coef=0.1",
            "ppo.old_kl_target=0.01",
        ),
    ),
    "ppo, pretraining loss": Case("ppo", (*_PPO, "ppo.ptx_coef=1.0", "data.pretrain=pretrain.txt")),
    "ppo, adapters": Case("ppo", (*_PPO, "adapter.rank=2", "ppo.value_model=backbone")),
    "ppo, state in host memory": Case("ppo", (*_PPO, "memory.optimizer_state=host", "model.train_layers=1")),
    "ppo, state in 8 bits": Case("ppo", (*_PPO, "memory.optimizer_state=8bit")),
    "iterate": Case(
        "iterate", ("iterate.rounds=1", "iterate.prompts=4", "ppo.updates=1", "ppo.value_init=zero", *_JUDGE)
    ),
    "generate": Case("generate", ("rollout.batch_size=1",)),
}


@contextmanager
def no_drawing() -> Iterator[None]:
    """Write a few bytes for every figure within the block, without axes, because drawing takes longer than the runs."""

    def savefig(figure: Figure, path: Path, **options: object) -> None:
        path.write_bytes(b"a figure")

    with mock.patch.object(Figure, "savefig", savefig), mock.patch.object(Figure, "subplots", mock.MagicMock()):
        yield


def prepare(folder: Path) -> None:
    """Write the model, the data and the user code of all cases."""
    new_run(folder, new_model(folder / "base", **SMALL))
    (folder / "code.py").write_text(CODE)
    (folder / "pretrain.txt").write_text("yes or no, I do not know\n" * 40)


def config_of(folder: Path, case: Case, out: Path, *more: str) -> RunConfig:
    """Return the config of a case with the output folder `out`."""
    here = [
        one.replace("code.py", f"{folder / 'code.py'}").replace("pretrain.txt", f"{folder / 'pretrain.txt'}")
        for one in case.settings
    ]
    return load_config(folder / "run.yaml", [*here, f"output_dir={out}", *more])


def command(case: Case, config: RunConfig, folder: Path) -> Callable[[], object]:
    """Return the call that `rlhf STAGE --resume` makes."""
    if case.stage == "generate":
        target = Path(config.output_dir) / ANSWERS
        return lambda: generate_file(config, folder / "prompts.jsonl", target, 2, resume=True)
    if case.stage == "iterate":
        return lambda: run_iterate(config, lambda line: None, resume=True)
    stage = {"sft": run_sft, "rm": run_rm, "ppo": run_ppo}[case.stage]
    return lambda: stage(config, resume=True)


def outcome(out: Path, stage: str) -> dict[str, Any]:
    """Return what a finished run has written, except what depends on time, memory and the number of saves."""
    if stage == "generate":
        return {ANSWERS: (out / ANSWERS).read_text(), "names": names(out)}
    if stage == "iterate":
        round_1 = out / "round_1"
        found = {f"{name}: {key}": value for name in ("rm", "ppo") for key, value in outcome(round_1, name).items()}
        texts = ("completions.jsonl", "rankings.jsonl", "comparisons.jsonl", "eval/answers.jsonl")
        found |= {name: (round_1 / name).read_text() for name in texts if (round_1 / name).exists()}
        return found | {"state.json": json.loads((out / "state.json").read_text())["steps"], "names": names(out)}
    folder = out / stage
    tensors = {
        f"{path.relative_to(folder)}:{name}": tensor.numpy().tobytes()
        for path in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }
    report = json.loads((folder / ("trainer.json" if stage == "ppo" else "report.json")).read_text())
    rows = [
        [(name, value) for name, value in row.items() if not any(part in name for part in TIMED)]
        for row in read_metrics(out)
        if row["stage"] == stage
    ]
    samples = out / "samples.jsonl"
    texts = samples.read_text() if samples.exists() else ""
    return {"report": report, "metrics": rows, "samples": texts, "names": names(out)} | tensors


def names(out: Path) -> list[str]:
    """Return the names in an output folder, without kept and rescued checkpoints, and all that an interruption has left."""
    found = [*out.iterdir(), *out.glob("plots/*"), *out.glob("round_*/*"), *out.glob("round_*/plots/*")]
    found += [path for path in out.rglob("*") if path.suffix in (".new", ".old") and path not in found]
    return sorted(
        str(path.relative_to(out)) for path in found if path.name != "checkpoints" and ".rescued" not in path.name
    )


def difference(first: dict[str, Any], second: dict[str, Any]) -> str | None:
    """Return the keys that differ; None if none does."""
    differ = [key for key in {**first, **second} if first.get(key) != second.get(key)]
    if not differ:
        return None
    shown = differ[0]
    values = (repr(one.get(shown)) for one in (first, second))
    return f"{', '.join(differ)}: {' instead of '.join(value[:300] for value in values)}"


def rough_difference(first: dict[str, Any], second: dict[str, Any]) -> str | None:
    """Return what differs between runs with passes of different sizes, whose sums have a different order; None if nothing does.

    Weights may differ by two steps of the optimizer, whose rate is 0.001, because Adam divides small gradients by their size.
    """
    if first.keys() != second.keys():
        return f"keys: {sorted(first)} instead of {sorted(second)}"
    for key, value in first.items():
        other = second[key]
        if isinstance(value, bytes):
            if len(value) != len(other):
                return f"{key}: {len(value)} bytes instead of {len(other)}"
            pair = [torch.frombuffer(bytearray(one), dtype=torch.float32) for one in (value, other)]
            if not torch.allclose(*pair, rtol=0, atol=0.002):
                return f"{key}: the largest difference is {float((pair[0] - pair[1]).abs().max())}"
    for key in (key for key in first if key.endswith("metrics")):
        if [row[:2] for row in first[key]] != [row[:2] for row in second[key]]:
            return f"{key}: different steps"
    return difference({"names": first["names"]}, {"names": second["names"]})
