"""Weights from a folder, all of them or an error: nothing that a file lacks is drawn at random in silence."""

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
    """What `kind` (`AutoModelForCausalLM`, `AutoModel`) makes of a folder's safetensors, in evaluation mode.

    Raises ValueError naming the folder and the file, the weight or the shape that is missing or wrong. A tied weight is
    stored once and missing nowhere; a weight that the model has no use for is left unread.
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
            # Only so are mismatches reported to the caller, who refuses them, and not in a table on the terminal.
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except SafetensorError as error:
        raise ValueError(f"{folder}: its weights are not a whole safetensors file: {error}") from None
    if found["mismatched_keys"]:
        name, stored, expected = sorted(found["mismatched_keys"])[0]
        raise ValueError(
            f"{folder}: got shape {tuple(stored)} for the weight {name}, expected {tuple(expected)} by its config.json"
        )
    if found["missing_keys"]:
        missing = sorted(found["missing_keys"])
        raise ValueError(f"{folder}: the weight {missing[0]} is missing ({len(missing)} missing in all)")
    return model.to(device).eval()


def max_positions(model: PreTrainedModel) -> int | None:
    """Longest sequence that the model was made for; None if its config knows no such number."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder; ValueError naming the folder if it has none, or a broken one."""
    require(Path(folder), "tokenizer_config.json")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (ValueError, KeyError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{folder}: its tokenizer does not load: {type(error).__name__}: {reason}") from None


def load_head(path: Path, hidden_size: int | None) -> ValueHead:
    """The scalar head in a safetensors file; ValueError unless it holds a `weight` of `hidden_size` and a `bias`."""
    state = read_tensors(path)
    expected = {"weight": (hidden_size,), "bias": ()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if found != expected:
        raise ValueError(f"{path}: got tensors {found}, expected {expected}")
    return ValueHead.from_weights(state["weight"], state["bias"])


def weight_files(folder: Path) -> list[str]:
    """Names of the files that must hold a model's weights: one, or an index and the shards that it lists."""
    index = "model.safetensors.index.json"
    if not (folder / index).is_file():
        return ["model.safetensors"]
    shards = read_json(folder / index).get("weight_map")
    if not isinstance(shards, dict):
        raise ValueError(f"{folder / index}: got no weight_map, expected one from weights to files")
    return [index, *sorted(set(shards.values()))]
