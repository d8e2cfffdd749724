"""`logits_ppo_loss` on the GPU backends, against float64."""

from functools import partial

import pytest
import torch

from rlhf_kernels import logits_ppo_loss, reference

from .helpers.bounds import check_error
from .helpers.gpu import BACKENDS, to_device
from .helpers.heads import make, widen

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPTIONS = [
    {},
    {"entropy_coef": 0.05, "softcap": 3.0, "logit_scale": 0.8},
    {"ratio_level": "sequence", "aggregation": "seq_mean_token_mean"},
    {"kl_weighting": "ratio"},
]


def scene(seed: int, dtype=torch.float32, **sizes):
    leaves, constants, extra = make(seed, **sizes)
    logits = (leaves["hidden"] @ leaves["weight"].t()).to(dtype)
    options = {k: extra[k] for k in ("temperature", "ref_logprobs", "weights")}
    return logits, constants | options | {"kl_coef": 0.1}


def differentiate(function, logits, arguments, *, upstream=0.37):
    x = logits.detach().requires_grad_()
    result = function(x, **arguments)
    loss = result.loss
    return result, torch.autograd.grad(upstream * loss, x)[0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_matches_float64(backend, dtype, options, inplace):
    logits, arguments = scene(0, dtype, b=3, t=20)
    arguments |= options
    device = to_device(arguments)
    refused = "ratio_level" if "ratio_level" in options else "inplace=True with float16" if inplace else ""
    if backend == "cuda" and refused and (refused == "ratio_level" or dtype == torch.float16):
        with pytest.raises(ValueError, match=f"'cuda' cannot serve this call: got {refused}"):
            logits_ppo_loss(to_device(logits), **device, inplace=inplace, backend=backend)
        return
    got = differentiate(
        lambda x, **rest: logits_ppo_loss(x.clone(), **rest, inplace=inplace, backend=backend),
        to_device(logits),
        device,
    )
    defined = partial(reference.logits_ppo_loss, **{"softcap": None, "logit_scale": 1.0} | arguments)
    eager = differentiate(defined, logits, {})
    wide = {k: widen(v, torch.float64) for k, v in arguments.items()}
    exact = differentiate(
        partial(reference.logits_ppo_loss, **{"softcap": None, "logit_scale": 1.0} | wide), logits.double(), {}
    )
    check_error("loss", got[0].loss.cpu(), eager[0].loss, exact[0].loss, scale=1.0)
    check_error("gradient", got[1].cpu(), eager[1], exact[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_entries_have_no_effect(backend):
    logits, arguments = to_device(scene(1, b=2, t=10))
    loss = partial(logits_ppo_loss, backend=backend)
    clean, gradient = differentiate(loss, logits, arguments)
    mask = arguments["mask"]
    dirty = {
        k: torch.where(mask, v, torch.nan) if torch.is_tensor(v) and v.is_floating_point() else v
        for k, v in arguments.items()
    }
    dirty["temperature"] = arguments["temperature"]  # on a CPU every temperature is checked, also masked ones
    dirty["ids"] = torch.where(mask, arguments["ids"], -(2**40))
    wild = torch.where(mask[..., None], logits, torch.nan)
    result, again = differentiate(loss, wild, dirty)
    assert torch.equal(result.loss, clean.loss) and torch.equal(again, gradient)
    assert all(torch.equal(result.metrics[k], clean.metrics[k]) for k in clean.metrics)
    assert (again[~mask] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_clipped_tokens_have_exactly_no_gradient(backend):
    logits, arguments = to_device(scene(2, b=2, t=20))
    arguments = {k: arguments[k] for k in ("ids", "old_logprobs", "mask")}
    arguments["advantages"] = torch.ones_like(arguments["old_logprobs"])
    gradient = differentiate(partial(logits_ppo_loss, backend=backend), logits, arguments)[1]
    logprobs = reference.token_logprobs(logits, arguments["ids"]).logprobs
    clipped = (logprobs - arguments["old_logprobs"]).exp() > 1.2
    silent = clipped | ~arguments["mask"]
    assert clipped[arguments["mask"]].any()
    assert (gradient[silent] == 0).all() and (gradient[~silent] != 0).any(-1).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("aggregation", ["token_mean", "seq_mean_token_mean"])
def test_no_token_counts(backend, aggregation):
    logits, arguments = to_device(scene(3, b=2, t=3))
    arguments["mask"] = torch.zeros_like(arguments["mask"])
    arguments["aggregation"] = aggregation
    result, gradient = differentiate(partial(logits_ppo_loss, backend=backend), logits, arguments)
    assert result.loss == 0 and (gradient == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_shifted_logits_and_packed_tokens(backend):
    """The slice logits[:, :-1] that trainers pass is read without a copy; two losses share one backward."""
    logits, arguments = to_device(scene(4, b=2, t=9))
    cut = {k: v[:, 1:] if torch.is_tensor(v) else v for k, v in arguments.items()}
    loss = partial(logits_ppo_loss, backend=backend)
    x = logits.detach().requires_grad_()
    (loss(x[:, :-1], **cut).loss + 2 * loss(x[:, :-1], **cut, objective="ratio").loss).backward()
    flat = {k: v.reshape(-1) if torch.is_tensor(v) else v for k, v in cut.items()}
    flat["cu_seqlens"] = torch.tensor([0, 8, 16], dtype=torch.int32, device=logits.device)
    rows = logits[:, :-1].reshape(16, -1)
    parts = [differentiate(loss, rows, flat | {"objective": o}, upstream=1)[1] for o in ("clip", "ratio")]
    expected = (parts[0] + 2 * parts[1]).view(2, 8, -1)
    torch.testing.assert_close(x.grad[:, :-1], expected, rtol=1e-5, atol=1e-8)
    assert (x.grad[:, -1] == 0).all()
