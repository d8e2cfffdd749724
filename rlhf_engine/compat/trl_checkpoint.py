"""Checkpoints of `PPOTrainer` in the layout of transformers: OUTPUT_DIR/checkpoint-N after N updates.

A checkpoint holds what changes: policy, value model, optimizer, learning rate, counters, random states and the position in the
dataset. All files are safetensors or JSON. It is written to a new folder, synced and renamed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerState

from rlhf_engine import files
from rlhf_engine.compat.trl_roles import is_adapted
from rlhf_engine.errors import foreign_errors
from rlhf_engine.files import OPTIMIZER, read_json, read_tensors, require, with_new_folder, write_json
from rlhf_engine.model.pretrained import write_pretrained
from rlhf_engine.model.reward_model import VALUE_MODEL
from rlhf_engine.optim.adamw import Optimizer
from rlhf_engine.optim.state_dict import load_optimizer_tensors, optimizer_tensors

STATE, RANDOM, TRAINER_STATE = "rlhf_trainer.json", "random.safetensors", "trainer_state.json"
_NAME = re.compile(r"checkpoint-(\d+)")


class Batches:
    """Endless batches of a data loader, in the order in which TRL's trainer gets them, from any position.

    A pass draws its order from torch's global generator. The state of the generator at the start of the pass is kept, so that a
    resumed run draws the same order.
    """

    def __init__(self, loader: DataLoader) -> None:
        self.loader, self.start, self.used = loader, torch.get_rng_state(), 0
        self._pass: Iterator[Any] | None = None

    def next(self) -> Any:
        """Return the next batch."""
        if self._pass is None or self.last_of_pass:
            self.start, self.used = torch.get_rng_state(), 0
            self._pass = iter(self.loader)
        self.used += 1
        return next(self._pass)

    @property
    def last_of_pass(self) -> bool:
        """Whether the last returned batch is the last one of a pass."""
        return self.used == len(self.loader)

    def go_to(self, start: Tensor, used: int) -> None:
        """Continue after `used` batches of the pass that began with the generator's state `start`."""
        now = torch.get_rng_state()
        torch.set_rng_state(start)
        self.start, self.used, begun = start, used, iter(self.loader)
        for _ in range(used):
            next(begun)
        self._pass = begun
        torch.set_rng_state(now)


def checkpoints(output_dir: str | Path) -> list[Path]:
    """Return the checkpoints in a folder, the newest first."""
    found = [(int(match[1]), path) for path in Path(output_dir).glob("checkpoint-*") if (match := _match(path))]
    return [path for _, path in sorted(found, reverse=True)]


def _match(path: Path) -> re.Match[str] | None:
    return _NAME.fullmatch(path.name) if path.is_dir() else None


def find(resume_from: str | bool, output_dir: str | Path) -> Path:
    """Return the checkpoint that `resume_from_checkpoint` names; True is the newest one in `output_dir`.

    Raises:
        ValueError: there is none.
    """
    if isinstance(resume_from, bool):
        found = checkpoints(output_dir)
        if not found:
            raise ValueError(f"resume_from_checkpoint: {output_dir} has no checkpoint; leave it out to begin a new run")
        return found[0]
    require(Path(resume_from), STATE, RANDOM, OPTIMIZER, TRAINER_STATE)
    return Path(resume_from)


def write_models(
    folder: Path, policy: nn.Module, value_model: nn.Module, tokenizer: PreTrainedTokenizerBase | None
) -> None:
    """Write the policy with its tokenizer into a folder, and the value model into its subfolder `value_model`."""
    write_pretrained(folder, cast("PreTrainedModel", policy), tokenizer)
    (folder / VALUE_MODEL).mkdir(exist_ok=True)
    write_pretrained(folder / VALUE_MODEL, cast("PreTrainedModel", value_model))


def save(
    folder: Path,
    *,
    policy: nn.Module,
    value_model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    optimizer: Optimizer,
    scheduler: Any,
    state: TrainerState,
    batches: Batches,
    keep: int | None,
) -> None:
    """Write a checkpoint, then delete the oldest ones beyond `keep`."""
    words: Any = np.random.get_state()
    random = {
        "torch": torch.get_rng_state(),
        "pass": batches.start,
        "numpy": torch.from_numpy(words[1].astype("int64")),
    }
    record = {
        "batches": batches.used,
        "numpy": [words[0], *(int(one) for one in words[2:4]), float(words[4])],
        "scheduler": scheduler.state_dict(),
    }

    def write(new: Path) -> None:
        write_models(new, policy, value_model, tokenizer)
        save_file(optimizer_tensors(optimizer), new / OPTIMIZER)
        save_file(random, new / RANDOM)
        write_json(new / STATE, record)
        state.save_to_json(str(new / TRAINER_STATE))

    with_new_folder(folder, write)
    for old in checkpoints(folder.parent)[keep or None :] if keep else ():
        files.remove(old)


def load(
    folder: Path,
    *,
    policy: nn.Module,
    value_model: nn.Module,
    optimizer: Optimizer,
    scheduler: Any,
    batches: Batches,
) -> dict[str, Any]:
    """Restore everything that `save` wrote; return the fields of the trainer's state.

    Raises:
        ValueError: a file is missing, broken, or of a different model or optimizer. The message names it.
    """
    record, fields = read_json(folder / STATE), read_json(folder / TRAINER_STATE)
    random, moments = read_tensors(folder / RANDOM), read_tensors(folder / OPTIMIZER)
    for model, place in ((policy, folder), (value_model, folder / VALUE_MODEL)):
        _load_weights(model, place)
    load_optimizer_tensors(optimizer, moments, folder / OPTIMIZER)
    with foreign_errors(f"{folder / STATE}: expected the checkpoint of a run with the same lr_scheduler_type"):
        scheduler.load_state_dict(record["scheduler"])
        for group, rate in zip(optimizer.param_groups, scheduler.get_last_lr(), strict=True):
            group["lr"] = rate
        kind, *numbers = record["numpy"]
        np.random.set_state((kind, random["numpy"].numpy().astype("uint32"), *numbers))
        batches.go_to(random["pass"], record["batches"])
        torch.set_rng_state(random["torch"])
    return fields


def _load_weights(model: nn.Module, folder: Path) -> None:
    """Copy the weights, or the adapter, that `write_models` wrote into a model."""
    where = f"{folder}: expected the checkpoint of a run with the same models"
    if is_adapted(model):
        from peft import load_peft_weights, set_peft_model_state_dict

        require(folder, "adapter_config.json")
        with foreign_errors(where):
            found = set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"))
        if found.unexpected_keys:
            raise ValueError(f"{where}: got the tensor {found.unexpected_keys[0]}, which the model does not have")
        return
    require(folder, "config.json")
    live = cast("PreTrainedModel", model)
    with foreign_errors(where):
        stored = type(live).from_pretrained(folder, dtype=live.dtype, local_files_only=True)
        live.load_state_dict(stored.state_dict())
