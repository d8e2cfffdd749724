"""Trials before a stage trains: what would fail only at its end fails within seconds, and leaves nothing on the disk.

* `try_output` writes the output folder with the model and the installed release of transformers, and loads it.
* `check_disk` compares the free space with the checkpoints that the settings imply.
* `try_reward` scores two samples.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_engine import files
from rlhf_engine.checkpoint import Checkpointable
from rlhf_engine.config import RunConfig
from rlhf_engine.files import read_model_config
from rlhf_engine.model import LanguageModel
from rlhf_engine.model.pretrained import load_tokenizer, write_pretrained
from rlhf_engine.model.reward_model import RewardModel
from rlhf_engine.model.saving import save_language_model, saved_tensors
from rlhf_engine.model.trunk import top_of
from rlhf_engine.optim.build import state_bytes
from rlhf_engine.planner.report import size
from rlhf_engine.ppo.trainer import PPOTrainer
from rlhf_engine.rollout import EOS, Rollout
from rlhf_engine.supervised.reward_model import RewardTrainer
from rlhf_engine.supervised.sft import SFTTrainer
from rlhf_engine.supervised.trainer import SupervisedTrainer

WHOLE_BYTES = 2**30
"""Models with at most these bytes of weights are written and loaded whole, others without their large weights."""
_PART_BYTES = 2**26
_TRIAL = ".rlhf-trial-"
"""Beginning of the names of temporary folders."""
_TRIED_TOKENS = 8
"""Tokens of a response that a reward is tried on, without its EOS."""

_SECTIONS = {"sft": "sft", "rm": "reward", "ppo": "ppo"}


def try_output(
    trainer: SupervisedTrainer[Any] | PPOTrainer, tokenizer: PreTrainedTokenizerBase, config: RunConfig
) -> None:
    """Write the result of a stage as it is now to a temporary folder on the disk of `output_dir`, and load it.

    Raises:
        ValueError: the folder cannot be written or loaded, or a weight differs after loading.
    """

    def write(folder: Path) -> None:
        trainer.write_model(folder, tokenizer, complete=True)

    model = _model_of(trainer)

    def read(folder: Path) -> Mapping[str, Tensor]:
        return (
            saved_tensors(folder, model, device="cpu")
            if isinstance(model, LanguageModel)
            else model.saved_tensors(folder)
        )

    weights = dict(model.named_parameters() if model.adapters is None else model.stored())
    _try(weights, write, read, _written(model), tokenizer, config)


def try_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: RunConfig) -> None:
    """Write `model.path` to a temporary folder and load it, as `try_output` does with the result of a stage."""
    policy = LanguageModel(model)

    def write(folder: Path) -> None:
        save_language_model(folder, policy, tokenizer)

    _try(
        dict(policy.stored()),
        write,
        lambda folder: saved_tensors(folder, policy, device="cpu"),
        model,
        tokenizer,
        config,
    )


def _try(
    weights: Mapping[str, Tensor],
    write: Callable[[Path], object],
    read: Callable[[Path], Mapping[str, Tensor]],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: RunConfig,
) -> None:
    """Write and read `weights` whole, or of large ones only the small weights of `model`, and the tokenizer.

    Adapters are always whole, because they are small and reading them loads no model.
    """
    place, trusted = existing_folder(config.output_dir), config.model.trust_remote_code
    whole = sum(tensor.nbytes for tensor in weights.values()) <= WHOLE_BYTES and config.memory.budget is None
    whole = whole or len(weights) < len(dict(model.named_parameters()))
    try:
        if place == Path(config.output_dir).absolute():  # locked, so that a trial there was killed
            for left in place.glob(f"{_TRIAL}*"):
                files.disk.delete(left)
        with tempfile.TemporaryDirectory(dir=place, prefix=_TRIAL) as name:
            folder = Path(name)
            if whole:
                write(folder)
                _compare(weights, read(folder))
            else:
                write_pretrained(folder, model, tokenizer, weights=_small_weights(model))
                read_model_config(folder, trust_remote_code=trusted)
            load_tokenizer(folder, trust_remote_code=trusted)
    except ValueError as error:
        raise ValueError(
            f"{error}; the result of this run could not be saved, so nothing is trained: correct the files of model.path "
            f"({config.model.path}), or install a different release of transformers"
        ) from error
    except (OSError, SafetensorError) as error:
        raise ValueError(f"output_dir: {place} cannot be written: {error}") from error


def check_disk(trainer: Checkpointable, config: RunConfig, *replaced: Path) -> None:
    """Raise ValueError unless the disk of `output_dir` has space for the run's checkpoints and its result.

    Two checkpoints exist while one replaces the other, unless `checkpoint_every` is 0. A checkpoint of a sharded model is
    written from the parts of the ranks and from whole tensors. `replaced` are folders of an earlier run that the run replaces.
    """
    section = getattr(config, _SECTIONS[trainer.stage])
    model = sum(tensor.nbytes for _, tensor in trainer.weights())
    trained = [tensor for _, tensor in trainer.weights() if tensor.requires_grad]
    checkpoint = model + state_bytes(trained, config.memory.optimizer_state)
    if trainer.stage == "sft":
        checkpoint += model  # the weights of the lowest validation loss
    copies = 1 if section.checkpoint_every == 0 else 2
    frozen = _frozen_bytes(trainer)
    needed = copies * checkpoint + frozen
    if isinstance(trainer, PPOTrainer) and trainer.sharded:
        needed += 2 * checkpoint
    if trainer.stage != "ppo":
        needed = max(copies * checkpoint, checkpoint + model + frozen)
    place = existing_folder(config.output_dir)
    kept = sum(path.stat().st_size for folder in replaced for path in folder.rglob("*") if path.is_file())
    free = shutil.disk_usage(place).free + kept
    if needed > free:
        fewer = "" if copies == 1 else f", or set {_SECTIONS[trainer.stage]}.checkpoint_every=0, which needs one copy"
        raise ValueError(
            f"output_dir: got {size(free)} of space on the disk of {place}, expected {size(needed)}: a checkpoint of this run "
            f"has {size(checkpoint)}, and {'the result' if copies == 1 else 'a second one'} is written before it is deleted; "
            f"free some space, set a different output_dir{fewer}"
        )


def try_reward(trainer: PPOTrainer, eos_id: int) -> None:
    """Score two samples: the first prompts of the run with the beginnings of the same prompts as responses.

    Raises:
        ValueError: the reward raises, or does not return one number per sample.
    """
    device = trainer.policy.device
    prompts = [prompt.long().to(device) for prompt in trainer.prompts(0, 2)]
    end = torch.tensor([eos_id], device=device)
    responses = [torch.cat([prompt[:_TRIED_TOKENS], end]) for prompt in reversed(prompts)]
    mask = _padded([torch.ones_like(response) for response in responses]).bool()
    empty = torch.zeros(mask.shape, device=device)
    rollout = Rollout(
        prompt_ids=_padded(prompts),
        prompt_lengths=torch.tensor([len(prompt) for prompt in prompts], device=device),
        response_ids=_padded(responses),
        mask=mask,
        logprobs=empty,
        sampling_logprobs=empty,
        values=empty,
        stop_reason=torch.full((2,), EOS, device=device),
    )
    try:
        scores = trainer.reward(rollout)
    except ValueError as error:
        raise ValueError(f"{error}; the reward was tried on two samples, and nothing is trained") from error
    if tuple(scores.shape) != (2,):
        raise ValueError(f"reward: got scores of shape {tuple(scores.shape)} for two samples, expected (2,)")


def existing_folder(output_dir: str | Path) -> Path:
    """Return `output_dir`, or the nearest folder above it that exists; raise ValueError if a file is in its place."""
    wanted = Path(output_dir).absolute()
    found = next(place for place in (wanted, *wanted.parents) if place.exists() or place.is_symlink())
    if not found.is_dir():
        raise ValueError(
            f"output_dir: {found} is not a folder, so {wanted} cannot be created; set a different output_dir"
        )
    return found


def _model_of(trainer: Checkpointable) -> LanguageModel | RewardModel:
    """Return the model that a trainer trains."""
    if isinstance(trainer, PPOTrainer):
        return trainer.policy
    if isinstance(trainer, SFTTrainer):
        return trainer.actor
    assert isinstance(trainer, RewardTrainer)
    return trainer.model


def _written(model: LanguageModel | RewardModel) -> PreTrainedModel:
    """Return the part of a model that transformers writes."""
    return model.model if isinstance(model, LanguageModel) else model.trunk


def _frozen_bytes(trainer: Checkpointable) -> int:
    """Return the bytes of frozen layers that the result of a run has, and its checkpoints do not have."""
    model = _model_of(trainer)
    top, written = top_of(model.trunk), _written(model)
    if model.adapters is not None or top is None or top.base is None:
        return 0
    kept = {id(weight) for _, weight in top.trained_tensors(written)}
    copies = 2 if isinstance(trainer, PPOTrainer) and trainer.update_rule.average is not None else 1
    return copies * sum(weight.nbytes for weight in written.parameters() if id(weight) not in kept)


def _small_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the smallest weights of a model, `_PART_BYTES` at most."""
    kept, total = {}, 0
    for name, tensor in sorted(model.state_dict().items(), key=lambda item: item[1].nbytes):
        total += tensor.nbytes
        if kept and total > _PART_BYTES:
            break
        kept[name] = tensor
    return kept


@torch.no_grad()
def _compare(weights: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    for name, tensor in weights.items():
        if name not in found or not torch.equal(found[name].cpu(), tensor.cpu()):
            raise ValueError(f"the weight {name} is lost or changed when the model is saved and loaded again")


def _padded(rows: Iterable[Tensor]) -> Tensor:
    return pad_sequence(list(rows), batch_first=True)
