"""Checkpoints: safetensors and JSON, written aside, synced and renamed, so that a folder is whole or absent.

A folder holds the policy and its tokenizer as transformers saves them (`AutoModelForCausalLM.from_pretrained` reads it), and
beside them `value_head.safetensors` or the folder `value_model`, `optimizer.safetensors`, `trainer.json` and the run's
`config.yaml`; a run that averages its weights has the average in `ema`, a folder of the same kind. Random numbers need no
state of their own: they are functions of the seed and the counters in `trainer.json`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

from rlhf_engine.config import RunConfig, flat_settings, load_saved_config, save_config
from rlhf_engine.files import read_json, read_tensors, recover, require, with_new_folder, write_json
from rlhf_engine.model.heads import VALUE_HEAD
from rlhf_engine.model.saving import copy_weights, save_policy
from rlhf_engine.optim.state_dict import load_optimizer_tensors, optimizer_tensors
from rlhf_engine.ppo.trainer import PPOTrainer

_NONE: Mapping[str, str] = MappingProxyType({})

EMA = "ema"
"""Folder inside a checkpoint: the averaged weights, a model like the checkpoint itself."""

OPTIMIZER, TRAINER, CONFIG = "optimizer.safetensors", "trainer.json", "config.yaml"

_MAY_CHANGE = {
    "output_dir",
    "device",
    "rollout.check_sequences",
    "rollout.batch_size",  # a sequence depends on its number alone
    "rollout.prefill_tokens",
    "model.path",
    *(f"reward.{name}" for name in ("path", "epochs", "batch_size", "microbatch", "evaluate_every", "optim")),
    "data.demonstrations",
    "data.comparisons",
    "data.prompts",
    "data.pretrain",
    "data.max_response_tokens",
    "data.validation_share",
    "data.hygiene",
    "memory.budget",
    "memory.gradient_checkpointing",  # the same bits
    "ppo.updates",
    "ppo.checkpoint_every",
    "sft",
    "eval",
    "iterate",
}
"""Keys and sections that a resumed run may have otherwise: places, the length of the run, and what PPO does not read.

What lies in the places of prompts, pretraining text and reward model may not change: a checkpoint has its fingerprints.
"""

_SAME = {"memory.optimizer_state": ("resident", "host")}
"""Values of a key that a resumed run may exchange: the same numbers in another place."""


def save_checkpoint(
    folder: str | Path,
    trainer: PPOTrainer,
    tokenizer: PreTrainedTokenizerBase | None,
    config: RunConfig,
    data: Mapping[str, str] = _NONE,
) -> None:
    """Write all that `resume` needs to go on with the same numbers, whole or not at all.

    `data` are fingerprints of what the run reads, by the key of its place, such as data.prompts.
    """
    tensors = optimizer_tensors(trainer.update_rule.optimizer)
    state = trainer.state() | {
        "seed": trainer.seed,
        "optimizer_tensors": len(tensors),
        "reference": fingerprint(trainer.reference.weights()),
        "data": dict(data),
    }

    def write(new: Path) -> None:
        save_policy(new, trainer.policy, tokenizer)
        if trainer.update_rule.average is not None:
            (new / EMA).mkdir()
            save_policy(new / EMA, trainer.update_rule.average.model, tokenizer)
        save_file(tensors, new / OPTIMIZER)
        write_json(new / TRAINER, state)
        save_config(config, new / CONFIG)

    with_new_folder(folder, write)


def resume(folder: str | Path, trainer: PPOTrainer, config: RunConfig, data: Mapping[str, str] = _NONE) -> None:
    """Put weights, optimiser and counters of a checkpoint into `trainer`, which was made from `config`.

    Raises ValueError for a file that is missing or broken, another seed, a setting of PPO that is not what the run began
    with (see `_MAY_CHANGE`), a model of other shapes, or another reference policy: the KL is measured to the policy that
    the run began with, never to the one that it resumes from.
    """
    folder = Path(folder)
    recover(folder)
    heads = (VALUE_HEAD,) if trainer.policy.value.shares_trunk else ()
    require(folder, "config.json", *heads, OPTIMIZER, TRAINER, CONFIG)
    kinds = {name: type(value) for name, value in trainer.state().items()}
    kinds |= {"seed": int, "optimizer_tensors": int, "reference": str, "data": dict}
    state = _read_state(folder / TRAINER, kinds)
    if state["seed"] != trainer.seed:
        raise ValueError(f"{folder}: got a run with seed {state['seed']}, expected {trainer.seed}, the config's seed")
    check_settings(folder, config)
    if state["reference"] != fingerprint(trainer.reference.weights()):
        raise ValueError(
            f"{folder}: its reference policy is another model than the one given; expected the model it began with"
        )
    for key, value in data.items():
        if state["data"].get(key) != value:
            raise ValueError(f"{key}: got another content than the run of {folder} began with, expected the same")
    tensors = read_tensors(folder / OPTIMIZER)
    if len(tensors) != state["optimizer_tensors"]:
        raise ValueError(
            f"{folder / OPTIMIZER}: got {len(tensors)} tensors, expected the {state['optimizer_tensors']} of {TRAINER}"
        )
    copy_weights(folder, trainer.policy)
    if trainer.update_rule.average is not None:
        require(folder / EMA, "config.json", *heads)
        copy_weights(folder / EMA, trainer.update_rule.average.model)
    load_optimizer_tensors(trainer.update_rule.optimizer, tensors, folder / OPTIMIZER)
    trainer.load_state(state)


def check_settings(folder: str | Path, config: RunConfig) -> None:
    """ValueError naming the first setting that is not what the run of a checkpoint began with, and may not differ."""
    source = Path(folder) / CONFIG
    before = dict(flat_settings(load_saved_config(source).to_dict(), _MAY_CHANGE))
    for key, value in flat_settings(config.to_dict(), _MAY_CHANGE):
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
    """SHA-256 of rows of token ids, in their order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(f"{len(row)} ".encode())
        digest.update(row.long().contiguous().numpy().data)
    return digest.hexdigest()


def _read_state(path: Path, kinds: dict[str, type]) -> dict[str, Any]:
    """The object in a JSON file; ValueError naming the first of `kinds` that it lacks or has of another type."""
    state = read_json(path)
    for name, kind in kinds.items():
        if not isinstance(state.get(name), kind):
            raise ValueError(f"{path}: got {state.get(name)!r} for {name}, expected {kind.__name__}")
    return state
