"""Exact layers: bits that depend on neither the position in a tensor nor the pass, with the gradients of torch's layers."""

import pytest
import torch
from torch import nn

from rlhf_engine.model import ActorCritic
from rlhf_engine.model.exact import exact_attention, invariant_activation, make_exact
from tests.engine.helpers.passes import logprobs_of
from tests.engine.helpers.tiny_models import tiny

ACTIVATIONS = [nn.SiLU(), nn.GELU(), nn.GELU(approximate="tanh")]
DTYPES = [torch.float32, torch.bfloat16]


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def gradients(function, inputs, slope):
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    return out.detach(), torch.autograd.grad(out, leaves, slope)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("module", ACTIVATIONS, ids=["silu", "gelu", "gelu_tanh"])
def test_activations_have_the_bits_of_any_place_and_the_gradient_of_torch(module, dtype):
    x, formula = 3 * randn(7, 101, dtype=dtype), invariant_activation(module)
    whole = formula(x)
    assert all(
        torch.equal(formula(x[row, column:]), whole[row, column:]) for row in (0, 6) for column in (0, 1, 37, 100)
    )
    model = nn.Sequential(type(module)(*([] if not hasattr(module, "approximate") else [module.approximate])))
    model.config, model.device = tiny().config, torch.device("cpu")
    make_exact(model)
    slope = randn(7, 101, dtype=dtype, seed=1)
    found, expected = (gradients(one, [x], slope) for one in (model, module))
    assert torch.equal(found[0], whole)
    for ours, theirs in zip((found[0], *found[1]), (expected[0], *expected[1]), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_has_the_gradient_of_torch(dtype, window):
    """Two sequences with four query heads on two groups; values have a smaller head size than keys."""
    inputs = (
        randn(2, 4, 9, 8, dtype=dtype),
        randn(2, 2, 9, 8, dtype=dtype, seed=1),
        randn(2, 2, 9, 6, dtype=dtype, seed=2),
    )
    distance = torch.arange(9)[:, None] - torch.arange(9)
    mask = (distance >= 0) & (distance < (window or 9))

    def plain(query, key, value):
        key, value = (x.repeat_interleave(2, 1) for x in (key, value))
        return nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=0.4).transpose(1, 2)

    def exact(query, key, value):
        return exact_attention(None, query, key, value, None, scaling=0.4, sliding_window=window)[0]

    slope = randn(2, 9, 4, 6, dtype=dtype, seed=3)
    ours, of_ours = gradients(exact, inputs, slope)
    theirs, of_theirs = gradients(plain, [x.float() for x in inputs], slope.float())
    for found, expected in zip((ours, *of_ours), (theirs, *of_theirs), strict=True):
        tolerance = 4 * torch.finfo(dtype).eps * float(expected.abs().max())
        torch.testing.assert_close(found, expected.to(dtype), rtol=0, atol=tolerance)


def test_attention_of_a_row_has_the_bits_of_shorter_sequences():
    query, key, value = (randn(1, 2, 40, 8, seed=seed) for seed in range(3))
    whole = exact_attention(None, query, key, value, None)[0]
    for length in (1, 15, 39):
        shorter = (x[:, :, :length] for x in (query, key, value))
        assert torch.equal(exact_attention(None, *shorter, None)[0], whole[:, :length])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
def test_logprobs_have_the_bits_of_any_batch(family, dtype):
    """A single short sequence has fewer rows than a product of the same bits needs, and is padded."""
    policy = ActorCritic(tiny(family, initializer_range=0.2).to(dtype))
    policy.be_exact()
    ids = torch.randint(3, 40, (5, 37), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = logprobs_of(policy, ids)
        for length in (2, 3, 16, 30):
            assert torch.equal(logprobs_of(policy, ids[3:4, :length]), whole[3:4, : length - 1]), length
    leaves = logprobs_of(policy, ids)
    assert torch.equal(leaves, whole) and leaves.requires_grad


def test_models_without_exact_passes_are_refused():
    eager = tiny()
    eager.set_attn_implementation("eager")
    with pytest.raises(
        ValueError, match=r"rollout\.exact: got True for LlamaModel with attention 'eager'.*needs 'sdpa'"
    ):
        ActorCritic(eager).be_exact()
    with pytest.raises(ValueError, match=r"rollout\.exact: got True on meta, expected False: only passes on a CPU"):
        make_exact(tiny().model.to("meta"))
