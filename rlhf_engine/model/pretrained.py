"""Loading of models from a folder. A missing weight is an error and is never initialised at random."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from rlhf_engine.files import read_json, read_model_config, read_tensors, require
from rlhf_engine.model.heads import ValueHead


def load_pretrained(
    kind: type,
    folder: str | Path,
    *,
    attention: str | None = "sdpa",
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> PreTrainedModel:
    """Return the model of class `kind` (`AutoModelForCausalLM`, `AutoModel`) from a folder's safetensors, in evaluation mode.

    A tied weight is stored once and does not count as missing. Weights that the model does not use are not read.

    Raises:
        ValueError: a file or a weight is missing or broken, or a shape is wrong. The message names the folder and the
            file or weight.
    """
    folder = Path(folder)
    require(folder, "config.json", *weight_files(folder))
    read_model_config(folder)
    try:
        model, found = kind.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=attention,
            local_files_only=True,
            use_safetensors=True,
            # Return mismatched shapes in `found`, which are raised below, instead of printing a table.
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except SafetensorError as error:
        raise ValueError(f"{folder}: its weights are not a whole safetensors file: {error}") from None
    if found["mismatched_keys"]:
        name, stored, expected = sorted(found["mismatched_keys"])[0]
        raise ValueError(
            f"{folder}: got shape {tuple(stored)} for the weight {name}, expected {tuple(expected)} from its config.json"
        )
    if found["missing_keys"]:
        missing = sorted(found["missing_keys"])
        raise ValueError(f"{folder}: the weight {missing[0]} is missing ({len(missing)} missing in all)")
    return model.to(device).eval()


def max_positions(model: PreTrainedModel) -> int | None:
    """Return the longest sequence that the model supports; None if its config does not define it."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a folder.

    Raises:
        ValueError: the folder has no tokenizer, or a broken one. The message names the folder.
    """
    require(Path(folder), "tokenizer_config.json")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (ValueError, KeyError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{folder}: its tokenizer does not load: {type(error).__name__}: {reason}") from None


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
    if not isinstance(shards, dict):
        raise ValueError(f"{folder / index}: the file has no weight_map, which lists the file of each weight")
    return [index, *sorted(set(shards.values()))]
