"""`logits_ppo_loss`: against float64, against the linear op, and gradients for strides, clipped and masked tokens."""

import pytest
import torch

from rlhf_kernels import linear_ppo_loss, logits_ppo_loss, reference

from .helpers.bounds import check_error
from .helpers.heads import make, widen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"entropy_coef": 0.05, "softcap": 3.0}, {"ratio_level": "sequence"}], ids=str)
def test_matches_float64(dtype, options):
    leaves, constants, extra = make(0, b=8, t=64)
    logits = (leaves["hidden"] @ leaves["weight"].t()).to(dtype)
    options = options | {"temperature": extra["temperature"], "kl_coef": 0.1, "ref_logprobs": extra["ref_logprobs"]}
    results = []
    for function, kind in (
        (logits_ppo_loss, dtype),
        (reference.logits_ppo_loss, dtype),
        (reference.logits_ppo_loss, torch.float64),
    ):
        x = logits.to(kind).requires_grad_()
        wide = torch.float64 if kind == torch.float64 else torch.float32
        arguments = {k: widen(v, wide) for k, v in (constants | options).items()}
        arguments = arguments if function is logits_ppo_loss else {"softcap": None, "logit_scale": 1.0} | arguments
        loss = function(x, **arguments).loss
        results.append((loss, *torch.autograd.grad(0.37 * loss, x)))
    (got, gradient), (eager, eager_gradient), (exact, exact_gradient) = results
    check_error("loss", got, eager, exact, scale=1.0)
    check_error("gradient", gradient, eager_gradient, exact_gradient)


def test_agrees_with_the_linear_op():
    leaves, constants, _ = make(1)
    linear = linear_ppo_loss(leaves["hidden"], leaves["weight"], **constants)
    from_logits = logits_ppo_loss(torch.nn.functional.linear(leaves["hidden"], leaves["weight"]), **constants)
    torch.testing.assert_close(linear.loss, from_logits.loss)
    assert torch.equal(linear.metrics["ratio_max"], from_logits.metrics["ratio_max"])


def test_shifted_logits_need_no_copy():
    """The slice logits[:, :-1] that trainers pass is read without a copy."""
    leaves, constants, _ = make(2)
    logits = (leaves["hidden"] @ leaves["weight"].t()).requires_grad_()
    cut = {k: v[:, 1:] for k, v in constants.items()}
    got = torch.autograd.grad(logits_ppo_loss(logits[:, :-1], **cut).loss, logits)[0]
    exact = logits.detach().double().requires_grad_()
    wide = {k: widen(v, torch.float64) for k, v in cut.items()}
    expected = torch.autograd.grad(logits_ppo_loss(exact[:, :-1], **wide).loss, exact)[0]
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-8)
    assert (got[:, -1] == 0).all()


def test_clipped_and_masked_tokens_have_exactly_no_gradient():
    leaves, constants, _ = make(3)
    logits = (leaves["hidden"] @ leaves["weight"].t()).requires_grad_()
    constants["advantages"] = torch.ones(4, 40)
    result = logits_ppo_loss(logits, **constants)
    result.loss.backward()
    logprobs = reference.token_logprobs(logits.detach(), constants["ids"]).logprobs
    clipped = (logprobs - constants["old_logprobs"]).exp() > 1.2
    silent = clipped | ~constants["mask"]
    assert clipped[constants["mask"]].any()
    assert (logits.grad[silent] == 0).all() and (logits.grad[~silent] != 0).any(-1).all()


def test_mistakes_are_named():
    leaves, constants, _ = make(4)
    logits = leaves["hidden"] @ leaves["weight"].t()
    with pytest.raises(ValueError, match="entropy: got a tensor, expected None"):
        logits_ppo_loss(logits, **constants, entropy=torch.zeros(4, 40))
    with pytest.raises(ValueError, match=r"advantages: got shape \(4, 39\)"):
        logits_ppo_loss(logits, **(constants | {"advantages": torch.zeros(4, 39)}))
    with pytest.raises(TypeError, match="'cliprnge'; did you mean 'cliprange'"):
        logits_ppo_loss(logits, **constants, cliprnge=0.1)
