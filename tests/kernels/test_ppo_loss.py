"""`ppo_loss`: the formulas against hand-computed numbers and float64, the aggregations, the metrics."""

import dataclasses
import inspect
import math

import pytest
import torch

from rlhf_kernels import METRICS, PPOOptions, explained_variance, ppo_loss, reference
from rlhf_kernels._options import PPOArguments
from rlhf_kernels.launch_args import flatten
from rlhf_kernels.ops.objective import ObjectiveTerms
from rlhf_kernels.ops.ppo_loss import Inputs
from rlhf_kernels.reference.surrogate import surrogate as surrogate_of_the_definition

from .helpers.bounds import check_error
from .helpers.compiled import compile_whole
from .helpers.objective import OPTIONS, case, run


def one(logprob: float, old: float, advantage: float, **options):
    """Return the loss, d loss / d logprob and the metrics of a batch of one token."""
    x = torch.tensor([[logprob]], requires_grad=True)
    result = ppo_loss(
        x, torch.tensor([[old]]), torch.tensor([[advantage]]), torch.ones(1, 1, dtype=torch.bool), **options
    )
    result.loss.backward()
    return result.loss.item(), x.grad.item(), result.metrics


@pytest.mark.parametrize(
    ("ratio", "advantage", "options", "loss", "slope"),
    [
        (1.1, 2.0, {}, -2.2, -2.2),  # within the range: -r A
        (1.5, 2.0, {}, -2.4, 0.0),  # above the range with A > 0: -(1 + eps) A, no gradient
        (1.5, -2.0, {}, 3.0, 3.0),  # above the range with A < 0: the plain term is the larger loss
        (0.5, -2.0, {}, 1.6, 0.0),  # below the range with A < 0: -(1 - eps) A, no gradient
        (0.5, 2.0, {}, -1.0, -1.0),
        (1.5, 2.0, {"cliprange_high": 0.6}, -3.0, -3.0),
        (4.0, -2.0, {"dual_clip": 3.0}, 6.0, 0.0),  # at most -c A
        (2.0, -2.0, {"dual_clip": 3.0}, 4.0, 4.0),
        (4.0, 2.0, {"objective": "ratio"}, -8.0, -8.0),
        (4.0, 2.0, {"objective": "ratio", "log_ratio_clamp": math.log(2)}, -4.0, 0.0),
        (2.0, 1.0, {"objective": "kl_penalty", "old_kl_coef": 0.5}, -2 + 0.5 * (1 - math.log(2)), -2 + 0.5),
        (2.0, 3.0, {"objective": "policy_gradient"}, -3 * math.log(2), -3.0),
        (1.1, 0.0, {}, 0.0, 0.0),
        # -A sg(clip(r)) log π: log 2 = 0.69314718, log 0.5 = -0.69314718, and no token loses its gradient
        (2.0, 3.0, {"objective": "cispo"}, -3 * 1.2 * 0.69314718, -3.6),
        (2.0, -3.0, {"objective": "cispo"}, 3 * 1.2 * 0.69314718, 3.6),
        (0.5, 3.0, {"objective": "cispo", "cliprange": 0.3}, 3 * 0.7 * 0.69314718, -2.1),
        (2.0, 3.0, {"objective": "cispo", "cliprange": 1.0, "cliprange_high": 4.0}, -6 * 0.69314718, -6.0),
        (4.0, 1.0, {"objective": "cispo", "log_ratio_clamp": math.log(1.1)}, -1.1 * 1.38629436, -1.1),
        # -A 4 / tau sigmoid(tau (r - 1)): sigmoid(0) = 0.5, sigmoid(1) = 0.73105858, sigmoid(-0.525) = 0.37168381
        (1.0, 3.0, {"objective": "sapo"}, -6.0, -3.0),
        (2.0, 3.0, {"objective": "sapo"}, -12 * 0.73105858, -12 * 0.73105858 * 0.26894142 * 2),
        (0.5, -3.0, {"objective": "sapo"}, 12 / 1.05 * 0.37168381, 12 * 0.37168381 * 0.62831619 * 0.5),
        (1.5, -3.0, {"objective": "sapo", "tau_neg": 2.0}, 6 * 0.73105858, 12 * 0.73105858 * 0.26894142 * 1.5),
        (4.0, 3.0, {"objective": "sapo", "log_ratio_clamp": math.log(2)}, -12 * 0.73105858, 0.0),
    ],
)
def test_surrogate_by_hand(isa, ratio, advantage, options, loss, slope):
    got_loss, got_slope, _ = one(math.log(ratio), 0.0, advantage, **options)
    assert got_loss == pytest.approx(loss, rel=1e-6, abs=1e-7)
    assert got_slope == pytest.approx(slope, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize(
    ("probability", "old", "advantage", "options", "loss", "slope"),
    [
        # ipo: the token is rejected where the probability moved by more than 0.1, for either sign of A; log 2 = 0.69314718
        (0.5, 0.25, 1.0, {"objective": "ipo"}, 1e-3 * 0.48045301, 2e-3 * 0.69314718),
        (0.5, 0.25, -1.0, {"objective": "ipo"}, 1e-3 * 0.48045301, 2e-3 * 0.69314718),
        (0.5, 0.25, -1.0, {"objective": "ipo", "log_ratio_coef": 0.0}, 0.0, 0.0),
        (0.3, 0.25, 1.0, {"objective": "ipo"}, -1.2 + 1e-3 * 0.03324115, -1.2 + 2e-3 * 0.18232156),
        (0.5, 0.25, 1.0, {"objective": "ipo", "divergence": 0.3, "log_ratio_coef": 0.0}, -2.0, -2.0),
        # dppo_tv: rejected where the probability moved by more than 0.2 in the direction of A
        (0.5, 0.25, 1.0, {"objective": "dppo_tv"}, 0.0, 0.0),
        (0.5, 0.25, -1.0, {"objective": "dppo_tv"}, 2.0, 2.0),
        (0.25, 0.5, -1.0, {"objective": "dppo_tv"}, 0.0, 0.0),
        (0.25, 0.5, 1.0, {"objective": "dppo_tv"}, -0.5, -0.5),
        (0.4, 0.25, 1.0, {"objective": "dppo_tv"}, -1.6, -1.6),
        (0.4, 0.25, 1.0, {"objective": "dppo_tv", "divergence_high": 0.1}, 0.0, 0.0),
        (0.25, 0.4, -1.0, {"objective": "dppo_tv", "divergence_high": 0.1}, 0.625, 0.625),
        (0.25, 0.4, -1.0, {"objective": "dppo_tv", "divergence": 0.1}, 0.0, 0.0),
        (0.4, 0.25, 1.0, {"objective": "dppo_tv", "ratio_limit": 1.5}, -1.5, -1.5),  # the gradient is not 0
        (0.5, 0.25, 1.0, {"objective": "dppo_tv", "log_ratio_coef": 0.1}, 0.1 * 0.48045301, 0.2 * 0.69314718),
        # dppo_kl: KL = 0.25 log(0.25 / 0.5) + 0.75 log(0.75 / 0.5) = 0.130812
        (0.5, 0.25, 1.0, {"objective": "dppo_kl"}, 0.0, 0.0),
        (0.5, 0.25, -1.0, {"objective": "dppo_kl"}, 2.0, 2.0),
        (0.5, 0.25, 1.0, {"objective": "dppo_kl", "divergence": 0.1308}, 0.0, 0.0),
        (0.5, 0.25, 1.0, {"objective": "dppo_kl", "divergence": 0.1309}, -2.0, -2.0),
        (0.5, 0.25, 1.0, {"objective": "dppo_kl", "divergence_high": 0.1309}, -2.0, -2.0),
        (0.3, 0.25, 1.0, {"objective": "dppo_kl"}, -1.2, -1.2),
        (1.0, 0.5, 1.0, {"objective": "dppo_kl"}, 0.0, 0.0),  # a probability of 1
    ],
)
def test_divergence_by_hand(isa, probability, old, advantage, options, loss, slope):
    got_loss, got_slope, metrics = one(math.log(probability), math.log(old), advantage, **options)
    assert got_loss == pytest.approx(loss, rel=1e-6, abs=1e-9)
    assert got_slope == pytest.approx(slope, rel=1e-6, abs=1e-9)
    rejected = loss >= 0 if advantage > 0 else slope < 0.1
    assert metrics["clipfrac"].item() == rejected


@pytest.mark.parametrize(
    ("log_ratios", "advantages", "options", "loss", "slopes", "clipfrac"),
    [
        # The mean log-ratio is log 2. A > 0: -1.2 A and no gradient; A < 0: -2 A, with a gradient in its own token only.
        ((math.log(4), 0.0), (1.0, -1.0), {"objective": "gspo_token"}, 0.4, (0.0, 1.0), 0.5),
        # The same with GSPO: the gradient through the ratio is the mean over the tokens.
        ((math.log(4), 0.0), (1.0, -1.0), {"ratio_level": "sequence"}, 0.4, (0.5, 0.5), 0.5),
        ((math.log(4), 0.0), (1.0, -1.0), {"objective": "gspo_token", "dual_clip": 1.5}, 0.15, (0.0, 0.0), 0.5),
        # Log-ratios in [-0.4, 0.4] on the side of A: mean(0.4, 0.2) = 0.3, and exp(0.3) = 1.34985881.
        ((1.0, 0.2), (3.0, 3.0), {"objective": "gmpo", "cliprange": 0.4}, -3 * 1.34985881, (0, -1.5 * 1.34985881), 0.5),
        # mean(-0.4, 0.2) = -0.1, and exp(-0.1) = 0.90483742
        (
            (-1.0, 0.2),
            (-3.0, -3.0),
            {"objective": "gmpo", "cliprange": 0.4},
            3 * 0.90483742,
            (0, 1.5 * 0.90483742),
            0.5,
        ),
        # mean(1, 0.2) = 0.6, and exp(0.6) = 1.82211880: on the other side of A there is no limit.
        ((1.0, 0.2), (-3.0, -3.0), {"objective": "gmpo", "cliprange": 0.4}, 3 * 1.8221188, (1.5 * 1.8221188,) * 2, 0.0),
        # mean(0.7, -0.2) = 0.25, and exp(0.25) = 1.28402542
        ((1.0, -0.2), (1.0, 1.0), {"objective": "gmpo", "cliprange_high": 0.7}, -1.28402542, (0, -0.64201271), 0.5),
        (
            (1.0, -1.0),
            (1.0, -1.0),
            {"objective": "gmpo", "cliprange": 0.4},
            0.0,
            (0.0, 0.0),
            1.0,
        ),  # each clipped, r = 1
    ],
)
def test_sequence_objectives_by_hand(isa, log_ratios, advantages, options, loss, slopes, clipfrac):
    """A sequence of two tokens, and a masked third one."""
    x = torch.tensor([[*log_ratios, 5.0]], requires_grad=True)
    mask = torch.tensor([[True, True, False]])
    advantages = torch.tensor([[*advantages, 7.0]])
    result = ppo_loss(x, torch.zeros(1, 3), advantages, mask, aggregation="seq_mean_token_mean", **options)
    result.loss.backward()
    assert result.loss.item() == pytest.approx(loss, rel=1e-6, abs=1e-7)
    assert x.grad[0].tolist() == pytest.approx([*slopes, 0.0], rel=1e-6, abs=1e-7)
    assert result.metrics["clipfrac"].item() == clipfrac


def test_gspo_token_is_gspo_where_sequences_have_one_advantage():
    inputs, constants = case(11)
    constants["advantages"] = constants["advantages"][:, :1].expand(-1, 40).contiguous()
    del constants["weights"]
    shared = {"aggregation": "seq_mean_token_mean", "cliprange": 0.03}
    gspo, gradients = run(ppo_loss, inputs, constants, shared | {"ratio_level": "sequence"})
    token, token_gradients = run(ppo_loss, inputs, constants, shared | {"objective": "gspo_token"})
    assert torch.equal(gspo.loss, token.loss) and gradients["logprobs"].count_nonzero() > 0
    torch.testing.assert_close(token_gradients["logprobs"], gradients["logprobs"])


@pytest.mark.parametrize("delta", [1.05, 1.2, 1.5, 3.0])
def test_two_sided_clip_of_trl(delta):
    """TRL's `delta` is `-min(min(r, delta) A, clip(r) A)`.

    It is `dual_clip=delta` if delta is at least 1 + cliprange_high. Below, TRL limits the ratio to delta where A > 0 and to
    1 + cliprange_high where A < 0.
    """
    g = torch.Generator().manual_seed(12)
    x, advantages = torch.randn(1, 200, generator=g), torch.randn(1, 200, generator=g)
    zero, mask, high = torch.zeros(1, 200), torch.ones(1, 200, dtype=torch.bool), 1.2

    def two_sided(x):
        r = x.exp()
        return -torch.minimum(r.clamp(max=delta) * advantages, r.clamp(0.8, high) * advantages).mean()

    def ours(**options):
        return lambda x: ppo_loss(x, zero, advantages, mask, **options).loss

    def values(loss):
        leaf = x.clone().requires_grad_()
        value = loss(leaf)
        return torch.stack([value.detach().expand(1, 200), torch.autograd.grad(value, leaf)[0]])

    expected = values(two_sided)
    equal = values(ours(cliprange_high=min(delta, high) - 1, dual_clip=max(delta, high)))
    torch.testing.assert_close(equal, expected, rtol=1e-6, atol=1e-8)
    alone = values(ours(dual_clip=delta))
    assert torch.allclose(alone, expected, rtol=1e-6, atol=1e-8) == (delta >= high)


@pytest.mark.parametrize(
    ("estimator", "value", "slope"),
    [("k1", 0.5, 1.0), ("k2", 0.125, 0.5), ("k3", math.exp(-0.5) - 0.5, 1 - math.exp(-0.5)), ("abs", 0.5, 1.0)],
)
def test_kl_term_by_hand(isa, estimator, value, slope):
    loss, got_slope, metrics = one(
        -1.0, -1.0, 0.0, ref_logprobs=torch.tensor([[-1.5]]), kl_coef=0.2, kl_estimator=estimator
    )
    assert loss == pytest.approx(0.2 * value, rel=1e-6)
    assert got_slope == pytest.approx(0.2 * slope, rel=1e-6)
    assert metrics["ref_kl"].item() == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize(
    ("clamp", "slope"),
    [
        (None, 0.25 * 2 * math.log(2)),  # kl_coef r (KL' + KL), with KL' = 1 - 1/2 and KL = log 2 - 1/2
        (math.log(1.5), 1.5 * 0.25 * 0.5),  # the clamped r is a constant
    ],
)
def test_kl_weighted_by_the_ratio_by_hand(isa, clamp, slope):
    """The ratio r is 2 and the reference has half the policy's probability, so k3 is 1/2 - 1 + log 2."""
    two = math.log(2)
    options = {
        "ref_logprobs": torch.tensor([[0.0]]),
        "kl_coef": 0.25,
        "kl_weighting": "ratio",
        "log_ratio_clamp": clamp,
    }
    loss, got, metrics = one(two, 0.0, 0.0, **options)
    ratio = 2 if clamp is None else 1.5
    assert loss == pytest.approx(0.25 * ratio * (two - 0.5), rel=1e-6)
    assert got == pytest.approx(slope, rel=1e-6)
    assert metrics["ref_kl"].item() == pytest.approx(two - 0.5, rel=1e-6)


@pytest.mark.parametrize(
    ("v", "old", "target", "loss", "slope"),
    [
        (1.0, 1.0, 2.0, 0.5, -1.0),
        (2.0, 1.0, 3.0, 0.5 * 1.8**2, 0.0),  # clipped to 1.2: the clipped error is larger and has no gradient
        (2.0, 1.0, 1.0, 0.5, 1.0),  # clipped to 1.2: the clipped error is smaller
    ],
)
def test_value_term_by_hand(isa, v, old, target, loss, slope):
    values = torch.tensor([[v]], requires_grad=True)
    zero, mask = torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool)
    options = {"old_values": torch.tensor([[old]]), "returns": torch.tensor([[target]]), "vf_coef": 0.5}
    result = ppo_loss(zero, zero, zero, mask, values=values, **options)
    result.loss.backward()
    assert result.metrics["value_loss"].item() == pytest.approx(loss, rel=1e-6)
    assert result.loss.item() == pytest.approx(0.5 * loss, rel=1e-6)
    assert values.grad.item() == pytest.approx(0.5 * slope, rel=1e-6)


def test_aggregations_by_hand():
    """Each aggregation of the losses -A of two sequences, (1, 2, 3) and (5)."""
    zero = torch.zeros(2, 3)
    advantages = -torch.tensor([[1.0, 2, 3], [5, 9, 9]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    expected = {"token_mean": 11 / 4, "seq_mean_token_sum": 11 / 2, "seq_mean_token_mean": 7 / 2, "token_sum": 11.0}
    for aggregation, value in expected.items():
        loss = ppo_loss(zero, zero, advantages, mask, objective="ratio", aggregation=aggregation).loss
        assert loss.item() == pytest.approx(value), aggregation


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_matches_float64(isa, options):
    inputs, constants = case(0)
    got, gradients = run(ppo_loss, inputs, constants, options)
    eager, eager_gradients = run(reference.ppo_loss, inputs, constants, options)
    exact, exact_gradients = run(reference.ppo_loss, inputs, constants, options, torch.float64)
    check_error("loss", got.loss, eager.loss, exact.loss)
    for name, gradient in gradients.items():
        check_error(f"gradient of {name}", gradient, eager_gradients[name], exact_gradients[name])
    for name in METRICS:
        torch.testing.assert_close(
            got.metrics[name], exact.metrics[name], rtol=2e-5, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_packed_equals_padded(options):
    inputs, constants = case(1)
    lengths = torch.tensor([40, 1, 0, 17, 40])
    inside = torch.arange(40) < lengths[:, None]
    constants["mask"] &= inside
    padded, padded_gradients = run(ppo_loss, inputs, constants, options)
    cu = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()

    def pack(tensors):
        return {k: v[inside] for k, v in tensors.items()}

    packed, gradients = run(ppo_loss, pack(inputs), pack(constants) | {"cu_seqlens": cu}, options)
    torch.testing.assert_close(packed.loss, padded.loss)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, padded_gradients[name][inside])


@pytest.mark.parametrize("aggregation", ["token_mean", "seq_mean_token_sum", "seq_mean_token_mean", "token_sum"])
def test_micro_batches_add_up(aggregation):
    """With the denominators of the full batch, loss, gradients and metrics of two parts add up to those of the batch."""
    inputs, constants = case(2, b=6)
    mask = constants["mask"]
    counts = {"num_tokens": mask.sum(), "num_value_tokens": mask.sum(), "num_sequences": mask.any(1).sum()}
    options = {"aggregation": aggregation, "entropy_coef": 0.1, "kl_coef": 0.1, **counts}
    whole, gradients = run(ppo_loss, inputs, constants, options)
    halves = []
    for rows in (slice(0, 2), slice(2, 6)):
        halves.append(
            run(ppo_loss, {k: v[rows] for k, v in inputs.items()}, {k: v[rows] for k, v in constants.items()}, options)
        )
    torch.testing.assert_close(sum(h[0].loss for h in halves), whole.loss)
    for name, gradient in gradients.items():
        torch.testing.assert_close(torch.cat([h[1][name] for h in halves]), gradient)
    for name in METRICS:
        parts = torch.stack([h[0].metrics[name] for h in halves])
        torch.testing.assert_close(parts.amax() if name == "ratio_max" else parts.sum(), whole.metrics[name])


def test_padding_counts_in_no_metric():
    inputs, constants = case(3)
    clean = run(ppo_loss, inputs, constants, {})[0]
    for tensors in (inputs, constants):
        for name, x in tensors.items():
            if name != "mask":
                tensors[name] = torch.where(constants["mask"], x, torch.nan)
    dirty, gradients = run(ppo_loss, inputs, constants, {})
    assert torch.equal(clean.loss, dirty.loss)
    for name in METRICS:
        assert torch.equal(clean.metrics[name], dirty.metrics[name]), name
    for gradient in gradients.values():
        assert (gradient[~constants["mask"]] == 0).all() and gradient.isfinite().all()


@pytest.mark.parametrize("ratio_level", ["token", "sequence"])
@pytest.mark.parametrize("aggregation", ["token_mean", "seq_mean_token_sum", "seq_mean_token_mean", "token_sum"])
def test_empty_mask_gives_zeros(aggregation, ratio_level):
    """For an empty mask and for an empty batch, loss and gradients are 0, not NaN."""
    inputs, constants = case(4)
    constants["mask"][:] = False
    for size in (40, 0):
        some = ({k: v[:, :size] for k, v in tensors.items()} for tensors in (inputs, constants))
        result, gradients = run(ppo_loss, *some, {"aggregation": aggregation, "ratio_level": ratio_level})
        assert result.loss.item() == 0
        assert all((g == 0).all() for g in gradients.values())
        assert all(m.item() == 0 for m in result.metrics.values())


def test_separate_value_mask():
    inputs, constants = case(5)
    value_mask = constants["mask"].roll(1, 1) | constants["mask"]
    got, gradients = run(ppo_loss, inputs, constants | {"value_mask": value_mask}, {})
    exact, exact_gradients = run(reference.ppo_loss, inputs, constants | {"value_mask": value_mask}, {}, torch.float64)
    assert got.metrics["num_value_tokens"] == value_mask.sum()
    torch.testing.assert_close(got.loss.double(), exact.loss)
    torch.testing.assert_close(gradients["values"].double(), exact_gradients["values"])


def test_explained_variance():
    inputs, constants = case(6)
    mask = constants["mask"]
    metrics = run(ppo_loss, inputs, constants, {})[0].metrics
    residual, returns = (constants["returns"] - inputs["values"])[mask], constants["returns"][mask]
    expected = 1 - residual.var(unbiased=False) / returns.var(unbiased=False)
    torch.testing.assert_close(explained_variance(metrics), expected, rtol=1e-4, atol=1e-5)


def test_same_bits_for_any_number_of_threads():
    inputs, constants = case(7, b=40, t=200)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        results.append(run(ppo_loss, inputs, constants, {"kl_coef": 0.1}))
    torch.set_num_threads(before)
    for result, gradients in results[1:]:
        assert torch.equal(result.loss, results[0][0].loss)
        assert all(torch.equal(gradients[k], results[0][1][k]) for k in gradients)


def test_several_losses_in_one_backward_and_nothing_under_no_grad():
    inputs, constants = case(8)
    x = inputs["logprobs"].clone().requires_grad_()
    rest = [constants[k] for k in ("old_logprobs", "advantages", "mask")]
    apart = [torch.autograd.grad(ppo_loss(x, *rest, objective=o).loss, x)[0] for o in ("clip", "ratio")]
    (2 * ppo_loss(x, *rest).loss + 3 * ppo_loss(x, *rest, objective="ratio").loss).backward()
    torch.testing.assert_close(x.grad, 2 * apart[0] + 3 * apart[1])
    with torch.no_grad():
        assert not ppo_loss(x, *rest).loss.requires_grad
    assert not any(m.requires_grad for m in ppo_loss(x, *rest).metrics.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": torch.ones(2, 3)}, "mask: got dtype torch.float32, expected torch.bool"),
        ({"advantages": torch.zeros(2, 4)}, r"advantages: got shape \(2, 4\), expected \(2, 3\)"),
        ({"old_logprobs": torch.zeros(2, 3, device="meta")}, "old_logprobs: got device meta, expected cpu"),
        ({"old_logprobs": torch.zeros(2, 3, dtype=torch.long)}, "old_logprobs: got dtype torch.int64"),
        ({"objective": "trust"}, "objective: got 'trust', expected one of"),
        ({"objective": "cipso"}, "objective: got 'cipso', expected one of .*; did you mean 'cispo'?"),
        (
            {"cliprange": 0.3, "objective": "sapo"},
            "cliprange: got 0.3 with objective='sapo'; only 'clip', 'cispo', .* read it",
        ),
        ({"ratio_level": "sequence", "objective": "gmpo"}, "ratio_level: got 'sequence' with objective='gmpo'"),
        (
            {"dual_clip": 3.0, "objective": "gmpo"},
            "dual_clip: got 3.0 with objective='gmpo'; only 'clip' and 'gspo_token'",
        ),
        ({"tau_pos": 2.0}, "tau_pos: got 2.0 with objective='clip'; only 'sapo' reads it"),
        ({"tau_neg": 0.0, "objective": "sapo"}, "tau_neg: got 0.0, expected a number above 0"),
        ({"divergence": 0.1}, "divergence: got 0.1 with objective='clip'; only 'ipo', 'dppo_tv' and 'dppo_kl' read it"),
        ({"divergence_high": 0.1, "objective": "ipo"}, "divergence_high: got 0.1 with objective='ipo'"),
        ({"divergence": -0.1, "objective": "ipo"}, "divergence: got -0.1, expected at least 0"),
        ({"ratio_limit": 3.0, "objective": "ipo"}, "ratio_limit: got 3.0 with objective='ipo'"),
        ({"log_ratio_coef": 0.1, "objective": "ratio"}, "log_ratio_coef: got 0.1 with objective='ratio'"),
        ({"ratio_level": "sequence", "objective": "dppo_tv"}, "ratio_level: got 'sequence' with objective='dppo_tv'"),
        ({"aggregation": "mean"}, "aggregation: got 'mean'"),
        ({"cliprange": -0.1}, "cliprange: got -0.1, expected at least 0"),
        ({"dual_clip": 1.0}, "dual_clip: got 1.0, expected a number above 1"),
        ({"cliprange": None}, "cliprange: got None, expected a finite number"),
        ({"cliprange": "0.2"}, "cliprange: got '0.2', expected a finite number"),
        ({"vf_coef": float("nan")}, "vf_coef: got nan"),
        ({"num_tokens": torch.tensor([6])}, r"num_tokens: got torch.int64 of shape \(1\)"),
        ({"num_tokens": torch.tensor(-1)}, "num_tokens: got -1, expected a finite number of at least 0"),
        ({"entropy_coef": 0.5}, "entropy is not set, but entropy_coef=0.5 needs it"),
        ({"old_kl_coef": 0.5}, "old_kl_coef: got 0.5 with objective='clip'; only 'kl_penalty' reads it"),
        ({"dual_clip": 3.0, "objective": "ratio"}, "dual_clip: got 3.0 with objective='ratio'"),
        ({"value_mask": torch.ones(2, 3, dtype=torch.bool)}, "value_mask is set but there are no value predictions"),
        ({"cu_seqlens": [0, 6]}, "cu_seqlens: got list, expected an int32 tensor"),
        ({"kl_coef": 0.1}, "ref_logprobs is not set, but kl_coef=0.1 needs it"),
        ({"kl_weighting": "ratio"}, "kl_weighting: got 'ratio' with kl_coef=0, where it has no effect; set kl_coef"),
        (
            {"kl_weighting": "ratio", "kl_coef": 0.1, "objective": "policy_gradient"},
            "kl_weighting: got 'ratio' with objective='policy_gradient'; only 'clip', 'kl_penalty', 'ratio', .* read it",
        ),
        ({"values": torch.zeros(2, 3)}, "returns is not set, but the value loss needs it"),
        ({"returns": torch.zeros(2, 3)}, "returns is set but there are no value predictions"),
        ({"ratio_level": "sequence", "objective": "policy_gradient"}, "ratio_level: got 'sequence' with"),
        ({"log_ratio_clamp": 0.5, "objective": "policy_gradient"}, "log_ratio_clamp: got 0.5 with"),
        ({"num_tokens": torch.tensor(torch.inf)}, "num_tokens: got inf, expected a finite number"),
        ({"cliprange": True}, "cliprange: got True, expected a finite number"),
        (
            {"cu_seqlens": torch.tensor([0, 6], dtype=torch.int32)},
            r"logprobs: got shape \(2, 3\) together with cu_seqlens",
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_mistakes_are_named(change, message):
    arguments = {k: torch.zeros(2, 3) for k in ("logprobs", "old_logprobs", "advantages")}
    arguments |= {"mask": torch.ones(2, 3, dtype=torch.bool)} | change
    with pytest.raises(ValueError, match=message):
        ppo_loss(**arguments)


def test_cu_seqlens_are_checked():
    x, mask = torch.zeros(6), torch.ones(6, dtype=torch.bool)
    for cu in ([0, 5], [1, 6], [0, 4, 3, 6]):
        with pytest.raises(ValueError, match="cu_seqlens: got"):
            ppo_loss(x, x, x, mask, cu_seqlens=torch.tensor(cu, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"cu_seqlens: got torch\.int64"):
        ppo_loss(x, x, x, mask, cu_seqlens=torch.tensor([0, 6]))
    with pytest.raises(ValueError, match=r"expected \[B, T\], or \[N\] together with cu_seqlens"):
        ppo_loss(x, x, x, mask, aggregation="seq_mean_token_sum")


def test_kernel_checks_cu_seqlens_in_a_compiled_graph():
    """In a compiled graph the public check cannot read values; the kernel must not access memory out of bounds."""
    x, mask = torch.zeros(4), torch.ones(4, dtype=torch.bool)

    def loss(x, cu):
        return ppo_loss(x, x, x, mask, cu_seqlens=cu, ratio_level="sequence").loss

    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    for ends in ([0, 8], [0, 2], [1, 4]):
        with pytest.raises(ValueError, match="cu_seqlens: got"):
            compiled(x, torch.tensor(ends, dtype=torch.int32))


def test_defaults_are_the_same_everywhere():
    """The options for type checkers, the table of options and the reference agree."""
    shared = {f.name: f.default for f in dataclasses.fields(PPOArguments)}
    assert tuple(PPOOptions.__annotations__) == tuple(shared)
    defined = (
        inspect.signature(reference.ppo_loss).parameters | inspect.signature(surrogate_of_the_definition).parameters
    )
    for name, default in shared.items():
        assert defined[name].default == default, name


def test_float64_tensors_with_float32_logprobs():
    inputs, constants = case(10)
    expected = run(ppo_loss, inputs, constants, {"vf_coef": 1.0})[0]
    wide = {k: v if k == "logprobs" else v.double() for k, v in inputs.items()}
    got = ppo_loss(**wide, **constants, vf_coef=1.0)
    torch.testing.assert_close(got.loss, expected.loss)
    torch.testing.assert_close(got.metrics["entropy"], expected.metrics["entropy"])


def test_opcheck():
    n = 9
    args = PPOArguments(
        returns=torch.randn(n), values=torch.randn(n), entropy_coef=0.1, kl_coef=0.1, ref_logprobs=torch.randn(n)
    )
    terms = ObjectiveTerms.of(args, torch.randn(n) - 3, torch.randn(n), torch.rand(n) > 0.3)
    leaves = [torch.randn(n, requires_grad=True) for _ in range(3)]
    inputs = Inputs(*leaves, None, args.returns, terms, "cpu")
    result = torch.library.opcheck(torch.ops.rlhf_kernels.ppo_loss, flatten(inputs))
    assert set(result.values()) == {"SUCCESS"}


def test_compiles_as_one_graph():
    inputs, constants = case(9)

    def loss(x):
        result = ppo_loss(
            x, *(constants[k] for k in ("old_logprobs", "advantages", "mask")), aggregation="seq_mean_token_mean"
        )
        return result.loss, result.metrics["clipfrac"]

    x = inputs["logprobs"].requires_grad_()
    expected, got = loss(x), compile_whole(loss)(x)
    assert torch.equal(expected[0], got[0]) and torch.equal(expected[1], got[1])
    gradients = [torch.autograd.grad(r[0], x)[0] for r in (expected, got)]
    assert torch.equal(*gradients)
