"""The trial `half_logits` of the fused head: its documented error bound, all gradients, and what it leaves unchanged."""

import pytest
import torch

from rlhf_kernels import linear_ppo_loss, linear_token_logprobs, reference
from rlhf_kernels.ops.head import Plan
from rlhf_kernels.trials import trial

from .helpers.gpu import to_device
from .helpers.head_loss import check_loss, chosen_of
from .helpers.heads import make

HALF = {torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""Dtype -> largest relative error of rounding to it."""


@pytest.mark.parametrize("dtype", HALF)
def test_the_error_of_log_probs_is_within_the_documented_bound(dtype):
    """Rounding the logits moves the id's and the log-sum-exp by at most u max |z| each."""
    leaves, constants, _ = map(to_device, make(3, dtype, b=2, t=20, vocabulary=300))
    given = 4 * leaves["hidden"], leaves["weight"].to(dtype), constants["ids"]
    given = given[0].to(dtype), *given[1:]
    options = {"backend": "triton", "mask": constants["mask"]}
    with trial("half_logits"):
        got = linear_token_logprobs(*given, **options).logprobs
    current = linear_token_logprobs(*given, **options).logprobs
    logits = given[0].double() @ given[1].double().t()
    exact = reference.token_logprobs(logits, given[2]).logprobs * constants["mask"]
    bound = 2 * HALF[dtype] * logits.abs().amax(-1) + 1e-5
    error = (got - exact).abs()
    assert (error <= bound).all(), (error / bound).max()
    assert error.max() > 10 * (current - exact).abs().max()


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("options", "compact"), [("clip", None), ("entropy_kl", True), ("softcap", None)])
def test_matches_float64(dtype, options, compact):
    """Loss, metrics and gradients are within twice the error of eager code, whose logits are rounded too."""
    leaves, constants, extra = map(to_device, make(4, dtype, t=10))
    with trial("half_logits"):
        chosen = chosen_of("everything", options, extra)
        how = {"compact": compact, "chunk_tokens": 17}
        check_loss(lambda **x: linear_ppo_loss(**x, backend="triton"), leaves, constants, chosen, dtype, how)


def test_the_plan():
    """As many bytes of logits as now, so twice the rows; factors in float32 and the CPU backend do not change."""

    def plans() -> list[Plan]:
        cases = ((torch.bfloat16, "triton"), (torch.float32, "triton"), (torch.bfloat16, "cpu"))
        return [Plan.of(8192, 128256, dtype, backend, None, None) for dtype, backend in cases]

    current = plans()
    with trial("half_logits"):
        tried = plans()
    assert (current[0].chunk, current[0].logits_dtype) == (2048, torch.float32)
    assert (tried[0].chunk, tried[0].logits_dtype, tried[0].sum_dtype) == (4096, torch.bfloat16, torch.float32)
    assert tried[1:] == current[1:]
