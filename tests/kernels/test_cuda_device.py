"""Tests of the CUDA C++ kernels on a device, at sizes for which the emulator is too slow; see also test_cuda_emulated."""

import pytest
import torch

from rlhf_kernels import gae, logits_ppo_loss, reference, rollout_advantages

from .helpers.advantages import batch, double, rollout
from .helpers.bounds import check_error
from .helpers.gpu import DEVICE, to_device

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("b", "t"), [(128, 4096), (64, 512), (33, 8192), (3, 8191), (2, 131072), (300, 5000)])
@pytest.mark.parametrize("holes", ["skip", "zero"])
def test_gae(b, t, holes):
    rewards, values, m = batch(b, t, "holes")
    bootstrap = torch.arange(b) / 8
    got = gae(
        *to_device(
            (
                rewards,
                values,
                m,
            )
        ),
        holes=holes,
        bootstrap=bootstrap.to(DEVICE),
        backend="cuda",
    )
    eager = gae(rewards, values, m, holes=holes, bootstrap=bootstrap, backend="cpu")
    exact = reference.gae(rewards.double(), values.double(), m, holes=holes, bootstrap=bootstrap.double())
    for x, y, z, name in zip(got, eager, exact, got._fields, strict=True):
        check_error(name, x.cpu(), y, z)


@pytest.mark.parametrize(("b", "t"), [(512, 1024), (3, 40000), (2100, 7)])
@pytest.mark.parametrize("whiten_rewards", [False, True])
def test_rollout_advantages(b, t, whiten_rewards):
    data = rollout(b, t, "response with a hole")
    options = {"kl_coef": 0.1, "whiten_rewards": whiten_rewards}
    got = rollout_advantages(**to_device(data), **options, backend="cuda")
    again = rollout_advantages(**to_device(data), **options, backend="cuda")
    assert all(map(torch.equal, got, again))
    eager = reference.rollout_advantages(**data, **options)
    exact = reference.rollout_advantages(**double(data), **options)
    for x, y, z, name in zip(got, eager, exact, got._fields, strict=True):
        check_error(name, x.cpu(), y, z)


def logits_batch(vocabulary, dtype, n=48):
    g = torch.Generator(DEVICE).manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=g, device=DEVICE)

    logits = (4 * normal(n, vocabulary)).to(dtype)
    ids = torch.randint(0, vocabulary, (n,), generator=g, device=DEVICE)
    taken = reference.token_logprobs(logits.float(), ids).logprobs
    return logits, {
        "ids": ids,
        "old_logprobs": taken + 0.3 * normal(n),
        "advantages": normal(n),
        "mask": torch.rand(n, generator=g, device=DEVICE) < 0.8,
    }


def gradient(logits, constants, upstream=1.0, backend="cuda", inplace=False):
    x = logits.clone().requires_grad_()
    rows = x * 1 if inplace else x
    result = logits_ppo_loss(rows, **constants, entropy_coef=0.01, inplace=inplace, backend=backend)
    (upstream * result.loss).backward()
    return result.loss.detach(), x.grad


# On sm_90 these are rows of 1, 2, 4 and 8 blocks, rows that do not start on 16-byte boundaries, and rows that are read twice.
@pytest.mark.parametrize("vocabulary", [1000, 50257, 64000, 128256, 151936, 300001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("upstream", [1.0, 0.37])
def test_logits_ppo_loss(vocabulary, dtype, upstream):
    logits, constants = logits_batch(vocabulary, dtype)
    got = gradient(logits, constants, upstream)
    eager = gradient(logits, constants, upstream, "reference")
    exact = gradient(logits.double(), constants, upstream, "reference")
    check_error("loss", got[0], eager[0], exact[0], scale=1.0)
    check_error("gradient", got[1], eager[1], exact[1])
    assert all(map(torch.equal, got, gradient(logits, constants, upstream)))
    if dtype != torch.float16:
        check_error("in place", gradient(logits, constants, upstream, inplace=True)[1], eager[1], exact[1])


@pytest.mark.parametrize("vocabulary", [1000, 128256, 300001])
def test_ids_out_of_range(vocabulary):
    logits, constants = logits_batch(vocabulary, torch.bfloat16)
    constants["mask"][:] = True
    clean = gradient(logits, constants)[1]
    bad = torch.tensor([3, 17, 40], device=DEVICE)
    constants["ids"][bad] = torch.tensor([-1, vocabulary, 2**40], device=DEVICE)
    got = gradient(logits, constants)[1]
    good = torch.ones(len(logits), dtype=torch.bool, device=DEVICE).index_fill_(0, bad, False)
    assert got[bad].isnan().all()
    assert torch.equal(got[good], clean[good])


def test_cuda_graph_capture():
    logits, constants = logits_batch(128256, torch.bfloat16)
    expected = gradient(logits, constants)
    x = logits.clone().requires_grad_()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.autograd.grad(logits_ppo_loss(x, **constants, entropy_coef=0.01, backend="cuda").loss, x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = logits_ppo_loss(x, **constants, entropy_coef=0.01, backend="cuda").loss
        (got,) = torch.autograd.grad(loss, x)
    got.zero_()
    graph.replay()
    assert torch.equal(loss.detach(), expected[0]) and torch.equal(got, expected[1])
