"""Checkpoints of every trainer: safetensors and JSON, written to a new folder, synced and renamed.

A folder is complete or absent. It holds the model and its tokenizer as transformers saves them (`from_pretrained` reads it),
`optimizer.safetensors`, `trainer.json` and the run's `config.yaml`. PPO adds `value_head.safetensors` or the folder
`value_model`, and `ema` for an average of the weights. Random numbers need no state: they are functions of the seed and the
counters in `trainer.json`.

A trainer that follows `Checkpointable` is saved and resumed by `save_checkpoint` and `resume`; this module knows none of them.
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
    """A trainer that can be saved between two steps and continued with the same numbers."""

    stage: str
    """Name of its settings in `_MAY_CHANGE`: ppo, sft or rm."""
    unit: str
    """Name of what `done` counts: update or step."""
    seed: int
    """Seed of everything random in the run."""
    whole: bool
    """Whether its state is that of `done` steps; False from the first changed weight of a step to the step's end."""

    @property
    def done(self) -> int:
        """Finished optimizer steps, or updates of PPO."""
        ...

    def state(self) -> dict[str, Any]:
        """Return counters, positions, coefficients and running statistics, as JSON."""
        ...

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return what changes and is in no file of `write_model`: the optimizer's state, by name."""
        ...

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Iterate over the tensors that `write_model` writes."""
        ...

    def constants(self) -> Mapping[str, Iterable[tuple[str, torch.Tensor]]]:
        """Return named tensors that a resumed run must have as they were, by their role; they are saved as fingerprints."""
        ...

    def write_model(self, folder: Path, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Write the model into an existing folder, as `from_pretrained` reads it."""

    def load(self, folder: Path, state: Mapping[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        """Continue from the model in `folder` and from what `state` and `tensors` returned; ValueError naming the file."""


_SAMPLING = tuple(
    f"rollout.{one.name}" for one in fields(RolloutConfig) if one.name not in ("max_prompt_tokens", "stop")
)
_FREE = (
    *("output_dir", "device", "model.path", "memory.budget", "eval", "iterate"),
    *(f"data.{name}" for name in ("demonstrations", "comparisons", "prompts", "pretrain", "hygiene")),
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
            ),  # a sequence depends on its number
            *("data.max_response_tokens", "data.validation_share", "ppo.updates", "sft"),
            *_REWARD_TRAINING,
        )
    ),
    "sft": frozenset((*_FREE, *_SAMPLING, "ppo", "reward")),
    "rm": frozenset((*_FREE, *_SAMPLING, "ppo", "sft", "reward.function")),
}
"""Keys and sections that a resumed run of a stage may change: places, the length of PPO, and what the stage does not read.

The contents of the files and models in those places may not change: a checkpoint has their fingerprints.
"""

_SAME = {"memory.optimizer_state": ("resident", "host")}
"""Values of a key that a resumed run may exchange: the same numbers in another place."""


def save_checkpoint(
    folder: str | Path,
    trainer: Checkpointable,
    tokenizer: PreTrainedTokenizerBase | None,
    config: RunConfig,
    data: Mapping[str, str] = _NONE,
) -> None:
    """Write everything that `resume` needs to continue with the same numbers; a failed call leaves `folder` as it was.

    `data` are fingerprints of what the run reads, by the key of its place, such as data.prompts. Raises FloatingPointError for
    a weight that is not finite, so that a run that diverged does not replace a good checkpoint; OSError for a failed write.
    """
    for name, weight in trainer.weights():
        if weight.is_floating_point() and not bool(weight.isfinite().all()):
            raise FloatingPointError(f"{folder}: not written, because the weight {name} is not finite")
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

    Raises ValueError for a file that is missing or broken, another stage or seed, a changed setting (see `_MAY_CHANGE`), a
    model of other shapes, other data, or another of the trainer's constants: the KL of PPO is measured to the policy that the
    run began with, never to the one that it resumes from.
    """
    folder = Path(folder)
    recover(folder)
    require(folder, "config.json", OPTIMIZER, TRAINER, CONFIG)
    constants = trainer.constants()
    kinds = {name: type(value) for name, value in trainer.state().items()}
    kinds |= {"seed": int, "optimizer_tensors": int, "data": dict} | dict.fromkeys(constants, str)
    state = _read_state(folder / TRAINER, kinds)
    # Checkpoints of PPO were written before there was a stage in them.
    stage = state.get("stage", "ppo")
    if stage != trainer.stage:
        raise ValueError(f"{folder}: got a checkpoint of the stage {stage}, expected one of {trainer.stage}")
    if state["seed"] != trainer.seed:
        raise ValueError(f"{folder}: got a run with seed {state['seed']}, expected {trainer.seed}, the config's seed")
    check_settings(folder, config, trainer.stage)
    for role, weights in constants.items():
        if state[role] != fingerprint(weights):
            raise ValueError(
                f"{folder}: its {role} policy is another model than the one given; expected the model it began with"
            )
    for key, value in data.items():
        if state["data"].get(key) != value:
            raise ValueError(f"{key}: got another content than the run of {folder} began with, expected the same")
    tensors = read_tensors(folder / OPTIMIZER)
    if len(tensors) != state["optimizer_tensors"]:
        raise ValueError(
            f"{folder / OPTIMIZER}: got {len(tensors)} tensors, expected the {state['optimizer_tensors']} of {TRAINER}"
        )
    trainer.load(folder, state, tensors)


def check_settings(folder: str | Path, config: RunConfig, stage: str = "ppo") -> None:
    """Raise ValueError naming the first setting that a resumed run of `stage` may not change and `config` does."""
    source, may_change = Path(folder) / CONFIG, _MAY_CHANGE[stage]
    before = dict(flat_settings(load_saved_config(source).to_dict(), may_change))
    for key, value in flat_settings(config.to_dict(), may_change):
        same = _SAME.get(key, ())
        if value != before[key] and not (value in same and before[key] in same):
            raise ValueError(f"{key}: got {value!r}, expected {before[key]!r} to go on with the run of {source}")


def fingerprint(weights: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Return the SHA-256 of named tensors, by name and in bytes."""
    digest = hashlib.sha256()
    for name, parameter in sorted(weights):
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def fingerprint_rows(rows: Iterable[torch.Tensor]) -> str:
    """Return the SHA-256 of rows of token ids, in their order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(f"{len(row)} ".encode())
        digest.update(row.long().contiguous().numpy().data)
    return digest.hexdigest()


def _read_state(path: Path, kinds: dict[str, type]) -> dict[str, Any]:
    """Return the object in a JSON file; ValueError naming the first of `kinds` that is missing or has another type."""
    state = read_json(path)
    for name, kind in kinds.items():
        if not isinstance(state.get(name), kind):
            raise ValueError(f"{path}: got {state.get(name)!r} for {name}, expected {kind.__name__}")
    return state
