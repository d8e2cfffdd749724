"""Properties of every op, on the CPU: random shapes, dtypes, layouts, masks, extreme values and loss scales against float64.

`PROPERTY_EXAMPLES=2000 pytest tests/kernels/test_properties.py` runs that many new random examples of each property.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import rlhf_kernels as ops
from rlhf_kernels import METRICS, reference

from .helpers import distillation, head_loss, heads, objective, selections
from .helpers.properties import (
    PROFILE,
    Numbers,
    check,
    double,
    dtypes,
    laid_out,
    layouts,
    masks,
    ranges,
    scales,
    seeds,
    sizes,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
ESTIMATORS = st.sampled_from(["k1", "k2", "k3", "abs"])


def gradients(function, leaves, upstream, **others):
    """Return the outputs and the gradients of `upstream` times a weighted sum of the differentiable outputs."""
    leaves = {name: x.detach().requires_grad_() for name, x in leaves.items()}
    result = function(**leaves, **others)
    outputs = [x for x in (result if isinstance(result, tuple) else (result,)) if isinstance(x, torch.Tensor)]
    differentiable = [x for x in outputs if x.requires_grad]
    if not differentiable:
        return outputs, {name: torch.zeros_like(x) for name, x in leaves.items()}
    seeds = [torch.linspace(1, -0.5, x.numel(), dtype=x.dtype).view(x.shape) * upstream for x in differentiable]
    found = torch.autograd.grad(differentiable, list(leaves.values()), seeds, allow_unused=True)
    pairs = zip(leaves.items(), found, strict=True)
    return outputs, {name: torch.zeros_like(x) if one is None else one for (name, x), one in pairs}


def compare(op, definition, leaves, upstream=0.37, scale=0.0, **others):
    """Check outputs and gradients. Eager PyTorch gets an upstream gradient in its range, and its result is scaled."""
    got, slopes = gradients(op, leaves, upstream, **others)
    eager, eager_slopes = gradients(definition, leaves, 0.37, **others)
    wide = {name: double(x) for name, x in others.items()}
    exact, exact_slopes = gradients(definition, {name: x.double() for name, x in leaves.items()}, upstream, **wide)
    for index, one in enumerate(got):
        if one.is_floating_point():
            check(f"output {index}", one, eager[index], exact[index], scale)
        else:
            assert torch.equal(one, exact[index])
    for name, slope in slopes.items():
        assert slope.dtype == leaves[name].dtype and slope.shape == leaves[name].shape
        check(f"gradient of {name}", slope, eager_slopes[name].double() * (upstream / 0.37), exact_slopes[name])


@PROFILE
@given(seeds, sizes, sizes, dtypes, layouts, ranges, ESTIMATORS, scales)
def test_kl_penalty(seed, b, t, dtype, layout, kind, estimator, upstream):
    n = Numbers(seed)
    logprobs = -n.drawn((b, t), kind).abs()
    ref = (logprobs + 0.3 * n.normal(b, t)).to(dtype)
    compare(
        ops.kl_penalty, reference_of("kl_penalty", dtype), {"logprobs": laid_out(logprobs.to(dtype), layout)}, upstream,
        ref_logprobs=laid_out(ref, layout), estimator=estimator,
    )  # fmt: skip


def reference_of(name, dtype):
    """Return a definition that widens its tensors first, as the ops do."""
    wide = torch.promote_types(dtype, torch.float32)

    def definition(**arguments):
        def widened(x):
            narrow = isinstance(x, torch.Tensor) and x.is_floating_point() and x.dtype != torch.float64
            return x.to(wide) if narrow else x

        return getattr(reference, name)(**{key: widened(x) for key, x in arguments.items()})

    return definition


@PROFILE
@given(seeds, sizes, sizes, dtypes, layouts, ranges, masks, st.booleans(), st.booleans(), scales)
def test_masked_statistics(seed, b, t, dtype, layout, kind, where, shift, unbiased, upstream):
    n = Numbers(seed)
    mask = n.mask((b, t), where)
    x = torch.where(mask, n.drawn((b, t), kind), torch.nan).to(dtype)
    if layout == "expanded":  # the first row is repeated, and so is its mask
        mask = laid_out(mask, layout)
    size = float(torch.where(mask, laid_out(x, layout), 0).abs().max()) if x.numel() else 0.0
    mean = reference_of("masked_mean", dtype)
    compare(ops.masked_mean, mean, {"x": laid_out(x, layout)}, upstream, scale=size, mask=laid_out(mask, layout))
    if kind in ("normal", "mixed", "large"):  # a variance near 0 has no relative accuracy
        white, how = reference_of("masked_whiten", dtype), {"shift_mean": shift, "unbiased": unbiased}
        compare(ops.masked_whiten, white, {"x": laid_out(x, layout)}, upstream, mask=laid_out(mask, layout), **how)


coefficients = st.sampled_from([0.0, 0.5, 0.95, 1.0])


@PROFILE
@given(
    seeds,
    sizes,
    sizes,
    layouts,
    ranges,
    masks,
    coefficients,
    coefficients,
    st.sampled_from(["skip", "zero"]),
    st.booleans(),
)
def test_gae(seed, b, t, layout, kind, where, gamma, lam, holes, bootstrapped):
    n = Numbers(seed)
    mask = laid_out(n.mask((b, t), where), layout)
    tokens = [laid_out(n.drawn((b, t), kind), layout) for _ in range(2)]
    rewards, values = (torch.where(mask, x, torch.inf) for x in tokens)
    how = {"gamma": gamma, "lam": lam, "holes": holes, "bootstrap": n.normal(b) if bootstrapped else None}
    got = ops.gae(rewards, values, mask, **how)
    eager = reference.gae(rewards, values, mask, **how)
    exact = reference.gae(rewards.double(), values.double(), mask, **{key: double(x) for key, x in how.items()})
    size = float(max((torch.where(mask, x, 0).abs().max() for x in tokens if x.numel()), default=0.0))
    for name in got._fields:
        check(name, getattr(got, name), getattr(eager, name), getattr(exact, name), size)


@PROFILE
@given(
    seeds,
    sizes,
    sizes,
    layouts,
    masks,
    ESTIMATORS,
    st.booleans(),
    st.booleans(),
    st.sampled_from([0.0, 0.05, 70_000.0]),
)
def test_rollout_advantages(seed, b, t, layout, where, estimator, rewards, advantages, kl_coef):
    n = Numbers(seed)
    mask = laid_out(n.mask((b, t), where), layout)
    if mask.sum() == 1:  # its whitened advantage is a difference of equal numbers
        rewards = advantages = False
    logprobs = laid_out(-n.normal(b, t).abs(), layout)
    given_ = {"logprobs": logprobs, "ref_logprobs": laid_out(logprobs + 0.1 * n.normal(b, t), layout)}
    given_ |= {"values": laid_out(n.normal(b, t), layout), "scores": n.normal(b), "mask": mask}
    how = {"kl_coef": kl_coef, "kl_estimator": estimator, "whiten_rewards": rewards, "whiten_advantages": advantages}
    got, eager = ops.rollout_advantages(**given_, **how), reference.rollout_advantages(**given_, **how)
    exact = reference.rollout_advantages(**{key: double(x) for key, x in given_.items()}, **how)
    for name in got._fields:
        check(name, getattr(got, name), getattr(eager, name), getattr(exact, name), scale=1.0 + kl_coef)


TRANSFORMS = st.sampled_from(
    [
        {},
        {"softcap": 5.0},
        {"temperature": 0.3, "logit_scale": 0.5},
        {"softcap": 1e3, "temperature": 7.0},
        {"logit_scale": 1e-3},
    ]
)


@PROFILE
@given(seeds, sizes, st.integers(1, 70), dtypes, layouts, ranges, masks, TRANSFORMS, st.booleans(), scales)
def test_token_logprobs(seed, b, vocabulary, dtype, layout, kind, where, transform, impossible, upstream):
    n = Numbers(seed)
    logits = n.drawn((b, 2, vocabulary), kind)
    ids = torch.randint(0, vocabulary, (b, 2), generator=n.generator)
    if impossible and vocabulary > 1 and "softcap" not in transform:  # tokens of probability 0
        logits[torch.rand(logits.shape, generator=n.generator) < 0.3] = -torch.inf
        logits.scatter_(-1, ids[..., None], 1.0)
    mask = n.mask((b, 2), where)
    logits = torch.where(mask[..., None], logits, torch.nan)
    if layout == "expanded":
        mask, ids = laid_out(mask, layout), laid_out(ids, layout)
    compare(
        ops.token_logprobs, reference.token_logprobs, {"logits": laid_out(logits.to(dtype), layout)}, upstream, scale=1.0,
        ids=torch.where(mask, ids, -7), mask=mask, entropy=True, **transform,
    )  # fmt: skip


def of_head(name, layout):
    """Return the layout of an input of the head. With equal rows of the weight, the gradient of hidden states is 0."""
    return layout if name == "hidden" or (name == "weight" and layout != "expanded") else "dense"


@PROFILE
@given(seeds, sizes, st.integers(1, 40), st.integers(1, 20), dtypes, layouts, masks, TRANSFORMS, st.booleans(), scales)
def test_linear_token_logprobs(seed, b, vocabulary, hidden, dtype, layout, where, transform, biased, upstream):
    n = Numbers(seed)
    mask = n.mask((b, 3), where)
    states = torch.where(mask[..., None], n.normal(b, 3, hidden), torch.nan)
    if layout == "expanded":
        mask = laid_out(mask, layout)
    leaves = {"hidden": states, "weight": 0.3 * n.normal(vocabulary, hidden)} | (
        {"bias": n.normal(vocabulary)} if biased else {}
    )
    leaves = {name: laid_out(x.to(dtype), of_head(name, layout)) for name, x in leaves.items()}
    ids = torch.randint(0, vocabulary, (b, 3), generator=n.generator)
    how = {"ids": ids, "mask": mask, "entropy": True, **transform}
    compare(ops.linear_token_logprobs, reference.linear_token_logprobs, leaves, upstream, scale=1.0, **how)


@PROFILE
@given(seeds, sizes, sizes, layouts, masks, st.sampled_from(objective.OPTIONS), scales)
def test_ppo_loss(seed, b, t, layout, where, options, upstream):
    n = Numbers(seed)
    mask = laid_out(n.mask((b, t), where), layout)
    logprobs = -n.normal(b, t).abs() - 1
    constants = {
        "old_logprobs": logprobs + 0.3 * n.normal(b, t), "advantages": n.normal(b, t), "old_values": n.normal(b, t),
        "returns": n.normal(b, t), "ref_logprobs": logprobs + 0.2 * n.normal(b, t), "weights": n.normal(b, t).abs(),
    }  # fmt: skip
    if not options.get("kl_coef"):
        constants.pop("ref_logprobs")
    if options.get("objective") in ("policy_gradient",):
        constants.pop("weights")
    leaves = {"logprobs": logprobs, "values": n.normal(b, t), "entropy": n.normal(b, t).abs()}
    if not options.get("entropy_coef"):
        leaves.pop("entropy")
    leaves, constants = (
        {k: laid_out(torch.where(mask, x, torch.nan), layout) for k, x in y.items()} for y in (leaves, constants)
    )
    loss = loss_of(ops.ppo_loss, METRICS), loss_of(reference.ppo_loss, METRICS)
    terms = float(b * t) if "sum" in options.get("aggregation", "") else 1.0
    compare(*loss, leaves, upstream, scale=max(terms, 1.0), mask=mask, **constants, **options)


def loss_of(function, names):
    """Return a function of the loss only; the metrics have separate tests, but none may be undefined."""

    def loss(**arguments):
        result = function(**arguments)
        assert all(bool(result.metrics[name].isfinite()) for name in names)
        return result.loss

    return loss


@PROFILE
@given(seeds, st.integers(1, 4), st.integers(1, 9), dtypes, layouts, masks, st.sampled_from(sorted(head_loss.OPTIONS)),
       st.sampled_from(["plain", "everything"]), scales, st.sampled_from([1.0, 2e5]))  # fmt: skip
def test_linear_ppo_loss(seed, b, t, dtype, layout, where, options, flags, upstream, size):
    """`size` multiplies the advantages, and the denominator too: the coefficient of a token is above float16's range."""
    leaves, constants, extra = heads.make(seed, dtype, b=b, t=t, vocabulary=37, hidden=12)
    chosen = head_loss.chosen_of(flags, options, extra)
    constants = constants | {"advantages": constants["advantages"] * size, "mask": Numbers(seed).mask((b, t), where)}
    if size > 1:
        chosen |= {"num_tokens": size * b * t} if chosen.get("aggregation", "token_mean") == "token_mean" else {}
        upstream /= size if "num_tokens" not in chosen else 1
    leaves = {k: laid_out(x, of_head(k, layout)) for k, x in leaves.items()}
    got, slopes = head_loss.run(ops.linear_ppo_loss, leaves, constants, chosen, dtype, upstream)
    exact, exact_slopes = head_loss.run(head_loss.reference_loss, leaves, constants, chosen, torch.float64, upstream)
    eager = [head_loss.in_order(one, leaves, constants, chosen, dtype) for one in range(4)]
    eager.append(head_loss.run(head_loss.reference_loss, leaves, constants, chosen, dtype))
    check("loss", got.loss, [one.loss for one, _ in eager], exact.loss, scale=max(1.0, size) * b * t)
    for name, slope in slopes.items():
        # The eager gradients have the upstream gradient 0.37.
        scaled = [one[name].double() * (upstream / 0.37) for _, one in eager]
        floor = float(exact_slopes["value_weight"].abs().max()) if name == "value_bias" else 0.0
        check(f"gradient of {name}", slope, scaled, exact_slopes[name], floor)


@PROFILE
@given(seeds, sizes, sizes, layouts, masks, st.sampled_from(selections.RULES), st.sampled_from(selections.LEVELS))
def test_importance_weights(seed, b, t, layout, where, rule, level):
    n = Numbers(seed)
    mask = laid_out(n.mask((b, t), where), layout)
    logprobs = -n.normal(b, t).abs()
    tokens = {"logprobs": logprobs, "sampler_logprobs": logprobs + 0.3 * n.normal(b, t)}
    tokens = {name: laid_out(torch.where(mask, x, torch.nan), layout) for name, x in tokens.items()}
    low, high = (
        {None: none}.get(rule.get(name), rule.get(name)) for name, none in (("low", -torch.inf), ("high", torch.inf))
    )
    got = ops.importance_weights(**tokens, mask=mask, level=level, **rule)
    bounded = rule | {"low": low, "high": high}
    eager = reference.importance_weights(**tokens, mask=mask, level=level, **bounded)
    exact = reference.importance_weights(
        **{k: x.double() for k, x in tokens.items()}, mask=mask, level=level, **bounded
    )
    if torch.equal(eager.mask, exact.mask):  # otherwise a ratio is a rounding away from its bound
        assert torch.equal(got.mask, exact.mask)
        check("weights", got.weights, eager.weights, exact.weights, scale=1.0)


@PROFILE
@given(seeds, st.integers(0, 30), st.integers(1, 6), layouts, st.sampled_from(["rloo", "dr_grpo", "grpo"]))
def test_group_advantages(seed, b, groups, layout, kind):
    n = Numbers(seed)
    scores, numbers = laid_out(n.normal(b), layout), torch.randint(-groups, groups, (b,), generator=n.generator) * 2**40
    got, eager = (f(scores, numbers, kind=kind) for f in (ops.group_advantages, reference.group_advantages))
    exact = reference.group_advantages(scores.double(), numbers, kind=kind)
    # Equal scores have a standard deviation of rounding errors, relative to `eps`.
    check("advantages", got, eager, exact, scale=3.0 if kind != "grpo" or layout != "expanded" else 3e4)


@PROFILE
@given(seeds, sizes, sizes, layouts, masks, ranges, st.sampled_from([0.0, 0.2, 0.5, 1.0]))
def test_top_entropy_mask(seed, b, t, layout, where, kind, share):
    n = Numbers(seed)
    mask = laid_out(n.mask((b, t), where), layout)
    entropy = laid_out(torch.where(mask, n.drawn((b, t), kind).abs(), torch.nan), layout)
    got, exact = (f(entropy, mask, entropy_quantile=share) for f in (ops.top_entropy_mask, reference.top_entropy_mask))
    assert torch.equal(got.mask, exact.mask)


@PROFILE
@given(seeds, st.integers(0, 4), st.integers(1, 3), st.integers(1, 12), dtypes, layouts, masks)
def test_decode_attention(seed, rows, groups, columns, dtype, layout, where):
    n = Numbers(seed)
    mask = n.mask((rows, columns), where)
    query = laid_out(n.normal(rows, 2 * groups, 8).to(dtype), layout)
    caches = [n.normal(rows, groups, columns, 8).masked_fill(~mask[:, None, :, None], torch.nan) for _ in range(2)]
    if layout == "expanded":
        mask = laid_out(mask, layout)
    keys, values = (laid_out(x.to(dtype), layout) for x in caches)
    got = ops.decode_attention(query, keys, values, mask)
    exact = reference.decode_attention(query.double(), keys.double(), values.double(), mask, 8**-0.5)
    eager = reference.decode_attention(query, keys, values, mask, 8**-0.5)
    check("attention", got, eager, exact, scale=1.0)


@PROFILE
@given(
    seeds,
    sizes,
    st.integers(1, 50),
    dtypes,
    layouts,
    ranges,
    st.sampled_from([{}, {"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.1}]),
)
def test_sample_tokens(seed, b, vocabulary, dtype, layout, kind, filters):
    n = Numbers(seed)
    logits = laid_out(n.drawn((b, vocabulary), kind).to(dtype), layout)
    counters = {name: torch.randint(-(2**40), 2**40, (b,), generator=n.generator) for name in ("sequence", "position")}
    got = ops.sample_tokens(logits, seed=seed, **counters, **filters)
    assert bool(((got.ids >= 0) & (got.ids < vocabulary)).all())
    chosen = [reference.token_logprobs(x, got.ids).logprobs for x in (logits, logits.double())]
    check("log-probs", got.logprobs, *chosen)
    assert bool((got.sampling_logprobs >= got.logprobs - 1e-5 * (1 + got.logprobs.abs())).all()) and bool(
        got.logprobs.isfinite().all()
    )


@PROFILE
@given(
    seeds, st.integers(1, 3), st.integers(1, 6), dtypes, st.sampled_from(sorted(distillation.OPTIONS)), masks, scales
)
def test_linear_topk_kl(seed, b, t, dtype, options, where, upstream):
    leaves, constants, _ = distillation.make(seed, dtype, b=b, t=t, k=4, vocabulary=31, hidden=10)
    constants = constants | {"mask": Numbers(seed).mask((b, t), where)}
    given_ = leaves, constants, distillation.OPTIONS[options]
    got, slopes = distillation.run(ops.linear_topk_kl, *given_, dtype, upstream)
    results = [distillation.in_order(one, *given_, dtype) for one in range(4)]
    results.append(distillation.run(reference.linear_topk_kl, *given_, dtype))
    eager, eager_slopes = zip(*results, strict=True)
    exact, exact_slopes = distillation.run(reference.linear_topk_kl, *given_, torch.float64, upstream)
    for name in got._fields:
        check(name, getattr(got, name), [getattr(one, name) for one in eager], getattr(exact, name), scale=1.0)
    for name, slope in slopes.items():
        scaled = [one[name].double() * (upstream / 0.37) for one in eager_slopes]
        check(f"gradient of {name}", slope, scaled, exact_slopes[name])
