"""The command `rlhf merge`: from an adapter, or the top layers of an unfinished run, to a complete model."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from rlhf_engine.files import read_json, with_new_folder
from rlhf_engine.model.heads import VALUE_HEAD
from rlhf_engine.model.pretrained import base_folder, is_adapter, is_top, load_tokenizer, write_pretrained
from rlhf_engine.model.reward_model import HEAD_FILE, VALUE_MODEL, RewardModel
from rlhf_engine.model.roles import POLICY
from rlhf_engine.model.saving import load_causal_lm
from rlhf_engine.model.trunk import adapters_of

_AVERAGE = "ema"


def merge_adapter(source: Path, target: Path, dtype: str | None = None, *, trust_remote_code: bool = False) -> None:
    """Write the model of an adapter's folder, with the adapter added to its weights, to a new folder.

    The folder may also be a checkpoint with only the top layers, to which those below are added. A reward model stays one. A
    value function and averaged weights in the folder are written too. The sums are computed in float32 and rounded once.

    Args:
        source: folder of an adapter or of top layers.
        target: folder to write.
        dtype: dtype of the weights, such as bfloat16; None is that of the model to which the adapter belongs.
        trust_remote_code: whether Python code from the folder of the model may run.

    Raises:
        ValueError: `source` is neither, `target` exists, or a file is missing or broken.
    """
    if not (is_adapter(source) or (is_top(source) and not (source / HEAD_FILE).is_file())):
        if is_top(source):
            raise ValueError(
                f"{source}: got the checkpoint of an unfinished reward model; finish it with rlhf rm --resume"
            )
        raise ValueError(f"{source}: got no adapter (adapter_config.json), expected the folder of one")
    if target.exists():
        raise ValueError(f"{target}: exists already; give a new folder")
    kind = getattr(torch, dtype or _stored_dtype(source))
    with_new_folder(target, lambda new: _write(source, new, kind, trust_remote_code=trust_remote_code))


def _write(source: Path, new: Path, dtype: torch.dtype, *, trust_remote_code: bool) -> None:
    if (source / HEAD_FILE).is_file():
        RewardModel.load(source, trust_remote_code=trust_remote_code).merged(dtype).save(new)
    else:
        model = load_causal_lm(source, trust_remote_code=trust_remote_code)
        adapters = adapters_of(model)
        if adapters is not None:
            adapters.merge(POLICY)
        write_pretrained(new, model.to(dtype))  # pyright: ignore[reportArgumentType]  # a decorator hides `self`
    if (source / VALUE_HEAD).is_file():
        shutil.copyfile(source / VALUE_HEAD, new / VALUE_HEAD)
    for name in (VALUE_MODEL, _AVERAGE):
        if is_adapter(source / name) or is_top(source / name):
            (new / name).mkdir()
            _write(source / name, new / name, dtype, trust_remote_code=trust_remote_code)
        elif (source / name).is_dir():
            shutil.copytree(source / name, new / name)
    if (source / "tokenizer_config.json").is_file():
        write_pretrained(new, None, load_tokenizer(source, trust_remote_code=trust_remote_code))


def _stored_dtype(source: Path) -> str:
    """Return the dtype in the config.json of the model to which an adapter belongs."""
    config = read_json(base_folder(source) / "config.json")
    found = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    return found if found in ("float32", "bfloat16", "float16") else "float32"
