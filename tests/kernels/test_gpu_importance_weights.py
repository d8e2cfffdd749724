"""`importance_weights`, `off_policy_sequence_mask` and `top_entropy_mask` in Triton."""

import itertools
import math

import pytest
import torch

from rlhf_kernels import IMPORTANCE_METRICS, importance_weights, off_policy_sequence_mask, reference, top_entropy_mask
from rlhf_kernels.backend import kernels
from rlhf_kernels.launch_args import Sequences

from .helpers.advantages import INVALID_CU_SEQLENS, check_invalid_cu_seqlens
from .helpers.bounds import check_error
from .helpers.gpu import DEVICE, to_device
from .helpers.selections import LEVELS, RULES, batch, packed


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize(("b", "t"), [(1, 1), (5, 40), (2, 1500)])
def test_against_float64(level, rule, b, t):
    data = batch(b, t, seed=t)
    got = importance_weights(**to_device(data), level=level, **rule, backend="triton")
    eager = importance_weights(**data, level=level, **rule, backend="reference")
    wide = {k: x.double() if x.is_floating_point() else x for k, x in data.items()}
    exact = importance_weights(**wide, level=level, **rule)
    assert torch.equal(got.mask.cpu(), exact.mask)
    check_error("weights", got.weights.cpu(), eager.weights, exact.weights)
    for name in IMPORTANCE_METRICS:
        assert float(got.metrics[name]) == pytest.approx(float(exact.metrics[name]), rel=2e-5, abs=2e-6), name


@pytest.mark.parametrize("level", LEVELS)
def test_packed_gives_the_bits_of_padded(level):
    lengths, data = torch.tensor([0, 1, 1030, 17, 0, 23]), batch(6, 1030)
    inside = torch.arange(1030) < lengths[:, None]
    data["mask"] = data["mask"] & inside
    rule = {"action": "mask", "low": 0.9, "high": 1.1, "level": level, "backend": "triton"}
    padded = importance_weights(**to_device(data), **rule)
    tokens, ends = to_device(packed(data, lengths))
    got = importance_weights(**tokens, **rule, cu_seqlens=ends)
    assert torch.equal(got.weights, padded.weights[inside.to(DEVICE)])
    assert torch.equal(got.mask, padded.mask[inside.to(DEVICE)])
    assert all(map(torch.equal, *((x.metrics[k] for k in IMPORTANCE_METRICS[5:8]) for x in (got, padded))))


@pytest.mark.parametrize("level", LEVELS)
def test_nonfinite_log_probs_and_empty_batches(level):
    logprobs = torch.tensor([[math.nan], [0.0], [-math.inf], [0.0]], device=DEVICE)
    sampler, mask = torch.zeros_like(logprobs), torch.ones(4, 1, dtype=torch.bool, device=DEVICE)
    sampler[3] = -math.inf
    options = {"level": level, "backend": "triton"}
    got = importance_weights(logprobs, sampler, mask, **options, high=2)
    assert got.weights.flatten().tolist() == pytest.approx([math.nan, 1, math.exp(-20), 2], nan_ok=True)
    assert all(got.metrics[k].isnan() for k in ("weight_max", "weight_mean", "mismatch_kl", "mismatch_max"))
    got = importance_weights(logprobs, sampler, mask, **options, action="mask", high=2)
    assert got.mask.flatten().tolist() == [False, True, True, False]
    for shape in ((0, 3), (3, 0), (2, 3)):
        x, none = torch.zeros(shape, device=DEVICE), torch.zeros(shape, dtype=torch.bool, device=DEVICE)
        got = importance_weights(x, x, none, **options, high=2)
        assert not got.weights.any() and not got.mask.any() and not any(got.metrics.values())


@pytest.mark.parametrize("ends", INVALID_CU_SEQLENS)
def test_invalid_cu_seqlens_read_nothing_out_of_bounds(ends, monkeypatch):
    def arguments(x, mask, ends):
        return x, x, mask, None, Sequences.of(x, ends), 1, 1, 0, 0.5, 2.0

    def launcher(*arguments):
        weights, _, _ = kernels("triton").importance_weights(*arguments)
        return (weights,)

    check_invalid_cu_seqlens(launcher, arguments, ends, monkeypatch)


def test_off_policy_mask():
    data = batch(20, 30)
    advantages = torch.randn(20, 30, generator=torch.Generator().manual_seed(3))
    for lengths in (None, torch.arange(20) + 5):
        given, ends = data | {"advantages": advantages}, None
        if lengths is not None:
            given, ends = packed(given, lengths)
        expected = reference.off_policy_sequence_mask(**given, max_kl=0.01, cu_seqlens=ends)
        got = off_policy_sequence_mask(
            **to_device(given), max_kl=0.01, cu_seqlens=None if ends is None else ends.to(DEVICE), backend="triton"
        )
        assert torch.equal(got.mask.cpu(), expected.mask) and 0 < expected.mask.sum() < given["mask"].sum()
        for name, value in got.metrics.items():
            assert float(value) == pytest.approx(float(expected.metrics[name]), rel=1e-5), name


def test_top_entropy():
    for (n, keep), share in itertools.product([(1, 1.0), (40, 0.6), (5000, 0.5)], (0.0, 0.2, 0.7, 1.0)):
        g = torch.Generator().manual_seed(n)
        entropy, mask = torch.rand(n, generator=g) * 5, torch.rand(n, generator=g) <= keep
        expected = reference.top_entropy_mask(entropy.double(), mask, entropy_quantile=share)
        got = top_entropy_mask(entropy.to(DEVICE), mask.to(DEVICE), entropy_quantile=share, backend="triton")
        assert torch.equal(got.mask.cpu(), expected.mask)
        for name, value in got.metrics.items():
            assert float(value) == pytest.approx(float(expected.metrics[name]), rel=1e-6, abs=1e-7), name
    x, mask = torch.tensor([1.0, math.nan, 2.0], device=DEVICE), torch.ones(3, dtype=torch.bool, device=DEVICE)
    assert not top_entropy_mask(x, mask, entropy_quantile=1.0, backend="triton").mask.any()
    empty = top_entropy_mask(x[:0], mask[:0], entropy_quantile=0.2, backend="triton")
    assert empty.mask.shape == (0,) and not any(empty.metrics.values())
