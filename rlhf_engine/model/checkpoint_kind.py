"""Refusal of checkpoints that are not float weights of a causal LM: they would load with a part dropped or misread."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from rlhf_engine.files import read_json

logger = logging.getLogger(__name__)

_QUANTISED = ("quantization_config", "compression_config")
"""Fields of config.json that describe quantised weights."""

_QUANTISED_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
"""Files of older tools that describe quantised weights, and the method that they imply."""

_FLOATS = ("F64", "F32", "F16", "BF16")

_DEEP = 200
"""More layers than a model has that shares weights between layers."""

_LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForImageTextToText")
"""Ends of the names of classes whose output layer predicts the next token."""


def refuse_quantised(folder: Path, weights: Sequence[str]) -> None:
    """Raise ValueError if the weights of a folder are quantised; `weights` are the names of its safetensors files.

    Quantised weights are found by config.json, by the files of older tools, and by the dtype of the weights themselves.
    """
    content = read_json(folder / "config.json")
    text = content.get("text_config")
    places = (content, text if isinstance(text, dict) else {})
    found = [place[name] for place in places for name in _QUANTISED if place.get(name)]
    methods = [str(one.get("quant_method") or one) if isinstance(one, dict) else str(one) for one in found]
    methods += [method for name, method in _QUANTISED_FILES.items() if (folder / name).is_file()]
    method = methods[0] if methods else _dtype_of_quantised(folder, weights)
    if method:
        raise ValueError(
            f"{folder}: got weights quantised with {method}, expected float32, bfloat16 or float16: quantised checkpoints are "
            "not supported; give the original checkpoint, or load this one in transformers, dequantise and save it"
        )


def check_layers(folder: Path, config: PreTrainedConfig, weights: Sequence[str]) -> None:
    """Raise ValueError if config.json names hundreds of layers that the weights do not have; to build them takes minutes."""
    layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    if not isinstance(layers, int) or layers <= _DEEP:
        return
    stored = 0
    for file in (name for name in weights if name.endswith(".safetensors")):
        with safe_open(folder / file, framework="pt") as tensors:
            numbers = [int(number) for name in tensors.keys() for number in re.findall(r"\.(\d+)\.", name)]  # noqa: SIM118
        stored = max(stored, *(number + 1 for number in numbers), 0)
    if stored < layers:
        raise ValueError(f"{folder / 'config.json'}: got {layers} layers, and its weights are of {stored}")


def check_language_model(
    folder: Path, config: PreTrainedConfig, model: PreTrainedModel, unexpected: Collection[str]
) -> None:
    """Raise ValueError if a folder that was loaded as a causal LM holds a model of a different kind.

    Such a checkpoint can load without an error: a tied output layer is not stored, and the head that it has instead is not
    read. `unexpected` are the stored weights that `model` does not have.
    """
    found = config.architectures or ()
    if not isinstance(found, list | tuple):
        raise ValueError(
            f"{folder / 'config.json'}: architectures: got {type(found).__name__}, expected a list of names"
        )
    loaded, stored = type(model).__name__, [str(name) for name in found]
    if stored and loaded not in stored and not any(map(_predicts_tokens, stored)):
        scores = "Sequence" in stored[0] or (folder / "reward_model.json").is_file()
        advice = "; set a reward model as reward.path or eval.judge" if scores else ""
        raise ValueError(
            f"{folder}: got a {stored[0]} (architectures in its config.json), expected a causal language model, such as "
            f"{loaded}{advice}"
        )
    layers = getattr(config.get_text_config(), "num_hidden_layers", 1)
    if layers < 1:
        raise ValueError(f"{folder / 'config.json'}: num_hidden_layers: got {layers}, expected at least 1")
    trunk = f"{model.base_model_prefix}."
    heads = sorted(name for name in unexpected if not name.startswith(trunk))
    if heads:
        raise ValueError(
            f"{folder}: the weight {heads[0]} is no part of {loaded} and would be lost ({len(heads)} such weights in all); "
            "expected a causal language model"
        )
    if unexpected:
        first = min(unexpected)
        logger.warning("%s: %d weights are not used by %s, the first is %s", folder, len(unexpected), loaded, first)


def finite(weight: Tensor) -> bool:
    """Return whether all elements of a weight are finite, without a second tensor of its size."""
    return weight.numel() == 0 or all(bool(bound.isfinite()) for bound in weight.aminmax())


def _predicts_tokens(architecture: str) -> bool:
    return architecture.endswith(_LANGUAGE_MODELS) or architecture in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def _dtype_of_quantised(folder: Path, weights: Sequence[str]) -> str:
    """Return the dtype of the first weight that is not stored as floats, such as F8_E4M3; empty if all are."""
    for file in weights:
        if not file.endswith(".safetensors"):
            continue
        try:
            with safe_open(folder / file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  (not a dictionary)
                    dtype = tensors.get_slice(name).get_dtype() if name.endswith("weight") else _FLOATS[0]
                    if dtype not in _FLOATS:
                        return f"the dtype {dtype}"
        except SafetensorError as error:
            raise ValueError(f"{folder}: its weights are not a whole safetensors file: {error}") from None
    return ""
