"""Half-precision linear layers and attention on a processor without such instructions: the numbers equal autocast's."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, FalconConfig

from rlhf_engine.model import ActorCritic, frozen_copy, upcast
from rlhf_engine.model.reward_model import RewardModel
from rlhf_engine.model.upcast import UpcastAttention, UpcastLinear, upcast_products
from tests.engine.helpers.passes import hidden_of
from tests.engine.helpers.rollouts import gradients, make_rollout
from tests.engine.helpers.tiny_models import tiny

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def old_processor(monkeypatch):
    monkeypatch.setattr(upcast, "has_products", lambda dtype, device: dtype == torch.float32)


def layers_of(bias):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(48, 40, bias=bias))
    ours = copy.deepcopy(plain)
    upcast_products(ours, BF16)
    assert type(plain[0]) is nn.Linear and type(ours[0]) is UpcastLinear
    return plain, ours


def run(layer, x, slope, dtype):
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        out = layer(x)
    out.backward(slope.to(out.dtype))
    return [out, x.grad, *(parameter.grad for parameter in layer.parameters())]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("half_weights", [False, True])
def test_output_and_gradients_equal_those_of_the_rounded_factors(bias, half_weights):
    plain, ours = layers_of(bias)
    x, slope = torch.randn(3, 17, 48), torch.randn(3, 17, 40)
    if half_weights:
        plain, ours, x = plain.to(BF16), ours.to(BF16), x.to(BF16)
    found, theirs = (run(layer, x, slope, None if half_weights else BF16) for layer in (ours, plain))
    rounded = [part.detach().to(BF16).double() for part in (x, *plain.parameters())]
    slope = slope.to(BF16).double()
    exact = [rounded[0] @ rounded[1].t() + (rounded[2] if bias else 0.0), slope @ rounded[1]]
    exact += [slope.flatten(0, 1).t() @ rounded[0].flatten(0, 1)] + [slope.sum((0, 1))] * bias
    for mine, reference, other in zip(found, exact, theirs, strict=True):
        assert mine.dtype == other.dtype
        bound = torch.finfo(mine.dtype).eps * reference.abs() + 1e-6 * reference.abs().max()
        assert bool(((mine.double() - reference).abs() <= bound).all())


def test_a_second_derivative_is_refused():
    _, ours = layers_of(bias=False)
    x = torch.randn(3, 48, requires_grad=True)
    with torch.autocast("cpu", BF16):
        out = ours(x)
    (slope,) = torch.autograd.grad(out.float().square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


def test_a_gradient_has_the_grad_dtype_of_the_weight():
    _, ours = layers_of(bias=True)
    ours = ours.to(BF16)
    for parameter in ours.parameters():
        parameter.grad_dtype = torch.float32
    x, slope = torch.randn(40, 48).to(BF16), torch.randn(40, 40).to(BF16)
    ours(x).backward(slope)
    exact = slope.double().t() @ x.double()
    assert float((ours[0].weight.grad.double() - exact).abs().max()) < 1e-5 * float(exact.abs().max())


def test_a_large_weight_is_converted_in_parts(monkeypatch):
    x, slope = torch.randn(5, 48), torch.randn(5, 40)
    whole = run(layers_of(bias=True)[1], x, slope, BF16)
    monkeypatch.setattr(upcast, "_PART", 48 * 7)
    for mine, other in zip(run(layers_of(bias=True)[1], x, slope, BF16), whole, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_dtypes_are_bitwise_unchanged(dtype):
    plain, ours = (layer.to(dtype) for layer in layers_of(bias=True))
    x, slope = torch.randn(5, 48, dtype=dtype), torch.randn(5, 40, dtype=dtype)
    for mine, other in zip(run(ours, x, slope, None), run(plain, x, slope, None), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_gradients_of_a_policy_are_near_autocasts(monkeypatch, checkpointed):
    rollout = make_rollout()

    def gradients_with(has):
        monkeypatch.setattr(upcast, "has_products", lambda dtype, device: has or dtype == torch.float32)
        policy = ActorCritic(tiny(initializer_range=0.2), compute_dtype=BF16, gradient_checkpointing=checkpointed)
        kinds = {type(module) for module in policy.model.modules() if isinstance(module, nn.Linear)}
        assert kinds == {nn.Linear if has else UpcastLinear}
        return gradients(policy, rollout, microbatch=4)

    ours, theirs = gradients_with(False), gradients_with(True)
    for name, gradient in theirs.items():
        assert float((ours[name] - gradient).norm()) <= 0.05 * float(gradient.norm()), name


def test_upcast_layers_survive_copies_and_reward_models_get_them(tmp_path):
    policy = ActorCritic(tiny(), compute_dtype=BF16)
    assert type(frozen_copy(policy).trunk.layers[0].mlp.up_proj) is UpcastLinear
    policy.model.save_pretrained(tmp_path)
    saved, ids = AutoModelForCausalLM.from_pretrained(tmp_path), torch.arange(3, 9)[None]
    assert torch.equal(saved.eval()(input_ids=ids).logits, policy.model(input_ids=ids).logits)
    scorer = RewardModel.from_causal_lm(tiny(), seed=1)
    assert type(scorer.trunk.layers[0].mlp.up_proj) is nn.Linear
    assert type(scorer.computing(compute_dtype=BF16).trunk.layers[0].mlp.up_proj) is UpcastLinear


def test_attention_and_its_gradients_equal_those_of_the_rounded_factors():
    torch.manual_seed(0)
    sizes = {"query": (2, 4, 9, 8), "key": (2, 2, 9, 8), "value": (2, 2, 9, 8)}
    factors = {name: torch.randn(size).requires_grad_() for name, size in sizes.items()}
    padding = torch.ones(9, 9).tril().bool() & (torch.arange(9) > 2 * torch.arange(2)[:, None, None, None])
    padding |= torch.eye(9).bool()
    for mask in (None, padding, torch.where(padding, 0.0, -60_000.0).to(BF16)):
        options = {"attn_mask": mask, "is_causal": mask is None, "scale": 0.3, "enable_gqa": True}
        with torch.autocast("cpu", BF16), UpcastAttention():
            out = nn.functional.scaled_dot_product_attention(*factors.values(), **options)
        slope = torch.randn(out.shape).to(BF16)
        found = [out, *torch.autograd.grad(out, list(factors.values()), slope)]

        exact = [factor.detach().to(BF16).double().requires_grad_() for factor in factors.values()]
        query, key, value = exact[0], *(one.repeat_interleave(2, 1) for one in exact[1:])
        seen = torch.ones(9, 9).tril().bool() if mask is None else padding
        scores = (query @ key.mT * 0.3).masked_fill(~seen, -torch.inf)
        expected = scores.softmax(-1) @ value
        expected = [expected, *torch.autograd.grad(expected, exact, slope.double())]
        assert out.dtype == BF16 and all(one.dtype == torch.float32 for one in found[1:])
        for mine, reference in zip(found, expected, strict=True):
            bound = torch.finfo(mine.dtype).eps * reference.abs() + 1e-6 * reference.abs().max()
            assert bool(((mine.double() - reference).abs() <= bound).all())


def upcast_calls(monkeypatch, run):
    """Return how often `run` called the upcast attention."""
    calls, original = [], upcast._Attention.apply
    monkeypatch.setattr(upcast._Attention, "apply", lambda *given: calls.append(given) or original(*given))
    run()
    return len(calls)


@pytest.mark.parametrize("half_weights", [False, True])
def test_a_trunk_uses_upcast_attention_only_without_half_precision_instructions(monkeypatch, half_weights):
    for has, expected in ((False, 2), (True, 0)):
        monkeypatch.setattr(upcast, "has_products", lambda dtype, device, has=has: has or dtype == torch.float32)
        model = tiny().to(BF16) if half_weights else tiny()
        policy = ActorCritic(model, compute_dtype=None if half_weights else BF16)
        assert upcast_calls(monkeypatch, lambda policy=policy: hidden_of(policy, torch.arange(3, 9)[None])) == expected
    assert upcast_calls(monkeypatch, lambda: hidden_of(ActorCritic(tiny()), torch.arange(3, 9)[None])) == 0


FALCON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 61}


@pytest.mark.parametrize(
    "make",
    [
        lambda: tiny("llama", initializer_range=0.2),
        lambda: tiny("mistral", initializer_range=0.2),  # a window of 7
        lambda: tiny("gpt2", initializer_range=0.2),
        # Its layers choose their attention by the name of the implementation.
        lambda: AutoModelForCausalLM.from_config(FalconConfig(**FALCON, initializer_range=0.2)).eval(),
    ],
    ids=["llama", "mistral", "gpt2", "falcon"],
)
def test_a_trunk_is_as_near_to_float32_as_with_autocast(monkeypatch, make):
    """Compare on two rows of 11 tokens, one of them padded on the left."""
    torch.manual_seed(0)
    model = make()
    ids, mask = torch.randint(3, 61, (2, 11)), torch.ones(2, 11, dtype=torch.long)
    mask[1, :4] = 0
    exact = hidden_of(ActorCritic(model), ids, mask)[mask.bool()]

    def distance(has):
        monkeypatch.setattr(upcast, "has_products", lambda dtype, device: has or dtype == torch.float32)
        policy = ActorCritic(copy.deepcopy(model), compute_dtype=BF16)
        found = hidden_of(policy, ids, mask)[mask.bool()]
        return float((found.float() - exact).norm() / exact.norm())

    with torch.no_grad():
        assert distance(False) <= 1.5 * distance(True) < 0.1


def test_weights_are_rounded_once_in_passes_without_gradient():
    policy, ids = ActorCritic(tiny(), compute_dtype=BF16), torch.arange(3, 9)[None]
    weight = policy.trunk.layers[0].mlp.down_proj.weight
    with torch.no_grad():
        with policy.products():
            before = hidden_of(policy, ids)
            weight.mul_(2)
            assert torch.equal(hidden_of(policy, ids), before)
            with torch.enable_grad():  # a pass with gradients reads the current weight
                assert not torch.equal(hidden_of(policy, ids), before)
        assert not torch.equal(hidden_of(policy, ids), before)
