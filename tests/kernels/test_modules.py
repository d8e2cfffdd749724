"""`FusedHead`: its methods against the ops, with an adapter, and with a layer that a different module registers."""

import copy

import pytest
import torch
from torch import nn

from rlhf_kernels import FusedHead, linear_ppo_loss, linear_token_logprobs, linear_topk_kl, logits_ppo_loss, reference

from .helpers.heads import differentiate, make

TRANSFORM = {"softcap": 3.0, "logit_scale": 0.7}


class Lora(nn.Module):
    """A layer with the attributes of peft's LoRA layer that the head reads."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base_layer, self.merged, self.disable_adapters, self.active_adapters = base, False, False, ["a"]
        self.scaling = {"a": 1.5, "b": -2.0}
        vocabulary, hidden = base.weight.shape
        self.lora_A = nn.ModuleDict({name: nn.Linear(hidden, 3, bias=False) for name in "ab"})
        self.lora_B = nn.ModuleDict({name: nn.Linear(3, vocabulary, bias=False) for name in "ab"})
        self.lora_dropout = nn.ModuleDict({"a": nn.Dropout(0.5), "b": nn.Identity()})

    def forward(self, x):
        low = {n: self.lora_A[n](self.lora_dropout[n](x)) for n in self.active_adapters}
        added = [self.lora_B[n](low[n]) * self.scaling[n] for n in self.active_adapters]
        return self.base_layer(x) + (0 if self.disable_adapters else sum(added))


def linear(leaves) -> nn.Linear:
    layer = nn.Linear(24, 203)
    with torch.no_grad():
        layer.weight.copy_(leaves["weight"])
        layer.bias.copy_(leaves["bias"])
    return layer


def test_methods_equal_the_ops():
    leaves, constants, extra = make(0)
    layer = linear(leaves)
    head, given = FusedHead(layer, **TRANSFORM), {"bias": layer.bias, **TRANSFORM}
    product = layer(leaves["hidden"])
    assert torch.equal(head.logits(leaves["hidden"]), 3.0 * torch.tanh(product * 0.7 / 3.0))
    options = {"temperature": 0.8, "mask": constants["mask"], "entropy": True}
    got = head.logprobs(leaves["hidden"], constants["ids"], **options)
    expected = linear_token_logprobs(leaves["hidden"], layer.weight, constants["ids"], **given, **options)
    assert all(map(torch.equal, got, expected))
    options = {"returns": extra["returns"], "temperature": 0.8, "kl_coef": 0.1, "ref_logprobs": extra["ref_logprobs"]}
    options |= {name: leaves[name] for name in ("value_weight", "value_bias")}
    got = head.ppo_loss(leaves["hidden"], **constants, **options)
    expected = linear_ppo_loss(leaves["hidden"], layer.weight, **constants, **given, **options)
    assert torch.equal(got.loss, expected.loss) and got.loss.requires_grad
    with pytest.raises(TypeError, match="'clip_range'; did you mean 'cliprange'"):
        head.ppo_loss(leaves["hidden"], **constants, clip_range=0.1)
    with pytest.raises(ValueError, match="'cuda' cannot serve this call"):
        FusedHead(layer, backend="cuda").ppo_loss(leaves["hidden"], **constants)


def teacher_of(constants):
    """Return the 7 most probable tokens of random logits for every row, and their log-probs."""
    torch.manual_seed(2)
    logprobs, ids = torch.randn(*constants["ids"].shape, 203).log_softmax(-1).topk(7)
    return ids, logprobs


def test_topk_kl_equals_the_op():
    leaves, constants, _ = make(0)
    layer, mask = linear(leaves), constants["mask"]
    weights = torch.rand(mask.shape)
    options = {
        "direction": "jsd",
        "tail": "lump",
        "beta": 0.3,
        "weights": weights,
        "num_tokens": 11,
        "temperature": 0.8,
    }
    got = FusedHead(layer, **TRANSFORM).topk_kl(leaves["hidden"], *teacher_of(constants), mask, **options)
    given = {"bias": layer.bias, **TRANSFORM}
    expected = linear_topk_kl(leaves["hidden"], layer.weight, *teacher_of(constants), mask, **given, **options)
    assert all(map(torch.equal, got, expected)) and got.loss.requires_grad
    with pytest.raises(ValueError, match="'cuda' cannot serve this call"):
        FusedHead(layer, backend="cuda").topk_kl(leaves["hidden"], *teacher_of(constants), mask)


@pytest.mark.parametrize("active", [["a"], ["b", "a"]], ids="".join)
def test_topk_kl_applies_active_adapters(active):
    """The loss and the gradients of hidden states and adapters equal those of the logits that the layer computes."""
    leaves, constants, _ = make(1)
    layer = Lora(linear(leaves)).eval()
    layer.active_adapters = active
    mask, (ids, logprobs) = constants["mask"], teacher_of(constants)
    trained = {n: p for n, p in layer.named_parameters() if "lora" in n and n.split(".")[1] in active}
    leaves = {"hidden": leaves["hidden"].clone().requires_grad_()} | trained
    got = FusedHead(layer, **TRANSFORM).topk_kl(leaves["hidden"], ids, logprobs, mask)
    gradients = differentiate(got.loss, leaves)
    for x in leaves.values():
        x.grad = None
    student = (3.0 * torch.tanh(layer(leaves["hidden"]) * 0.7 / 3.0)).log_softmax(-1).gather(-1, ids)
    divergence = (logprobs.exp() * (logprobs - student)).sum(-1)
    expected = divergence[mask].mean()
    torch.testing.assert_close(got.loss, expected)
    for name, gradient in differentiate(expected, leaves).items():
        torch.testing.assert_close(gradients[name], gradient, rtol=2e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("active", [["a"], ["b", "a"], []], ids="".join)
def test_active_adapters_are_applied(active):
    """Loss and all gradients of policy and value head equal those of the logits that the layer computes."""
    torch.manual_seed(0)
    leaves, constants, extra = make(1)
    layer = Lora(linear(leaves))
    head = FusedHead(layer, softcap=3.0)
    layer.active_adapters = active
    layer.disable_adapters = not active
    trained = {name: p for name, p in layer.named_parameters() if "lora" in name}
    leaves = {k: leaves[k].clone().requires_grad_() for k in ("hidden", "value_weight", "value_bias")} | trained
    options = {"returns": extra["returns"], "entropy_coef": 0.02, "vf_coef": 0.5}
    value = {k: leaves[k] for k in ("value_weight", "value_bias")}
    torch.manual_seed(1)  # of the dropout
    got = head.ppo_loss(leaves["hidden"], **constants, **value, **options)
    gradients = differentiate(got.loss, leaves)
    for x in leaves.values():
        x.grad = None
    values = leaves["hidden"] @ leaves["value_weight"] + leaves["value_bias"]
    torch.manual_seed(1)
    first = {"logits": layer(leaves["hidden"]), "temperature": 1.0, "softcap": 3.0, "logit_scale": 1.0}
    expected = reference.logits_ppo_loss(**first, **constants, values=values, **options)
    torch.testing.assert_close(got.loss, expected.loss)
    for name, gradient in differentiate(expected.loss, leaves).items():
        torch.testing.assert_close(gradients[name], gradient, rtol=2e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")
        used = not name.startswith("lora") or name.split(".")[1] in active
        assert bool(gradient.abs().max() > 0) == used, name


def test_an_adapter_makes_no_copy_of_the_weight():
    """The weight of the product is the parameter, and B is a parameter for one adapter in the dtype of the hidden states."""
    leaves, _, _ = make(1)
    layer = Lora(linear(leaves))
    found = FusedHead(layer).matrices(leaves["hidden"])
    assert found.weight is layer.base_layer.weight and found.hidden is leaves["hidden"]
    assert found.low_rank.weight.data_ptr() == layer.lora_B["a"].weight.data_ptr()
    layer.active_adapters = ["b", "a"]
    found = FusedHead(layer).matrices(leaves["hidden"])
    assert found.low_rank.weight.shape == (203, 6) and found.low_rank.states.shape == (4, 40, 6)
    first = found.first(7)
    torch.testing.assert_close(first.product(), found.product()[..., :7])


def test_hidden_states_of_masked_rows_may_be_nan_for_an_adapter():
    """No gradient is NaN, and the value head reads rows that only its mask includes."""
    leaves, constants, extra = make(1)
    mask = constants["mask"]
    value_mask = mask.clone()
    value_mask[:, :9] = True
    hidden = leaves["hidden"].masked_fill(~(mask | value_mask)[..., None], torch.nan)
    layer, results = Lora(linear(leaves)).eval(), []
    for states in (hidden.nan_to_num(), hidden):
        layer.zero_grad()
        options = {"value_weight": leaves["value_weight"], "value_mask": value_mask, "returns": extra["returns"]}
        found = FusedHead(layer).ppo_loss(states, **constants, **options)
        found.loss.backward()
        results.append((found.loss, found.metrics["value_loss"], layer.lora_A["a"].weight.grad.clone()))
    assert all(torch.equal(a, b) and b.isfinite().all() for a, b in zip(*results, strict=True))


def test_an_adapter_applies_to_positive_tokens_outside_of_the_mask():
    leaves, constants, _ = make(2)
    nll_mask = ~constants["mask"]
    nll_mask[1:] = False
    hidden = leaves["hidden"].masked_fill(~(constants["mask"] | nll_mask)[..., None], torch.nan)
    layer = Lora(linear(leaves)).eval()
    got = FusedHead(layer).ppo_loss(hidden, **constants, nll_mask=nll_mask, nll_coef=0.3)
    expected = logits_ppo_loss(layer(leaves["hidden"]), **constants, nll_mask=nll_mask, nll_coef=0.3)
    for name in ("policy_loss", "nll_loss"):
        torch.testing.assert_close(got.metrics[name], expected.metrics[name], rtol=1e-4, atol=1e-5)
    got.loss.backward()
    assert layer.lora_A["a"].weight.grad.isfinite().all()


class Owner(nn.Module):
    """A model that registers the layer and keeps the head in an attribute that is not a submodule."""

    def __init__(self):
        super().__init__()
        self.output = nn.Linear(24, 203)
        self.__dict__["head"] = FusedHead(self.output, **TRANSFORM)


def test_a_head_in_a_plain_attribute_sees_the_layer_of_its_copy():
    leaves, constants, _ = make(2)
    owner = Owner()
    assert [name for name, _ in owner.named_parameters()] == ["output.weight", "output.bias"]
    assert list(owner.head.state_dict()) == ["weight", "bias"]
    other = copy.deepcopy(owner)
    assert other.head.layer is other.output and other.output.weight is not owner.output.weight
    other.output.weight = nn.Parameter(leaves["weight"])  # as FSDP2 replaces it
    got = other.head.logprobs(leaves["hidden"], constants["ids"])
    of_layer = {"weight": leaves["weight"], "bias": other.output.bias}
    expected = linear_token_logprobs(leaves["hidden"], ids=constants["ids"], **of_layer, **TRANSFORM)
    assert torch.equal(got.logprobs, expected.logprobs)
    owner.head.load_state_dict({k: x + 1 for k, x in owner.head.state_dict().items()})
    assert torch.equal(other.output.bias + 1, owner.output.bias)
