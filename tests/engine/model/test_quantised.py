"""Quantised layers: stored values, products and their gradients, loading, and what is refused."""

import copy
import json
import sys
from pathlib import Path

import pytest
import torch
from bitsandbytes import functional
from safetensors.torch import load_file, save_file
from torch import nn
from torchao.quantization import Float8Tensor, Int8Tensor, PerRow
from transformers import AutoModelForCausalLM, MixtralConfig, modeling_utils
from transformers.pytorch_utils import Conv1D

from rlhf_engine.config import RunConfig
from rlhf_engine.model import ActorCritic, upcast
from rlhf_engine.model.checkpoint_kind import finite
from rlhf_engine.model.pretrained import like, load_pretrained
from rlhf_engine.model.quantised import (
    FORMATS,
    QuantisedLinear,
    import_quant,
    quant_of,
    quantise_layers,
    quantised_bytes,
)
from rlhf_engine.model.reward_model import RewardModel
from rlhf_engine.model.saving import load_policy, save_policy
from tests.engine.helpers.quantised_models import QUANTS, layers, quantised
from tests.engine.helpers.tiny_models import tiny

DTYPES = (torch.float32, torch.bfloat16)


def theirs(weight, quant, dtype):
    """Return what the package itself dequantises from a float32 weight."""
    if quant == "nf4":
        # As one row: the CPU kernel of bitsandbytes 0.50 reads wrong scales if a row ends within a block.
        row = weight.reshape(1, -1)
        codes, state = functional.quantize_4bit(row, blocksize=64, compress_statistics=False, quant_type="nf4")
        state.dtype = dtype
        return functional.dequantize_4bit(codes, state).view(weight.shape)
    kind = {"int8": Int8Tensor, "fp8": Float8Tensor}[quant]
    return kind.from_hp(weight, granularity=PerRow()).dequantize(dtype)


def layer_of(quant, rows=48, columns=96, *, bias=False, seed=0):
    """Return a quantised layer and its original weight."""
    torch.manual_seed(seed)
    source = nn.Linear(columns, rows, bias=bias)
    weight = source.weight.detach().clone()
    found = QuantisedLinear(source, quant)
    found.store(weight, import_quant(quant))
    return found, weight


# ---- values ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant", QUANTS)
def test_every_weight_is_what_the_package_dequantises(tmp_path, quant, dtype):
    model = quantised(tmp_path, quant, "qwen2")
    original = tiny("qwen2", initializer_range=0.1)
    found = layers(model)
    assert len(found) == 14 and quant_of(model) == quant
    for name, layer in found.items():
        weight = original.get_submodule(name).weight.detach()
        assert torch.equal(layer.dequantised(dtype), theirs(weight, quant, dtype)), name


@pytest.mark.parametrize("quant", QUANTS)
def test_large_weights_are_quantised_in_parts_with_the_same_values(quant):
    layer, weight = layer_of(quant, 700, 448)  # more than one part
    assert torch.equal(layer.dequantised(torch.float32), theirs(weight, quant, torch.float32))


@pytest.mark.parametrize("shape", [(32, 32), (48, 96), (16, 128), (3, 1024)])
def test_nf4_is_a_value_of_its_table_times_the_scale_of_the_block(shape):
    """Also if blocks do not end with rows."""
    layer, weight = layer_of("nf4", *shape)
    table = functional.get_4bit_type("nf4", device="cpu")
    pairs = layer.weight.flatten().long()
    numbers = torch.stack([pairs >> 4, pairs & 15], 1).flatten()
    scales = weight.view(-1, 64).abs().amax(1, keepdim=True)
    assert torch.equal(layer.dequantised(torch.float32), (table[numbers].view(-1, 64) * scales).view(shape))


@pytest.mark.parametrize("quant", QUANTS)
def test_the_error_of_a_weight_is_bounded(quant):
    """int8: half a step of 1/127 (the lowest code is -128). NF4: half of its widest gap. fp8: half of the last bit of four."""
    layer, weight = layer_of(quant, 256, 256)
    error = (layer.dequantised(torch.float32) - weight).abs()
    rows, blocks = weight.abs().amax(1, keepdim=True), weight.view(-1, 64).abs().amax(1)
    if quant == "int8":
        assert (error <= rows / 127 * 0.502).all()
    elif quant == "fp8":
        assert (error <= torch.maximum(weight.abs() / 16, rows / 448 * 2**-10)).all()
    else:
        assert (error.view(-1, 64).amax(1) <= 0.152 * blocks).all()
    assert error.max() > 0


@pytest.mark.parametrize("quant", QUANTS)
def test_a_row_of_zeros_stays_zero(quant):
    layer, weight = layer_of(quant)
    weight[3], weight[5, :64] = 0, 0
    layer.store(weight, import_quant(quant))
    found = layer.dequantised(torch.float32)
    assert bool((found[3] == 0).all()) and bool(found.isfinite().all())


@pytest.mark.parametrize("quant", QUANTS)
def test_the_bytes_are_those_of_codes_and_scales(quant):
    layer, _ = layer_of(quant, 48, 96)
    assert quantised_bytes(quant, 48, 96) == layer.weight.nbytes + layer.scale.nbytes
    by_hand = {"int8": 48 * 96 + 48 * 4, "fp8": 48 * 96 + 48 * 4, "nf4": 48 * 96 // 2 + 48 * 96 // 64 * 4}
    assert quantised_bytes(quant, 48, 96) == by_hand[quant]


@pytest.mark.parametrize("quant", QUANTS)
def test_a_layer_of_gpt2_is_transposed(quant):
    torch.manual_seed(0)
    source = Conv1D(96, 64)  # (I, O) = (64, 96)
    weight, x = source.weight.detach().clone(), torch.randn(5, 64)
    layer = QuantisedLinear(source, quant)
    layer.store(weight, import_quant(quant))
    assert (layer.in_features, layer.out_features) == (64, 96)
    assert torch.equal(layer.dequantised(torch.float32), theirs(weight.t().contiguous(), quant, torch.float32))
    torch.testing.assert_close(layer(x), x @ layer.dequantised(torch.float32).t() + source.bias)


@pytest.mark.parametrize("quant", QUANTS)
def test_a_change_of_dtype_leaves_codes_and_scales(quant):
    layer, _ = layer_of(quant, bias=True)
    before = layer.dequantised(torch.float32)
    layer.to(torch.bfloat16)
    assert layer.bias.dtype == torch.bfloat16 and torch.equal(layer.dequantised(torch.float32), before)
    assert torch.equal(copy.deepcopy(layer).dequantised(torch.float32), before)


# ---- products ----


def errors(found, expected):
    return float((found.double() - expected).abs().max())


@pytest.mark.parametrize("how", ["float32", "bfloat16", "autocast", "upcast"])
@pytest.mark.parametrize("quant", QUANTS)
def test_products_and_gradients_are_as_exact_as_those_of_the_dequantised_weight(monkeypatch, quant, how):
    """At most twice what eager torch makes in the same dtype, plus 2 eps of the scale; both against float64."""
    if how == "upcast":
        monkeypatch.setattr(upcast, "has_products", lambda dtype, device: False)
    dtype = torch.float32 if how in ("float32", "autocast") else torch.bfloat16
    product = torch.float32 if how == "float32" else torch.bfloat16
    layer, _ = layer_of(quant, 64, 128, bias=True)
    layer.to(dtype)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 7, 128, generator=generator).to(dtype).requires_grad_()
    slope = torch.randn(3, 7, 64, generator=generator).to(product)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
        y = layer(x)
    y.backward(slope)
    rounded, weight = x.detach().to(product), layer.dequantised(product)
    exact = layer.dequantised(torch.float32).double()
    expected = rounded.double() @ exact.t() + layer.bias.double()
    eager = nn.functional.linear(rounded, weight, layer.bias.to(product))
    gradient, eager_gradient = slope.double() @ exact, slope @ weight
    eps = torch.finfo(product).eps
    assert y.dtype == product and x.grad.dtype == dtype
    assert errors(y, expected) <= 2 * errors(eager, expected) + 2 * eps * float(expected.abs().max())
    assert errors(x.grad, gradient) <= 2 * errors(eager_gradient, gradient) + 2 * eps * float(gradient.abs().max())
    torch.testing.assert_close(layer.bias.grad.float(), slope.float().sum((0, 1)), rtol=1e-2, atol=1e-2)
    assert layer.weight.grad is None and layer.scale.grad is None
    if how == "upcast":  # the weight is not rounded to bfloat16 first
        wide = nn.functional.linear(rounded.float(), layer.dequantised(torch.float32), layer.bias.float())
        assert torch.equal(y, wide.bfloat16())


@pytest.mark.parametrize("quant", ["int8", "fp8"])
def test_gradients_of_first_and_second_order_are_those_of_a_product(quant):
    layer, _ = layer_of(quant, 6, 5, bias=True)
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))
    assert torch.autograd.gradgradcheck(lambda x: layer(x).tanh(), (x,))


@pytest.mark.parametrize("quant", QUANTS)
def test_nothing_is_saved_for_the_backward_pass(quant):
    layer, _ = layer_of(quant)
    found = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: found.append(x) or x, lambda x: x):
        layer(torch.randn(4, 96, requires_grad=True)).sum().backward()
    assert not found


@pytest.mark.parametrize("quant", QUANTS)
def test_passes_with_and_without_gradients_have_the_same_bits(quant):
    """Also those of a row with any rows around it, from 16 rows on: sampling and training compare log-probs."""
    layer, _ = layer_of(quant)
    x = torch.randn(64, 96)
    with torch.no_grad():
        expected = layer(x)
    assert torch.equal(layer(x.requires_grad_()), expected)
    assert torch.equal(layer(x[:16]), expected[:16])


@pytest.mark.parametrize("quant", QUANTS)
@torch.no_grad()
def test_a_layer_is_traced_whole(quant):
    """Decode steps on a GPU compile the layers of the trunk."""
    layer, _ = layer_of(quant)
    x = torch.randn(16, 96)
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


# ---- loading ----


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gpt2", "gpt2_tied", "qwen2", "gemma2", "cohere", "granite"])
@pytest.mark.parametrize("quant", QUANTS)
def test_only_linear_layers_within_the_layers_are_quantised(tmp_path, family, quant):
    model = quantised(tmp_path, quant, family)
    original = tiny(family, initializer_range=0.1)
    linear = {name for name, one in original.named_modules() if isinstance(one, nn.Linear | Conv1D)} - {"lm_head"}
    assert layers(model).keys() == linear and not model.training
    ours = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, expected in [*original.named_parameters(), *original.named_buffers()]:
        place, _, last = name.rpartition(".")
        if place not in linear or last == "bias":
            assert torch.equal(ours[name], expected) and ours[name].dtype == expected.dtype, name
    assert model.dtype == torch.float32 and like(model)["quant"] == quant
    tied = original.get_output_embeddings().weight is original.get_input_embeddings().weight
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    assert not hasattr(model.config, "quantization_config") and not hasattr(model.config, "_is_quantized")
    ActorCritic(model)  # which compares its log-probs with those of the model's own forward pass


@pytest.mark.parametrize("shards", [False, True])
def test_files_are_not_mapped_while_weights_are_read(tmp_path, monkeypatch, shards):
    """Pages of a mapped file would count as memory of the process."""
    tiny(initializer_range=0.1).save_pretrained(tmp_path, max_shard_size="20KB" if shards else "5GB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 if shards else True
    seen, store = [], QuantisedLinear.store

    def watched(self, *arguments):
        seen.append(str(tmp_path) in Path("/proc/self/maps").read_text())
        store(self, *arguments)

    monkeypatch.setattr(QuantisedLinear, "store", watched)
    before = modeling_utils.safe_open
    model = load_pretrained(AutoModelForCausalLM, tmp_path, quant="int8")
    assert len(seen) == 15 and not any(seen)  # the first is the trial on the device
    assert modeling_utils.safe_open is before and len(layers(model)) == 14


def test_bfloat16_weights_keep_their_dtype_outside_of_the_layers(tmp_path):
    model = quantised(tmp_path, "nf4", "qwen2", dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16, torch.uint8}
    assert {layer.bias.dtype for layer in layers(model).values() if layer.bias is not None} == {torch.bfloat16}


def change(folder, name, edit):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors, name)
    save_file(tensors, path, metadata={"format": "pt"})


UP = "model.layers.1.mlp.up_proj.weight"
NAN, SMALL = float("nan"), torch.zeros(4, 4)


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize(
    ("name", "edit", "message"),
    [
        (UP, lambda all_, name: all_.pop(name), rf"the weight {UP} is missing \(1 missing in all\)"),
        (
            UP,
            lambda all_, name: all_.update({name: SMALL}),
            rf"got shape \(4, 4\) for the weight {UP}, expected \(48, 32\)",
        ),
        (UP, lambda all_, name: all_[name].__setitem__((0, 0), NAN), f"the weight {UP} is not finite"),
        ("model.norm.weight", lambda all_, name: all_[name].__setitem__(0, NAN), "model.norm.weight is not finite"),
        ("extra.weight", lambda all_, name: all_.update({name: SMALL}), "the weight extra.weight is no part of"),
    ],
)
def test_broken_weights_are_named(tmp_path, quant, name, edit, message):
    tiny().save_pretrained(tmp_path)
    change(tmp_path, name, edit)
    with pytest.raises(ValueError, match=message):
        load_pretrained(AutoModelForCausalLM, tmp_path, quant=quant)


def test_finite_reads_every_element():
    weight = torch.zeros(3, 3)
    assert finite(weight) and finite(torch.empty(0))
    for value in (NAN, float("inf"), -float("inf")):
        assert not finite(torch.cat([weight.flatten(), torch.tensor([value])]))


# ---- refused ----


def test_experts_in_one_tensor_are_refused(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = MixtralConfig(**sizes, vocab_size=61, num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"model\.quant: the weight model\.layers\.0\.mlp\.experts\.gate_up_proj of Mixtral"
    ):
        load_pretrained(AutoModelForCausalLM, tmp_path, quant="int8")


def test_sizes_that_blocks_do_not_divide_are_refused(tmp_path):
    tiny(intermediate_size=45).save_pretrained(tmp_path)
    message = r"model\.quant: the weight model\.layers\.0\.mlp\.gate_proj\.weight of shape \(45, 32\) has 1440 elements"
    with pytest.raises(ValueError, match=message):
        load_pretrained(AutoModelForCausalLM, tmp_path, quant="nf4")
    assert len(layers(load_pretrained(AutoModelForCausalLM, tmp_path, quant="int8"))) == 14


@pytest.mark.parametrize("quant", QUANTS)
def test_without_the_package_the_extra_is_named_before_anything_is_read(tmp_path, monkeypatch, quant):
    package = FORMATS[quant].package
    for name in [one for one in sys.modules if one.partition(".")[0] == package]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        ValueError, match=rf"model\.quant: '{quant}' needs {package}.*pip install 'rlhf-kernels\[quant\]'"
    ):
        load_policy(tmp_path / "nothing", quant=quant)


def test_an_unknown_format_and_device_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"model\.quant: got 'int3', expected none, int8, fp8, nf4"):
        load_policy(tmp_path, quant="int3")
    with pytest.raises(ValueError, match=r"model\.quant: got 'int3' \(str\), expected one of 'none'"):
        RunConfig.from_dict({"model": {"quant": "int3"}})
    with pytest.raises(ValueError, match=r"model\.quant: got 'nf4', which cannot be used on the device 'meta'"):
        load_policy(tmp_path, quant="nf4", device="meta")


def test_quantised_weights_are_not_saved(tmp_path):
    model = quantised(tmp_path / "base", "int8")
    policy, reward = ActorCritic(model), RewardModel.from_causal_lm(model, 0)
    for save in (lambda: save_policy(tmp_path, policy, None), lambda: reward.save(tmp_path)):
        with pytest.raises(ValueError, match=r"model\.quant: got 'int8', expected 'none' for a model without adapters"):
            save()
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_training_needs_an_adapter():
    config = RunConfig.from_dict({"model": {"quant": "nf4"}})  # which other commands accept
    with pytest.raises(ValueError, match=r"model\.quant: got 'nf4' with adapter\.rank 0, expected 'none'"):
        config.check_training()
    RunConfig.from_dict({"model": {"quant": "nf4"}, "adapter": {"rank": 2}}).check_training()


def test_adapters_are_not_merged_for_sampling():
    sections = {"model": {"quant": "nf4"}, "adapter": {"rank": 2}}
    with pytest.raises(
        ValueError, match=r"rollout\.merge_adapters: got 'always' with model\.quant 'nf4', expected 'auto'"
    ):
        RunConfig.from_dict(sections | {"rollout": {"merge_adapters": "always"}})
    RunConfig.from_dict(sections | {"rollout": {"merge_adapters": "never"}})


def test_a_model_that_is_quantised_already_is_refused(tmp_path):
    tiny().save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(content | {"quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(ValueError, match="got weights quantised with awq"):
        load_pretrained(AutoModelForCausalLM, tmp_path, quant="int8")


def test_routers_keep_their_dtype():
    model = tiny()
    model.model.layers[0].mlp.gate = nn.Linear(32, 4)
    quantise_layers(model, "int8")
    assert type(model.model.layers[0].mlp.gate) is nn.Linear and len(layers(model)) == 14
