"""Loading of a model with quantised layers: transformers reads one weight at a time, and each is quantised as it is read.

The peak is that of the result and of one weight. The files are read with `pread`, because pages of a mapped file would count as
memory of the process.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel, modeling_utils
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from rlhf_engine.memory.malloc import return_free_pages
from rlhf_engine.model.checkpoint_kind import finite
from rlhf_engine.model.quantised import QuantisedLinear, import_quant, quantise_layers

_METHOD: Any = "rlhf"  # transformers types its own methods only


@contextmanager
def quantising(quant: str) -> Iterator[dict[str, Any]]:
    """Yield the arguments of `from_pretrained` that quantise the weights; none for "none".

    Inside the context transformers opens files with `pread`, for which it has no argument.
    """
    if quant == "none":
        yield {}
        return
    transformers: Any = modeling_utils
    before = transformers.safe_open

    def opened(*place: Any, **settings: Any) -> Any:
        return before(*place, **settings | {"backend": "pread"})

    transformers.safe_open = opened
    try:
        yield {"quantization_config": QuantConfig(quant)}  # pyright: ignore[reportArgumentType]  # a decorator hides the class
    finally:
        transformers.safe_open = before


def finish(model: PreTrainedModel, found: dict[str, Any]) -> str | None:
    """Remove the traces of transformers' quantiser from a model, and add its mismatched weights to `found`.

    Returns:
        The name of a weight that is not finite, or None.
    """
    quantiser: Any = model.hf_quantizer
    found["mismatched_keys"] = [*found["mismatched_keys"], *quantiser.mismatched]
    quantiser.remove_quantization_config(model)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config.__dict__.pop("_is_quantized", None)
    return next(iter(quantiser.broken), None)


@register_quantization_config(_METHOD)
class QuantConfig(QuantizationConfigMixin):
    """The format of the weights, as transformers passes it to its quantiser."""

    def __init__(self, quant: str = "none", **unused: object) -> None:
        self.quant_method = _METHOD
        self.quant = quant


@register_quantizer(_METHOD)
class Quantiser(HfQuantizer):
    """The quantiser of transformers for `QuantisedLinear`s."""

    def __init__(self, quantization_config: Any, **settings: Any) -> None:
        super().__init__(quantization_config, **settings)
        self.quant: str = quantization_config.quant
        self.package = import_quant(self.quant)
        self.mismatched: list[tuple[str, Any, Any]] = []
        """Weights with a wrong shape: name, shape in the file, and shape of the model."""
        self.broken: list[str] = []
        """Weights that are not finite."""

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        quantise_layers(model, self.quant)

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Return whether a parameter is the weight of a quantised layer."""
        return _owner(model, param_name) is not None

    def get_quantize_ops(self) -> ConversionOps:
        """Return the operation that quantises one weight."""
        return _Quantise(self)

    def is_serializable(self, **kwargs: Any) -> bool:
        """Return False: only adapters are saved."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Whether adapters can be trained on the weights."""
        return True


class _Quantise(ConversionOps):
    """Quantise one weight as soon as it is read."""

    def __init__(self, quantiser: Any) -> None:  # a `Quantiser`, whose type the decorator hides
        self.quantiser = quantiser

    def convert(self, input_dict: dict[str, Any], *unused: Any, model: Any = None, **settings: Any) -> dict[str, Any]:
        """Store the weights in their layers, and return their codes."""
        return {name: self._store(model, name, value) for name, value in input_dict.items()}

    def _store(self, model: Any, name: str, value: Any) -> nn.Parameter:
        weight: Tensor = value[0] if isinstance(value, list) else value
        layer = _owner(model, name)
        assert layer is not None
        expected = layer.weight.shape
        return_free_pages()  # of the weight before, whose holes between codes fit no later weight
        if weight.shape != expected:
            self.quantiser.mismatched.append((name, weight.shape, expected))
        elif not finite(weight):
            self.quantiser.broken.append(name)
        else:
            layer.store(weight, self.quantiser.package)
        return layer.weight


def _owner(model: nn.Module, name: str) -> QuantisedLinear | None:
    """Return the quantised layer whose weight has a name, if there is one."""
    place, _, last = name.rpartition(".")
    if last != "weight":
        return None
    module = model.get_submodule(place)
    return module if isinstance(module, QuantisedLinear) else None
