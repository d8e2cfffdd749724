"""Checkpoints of all trainers: safetensors and JSON, written to a new folder, synced and renamed.

A checkpoint folder is complete or absent. It holds the model and its tokenizer as `from_pretrained` of transformers reads
them, `optimizer.safetensors`, `trainer.json` and the run's `config.yaml`. PPO adds `value_head.safetensors` or the folder
`value_model`, and `ema` for averaged weights. Random numbers need no state, because they are functions of the seed and the
counters in `trainer.json`.

`save_checkpoint` and `resume` accept any trainer that implements `Checkpointable`; this module does not import the trainers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

from rlhf_engine.config import RolloutConfig, RunConfig, flat_settings, load_saved_config, save_config
from rlhf_engine.files import OPTIMIZER, read_json, read_tensors, recover, require, with_new_folder, write_json

_NONE: Mapping[str, str] = MappingProxyType({})

TRAINER, CONFIG = "trainer.json", "config.yaml"


class Checkpointable(Protocol):
    """A trainer that can be saved between two steps and resumed with identical results."""

    stage: str
    """Key of its settings in `_MAY_CHANGE`: ppo, sft or rm."""
    unit: str
    """Unit of `done`: update or step."""
    seed: int
    """Seed of all random numbers of the run."""
    whole: bool
    """Whether the state is that of `done` steps; False from the first changed weight of a step to the step's end."""

    @property
    def done(self) -> int:
        """Number of finished optimizer steps, or of finished PPO updates."""
        ...

    def state(self) -> dict[str, Any]:
        """Return counters, positions, coefficients and running statistics as JSON values."""
        ...

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the changing tensors that `write_model` does not write: the optimizer's state, by name."""
        ...

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Iterate over the tensors that `write_model` writes."""
        ...

    def constants(self) -> Mapping[str, Iterable[tuple[str, torch.Tensor]]]:
        """Return named tensors by role that must be equal in a resumed run; a checkpoint holds their fingerprints."""
        ...

    def write_model(self, folder: Path, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Write the model into an existing folder in the format of `from_pretrained`."""

    def load(self, folder: Path, state: Mapping[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        """Restore the model in `folder` and the results of `state` and `tensors`; raise ValueError that names a bad file."""


_SAMPLING = tuple(
    f"rollout.{one.name}" for one in fields(RolloutConfig) if one.name not in ("max_prompt_tokens", "stop")
)
_FREE = (
    *("output_dir", "device", "model.path", "memory.budget", "eval", "iterate"),
    *(
        f"data.{name}"
        for name in ("demonstrations", "comparisons", "prompts", "pretrain", "hygiene", "unknown_columns")
    ),
    *("memory.gradient_checkpointing", "sft.checkpoint_every", "reward.checkpoint_every", "ppo.checkpoint_every"),
    *("reward.path",),
)
_REWARD_TRAINING = tuple(f"reward.{name}" for name in ("epochs", "batch_size", "microbatch", "evaluate_every", "optim"))
_MAY_CHANGE: Mapping[str, frozenset[str]] = {
    "ppo": frozenset(
        (
            *_FREE,
            *(
                "rollout.check_sequences",
                "rollout.batch_size",
                "rollout.prefill_tokens",
            ),  # none of them changes a sequence
            *("data.max_response_tokens", "data.validation_share", "ppo.updates", "sft"),
            *_REWARD_TRAINING,
        )
    ),
    "sft": frozenset((*_FREE, *_SAMPLING, "ppo", "reward")),
    "rm": frozenset((*_FREE, *_SAMPLING, "ppo", "sft", "reward.function")),
}
"""Keys and sections that a resumed run of a stage may change: paths, the number of PPO updates, and unused settings.

The contents of the files and models at those paths must not change: a checkpoint has their fingerprints.
"""

_SAME = {"memory.optimizer_state": ("resident", "host")}
"""Values of a key that a resumed run may exchange, because they give the same numbers."""


def save_checkpoint(
    folder: str | Path,
    trainer: Checkpointable,
    tokenizer: PreTrainedTokenizerBase | None,
    config: RunConfig,
    data: Mapping[str, str] = _NONE,
) -> None:
    """Write a checkpoint with which `resume` continues with the same numbers; a failed call leaves `folder` unchanged.

    `data` holds fingerprints of the run's input files, by the key of their path, such as data.prompts.

    Raises:
        FloatingPointError: for a weight that is not finite, so that a diverged run does not replace a good checkpoint.
        OSError: for a failed write.
    """
    for name, weight in trainer.weights():
        if weight.is_floating_point() and not bool(weight.isfinite().all()):
            raise FloatingPointError(
                f"{folder}: the checkpoint was not written, because the weight {name} is not finite"
            )
    tensors = trainer.tensors()
    state = trainer.state() | {
        "stage": trainer.stage,
        "seed": trainer.seed,
        "optimizer_tensors": len(tensors),
        "data": dict(data),
    }
    state |= {role: fingerprint(weights) for role, weights in trainer.constants().items()}

    def write(new: Path) -> None:
        trainer.write_model(new, tokenizer)
        save_file(tensors, new / OPTIMIZER)
        write_json(new / TRAINER, state)
        save_config(config, new / CONFIG)

    with_new_folder(folder, write)


def resume(folder: str | Path, trainer: Checkpointable, config: RunConfig, data: Mapping[str, str] = _NONE) -> None:
    """Load a checkpoint into `trainer`, which was built from `config`.

    Raises:
        ValueError: for a file that is missing or broken, a different stage or seed, a changed setting (see `_MAY_CHANGE`), a
            model of different shapes, different data, or a different constant of the trainer. The reference of PPO is such a
            constant: the KL is measured to the policy that the run began with, not to the resumed one.
    """
    folder = Path(folder)
    recover(folder)
    require(folder, "config.json", OPTIMIZER, TRAINER, CONFIG)
    constants = trainer.constants()
    kinds = {name: type(value) for name, value in trainer.state().items()}
    kinds.pop("planned_steps", None)  # checkpoints of earlier versions have none
    kinds |= {"seed": int, "optimizer_tensors": int, "data": dict} | dict.fromkeys(constants, str)
    state = _read_state(folder / TRAINER, kinds)
    # Old PPO checkpoints have no stage.
    stage = state.get("stage", "ppo")
    if stage != trainer.stage:
        raise ValueError(f"{folder}: got a checkpoint of the stage {stage}, expected the stage {trainer.stage}")
    if state["seed"] != trainer.seed:
        raise ValueError(f"{folder}: got a run with seed {state['seed']}, expected {trainer.seed}, the config's seed")
    check_settings(folder, config, trainer.stage)
    for role, weights in constants.items():
        if state[role] != fingerprint(weights):
            raise ValueError(
                f"{folder}: the {role} policy of this run differs from that of the checkpoint; use the model that it began with"
            )
    for key, value in data.items():
        if state["data"].get(key) != value:
            raise ValueError(f"{key}: the content has changed since the run of {folder} began; restore it to resume")
    tensors = read_tensors(folder / OPTIMIZER)
    if len(tensors) != state["optimizer_tensors"]:
        raise ValueError(
            f"{folder / OPTIMIZER}: got {len(tensors)} tensors, expected {state['optimizer_tensors']} as in {TRAINER}"
        )
    trainer.load(folder, state, tensors)


def check_settings(folder: str | Path, config: RunConfig, stage: str = "ppo") -> None:
    """Raise ValueError with the first setting that `config` changes and a resumed run of `stage` may not change."""
    source, may_change = Path(folder) / CONFIG, _MAY_CHANGE[stage]
    before = dict(flat_settings(load_saved_config(source).to_dict(), may_change))
    for key, value in flat_settings(config.to_dict(), may_change):
        same = _SAME.get(key, ())
        if value != before[key] and not (value in same and before[key] in same):
            raise ValueError(f"{key}: got {value!r}, expected {before[key]!r} to go on with the run of {source}")


def fingerprint(weights: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Return the SHA-256 of the names, shapes, dtypes and bytes of tensors, sorted by name."""
    digest = hashlib.sha256()
    for name, parameter in sorted(weights):
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def fingerprint_rows(rows: Iterable[torch.Tensor]) -> str:
    """Return the SHA-256 of rows of token ids in the given order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(f"{len(row)} ".encode())
        digest.update(row.long().contiguous().numpy().data)
    return digest.hexdigest()


def _read_state(path: Path, kinds: dict[str, type]) -> dict[str, Any]:
    """Return the object in a JSON file; raise ValueError with the first of `kinds` that is missing or has the wrong type."""
    state = read_json(path)
    for name, kind in kinds.items():
        if not isinstance(state.get(name), kind):
            raise ValueError(f"{path}: got {state.get(name)!r} for {name}, expected {kind.__name__}")
    return state
