"""Output layers of bitsandbytes and torchao in `FusedHead` and `head_arguments`, with and without a peft adapter."""

import types

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_kernels import FusedHead, QuantisedWeight, head_arguments, reference
from rlhf_kernels.integrations.head import fuse_head, token_logprobs_of
from rlhf_kernels.matrices import operands
from rlhf_kernels.output_layer import stored_weight

SIZES = {
    "vocab_size": 192,
    "hidden_size": 128,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
NESTED = {"bitsandbytes": False, "bitsandbytes, nested": True}
KINDS = (*NESTED, "torchao")


def quantised(layer: nn.Linear, kind: str) -> tuple[nn.Module, torch.Tensor]:
    """Return the layer in the format of `kind`, and its weight as that package dequantises it."""
    if kind == "torchao":
        quantization = pytest.importorskip("torchao.quantization", reason="the extra `quant` is not installed")
        holder = nn.Sequential(layer)
        quantization.quantize_(holder, quantization.Int8WeightOnlyConfig())
        return holder[0], holder[0].weight.dequantize()
    bnb = pytest.importorskip("bitsandbytes", reason="the extra `quant` is not installed")
    v, h = layer.weight.shape
    made = bnb.nn.Linear4bit(h, v, layer.bias is not None, quant_type="nf4", compress_statistics=NESTED[kind])
    made.load_state_dict(layer.state_dict())
    made = made.to("cpu")  # this quantises the weight
    return made, bnb.functional.dequantize_4bit(made.weight.data, made.weight.quant_state)


def model(kind: str | None, dtype=torch.float32) -> tuple[LlamaForCausalLM, torch.Tensor]:
    """Return a model whose output layer is in the format of `kind`, and the layer's dequantised weight."""
    torch.manual_seed(0)
    made = LlamaForCausalLM(LlamaConfig(**SIZES)).to(dtype)
    nn.init.normal_(made.lm_head.weight, std=0.3)
    if kind is None:
        return made, made.lm_head.weight
    layer, weight = quantised(made.lm_head, kind)
    made.lm_head = layer
    return made, weight


def batch(hidden: int = 128, dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    states = torch.randn(3, 9, hidden, generator=g).to(dtype).requires_grad_()
    return states, torch.randint(0, 192, (3, 9), generator=g)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weight_is_that_of_the_package(kind, dtype):
    made, weight = model(kind, dtype)
    found = stored_weight(made.lm_head)
    assert isinstance(found, QuantisedWeight) and found.shape == (192, 128)
    got = found.dequantised(dtype)
    # torchao multiplies in the dtype of the scale, and nested statistics are sums of two numbers.
    torch.testing.assert_close(got, weight.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("nested", [False, True])
def test_the_layout_of_bitsandbytes_for_cpus(nested):
    """The layer packs its weight in a different order when it first runs on a CPU with AVX512-BF16, and rounds absmax."""
    bnb = pytest.importorskip("bitsandbytes", reason="the extra `quant` is not installed")
    torch.manual_seed(0)
    made, _ = quantised(nn.Linear(128, 192, bias=False), "bitsandbytes, nested" if nested else "bitsandbytes")
    before = stored_weight(made)
    weight = made.weight
    weight.data, _ = bnb.functional._convert_weight_packed_for_cpu(weight.data, weight.quant_state)
    assert weight.quant_state.packing_format_for_cpu
    after = stored_weight(made)
    assert torch.equal(after.values, before.values) and torch.equal(after.scales, before.scales.bfloat16())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("adapted", [False, True])
def test_a_fused_head_reads_a_quantised_layer(kind, adapted):
    """Log-probs, loss and gradients are those of the dequantised weight, also inside peft's layer for it."""
    made, weight = model(kind)
    hidden, ids = batch()
    whole, trained = weight.float(), [hidden]
    if adapted:
        # peft adapts layers of bitsandbytes on a GPU only, so its plain layer is used around both.
        made, _ = model(None)
        layer = get_peft_model(made, LoraConfig(r=4, lora_alpha=6, target_modules=["lm_head"])).base_model.model.lm_head
        nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
        layer.base_layer = model(kind)[0].lm_head
        trained += [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
        whole = whole + 1.5 * trained[2] @ trained[1]
    head = FusedHead.of(made)
    got = head.logprobs(hidden, ids, entropy=True)
    expected = reference.linear_token_logprobs(hidden, whole, ids, entropy=True)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(got.logprobs.square().sum() + got.entropy.sum(), trained)
    exact = torch.autograd.grad(expected.logprobs.square().sum() + expected.entropy.sum(), trained)
    for a, b in zip(gradients, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())
    constants = {"old_logprobs": expected.logprobs.detach() + 0.1, "advantages": torch.randn(3, 9)}
    mask = torch.ones(3, 9, dtype=torch.bool)
    loss = head.ppo_loss(hidden, ids, **constants, mask=mask).loss
    options = {"temperature": 1.0, "softcap": None, "logit_scale": 1.0}
    theirs = reference.linear_ppo_loss(hidden, whole, ids, **constants, mask=mask, **options).loss
    torch.testing.assert_close(loss, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_head_in_a_model(kind):
    """The head replaces the layer; outside of `taking` the model returns the layer's logits."""
    made, weight = model(kind)
    plain = LlamaForCausalLM(LlamaConfig(**SIZES))
    plain.load_state_dict({k: v for k, v in made.state_dict().items() if not k.startswith("lm_head")}, strict=False)
    plain.lm_head.weight = nn.Parameter(weight.float())
    ids = torch.randint(0, 192, (3, 9), generator=torch.Generator().manual_seed(1))
    logits = made.train()(input_ids=ids).logits
    names = [name for name, _ in made.named_parameters()]
    head = fuse_head(made)
    assert [name.replace("lm_head.layer.", "lm_head.") for name, _ in made.named_parameters()] == names
    # The checks of the model run the layer, and bitsandbytes may then round its weight to bfloat16.
    near = {"rtol": 0, "atol": 2**-7 * float(logits.abs().max())}
    torch.testing.assert_close(made.train()(input_ids=ids).logits, logits, **near)
    got = token_logprobs_of(made, ids, torch.ones_like(ids), 4, head=head)
    expected = reference.token_logprobs(plain(ids).logits[:, 4:-1], ids[:, 5:], entropy=True)
    torch.testing.assert_close(got, expected, **near)


@pytest.mark.parametrize("kind", KINDS)
def test_head_arguments_of_a_quantised_layer(kind):
    made, weight = model(kind)
    found = head_arguments(made)
    assert isinstance(found["weight"], QuantisedWeight) and found["bias"] is None
    # The check of the logits runs the layer, and bitsandbytes may then round absmax to bfloat16.
    torch.testing.assert_close(found["weight"].dequantised(), weight.float(), rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_product_in_float32(monkeypatch, kind):
    monkeypatch.setattr("rlhf_kernels.ops.weights.TILE_BYTES", 50 * 128 * 4)
    made, _ = model(kind, torch.bfloat16)
    hidden, ids = batch(dtype=torch.bfloat16)
    head = FusedHead(made.lm_head, float32=True)
    exact = hidden.float() @ stored_weight(made.lm_head).dequantised().T
    torch.testing.assert_close(head.logits(hidden), exact, rtol=1e-5, atol=1e-5)
    expected = reference.token_logprobs(exact, ids).logprobs
    torch.testing.assert_close(head.logprobs(hidden, ids).logprobs, expected, rtol=1e-5, atol=1e-5)


# ---- layers that are refused, as objects with the attributes that are read ----


def int8_tensor(**changes) -> types.SimpleNamespace:
    found = {
        "qdata": torch.zeros(6, 4, dtype=torch.int8),
        "scale": torch.ones(6, 1),
        "zero_point": torch.zeros(6, 1, dtype=torch.int8),
        "act_quant_kwargs": None,
        "act_pre_scale": None,
    }
    return types.SimpleNamespace(**found | changes, numel=lambda: 24)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (int8_tensor(scale=torch.ones(6, 2)), r"SimpleNamespace with torch.int8 and scales of shape \(6, 2\)"),
        (int8_tensor(qdata=torch.zeros(6, 2, dtype=torch.uint8)), "SimpleNamespace with torch.uint8 and scales"),
        (int8_tensor(act_quant_kwargs={}), "SimpleNamespace that quantises or scales its input"),
        (int8_tensor(act_pre_scale=torch.ones(4)), "SimpleNamespace that quantises or scales its input"),
        (torch.zeros(6, 4, dtype=torch.int8), "SimpleNamespace with a weight of torch.int8"),
        (
            types.SimpleNamespace(numel=lambda: 12, quant_state=types.SimpleNamespace(quant_type="fp4")),
            "bitsandbytes' 'fp4'",
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_other_formats_are_refused(weight, message):
    layer = types.SimpleNamespace(weight=weight, bias=None)
    with pytest.raises(
        ValueError, match=f"^head: got {message}.*, expected a floating point weight, NF4 of bitsandbytes"
    ):
        operands(layer, torch.zeros(2, 4))


def test_zero_points_are_refused():
    layer = nn.Linear(4, 6)
    layer.__dict__["weight"] = int8_tensor(zero_point=torch.ones(6, 1, dtype=torch.int8))
    del layer._parameters["weight"]
    model = nn.Module()
    model.get_output_embeddings = lambda: layer
    for read in (lambda: FusedHead(layer), lambda: head_arguments(model)):
        with pytest.raises(ValueError, match="head: got an int8 weight with zero points, expected"):
            read()
