"""Files with which a number that was not finite is found again: the sequences, the weights and the settings."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rlhf_engine.config import RunConfig
from rlhf_engine.files import parse_json, with_new_file
from rlhf_engine.model import ActorCritic
from rlhf_engine.notices import notice
from rlhf_engine.ppo.callbacks import Callback
from rlhf_engine.ppo.experience import Experience, Scored, microbatch_size
from rlhf_engine.ppo.minibatch import minibatch_backward
from rlhf_engine.ppo.nonfinite import NonFinite, data_of, first_nonfinite, tensors_of
from rlhf_engine.ppo.trainer import PPOTrainer
from rlhf_engine.rollout import recompute

FOLDER = "repro"
"""Folder in OUTPUT_DIR with the files."""
MOST = 3
"""Files that a run writes at most: each has the trained weights."""
_WEIGHT = "weight:"
_KEY = "rlhf_repro"


class ReproFiles(Callback):
    """Callback that writes a file for each of the first `MOST` numbers that are not finite."""

    def __init__(self, config: RunConfig) -> None:
        self.config, self.count = config, 0

    def on_nonfinite(self, trainer: PPOTrainer, cause: NonFinite) -> None:
        """Write the file, and name it in `cause`."""
        if self.count == MOST:
            return
        self.count += 1
        path = Path(self.config.output_dir) / FOLDER / f"update-{cause.update}-{self.count}.safetensors"
        try:
            write_repro(path, trainer, self.config, cause)
        except (OSError, SafetensorError) as error:
            notice(f"{path}: could not be written: {error}")
            return
        cause.file = path


def write_repro(path: Path, trainer: PPOTrainer, config: RunConfig, cause: NonFinite) -> None:
    """Write the sequences of `cause`, the weights that the run trains, and the settings."""
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors_of(cause.data).items()}
    # Weights may share memory with one another, which the format does not allow.
    tensors |= {_WEIGHT + name: tensor.detach().clone() for name, tensor in trainer.policy.stored()}
    about = {
        "config": config.to_dict(),
        "update": cause.update,
        "found": str(cause),
        "changing": dict(cause.changing),
    }
    with_new_file(path, lambda new: save_file(tensors, new, metadata={_KEY: json.dumps(about)}))


class Repro:
    """The content of a file that `write_repro` wrote.

    Raises:
        ValueError: `path` is not such a file.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise ValueError(f"{path}: no such file; a run writes it to OUTPUT_DIR/{FOLDER}")
        try:
            with safe_open(path, framework="pt") as file:
                about = parse_json((file.metadata() or {})[_KEY])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            self.config = RunConfig.from_dict(about["config"])
            self.update, self.found, self.changing = about["update"], about["found"], about["changing"]
            self.weights = {name.removeprefix(_WEIGHT): x for name, x in tensors.items() if name.startswith(_WEIGHT)}
            self.tensors = {name: x for name, x in tensors.items() if not name.startswith(_WEIGHT)}
            self.data = data_of(self.tensors)
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: not a file for rlhf repro ({type(error).__name__}: {error})") from None

    def replay(self, policy: ActorCritic) -> tuple[list[str], str | None]:
        """Repeat the computation; return a line per tensor that is not finite, and the operation, or None if all is finite."""
        self._load(policy)
        lines = [f"{name}: {found}" for name, tensor in self.tensors.items() if (found := _bad(tensor)) is not None]
        lines += [f"weight {name}: {found}" for name, x in self.weights.items() if (found := _bad(x)) is not None]
        data = _on(self.data, policy.device)
        run, inputs = (
            (self._gradient(policy, data), tensors_of(data))
            if isinstance(data, Experience)
            else (self._log_probs(policy, data), {})
        )
        return lines, first_nonfinite(policy, inputs, run)

    def _load(self, policy: ActorCritic) -> None:
        """Copy the weights of the file into the policy."""
        ours = dict(policy.named_parameters())
        for name, weight in self.weights.items():
            if name not in ours or ours[name].shape != weight.shape:
                raise ValueError(f"model.path: the model has no weight {name} of shape {tuple(weight.shape)}")
            ours[name].data.copy_(weight)

    def _gradient(self, policy: ActorCritic, data: Experience) -> Callable[[], Tensor | None]:
        everyone = torch.arange(len(data.rollout), device=policy.device)
        temperature = self.config.rollout.temperature

        def run() -> Tensor | None:
            metrics = minibatch_backward(policy, data, everyone, self.config.ppo, temperature, **self.changing)
            return torch.stack([value for name, value in metrics.items() if name.endswith("_loss")]).sum()

        return run

    def _log_probs(self, policy: ActorCritic, data: Scored) -> Callable[[], Tensor | None]:
        size, temperature = microbatch_size(self.config.ppo), self.config.rollout.temperature
        return lambda: recompute(policy, data.rollout, ("logprobs", "values"), temperature=temperature, **size)[
            "logprobs"
        ]


def _bad(tensor: Tensor) -> str | None:
    """Return how many numbers of a tensor are not finite and where the first one is; None if all are."""
    if not tensor.is_floating_point():
        return None
    bad = (~tensor.isfinite()).nonzero()
    if not len(bad):
        return None
    place = tuple(bad[0].tolist())
    return f"{len(bad):,} of {tensor.numel():,} numbers are not finite, the first is {float(tensor[place])} at {list(place)}"


def _on(data: Experience | Scored, device: torch.device) -> Experience | Scored:
    return data_of({name: tensor.to(device) for name, tensor in tensors_of(data).items()})


def with_device(config: RunConfig, device: str | None) -> RunConfig:
    """Return the config with a different device, and with values that start from zeros if a head's weights are in the file."""
    ppo = replace(config.ppo, value_init="zero") if config.ppo.value_model == "head" else config.ppo
    ppo = ppo if config.ppo.baseline == "value" else config.ppo
    return replace(config, ppo=ppo, device=device or config.device)
