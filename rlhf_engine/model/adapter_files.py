"""A folder with one adapter in peft's format, and the fingerprint of the model that the adapter belongs to.

`adapter_config.json` and `adapter_model.safetensors` are peft's, so that `PeftModel.from_pretrained` loads the folder.
`rlhf_adapter.json` has the fingerprint, so that an adapter is never added to a different model, or to one that has changed.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from rlhf_engine.config import AdapterConfig
from rlhf_engine.files import disk, read_json, read_tensors, require, write_json
from rlhf_engine.model.pretrained import ADAPTER, base_folder, weight_files

WEIGHTS, RECORD = "adapter_model.safetensors", "rlhf_adapter.json"
_PREFIX = "base_model.model."
"""Prefix in peft's files of the names of a model's weights."""

_READ = ("r", "lora_alpha", "target_modules", "use_rslora", "fan_in_fan_out")
"""Fields of adapter_config.json that define the adapter."""
_IGNORED = (
    *(
        "peft_type",
        "peft_version",
        "task_type",
        "auto_mapping",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
    ),
    *("lora_dropout", "megatron_core", "runtime_config", "qalora_group_size"),
)
"""Fields that do not change what a trained adapter computes."""
_HARMLESS_STARTS = (True, False, "gaussian")
"""Values of `init_lora_weights` that leave the base model as it was; others, such as PiSSA, change its weights."""


@dataclass(frozen=True)
class Base:
    """The folder of a model to which adapters belong, and the fingerprint of its weights."""

    folder: str
    fingerprint: str

    @classmethod
    def of(cls, folder: str | Path) -> Base:
        """Return the base in a folder of safetensors."""
        path = Path(folder)
        names = sorted(weight_files(path))
        require(path, "config.json", *names)
        stats = ((path / name).stat() for name in names)
        return cls(str(path.resolve()), _digest(path, tuple((one.st_size, one.st_mtime_ns) for one in stats)))


@functools.lru_cache(maxsize=8)
def _digest(folder: Path, stats: tuple[tuple[int, int], ...]) -> str:
    """Return the SHA-256 of the files of a model's weights; `stats` change when the files do."""
    return " ".join(
        disk.digest(folder / name) for name in sorted(weight_files(folder)) if name.endswith(".safetensors")
    )


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter that was read from a folder."""

    folder: Path
    settings: AdapterConfig
    """Rank, scale and targets."""
    tensors: Mapping[str, torch.Tensor]
    """The matrices A and B by the names of their layers, such as `model.layers.0.mlp.up_proj.lora_A.weight`."""
    base: Base


def read_adapter(folder: str | Path) -> StoredAdapter:
    """Return the adapter in a folder.

    Raises:
        ValueError: a file is missing or broken; the adapter is of a kind that is not supported; or the weights of its base
            are not those that it was trained on. The message names the file.
    """
    folder = Path(folder)
    require(folder, ADAPTER, WEIGHTS)
    settings = _settings(folder / ADAPTER, read_json(folder / ADAPTER))
    base = Base.of(base_folder(folder))
    if (folder / RECORD).is_file():  # folders of other programs have none
        check_base(folder, base)
    tensors = {name.removeprefix(_PREFIX): tensor for name, tensor in read_tensors(folder / WEIGHTS).items()}
    return StoredAdapter(folder, settings, tensors, base)


def check_base(folder: Path, base: Base, record: str = RECORD, what: str = "the adapter belongs") -> None:
    """Raise ValueError unless what a folder holds, with its fingerprint in the file `record`, was trained on `base`."""
    expected = read_json(folder / record).get("base_fingerprint")
    if expected != base.fingerprint:
        raise ValueError(
            f"{folder}: {what} to other weights than those of {base.folder}: their SHA-256 is "
            f"{base.fingerprint[:16]}..., expected {str(expected)[:16]}... ({record}); restore the model that it was trained on"
        )


def trained_on(folder: str | Path) -> str | None:
    """Return the `model.quant` that the adapter in a folder was trained with; None if it is of a different program."""
    record = Path(folder) / RECORD
    return str(read_json(record).get("quant", "none")) if record.is_file() else None


def write_adapter(
    folder: Path,
    settings: AdapterConfig,
    tensors: Mapping[str, torch.Tensor],
    base: Base,
    *,
    fan_in_fan_out: bool,
    quant: str = "none",
) -> None:
    """Write an adapter into an existing folder in peft's format; the targets of `settings` are names of layers.

    `quant` is the format of the weights that it was trained on, for `trained_on`.
    """
    content = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.folder,
        "inference_mode": True,
        "r": settings.rank,
        "lora_alpha": int(settings.alpha) if settings.alpha == int(settings.alpha) else settings.alpha,
        "target_modules": list(settings.targets),
        "use_rslora": settings.rslora,
        "fan_in_fan_out": fan_in_fan_out,
        "lora_dropout": 0.0,
        "bias": "none",
    }
    (folder / ADAPTER).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    stored = {_PREFIX + name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    save_file(stored, folder / WEIGHTS, metadata={"format": "pt"})
    write_json(folder / RECORD, {"base": base.folder, "base_fingerprint": base.fingerprint, "quant": quant})


def _settings(path: Path, content: dict[str, Any]) -> AdapterConfig:
    """Return the settings in adapter_config.json; raise ValueError with the first field that is not supported."""
    if content.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type: got {content.get('peft_type')!r}, expected 'LORA'")
    if content.get("use_dora"):
        raise ValueError(f"{path}: use_dora: got True, expected False: DoRA is not supported; train a LoRA adapter")
    if content.get("init_lora_weights", True) not in _HARMLESS_STARTS:
        start = content["init_lora_weights"]
        raise ValueError(f"{path}: init_lora_weights: got {start!r}, expected True: it changes the weights of the base")
    for name, value in content.items():
        if name not in (*_READ, *_IGNORED, "init_lora_weights") and value not in (None, False, "none", {}, []):
            raise ValueError(f"{path}: {name}: got {value!r}, which is not supported; expected plain LoRA")
    try:
        targets = content["target_modules"]
        return AdapterConfig(
            rank=content["r"],
            alpha=content["lora_alpha"],
            targets=(targets,) if isinstance(targets, str) else tuple(sorted(targets)),
            rslora=content.get("use_rslora", False),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not the config of a LoRA adapter: {error}") from None
