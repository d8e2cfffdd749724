"""The product of a frozen linear layer with an adapter, against peft's own."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

from rlhf_engine.model import low_rank
from rlhf_engine.model.low_rank import LowRankLinear, fuse_products


def make_layer(*, bias: bool = True, dtype: torch.dtype = torch.float64, fused: bool = True) -> Linear:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7, bias=bias)).to(dtype)
    inject_adapter_in_model(LoraConfig(r=3, lora_alpha=2, target_modules=["0"]), model, "policy")
    layer = model[0].to(dtype)
    nn.init.normal_(layer.lora_B["policy"].weight)
    if fused:
        fuse_products([layer])
    return layer


def outputs(layer: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Return y and the gradients of the sum of its sines."""
    x = x.clone().requires_grad_()
    trained = {name: one for name, one in layer.named_parameters() if one.requires_grad}
    y = layer(x)
    return {
        "y": y,
        **dict(zip(("x", *trained), torch.autograd.grad(y.sin().sum(), (x, *trained.values())), strict=True)),
    }


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 3, 5), (0, 5), (2, 0, 5)])
def test_output_and_gradients_equal_those_of_peft(shape: tuple[int, ...], bias: bool, monkeypatch) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    expected = outputs(make_layer(bias=bias, fused=False), x)
    monkeypatch.setattr(Linear, "forward", None)  # so that only the fused product can compute it
    layer = make_layer(bias=bias)
    found = outputs(layer, x)
    assert type(layer) is LowRankLinear and found.keys() == expected.keys() and len(found) == 4
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-12, atol=1e-12)


def test_gradients_of_any_order() -> None:
    layer = make_layer()
    base, a, b = layer.base_layer, layer.lora_A["policy"].weight, layer.lora_B["policy"].weight
    x = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)

    def product(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return low_rank._Product.apply(x, base.weight, base.bias, a, b, 0.7)

    inputs = (x, a.detach().requires_grad_(), b.detach().requires_grad_())
    assert torch.autograd.gradcheck(product, inputs)
    assert torch.autograd.gradgradcheck(product, inputs)


def test_a_pass_without_gradients_has_the_same_bits() -> None:
    layer, x = make_layer(dtype=torch.float32), torch.randn(9, 5)
    with torch.no_grad():
        found = layer(x)
    assert torch.equal(found, layer(x))


def test_a_copy_of_the_layer_multiplies_with_its_own_weights() -> None:
    layer, x = make_layer(), torch.randn(4, 5, dtype=torch.float64)
    other = copy.deepcopy(layer)
    before = other(x)
    nn.init.zeros_(layer.lora_B["policy"].weight)
    assert torch.equal(other(x), before) and not torch.equal(layer(x), before)


@pytest.mark.parametrize("case", ["autocast", "trained weight", "other dtype", "two adapters", "merged"])
def test_peft_computes_what_the_fused_product_does_not(case: str, monkeypatch) -> None:
    """The fused product raises here, so that only peft can compute the output."""
    layer, plain = (make_layer(dtype=torch.float32, fused=fused) for fused in (True, False))
    x = torch.randn(4, 5, dtype=torch.float64 if case == "other dtype" else torch.float32)
    for one in (layer, plain):
        if case == "trained weight":
            one.base_layer.requires_grad_(True)
        elif case == "two adapters":
            one.update_layer("value", 2, 2, config=LoraConfig(r=2, lora_alpha=2))
            torch.manual_seed(1)
            nn.init.normal_(one.lora_A["value"].weight)
            nn.init.normal_(one.lora_B["value"].weight)
            one.set_adapter(["policy", "value"])
        elif case == "merged":
            one.merge()
        elif case == "other dtype":
            one.base_layer.to(torch.float64)
    monkeypatch.setattr(low_rank, "_multiply", None)
    with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
        assert torch.equal(layer(x), plain(x))


def test_no_adapter_is_the_frozen_layer() -> None:
    layer, x = make_layer(), torch.randn(4, 5, dtype=torch.float64)
    layer._disable_adapters = True
    assert torch.equal(layer(x), layer.base_layer(x))
