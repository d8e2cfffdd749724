"""Checkpoints of all trainers: safetensors and JSON, written to a new folder, synced, read back and renamed.

A checkpoint folder is complete or absent. It holds the model and its tokenizer as `from_pretrained` of transformers reads
them, or only the trained adapter as peft reads it, or only the trained top layers; `optimizer.safetensors`, `trainer.json`, the
run's `config.yaml`, the stage's lines of `metrics.jsonl` and, for PPO, `samples.jsonl`. PPO adds `value_head.safetensors` or
the folder `value_model`, and `ema` for averaged weights. Random numbers need no state, because they are functions of the seed
and the counters in `trainer.json`. `manifest.json` has a checksum of every file.

The newest checkpoint of a stage is in its folder, such as OUTPUT_DIR/ppo. Earlier ones that `checkpoint.keep` or
`checkpoint.best` keeps are in OUTPUT_DIR/checkpoints, such as `ppo-12` after 12 updates; `resume` loads the newest that is
undamaged.

`save_checkpoint` and `resume` accept any trainer that implements `Checkpointable`; this module does not import the trainers.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, cast

import torch
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

from rlhf_engine.checkpoint_folders import DONE, SCORE, TRAINER, checkpoints
from rlhf_engine.config import RolloutConfig, RunConfig, flat_settings, load_saved_config, save_config
from rlhf_engine.files import OPTIMIZER, is_finite, read_json, read_tensors, require, with_new_folder, write_json
from rlhf_engine.manifest import MANIFEST, damage, foreign_files, write_manifest
from rlhf_engine.notices import notice

_NONE: Mapping[str, str] = MappingProxyType({})
_NO_LOGS: Mapping[str, bytes] = MappingProxyType({})

CONFIG = "config.yaml"
REWARD_FUNCTION = "reward.function"
"""Key of the fingerprint of the reward function's file."""


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

    def constants(self) -> Mapping[str, str]:
        """Return the fingerprints by role of tensors that must be equal in a resumed run."""
        ...

    def gathered(self, folder: Path) -> AbstractContextManager[None]:
        """Let the first rank read whole tensors inside the context, in which it saves; all ranks must enter.

        `folder` is a new folder for parts of sharded tensors, deleted at the end.
        """
        ...

    def write_model(self, folder: Path, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Write the model into an existing folder in the format of `from_pretrained`."""

    def load(self, folder: Path, state: Mapping[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        """Restore the model in `folder` and the results of `state` and `tensors`; raise ValueError that names a bad file."""


_SAMPLING = tuple(
    f"rollout.{one.name}" for one in fields(RolloutConfig) if one.name not in ("max_prompt_tokens", "stop")
)
_FREE = (
    *("output_dir", "device", "model.path", "memory.budget", "eval", "iterate", "checkpoint", "tracking", "http"),
    *("distributed",),
    *(
        f"data.{name}"
        for name in ("demonstrations", "comparisons", "prompts", "pretrain", "hygiene", "unknown_columns")
    ),
    *("memory.gradient_checkpointing", "sft.checkpoint_every", "reward.checkpoint_every", "ppo.checkpoint_every"),
    *("reward.path", "reward.url", "reward.concurrency", "reward.timeout", "reward.retries"),
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
            *(
                "data.max_response_tokens",
                "data.validation_share",
                "ppo.updates",
                "ppo.log_samples",
                "ppo.profile_update",
                "sft",
            ),
            *("ppo.warn_on", "ppo.stop_on", "ppo.on_nonfinite", "ppo.ratio_guard", "ppo.on_ratio"),
            *_REWARD_TRAINING,
        )
    ),
    "sft": frozenset((*_FREE, *_SAMPLING, "ppo", "reward")),
    "rm": frozenset((*_FREE, *_SAMPLING, "ppo", "sft", "reward.function")),
}
"""Keys and sections that a resumed run of a stage may change: paths, the number of PPO updates, and unused settings.

The contents of the files and models at those paths must not change: a checkpoint has their fingerprints.
"""

_PARTS = ("adapter_config.json", "rlhf_top_layers.json")
"""Files in the folder of an adapter or of top layers, which has no config.json of a model."""

_SAME = {
    "memory.optimizer_state": ("resident", "host"),
    "rollout.merge_adapters": ("auto", "always", "never"),  # the trainer compares whether adapters are merged
}
"""Values of a key that a resumed run may exchange, because they give the same numbers."""


_COMPARED = {"reward.function": lambda value: value and value.rpartition(":")[2]}
"""Part of a value that a resumed run may not change: a reward function may be imported from a different place."""


def save_checkpoint(
    folder: str | Path,
    trainer: Checkpointable,
    tokenizer: PreTrainedTokenizerBase | None,
    config: RunConfig,
    data: Mapping[str, str] = _NONE,
    *,
    logs: Mapping[str, bytes] = _NO_LOGS,
    score: float | None = None,
    retire: Callable[[Path], object] | None = None,
) -> None:
    """Write a checkpoint with which `resume` continues with the same numbers; a failed call leaves `folder` unchanged.

    Args:
        folder: the folder to write or to replace.
        trainer: the trainer, between two steps.
        tokenizer: the tokenizer to write with the model, if any.
        config: the run's config.
        data: fingerprints of the run's input files, by the key of their path, such as data.prompts.
        logs: the run's lines so far of metrics.jsonl and similar files, by the names of the files.
        score: value of the metric `checkpoint.best`; larger is better.
        retire: called with the replaced checkpoint, as in `with_new_folder`.

    Raises:
        FloatingPointError: for a tensor that is not finite, so that a diverged run does not replace a good checkpoint.
        OSError: for a failed write, or if the files do not read back as they were written.
    """
    tensors = trainer.tensors()
    _check_finite(Path(folder), trainer, tensors)
    state = trainer.state() | {
        "stage": trainer.stage,
        "seed": trainer.seed,
        "optimizer_tensors": len(tensors),
        "data": dict(data),
    }
    state |= trainer.constants()
    # Without this key, a checkpoint is one of an earlier release, which has no manifest.
    state["manifest"] = MANIFEST

    def write(new: Path) -> None:
        trainer.write_model(new, tokenizer)
        save_file(tensors, new / OPTIMIZER)
        save_config(config, new / CONFIG)
        for name, lines in logs.items():
            (new / name).write_bytes(lines)
        write_json(new / TRAINER, state)
        write_manifest(new, {DONE: trainer.done, SCORE: score})
        for path in foreign_files(Path(folder)):
            copy = new / path.relative_to(folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, copy)

    with_new_folder(folder, write, check=_check_written, retire=retire)


def _check_finite(folder: Path, trainer: Checkpointable, tensors: Mapping[str, torch.Tensor]) -> None:
    for kind, named in (("weight", trainer.weights()), ("optimizer's tensor", tensors.items())):
        for name, tensor in named:
            if not is_finite(tensor):
                raise FloatingPointError(
                    f"{folder}: the checkpoint was not written, because the {kind} {name} is not finite"
                )


def _check_written(new: Path) -> None:
    found = damage(new)
    if found is not None:
        raise OSError(f"{found}: the disk did not store what was written to it")


def resume(folder: str | Path, trainer: Checkpointable, config: RunConfig, data: Mapping[str, str] = _NONE) -> Path:
    """Load the newest undamaged checkpoint into `trainer`, which was built from `config`; return its folder.

    A damaged checkpoint is skipped with a warning if an earlier one is undamaged.

    Raises:
        ValueError: there is no checkpoint; every checkpoint has a file that is missing or damaged; or the newest undamaged one
            has a different stage or seed, a changed setting (see `_MAY_CHANGE`), a model of different shapes, different data,
            or a different constant of the trainer. The reference of PPO is such a constant: the KL is measured to the policy
            that the run began with, not to the resumed one.
    """
    found = checkpoints(folder)
    damages: dict[Path, str] = {}
    for place in found:
        wrong = damage(place) if has_manifest(place) else None
        if wrong is None:
            for why in damages.values():
                notice(f"{why}; the run continues from the earlier checkpoint {place}")
            _load(place, trainer, config, data)
            return place
        damages[place] = wrong
    if not found:
        raise ValueError(
            f"{folder}: there is no checkpoint to resume from; give the folder that a checkpoint was saved in"
        )
    # Loading names the tensor or the value that is wrong, where it can; a checksum only names the file.
    trainer.whole = False
    _load(found[0], trainer, config, data)
    trainer.whole = False
    raise ValueError(f"{damages[found[0]]}; restore it from a copy, or begin again with --overwrite")


def has_manifest(folder: Path) -> bool:
    """Return whether the checkpoint in `folder` was written with a manifest. Those of earlier releases were not."""
    if (folder / MANIFEST).exists():
        return True
    try:
        return MANIFEST in read_json(folder / TRAINER).values()
    except (ValueError, OSError):
        return True  # a checkpoint without a readable trainer.json is damaged in any case


def _load(folder: Path, trainer: Checkpointable, config: RunConfig, data: Mapping[str, str]) -> None:
    model = next((name for name in _PARTS if (folder / name).is_file()), "config.json")
    require(folder, model, OPTIMIZER, TRAINER, CONFIG)
    constants = trainer.constants()
    ours = trainer.state()
    later = {name: ours.pop(name) for name in ("planned_steps", "merges", "limits", "passes") if name in ours}
    kinds = {name: type(value) for name, value in ours.items()}
    kinds |= {"seed": int, "optimizer_tensors": int, "data": dict} | dict.fromkeys(constants, str)
    state = _read_state(folder / TRAINER, kinds)
    for name, value in later.items():  # checkpoints of earlier versions have none of these
        if name in state and not _like(state[name], value):
            raise ValueError(f"{folder / TRAINER}: got {state[name]!r} for {name}, expected a value like {value!r}")
    # Old PPO checkpoints have no stage.
    stage = state.get("stage", "ppo")
    if stage != trainer.stage:
        raise ValueError(f"{folder}: got a checkpoint of the stage {stage}, expected the stage {trainer.stage}")
    if state["seed"] != trainer.seed:
        raise ValueError(f"{folder}: got a run with seed {state['seed']}, expected {trainer.seed}, the config's seed")
    check_settings(folder, config, trainer.stage)
    for role, found in constants.items():
        if state[role] != found:
            raise ValueError(
                f"{folder}: the {role} policy of this run differs from that of the checkpoint; use the model that it began with"
            )
    _check_data(folder, state["data"], data)
    tensors = read_tensors(folder / OPTIMIZER)
    if len(tensors) != state["optimizer_tensors"]:
        raise ValueError(
            f"{folder / OPTIMIZER}: got {len(tensors)} tensors, expected {state['optimizer_tensors']} as in {TRAINER}"
        )
    trainer.load(folder, state, tensors)


def _check_data(folder: Path, before: Mapping[str, Any], now: Mapping[str, str]) -> None:
    """Raise ValueError for an input whose content has changed, except a reward function's file, of which warn."""
    for key, value in now.items():
        if before.get(key) == value:
            continue
        if key == REWARD_FUNCTION and (key in before or "reward.path" not in before):
            if key in before:  # checkpoints of earlier releases have no fingerprint of it
                notice(
                    f"{key}: its file has changed since the run of {folder} began; the run continues with the new one"
                )
            continue
        raise ValueError(f"{key}: the content has changed since the run of {folder} began; restore it to resume")
    for key in before:
        if key not in now:
            raise ValueError(f"{key}: the run of {folder} began with it, and it is not set now; set it to resume")


def check_settings(folder: str | Path, config: RunConfig, stage: str = "ppo") -> None:
    """Raise ValueError with the first setting that `config` changes and a resumed run of `stage` may not change."""
    source, may_change = Path(folder) / CONFIG, _MAY_CHANGE[stage]
    before = dict(flat_settings(load_saved_config(source).to_dict(), may_change))
    for key, value in flat_settings(config.to_dict(), may_change):
        same, part = _SAME.get(key, ()), _COMPARED.get(key, lambda value: value)
        if part(value) != part(before[key]) and not (value in same and before[key] in same):
            raise ValueError(f"{key}: got {value!r}, expected {before[key]!r} to go on with the run of {source}")


def fingerprint(weights: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Return the SHA-256 of the names, shapes, dtypes and bytes of tensors, sorted by name.

    Sharded tensors are gathered one after the other; all ranks must call.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(weights):
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        if hasattr(parameter, "full_tensor"):
            parameter = cast("Any", parameter).full_tensor()
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


def _like(found: object, ours: object) -> bool:
    """Return whether a value from JSON has the structure of ours: numbers, tuples of one length, lists of like elements.

    An object may have further names, whose values are numbers, and null for a number.
    """
    if isinstance(ours, dict):
        known = cast("dict[str, object]", ours)
        return isinstance(found, dict) and all(
            (value is None and not isinstance(known.get(name), (dict, list, tuple)))
            or _like(value, 0 if known.get(name) is None else known[name])
            for name, value in cast("dict[str, object]", found).items()
        )
    if isinstance(ours, (list, tuple)):
        values, elements = cast("Sequence[object]", found), cast("Sequence[object]", ours)
        if not isinstance(found, list) or not values:
            return False
        if isinstance(ours, tuple):
            return len(values) == len(elements) and all(map(_like, values, elements))
        return all(_like(value, elements[0]) for value in values)
    if isinstance(ours, bool):
        return isinstance(found, bool)
    return isinstance(found, (int, float)) and not isinstance(found, bool)
