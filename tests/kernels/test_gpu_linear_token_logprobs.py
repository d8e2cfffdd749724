"""`linear_token_logprobs` on a GPU: forward and the recomputing backward against float64."""

import pytest
import torch

from rlhf_kernels import linear_token_logprobs, reference

from .helpers.bounds import check_error
from .helpers.gpu import DEVICE, to_device
from .helpers.heads import differentiate, make, widen


def batch(*args, **kwargs):
    return map(to_device, make(*args, **kwargs))


def run(function, leaves, ids, dtype, **options):
    x = {k: leaves[k].to(dtype).clone().requires_grad_() for k in ("hidden", "weight", "bias")}
    wide = torch.promote_types(dtype, torch.float32)
    out = function(**x, ids=ids, entropy=True, **{k: widen(v, wide) for k, v in options.items()})
    weights = torch.linspace(-1, 1, ids.numel(), dtype=torch.float64, device=DEVICE).view(ids.shape)
    return out, differentiate((out.logprobs * weights).sum() - 0.3 * (out.entropy * weights.flip(0)).sum(), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "options",
    [{}, {"softcap": 3.0, "logit_scale": 0.7}, {"temperature": 0.8}, {"temperature": "row"}, {"chunk_tokens": 17}],
    ids=str,
)
def test_matches_float64(dtype, options):
    leaves, constants, extra = batch(0, dtype, t=15)
    options = options | {"mask": constants["mask"]}
    if options.get("temperature") == "row":
        options["temperature"] = extra["temperature"]
    plain = {k: v for k, v in options.items() if k != "chunk_tokens"}
    got, gradients = run(linear_token_logprobs, leaves, constants["ids"], dtype, **options, backend="triton")
    eager, eager_gradients = run(reference.linear_token_logprobs, leaves, constants["ids"], dtype, **plain)
    exact, exact_gradients = run(reference.linear_token_logprobs, leaves, constants["ids"], torch.float64, **plain)
    assert got.logprobs.dtype == torch.float32
    check_error("logprobs", got.logprobs, eager.logprobs, exact.logprobs)
    check_error("entropy", got.entropy, eager.entropy, exact.entropy)
    for name, gradient in gradients.items():
        assert gradient.dtype == dtype
        check_error(f"gradient of {name}", gradient, eager_gradients[name], exact_gradients[name])


@pytest.mark.parametrize(
    ("b", "t", "vocabulary", "hidden"), [(1, 1, 2, 1), (1, 1, 9001, 33), (3, 1, 65, 7), (2, 9, 701, 5)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_odd_shapes(dtype, b, t, vocabulary, hidden):
    """One row, one token, V and H that are not multiples of a block, and V of more than one block."""
    leaves, constants, _ = batch(1, dtype, b=b, t=t, vocabulary=vocabulary, hidden=hidden)
    got, gradients = run(linear_token_logprobs, leaves, constants["ids"], dtype, backend="triton")
    eager, eager_gradients = run(reference.linear_token_logprobs, leaves, constants["ids"], dtype)
    exact, exact_gradients = run(reference.linear_token_logprobs, leaves, constants["ids"], torch.float64)
    check_error("logprobs", got.logprobs, eager.logprobs, exact.logprobs)
    check_error("entropy", got.entropy, eager.entropy, exact.entropy)
    for name, gradient in gradients.items():
        check_error(f"gradient of {name}", gradient, eager_gradients[name], exact_gradients[name])


def test_masked_rows_have_no_effect():
    leaves, constants, extra = batch(2, torch.bfloat16, t=9)
    options = {"mask": constants["mask"], "temperature": extra["temperature"], "backend": "triton"}
    out = ~constants["mask"]
    clean, clean_gradients = run(linear_token_logprobs, leaves, constants["ids"], torch.bfloat16, **options)
    leaves["hidden"] = leaves["hidden"].masked_fill(out[..., None], torch.nan)
    options["temperature"] = options["temperature"].masked_fill(out, 7.0)
    ids = constants["ids"].masked_fill(out, -100)
    dirty, gradients = run(linear_token_logprobs, leaves, ids, torch.bfloat16, **options)
    assert (dirty.logprobs[out] == 0).all() and (dirty.entropy[out] == 0).all()
    assert torch.equal(clean.logprobs, dirty.logprobs) and torch.equal(clean.entropy, dirty.entropy)
    assert all(torch.equal(gradients[k], clean_gradients[k]) for k in gradients)


def test_empty_and_all_masked():
    leaves, constants, _ = batch(4, t=5)
    for hidden, ids in ((leaves["hidden"], constants["ids"]), (leaves["hidden"][:0], constants["ids"][:0])):
        x = hidden.clone().requires_grad_()
        mask = torch.zeros_like(ids, dtype=torch.bool)
        out = linear_token_logprobs(x, leaves["weight"], ids, mask=mask, backend="triton")
        out.logprobs.sum().backward()
        assert (out.logprobs == 0).all() and (x.grad == 0).all()


@pytest.mark.parametrize("upstream", [torch.inf, torch.nan, 1e9])
def test_the_upstream_gradient_of_masked_rows_is_ignored(upstream):
    """A function of the log-probs can have an infinite slope at the 0 of a masked row."""
    leaves, constants, _ = batch(2, torch.float16, t=9)
    mask, grads = constants["mask"], []
    for masked in (0.0, upstream):
        x = {k: leaves[k].clone().requires_grad_() for k in ("hidden", "weight")}
        out = linear_token_logprobs(**x, ids=constants["ids"], mask=mask, backend="triton")
        out.logprobs.backward(torch.where(mask, 1e-3, masked))
        grads.append([v.grad for v in x.values()])
    assert all(torch.equal(a, b) and (a != 0).any() for a, b in zip(*grads, strict=True))


def test_tiny_upstream_gradients_survive_half_precision():
    """Gradients of logits near 1e-7 underflow in float16, so they are computed relative to the largest coefficient."""
    leaves, constants, _ = batch(2, torch.float16, t=9)
    weight = leaves["weight"].clone().requires_grad_()
    weight.grad_dtype = torch.float32  # float16 could not hold the result
    out = linear_token_logprobs(leaves["hidden"], weight, constants["ids"], backend="triton")
    (out.logprobs.sum() * 1e-7).backward()
    exact = leaves["weight"].double().requires_grad_()
    expected = reference.linear_token_logprobs(leaves["hidden"].double(), exact, constants["ids"]).logprobs
    (expected.sum() * 1e-7).backward()
    assert (weight.grad.double() - exact.grad).norm() <= 0.01 * exact.grad.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bits_of_a_log_prob_do_not_depend_on_the_batch(dtype):
    """With a fixed chunk size, a row has the same bits as a single row, among other rows, and first or last in its chunk."""
    leaves, constants, _ = batch(8, dtype, b=1, t=40, vocabulary=603, hidden=96)
    hidden, weight, ids = leaves["hidden"].view(40, 96), leaves["weight"], constants["ids"].view(40)
    options = {"entropy": True, "chunk_tokens": 16, "backend": "triton"}
    whole = linear_token_logprobs(hidden, weight, ids, **options)
    for rows in (slice(None), slice(5, 6), slice(3, 12), slice(1, 18), slice(0, 39)):
        part = linear_token_logprobs(hidden[rows], weight, ids[rows], **options)
        assert torch.equal(part.logprobs, whole.logprobs[rows]), rows
        assert torch.equal(part.entropy, whole.entropy[rows]), rows


def test_log_probs_of_half_inputs_have_float32_accuracy():
    """Logits are float32 products of bfloat16 factors, so they have float32 accuracy; eager rounds them to 8 bits."""
    leaves, constants, _ = batch(9, torch.bfloat16, t=9)
    hidden, weight, ids = leaves["hidden"], leaves["weight"], constants["ids"]
    got = linear_token_logprobs(hidden, weight, ids, entropy=True, backend="triton")
    exact = reference.linear_token_logprobs(hidden.double(), weight.double(), ids, entropy=True)
    torch.testing.assert_close(got.logprobs.double(), exact.logprobs, rtol=0, atol=5e-6)
    torch.testing.assert_close(got.entropy.double(), exact.entropy, rtol=0, atol=5e-6)
