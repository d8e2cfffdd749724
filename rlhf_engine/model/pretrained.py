"""Loading of models from a folder. A missing weight is an error and is never initialised at random."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlhf_engine.errors import foreign_errors
from rlhf_engine.files import read_json, read_model_config, read_tensors, remote_code_off, require
from rlhf_engine.model.checkpoint_kind import check_language_model, check_layers, finite, refuse_quantised
from rlhf_engine.model.heads import ValueHead
from rlhf_engine.model.quantised import QuantError, check_device, quant_of

Loaded = TypeVar("Loaded")

ADAPTER = "adapter_config.json"
"""File that marks the folder of an adapter in peft's format."""

TOP_RECORD = "rlhf_top_layers.json"
"""File that marks a folder with only the trained top layers of a model."""

_NO_ATTENTION = ("does not support an attention implementation", "does not support Flash Attention", "FlashAttention")
"""Parts of transformers' messages for an attention implementation that a model does not have or that is not installed."""

_log = logging.getLogger(__name__)


class _NoAttentionError(ValueError):
    """An attention implementation that is not available."""


def load_pretrained(
    kind: type,
    folder: str | Path,
    *,
    attention: str | None = "sdpa",
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
    quant: str = "none",
) -> PreTrainedModel:
    """Return the model of class `kind` (`AutoModelForCausalLM`, `AutoModel`) from a folder's safetensors, in evaluation mode.

    A tied weight is stored once and does not count as missing. Weights within the trunk that the model does not use are not
    read, and a log line names the first. `trust_remote_code` allows Python code from the folder to run. `quant` is the format
    of the linear layers in the trunk (`model.quant`), in which they are frozen.

    Raises:
        ValueError: a file or a weight is missing or broken, a shape is wrong, the weights are quantised, or the folder holds a
            model of a different kind. The message names the folder and the file or weight. Or `quant` needs a package that is
            not installed, or cannot store a weight.
    """
    from rlhf_engine.model.quantised_loading import finish, quantising  # adds a quantiser to those of transformers

    check_device(quant, device)
    folder = Path(folder)
    weights = weight_files(folder)
    require(folder, "config.json", *weights)
    if (folder / ADAPTER).is_file():
        # transformers would load the base model that the adapters name.
        raise ValueError(
            f"{folder}: got adapters of peft; merge them into their model with merge_and_unload() and save that"
        )
    config = read_model_config(folder, trust_remote_code=trust_remote_code)
    refuse_quantised(folder, weights)
    check_layers(folder, config, weights)
    if (folder / "generation_config.json").is_file():
        read_json(folder / "generation_config.json")  # transformers ignores a broken one
    what = f"{folder}: transformers {transformers.__version__} cannot load the model"

    def load(name: str | None) -> tuple[Any, dict[str, Any]]:
        # A warning of torch or transformers is not for the user, who cannot change their calls.
        with quantising(quant) as quantised, warnings.catch_warnings(action="ignore", category=UserWarning):
            return kind.from_pretrained(
                folder,
                dtype=dtype,
                attn_implementation=name,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                # Return mismatched shapes in `found`, which are raised below, instead of printing a table.
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **quantised,
            )

    try:
        with (
            remote_code_off(folder / "config.json", trust_remote_code),
            foreign_errors(what, SafetensorError, _NoAttentionError, QuantError),
        ):
            model, found = _with_attention(_with_softcap(attention, config), load)
    except SafetensorError as error:
        raise ValueError(f"{folder}: its weights are not a whole safetensors file: {error}") from None
    broken = None if quant == "none" else finish(model, found)
    if found["mismatched_keys"]:
        name, stored, expected = sorted(found["mismatched_keys"])[0]
        raise ValueError(
            f"{folder}: got shape {tuple(stored)} for the weight {name}, expected {tuple(expected)} from its config.json"
        )
    if found["missing_keys"]:
        missing = sorted(found["missing_keys"])
        raise ValueError(f"{folder}: the weight {missing[0]} is missing ({len(missing)} missing in all)")
    broken = broken or next((name for name, weight in model.named_parameters() if not finite(weight)), None)
    if broken is not None:
        raise ValueError(
            f"{folder}: the weight {broken} is not finite; the checkpoint is of a run that diverged, or broken"
        )
    if kind is AutoModelForCausalLM:
        check_language_model(folder, config, model, found["unexpected_keys"])
    return model.to(device).eval()


def like(model: PreTrainedModel) -> dict[str, Any]:
    """Return the arguments of `load_pretrained` with which a copy of `model` is loaded, such as one from its checkpoint."""
    return {
        "attention": model.config.get_text_config()._attn_implementation,
        "dtype": model.dtype,
        "device": model.device,
        "quant": quant_of(model),
        # Code from a model's folder is imported as a module of this package. It was trusted when `model` was loaded.
        "trust_remote_code": any(
            type(one).__module__.startswith("transformers_modules.") for one in (model, model.config)
        ),
    }


def _with_softcap(name: str | None, config: PreTrainedConfig) -> str | None:
    """Return the implementation `name`, or "eager" in place of "sdpa", which older transformers run without a softcap."""
    if name != "sdpa" or getattr(config.get_text_config(), "attn_logit_softcapping", None) is None:
        return name
    _log.warning("model.attention: the attention of the model has a softcap, which 'sdpa' lacks, so 'eager' is used")
    return "eager"


def _with_attention(name: str | None, load: Callable[[str | None], Loaded]) -> Loaded:
    """Return `load(name)`, or `load("eager")` for a model without the implementation "sdpa", and log that.

    Raises:
        ValueError: the implementation `name` is not available; the message names the setting.
    """
    try:
        return load(name)
    except (ValueError, ImportError) as error:
        # transformers refuses an implementation before it reads weights, with a message for its own callers.
        if not any(words in str(error) for words in _NO_ATTENTION):
            raise
        if name != "sdpa":
            reason = str(error).strip().splitlines()[0]
            raise _NoAttentionError(
                f"attention: got {name!r}, which is not available ({reason}); set model.attention=eager"
            ) from None
    _log.warning("model.attention: the model has no attention of kind 'sdpa' in transformers, so 'eager' is used")
    return load("eager")


def write_pretrained(
    folder: Path,
    model: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write a model and a tokenizer into an existing folder in the format of `from_pretrained`.

    `weights` replaces the weights of the model, for a trial with a part of them.

    Raises:
        ValueError: transformers refuses to write them, for example because of a value in generation_config.json.
        OSError, SafetensorError: a failed write.
    """
    what = f"{folder}: transformers {transformers.__version__} cannot write the"
    if model is not None:
        with foreign_errors(f"{what} model", OSError, SafetensorError):
            model.save_pretrained(folder, state_dict=weights)
    if tokenizer is not None:
        with foreign_errors(f"{what} tokenizer", OSError, SafetensorError):
            tokenizer.save_pretrained(folder)


def max_positions(model: PreTrainedModel) -> int | None:
    """Return the longest sequence that the model supports; None if its config does not define it.

    With dynamic rope it is the config's number times the factor of the rope.
    """
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)
    rope = getattr(config, "rope_parameters", None) or {}
    if positions is not None and "dynamic" in str(rope.get("rope_type", "")):
        return int(positions * rope.get("factor", 1.0))
    return positions


def load_tokenizer(folder: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a folder. `trust_remote_code` allows Python code from the folder to run.

    Raises:
        ValueError: the folder has no tokenizer, or a broken one. The message names the folder.
    """
    path = Path(folder) / "tokenizer_config.json"
    require(Path(folder), path.name)
    with remote_code_off(path, trust_remote_code), foreign_errors(f"{folder}: its tokenizer does not load"):
        # Without a value transformers asks on the terminal.
        found = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    template = found.chat_template or {}
    if not all(isinstance(text, str) for text in (template.values() if isinstance(template, dict) else [template])):
        raise ValueError(f"{folder}: chat_template: got {type(template).__name__}, expected a text, or texts by name")
    return found


def load_head(path: Path, hidden_size: int | None) -> ValueHead:
    """Return the scalar head in a safetensors file.

    Raises:
        ValueError: the file does not contain exactly a `weight` of `hidden_size` elements and a scalar `bias`.
    """
    state = read_tensors(path)
    expected = {"weight": (hidden_size,), "bias": ()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if found != expected:
        raise ValueError(f"{path}: got tensors {found}, expected {expected}")
    return ValueHead.from_weights(state["weight"], state["bias"])


def weight_files(folder: Path) -> list[str]:
    """Return the names of the files that must hold a model's weights: one file, or an index and its shards.

    Raises:
        ValueError: the index does not list shards.
    """
    index = "model.safetensors.index.json"
    if not (folder / index).is_file():
        return ["model.safetensors"]
    shards = read_json(folder / index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise ValueError(f"{folder / index}: the file has no weight_map, which lists the file of each weight")
    return [index, *sorted(set(shards.values()))]


# ---- folders of adapters ----


def is_adapter(folder: str | Path) -> bool:
    """Return whether a folder holds an adapter of peft instead of a model."""
    path = Path(folder) / ADAPTER
    return path.is_file() and "peft_type" in read_json(path)


def is_top(folder: str | Path) -> bool:
    """Return whether a folder holds only the trained top layers of a model, as a checkpoint of an unfinished run does."""
    return (Path(folder) / TOP_RECORD).is_file()


def base_folder(folder: str | Path) -> Path:
    """Return the folder of the model that an adapter's or top layers' folder names; return a model's folder unchanged.

    Raises:
        ValueError: the folder does not name a folder of a model that exists.
    """
    if is_top(folder):
        path, key, part = Path(folder) / TOP_RECORD, "base", "the top layers belong"
    elif is_adapter(folder):
        path, key, part = Path(folder) / ADAPTER, "base_model_name_or_path", "the adapter belongs"
    else:
        return Path(folder)
    named = read_json(path).get(key)
    found = Path(str(named))
    if not named or not found.is_dir():
        raise ValueError(
            f"{path}: {key}: got {named!r}, expected the folder of the model that {part} to; correct the path"
        )
    if not (found / "config.json").is_file() and not is_adapter(found):
        raise ValueError(f"{path}: {key}: got {named!r}, where the file config.json is missing; correct the path")
    if is_adapter(found):
        raise ValueError(f"{path}: {key}: got {named!r}, which is an adapter; expected the folder of a model")
    return found
