"""`linear_token_logprobs`: forward and backward, which computes the logits again, against float64."""

import pytest
import torch

from rlhf_kernels import linear_token_logprobs, reference
from rlhf_kernels.launch_args import Transform, flatten
from rlhf_kernels.ops.linear_token_logprobs import HeadInputs, Inputs, Storage

from .helpers.bounds import check_error
from .helpers.compiled import compile_whole
from .helpers.heads import differentiate, make, widen


def run(function, leaves, ids, dtype, **options):
    x = {k: leaves[k].to(dtype).clone().requires_grad_() for k in ("hidden", "weight", "bias")}
    out = function(**x, ids=ids, entropy=True, **{k: widen(v, dtype) for k, v in options.items()})
    weights = torch.linspace(-1, 1, ids.numel(), dtype=torch.float64).view(ids.shape)
    return out, differentiate((out.logprobs * weights).sum() - 0.3 * (out.entropy * weights.flip(0)).sum(), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "options",
    [{}, {"softcap": 3.0, "logit_scale": 0.7}, {"temperature": 0.8}, {"temperature": "row"}, {"chunk_tokens": 48}],
    ids=str,
)
def test_matches_float64(dtype, options):
    leaves, constants, extra = make(0, dtype, b=8, t=64)
    options = options | {"mask": constants["mask"]}
    if options.get("temperature") == "row":
        options["temperature"] = extra["temperature"]
    plain = {k: v for k, v in options.items() if k != "chunk_tokens"}
    got, gradients = run(linear_token_logprobs, leaves, constants["ids"], dtype, **options)
    eager, eager_gradients = run(reference.linear_token_logprobs, leaves, constants["ids"], dtype, **plain)
    exact, exact_gradients = run(reference.linear_token_logprobs, leaves, constants["ids"], torch.float64, **plain)
    assert got.logprobs.dtype == torch.float32
    check_error("logprobs", got.logprobs, eager.logprobs, exact.logprobs)
    check_error("entropy", got.entropy, eager.entropy, exact.entropy)
    for name, gradient in gradients.items():
        check_error(f"gradient of {name}", gradient, eager_gradients[name], exact_gradients[name])


def test_rows_without_an_upstream_gradient_enter_no_backward_product(monkeypatch):
    leaves, constants, _ = make(1)
    hidden = leaves["hidden"].clone().requires_grad_()
    out = linear_token_logprobs(hidden, leaves["weight"], constants["ids"])
    rows, mm = [], torch.mm

    def counted(a, b, **kwargs):
        rows.append(a.shape[0])
        return mm(a, b, **kwargs)

    monkeypatch.setattr(torch, "mm", counted)
    out.logprobs[:, :5].sum().backward()
    assert rows == [20, 20]  # 4 sequences of 5 tokens: logits again, then the gradient of the hidden states
    assert (hidden.grad[:, 5:] == 0).all() and (hidden.grad[:, :5] != 0).any()


@pytest.mark.parametrize("upstream", [torch.inf, torch.nan, 1e9])
def test_upstream_gradient_of_masked_rows_is_ignored(upstream):
    """A function of the log-probs may have an infinite derivative at the log-prob 0 of a masked row."""
    leaves, constants, _ = make(2, torch.float16)
    mask, grads = constants["mask"], []
    for masked in (0.0, upstream):
        x = {k: leaves[k].clone().requires_grad_() for k in ("hidden", "weight")}
        out = linear_token_logprobs(**x, ids=constants["ids"], mask=mask)
        out.logprobs.backward(torch.where(mask, 1e-3, masked))
        grads.append([v.grad for v in x.values()])
    assert all(torch.equal(a, b) and (a != 0).any() for a, b in zip(*grads, strict=True))


def test_tiny_upstream_gradients_survive_half_precision():
    """Gradients of logits near 1e-7 underflow in float16, so they are computed relative to the largest coefficient."""
    leaves, constants, _ = make(2, torch.float16)
    weight = leaves["weight"].clone().requires_grad_()
    weight.grad_dtype = torch.float32  # float16 could not hold the result
    (linear_token_logprobs(leaves["hidden"], weight, constants["ids"]).logprobs.sum() * 1e-7).backward()
    exact = leaves["weight"].double().requires_grad_()
    (linear_token_logprobs(leaves["hidden"].double(), exact, constants["ids"]).logprobs.sum() * 1e-7).backward()
    assert (weight.grad.double() - exact.grad).norm() <= 0.01 * exact.grad.norm()


def test_log_probs_are_float32_and_masked_rows_zero():
    leaves, constants, _ = make(3, torch.bfloat16)
    mask = constants["mask"]
    out = linear_token_logprobs(leaves["hidden"], leaves["weight"], constants["ids"], mask=mask, entropy=True)
    assert out.logprobs.dtype == torch.float32 and (out.logprobs[~mask] == 0).all() and (out.entropy[~mask] == 0).all()
    assert linear_token_logprobs(leaves["hidden"], leaves["weight"], constants["ids"]).entropy is None


def test_empty_and_all_masked():
    leaves, constants, _ = make(4)
    for hidden, ids in ((leaves["hidden"], constants["ids"]), (leaves["hidden"][:0], constants["ids"][:0])):
        x = hidden.clone().requires_grad_()
        out = linear_token_logprobs(x, leaves["weight"], ids, mask=torch.zeros_like(ids, dtype=torch.bool))
        out.logprobs.sum().backward()
        assert (out.logprobs == 0).all() and (x.grad == 0).all()


def test_opcheck():
    shapes = ((9, 8), (37, 8), (37,), (9, 3), (37, 3))
    of_head = HeadInputs(*(torch.randn(*shape, requires_grad=True) for shape in shapes))
    ids, mask = torch.randint(0, 37, (9,)), torch.rand(9) > 0.3
    inputs = Inputs(of_head, Storage.of(of_head.weight), ids, mask, Transform(softcap=3.0), None, "cpu")
    result = torch.library.opcheck(torch.ops.rlhf_kernels.linear_token_logprobs, flatten(inputs))
    assert set(result.values()) == {"SUCCESS"}


def test_a_transposed_weight_compiles():
    leaves, constants, _ = make(6)
    weight = leaves["weight"].t().contiguous().requires_grad_()  # (H, V)

    def loss(w):
        return linear_token_logprobs(leaves["hidden"], w.t(), constants["ids"]).logprobs.sum()

    expected = torch.autograd.grad(loss(weight), weight)[0]
    assert torch.equal(torch.autograd.grad(torch.compile(loss, fullgraph=True)(weight), weight)[0], expected)


def test_compiles_as_one_graph():
    leaves, constants, _ = make(5)
    x = [leaves[k].clone().requires_grad_() for k in ("hidden", "weight")]

    def loss(hidden, weight):
        out = linear_token_logprobs(hidden, weight, constants["ids"], mask=constants["mask"], entropy=True)
        return (out.logprobs + out.entropy).sum()

    expected = torch.autograd.grad(loss(*x), x)
    for a, b in zip(expected, torch.autograd.grad(compile_whole(loss)(*x), x), strict=True):
        assert torch.equal(a, b)
