"""`token_logprobs` against float64, on inputs for which other implementations gave wrong results."""

import math

import pytest
import torch

from rlhf_kernels import reference, token_logprobs

from .helpers.bounds import (
    TEMPERATURES,
    check_error,
    check_softcap_slope,
    check_temperature_costs_nothing,
    temperature_scene,
)
from .helpers.compiled import compile_whole

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def compare(logits, ids, upstream=(0.37, -0.11), **options):
    """Compare outputs and gradient of the kernel with eager and float64; return those of the kernel.

    The gradient is that of a weighted sum of the two outputs.
    """
    results = []
    for function, dtype in (
        (token_logprobs, logits.dtype),
        (reference.token_logprobs, logits.dtype),
        (None, torch.float64),
    ):
        x = logits.detach().to(dtype).requires_grad_()
        wide = {
            k: v.double() if function is None and torch.is_tensor(v) and v.is_floating_point() else v
            for k, v in options.items()
        }
        out = (function or reference.token_logprobs)(x, ids, entropy=True, **wide)
        weights = torch.linspace(-1, 1, out.logprobs.numel(), dtype=torch.float64).view(out.logprobs.shape)
        loss = (upstream[0] * out.logprobs * weights).sum() + (upstream[1] * out.entropy * weights).sum()
        results.append((out.logprobs, out.entropy, torch.autograd.grad(loss, x)[0]))
    for name, *triple in zip(("logprobs", "entropy", "gradient"), *results, strict=True):
        check_error(name, *triple)
    return results[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [1, 2, 7, 64, 1003, 5027])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"softcap": 5.0},
        {"temperature": 0.7, "logit_scale": 0.5},
        {"softcap": 2.0, "temperature": "row"},
        {"temperature": "row"},
    ],
    ids=str,
)
def test_matches_float64(isa, dtype, vocabulary, options):
    torch.manual_seed(vocabulary)
    rows = 17
    if options.get("temperature") == "row":
        options = options | {"temperature": torch.rand(rows) + 0.5}
    compare((3 * torch.randn(rows, vocabulary)).to(dtype), torch.randint(0, vocabulary, (rows,)), **options)


@pytest.mark.parametrize("kind", TEMPERATURES)
def test_a_temperature_costs_no_accuracy(isa, kind):
    """The rounding of 1 / T must not change a log-prob of -15, because ratios and k3 would amplify the error."""
    logits, ids, options = temperature_scene(kind)
    check_temperature_costs_nothing(token_logprobs(logits, ids, **options).logprobs, logits, ids, options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_slope_of_the_softcap_does_not_cancel(isa, dtype):
    check_softcap_slope(token_logprobs, dtype)


def test_hand_computed():
    """For p = (1/2, 1/4, 1/4), log p = -log 2 and H = 1.5 log 2; the gradient of log p is onehot - p."""
    logits = torch.tensor([[0.0, -math.log(2), -math.log(2)]], requires_grad=True)
    out = token_logprobs(logits, torch.tensor([0]), entropy=True)
    torch.testing.assert_close(out.logprobs, torch.tensor([-math.log(2)]))
    torch.testing.assert_close(out.entropy, torch.tensor([1.5 * math.log(2)]))
    out.logprobs.backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[0.5, -0.25, -0.25]]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_negative_logits_and_odd_vocabulary(isa, dtype):
    """If columns past V were read as 0, they would dominate logits near -50 (other libraries gave log-probs of +123)."""
    logits = (-50 + torch.randn(9, 1001)).to(dtype)
    logprobs, _, _ = compare(logits, torch.randint(0, 1001, (9,)))
    assert (logprobs < 0).all()


def test_common_offset(isa):
    compare(1e4 + torch.randn(9, 777), torch.randint(0, 777, (9,)))


def test_logsumexp_near_zero(isa):
    """For normalised logits the log-prob is the logit itself."""
    logits = torch.randn(9, 333).log_softmax(-1)
    logprobs, _, _ = compare(logits, torch.arange(9))
    torch.testing.assert_close(logprobs, logits[torch.arange(9), torch.arange(9)], atol=1e-6, rtol=1e-6)


def test_rising_maximum(isa):
    """The running maximum changes in every block."""
    compare(torch.linspace(-80, 80, 5000).repeat(3, 1), torch.tensor([0, 2500, 4999]))


def test_masked_columns(isa):
    """A logit of -inf has probability 0, and 0 * inf must not become NaN in the entropy."""
    logits = torch.randn(5, 2100)
    logits[:, :1500] = -torch.inf
    out = token_logprobs(logits, torch.full((5,), 2000), entropy=True)
    expected = reference.token_logprobs(logits[:, 1500:].double(), torch.full((5,), 500), entropy=True)
    torch.testing.assert_close(out.logprobs, expected.logprobs.float())
    torch.testing.assert_close(out.entropy, expected.entropy.float())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_logits_give_a_non_finite_row(isa, bad):
    logits = torch.randn(3, 2000)
    logits[1, 1700] = bad
    out = token_logprobs(logits, torch.zeros(3, dtype=torch.long), entropy=True)
    assert out.logprobs.isfinite().tolist() == [True, False, True]
    assert out.entropy.isfinite().tolist() == [True, False, True]


def test_masked_rows_are_zero(isa):
    logits = torch.randn(2, 3, 50)
    logits[0, 1] = torch.nan
    logits.requires_grad_()
    ids = torch.randint(0, 50, (2, 3))
    ids[0, 1] = -100
    mask = torch.tensor([[True, False, True], [True, True, False]])
    out = token_logprobs(logits, ids, mask=mask, entropy=True)
    (out.logprobs.sum() + out.entropy.sum()).backward()
    assert (out.logprobs[~mask] == 0).all() and (out.entropy[~mask] == 0).all()
    assert (logits.grad[~mask] == 0).all() and logits.grad[mask].isfinite().all()


def test_strides_are_respected(isa):
    """Trainers pass slices: shifted logits, a transpose, every second row."""
    base, ids = torch.randn(4, 9, 130), torch.randint(0, 130, (4, 8))
    compare(base[:, :-1], ids)
    compare(base[:, 1:].transpose(0, 1), ids.t())
    compare(base[:, ::2], ids[:, :5] % 130)
    compare(torch.randn(130, 12).t(), torch.randint(0, 130, (12,)))


def test_inplace_gradient_overwrites_the_logits():
    from rlhf_kernels import logits_ppo_loss

    logits = torch.randn(2, 5, 40).requires_grad_()
    work = logits * 1
    ids, mask = torch.randint(0, 40, (2, 5)), torch.ones(2, 5, dtype=torch.bool)
    old, advantages = torch.full((2, 5), -3.5), torch.randn(2, 5)
    expected = torch.autograd.grad(logits_ppo_loss(logits, ids, old, advantages, mask).loss, logits)[0]
    before = work.data_ptr()
    (gradient,) = torch.autograd.grad(logits_ppo_loss(work, ids, old, advantages, mask, inplace=True).loss, work)
    assert gradient.data_ptr() == before
    assert torch.equal(gradient, expected)


@pytest.mark.parametrize(("own", "shared"), [((1, 40), (5, 40)), ((1, 3, 40), (2, 3, 40))])
def test_inplace_does_not_overwrite_overlapping_rows(own, shared):
    from rlhf_kernels import logits_ppo_loss

    row, tokens = torch.randn(own).requires_grad_(), shared[:-1]
    ids, mask = torch.arange(math.prod(tokens)).view(tokens), torch.ones(tokens, dtype=torch.bool)
    gradients = []
    for inplace in (False, True):
        logits = (row * 1).expand(shared)
        loss = logits_ppo_loss(logits, ids, torch.full(tokens, -3.5), torch.ones(tokens), mask, inplace=inplace).loss
        gradients.append(torch.autograd.grad(loss, row)[0])
    assert torch.equal(*gradients)


def test_reference_gives_non_finite_rows_too():
    logits = torch.randn(2, 9)
    logits[1, 3] = math.nan
    out = reference.token_logprobs(logits, torch.zeros(2, dtype=torch.long), entropy=True)
    assert out.entropy.isfinite().tolist() == [True, False]


def test_same_bits_twice_and_in_any_batch():
    logits, ids = torch.randn(40, 3001), torch.randint(0, 3001, (40,))
    whole = token_logprobs(logits, ids, entropy=True)
    again = token_logprobs(logits, ids, entropy=True)
    part = token_logprobs(logits[7:9], ids[7:9], entropy=True)
    assert torch.equal(whole.logprobs, again.logprobs) and torch.equal(whole.entropy, again.entropy)
    assert torch.equal(whole.logprobs[7:9], part.logprobs) and torch.equal(whole.entropy[7:9], part.entropy)


def test_float32_results_for_half_inputs():
    out = token_logprobs(torch.randn(3, 9).bfloat16(), torch.zeros(3, dtype=torch.long), entropy=True)
    assert out.logprobs.dtype == out.entropy.dtype == torch.float32


def test_empty_batch():
    logits = torch.randn(0, 9, requires_grad=True)
    out = token_logprobs(logits, torch.zeros(0, dtype=torch.long))
    out.logprobs.sum().backward()
    assert out.logprobs.shape == (0,) and logits.grad.shape == (0, 9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": torch.tensor([0, 9])}, "ids: got 9, expected ids in"),
        ({"ids": torch.tensor([0, -1])}, "ids: got -1, expected ids in"),
        ({"ids": torch.tensor([0])}, r"ids: got shape \(1\)"),
        ({"ids": torch.tensor([0.0, 1.0])}, "ids: got dtype torch.float32"),
        ({"temperature": -1.0}, "temperature: got -1.0"),
        ({"temperature": torch.tensor([1.0, 0.0])}, "temperature: got 0.0 among"),
        ({"temperature": torch.tensor([1.0, torch.inf])}, "temperature: got inf among"),
        ({"temperature": 1e39}, r"temperature: got 1e\+39, expected at most"),
        ({"temperature": 1e-50}, "temperature: got 1e-50, expected at least"),
        ({"temperature": torch.ones(3)}, "temperature: got shape"),
        ({"softcap": 0.0}, "softcap: got 0.0"),
        ({"logit_scale": -1.0}, "logit_scale: got -1.0"),
        ({"mask": torch.ones(2)}, "mask: got dtype torch.float32, expected torch.bool"),
        ({"logits": torch.zeros(2, 9, dtype=torch.long)}, "logits: got dtype torch.int64"),
        ({"ids": torch.zeros(2, dtype=torch.long, device="meta")}, "ids: got device meta"),
        ({"backend": "fortran"}, "backend: got 'fortran'"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_mistakes_are_named(change, message):
    arguments = {"logits": torch.randn(2, 9), "ids": torch.tensor([0, 1])} | change
    with pytest.raises(ValueError, match=message):
        token_logprobs(**arguments)


def test_opcheck():
    ids, mask = torch.randint(0, 37, (9,)), torch.rand(9) > 0.3
    logits = torch.randn(9, 37, requires_grad=True)
    result = torch.library.opcheck(
        torch.ops.rlhf_kernels.token_logprobs, (logits, ids, mask, None, 1.0, 3.0, 1.0, False, "cpu")
    )
    assert set(result.values()) == {"SUCCESS"}


def test_compiles_as_one_graph():
    logits, ids = torch.randn(2, 5, 37, requires_grad=True), torch.randint(0, 37, (2, 5))

    def run(x):
        out = token_logprobs(x, ids, temperature=0.7, entropy=True)
        return (out.logprobs - 0.1 * out.entropy).sum()

    expected = torch.autograd.grad(run(logits), logits)[0]
    got = torch.autograd.grad(compile_whole(run)(logits), logits)[0]
    assert torch.equal(expected, got)
