"""Frozen linear layers in 8 or 4 bits: the formats of bitsandbytes and torchao, and the layer that multiplies with them.

The packages quantise, and their layouts are stored. The product is computed here from the dequantised weight, in the forward
and again in the backward pass, so that nothing is saved for the backward pass, and sampling and training have the same bits.
The layers of the packages do not have both: torchao saves the dequantised weight, and bitsandbytes changes to a different
kernel in passes without gradients on some processors.
Legend: O outputs, I inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rlhf_engine.errors import foreign_errors
from rlhf_engine.model.trunk import layers_of, trunk_of
from rlhf_engine.model.upcast import product_dtype, upcasts

BLOCK = 64
"""Weights of NF4 that share a scale."""
_AT_A_TIME = 2**18
"""Weights that are quantised at a time; the packages need about 16 bytes of workspace for each."""
_SMALLEST = 1e-12
"""Lower bound of a row's largest weight in fp8; torchao would divide a row of zeros by 0."""
_ROUTERS = ("gate", "router", "shared_expert_gate")
"""Last names of linear layers that select experts. They are small, and keep their dtype."""


class QuantError(ValueError):
    """A format that cannot be used: its package is missing, or a weight or a device does not allow it."""


@dataclass(frozen=True)
class Format:
    """How the weight of a linear layer is stored: codes, and float32 scales."""

    package: str
    load: Callable[[], Any]
    """Import the package and return its module with the functions."""
    quantise: Callable[[Any, Tensor], tuple[Tensor, Tensor]]
    """Return codes and scales of some float32 rows; the first argument is the module. A row has one scale, or is a block."""
    dequantise: Callable[[Tensor, Tensor, tuple[int, int], torch.dtype], Tensor]
    """Return the weight of a shape (O, I) in a dtype from its codes and scales."""
    code_bits: int
    scales: Callable[[int, int], int]
    """Return the number of scales of a weight (O, I)."""


def _load_torchao() -> Any:
    from torchao import quantization

    return quantization


def _load_bitsandbytes() -> Any:
    import bitsandbytes.functional

    return bitsandbytes.functional


def _int8(torchao: Any, rows: Tensor) -> tuple[Tensor, Tensor]:
    found = torchao.Int8Tensor.from_hp(rows, granularity=torchao.PerRow())
    return found.qdata, found.scale


def _fp8(torchao: Any, rows: Tensor) -> tuple[Tensor, Tensor]:
    found = torchao.Float8Tensor.from_hp(rows, granularity=torchao.PerRow(), hp_value_lb=_SMALLEST)
    return found.qdata, found.scale


def _nf4(functional: Any, blocks: Tensor) -> tuple[Tensor, Tensor]:
    codes, state = functional.quantize_4bit(blocks, blocksize=BLOCK, compress_statistics=False, quant_type="nf4")
    return codes, state.absmax


def _from_rows(codes: Tensor, scales: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    # The product with float32 scales is rounded once, also in half precision.
    return codes.to(dtype).mul_(scales.view(-1, 1))


def _from_nf4(codes: Tensor, scales: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    # As one row: the CPU kernel of bitsandbytes 0.50 reads wrong scales if a row ends within a block.
    return torch.ops.bitsandbytes.dequantize_4bit(codes, scales, BLOCK, "nf4", [math.prod(shape)], dtype).view(shape)


def _one_per_row(rows: int, columns: int) -> int:
    return rows


def _one_per_block(rows: int, columns: int) -> int:
    return rows * columns // BLOCK


FORMATS = {
    "int8": Format("torchao", _load_torchao, _int8, _from_rows, 8, _one_per_row),
    "fp8": Format("torchao", _load_torchao, _fp8, _from_rows, 8, _one_per_row),
    "nf4": Format("bitsandbytes", _load_bitsandbytes, _nf4, _from_nf4, 4, _one_per_block),
}
"""Values of `model.quant` that quantise."""
_CODES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn, "nf4": torch.uint8}


def import_quant(quant: str) -> Any:
    """Import the package that quantises, and return its module with the functions; None for "none".

    Raises:
        QuantError: it is not installed, or there is no such format.
    """
    if quant == "none":
        return None
    if quant not in FORMATS:
        raise QuantError(f"model.quant: got {quant!r}, expected none, {', '.join(FORMATS)}")
    wanted = FORMATS[quant]
    try:
        return wanted.load()
    except ImportError as error:
        raise QuantError(
            f"model.quant: {quant!r} needs {wanted.package}, which cannot be imported; run pip install "
            f"'rlhf-kernels[quant]' ({error})"
        ) from None


def quantised_bytes(quant: str, rows: int, columns: int) -> int:
    """Return the bytes of the codes and scales of a weight (O, I)."""
    form = FORMATS[quant]
    return rows * columns * form.code_bits // 8 + form.scales(rows, columns) * torch.float32.itemsize


class QuantisedLinear(nn.Linear):
    """A linear layer with a frozen quantised weight. Inputs get gradients, of any order.

    Codes and scales are stored as integers, so that a change of the model's dtype leaves them as they are.
    """

    weight: Any  # bytes of the codes
    scale: nn.Parameter
    """Bytes of the scales."""

    def __init__(self, source: nn.Linear | Conv1D, quant: str) -> None:
        """Take the place of `source`, and its bias. `store` replaces its weight, which has no data on the device meta."""
        nn.Module.__init__(self)
        self.quant = quant
        self.fan_in_fan_out = isinstance(source, Conv1D)
        """Whether the weight of `source` is stored as (I, O)."""
        shape = tuple(source.weight.shape)
        self.out_features, self.in_features = shape[::-1] if self.fan_in_fan_out else shape
        self.weight, self.bias = source.weight, source.bias
        self.register_parameter("scale", None)

    @torch.no_grad()
    def store(self, weight: Tensor, package: Any) -> None:
        """Quantise `weight`, which has the shape of the source's. `package` is that of `import_quant`."""
        weight = weight.t() if self.fan_in_fan_out else weight
        rows = weight.reshape(-1, BLOCK) if self.quant == "nf4" else weight
        parts = [
            FORMATS[self.quant].quantise(package, part.float().contiguous())
            for part in rows.split(max(1, _AT_A_TIME // rows.shape[1]))
        ]
        integers = (torch.cat(list(ones)).contiguous().view(torch.uint8) for ones in zip(*parts, strict=True))
        self.weight, self.scale = (nn.Parameter(one, requires_grad=False) for one in integers)

    def dequantised(self, dtype: torch.dtype) -> Tensor:  # (O, I)
        """Return the weight in `dtype`."""
        codes, scales = self.weight.view(_CODES[self.quant]), self.scale.view(torch.float32)
        shape = (self.out_features, self.in_features)
        return FORMATS[self.quant].dequantise(codes, scales, shape, dtype)

    def forward(self, x: Tensor) -> Tensor:  # (..., I) -> (..., O)
        """Return `x @ weight.T + bias`."""
        dtype = product_dtype(x)
        if torch.is_grad_enabled():
            return _Product.apply(x, self.bias, self, dtype, False)
        return _multiply(x, self.bias, self, dtype, transposed=False)

    def extra_repr(self) -> str:
        """Return the sizes and the format."""
        return f"{super().extra_repr()}, quant={self.quant}"


def _multiply(
    x: Tensor, bias: Tensor | None, layer: QuantisedLinear, dtype: torch.dtype, *, transposed: bool
) -> Tensor:
    """Return `x @ W.T + bias` in `dtype`, or `x @ W` if `transposed`; computed in float32 where `dtype` has no products."""
    factor = torch.float32 if upcasts(dtype, x.device.type) else dtype
    with torch.autocast(x.device.type, enabled=False):
        weight = layer.dequantised(factor)
        bias = None if bias is None else bias.to(factor)
        return nn.functional.linear(x.to(dtype).to(factor), weight.t() if transposed else weight, bias).to(dtype)


class _Product(torch.autograd.Function):
    """The product of `_multiply`. It saves no tensor, because the gradient of the input reads only the frozen weight."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, layer: QuantisedLinear, dtype: torch.dtype, transposed: bool
    ) -> Tensor:
        ctx.layer, ctx.dtype, ctx.transposed = layer, dtype, transposed
        ctx.kinds = x.dtype, None if bias is None else bias.dtype
        return _multiply(x, bias, layer, dtype, transposed=transposed)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        to_x = to_bias = None
        if ctx.needs_input_grad[0]:
            to_x = _Product.apply(slope, None, ctx.layer, ctx.dtype, not ctx.transposed).to(ctx.kinds[0])
        if ctx.needs_input_grad[1]:
            to_bias = slope.flatten(0, -2).float().sum(0).to(ctx.kinds[1])
        return to_x, to_bias, None, None, None


# ---- which layers of a model ----


def quant_of(model: nn.Module) -> str:
    """Return the format of a model's quantised layers; "none" if there are none."""
    return next((one.quant for one in model.modules() if isinstance(one, QuantisedLinear)), "none")


def refuse_quantised_layers(model: nn.Module) -> None:
    """Raise ValueError if a model has quantised layers and would be written whole or trained whole."""
    if (quant := quant_of(model)) != "none":
        raise QuantError(
            f"model.quant: got {quant!r}, expected 'none' for a model without adapters: quantised weights cannot be saved; "
            "train an adapter (adapter.rank), or load the model with model.quant=none"
        )


def quantise_layers(model: PreTrainedModel, quant: str) -> None:
    """Replace the linear layers within the layers of the trunk of a model by `QuantisedLinear`s without data.

    Embeddings, norms, routers and the output layer keep their dtype.

    Raises:
        QuantError: the trunk has no layers, or one with a weight that the format cannot store. The message names it.
    """
    found = dict(_linear_layers(model))
    if not found:
        raise QuantError(
            f"model.quant: got {quant!r}, expected 'none': {type(model).__name__} has no layers with linear layers in them"
        )
    for name, module in found.items():
        parent, _, last = name.rpartition(".")
        _check_size(name, module, quant)
        setattr(model.get_submodule(parent), last, QuantisedLinear(module, quant))


def _linear_layers(model: PreTrainedModel) -> Iterator[tuple[str, nn.Linear | Conv1D]]:
    """Iterate over the linear layers within the layers of the trunk, by their names in `model`."""
    inside = {id(module) for layer in layers_of(trunk_of(model)) for module in layer.modules()}
    for name, module in model.named_modules():
        if id(module) not in inside:
            continue
        if isinstance(module, nn.Linear | Conv1D):
            if name.rpartition(".")[2] not in _ROUTERS:
                yield name, module
            continue
        for key, weight in module.named_parameters(recurse=False):
            if weight.dim() == 3 and min(weight.shape[1:]) > 1 and not isinstance(module, nn.Conv1d):
                raise QuantError(
                    f"model.quant: the weight {name}.{key} of {type(model).__name__} has 3 dimensions, as experts in one "
                    "tensor have, which cannot be quantised; set model.quant=none"
                )


def _check_size(name: str, module: nn.Linear | Conv1D, quant: str) -> None:
    numbers = module.weight.numel()
    if quant == "nf4" and numbers % BLOCK:
        shape = tuple(module.weight.shape)
        raise QuantError(
            f"model.quant: the weight {name}.weight of shape {shape} has {numbers} elements, expected a multiple of {BLOCK} "
            "for 'nf4'; set model.quant=int8"
        )


def check_device(quant: str, device: torch.device | str) -> None:
    """Raise ValueError unless a device can dequantise, by trying it on one block."""
    package = import_quant(quant)
    if package is None:
        return
    layer = QuantisedLinear(nn.Linear(BLOCK, 1, bias=False), quant)
    layer.store(torch.ones(1, BLOCK), package)
    what = f"model.quant: got {quant!r}, which cannot be used on the device {str(device)!r}; set model.quant=none"
    with foreign_errors(what):
        layer.to(device).dequantised(torch.float32).sum().item()
