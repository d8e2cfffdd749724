"""NeMo-RL's `ClippedPGLossFn` against its documented formulas in float64: loss, gradient, metrics and refused options.

B sequences, S positions, of which the first has no log-prob.
"""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch

from rlhf_kernels.integrations.nemo_rl import ClippedPGLossConfig, ClippedPGLossFn, ClippedPGLossMixin

B, S = 6, 10
SEQUENCES, TOKENS = 4.0, 37.0
"""Global counts."""


def batch(wide: bool = False):
    """Return log-probs of the policy (B, S - 1) and NeMo-RL's data; the third sequence has a `sample_mask` of 0."""
    g = torch.Generator().manual_seed(0)
    prev = -3 * torch.rand(B, S, generator=g) - 0.05
    token_mask = (torch.rand(B, S, generator=g) < 0.7).float()
    token_mask[:, 1] = 1
    data = {
        "advantages": torch.randn(B, S, generator=g) + 0.5,
        "prev_logprobs": prev,
        "generation_logprobs": prev + 0.2 * torch.randn(B, S, generator=g),
        "reference_policy_logprobs": prev + 0.3 * torch.randn(B, S, generator=g),
        "token_mask": token_mask,
        "sample_mask": torch.tensor([1.0, 1, 0, 1, 1, 1]),
        "rewards": torch.randn(B, generator=g),
    }
    new = (prev + 0.3 * torch.randn(B, S, generator=g))[:, 1:]
    return (new.double(), {k: v.double() for k, v in data.items()}) if wide else (new, data)


class Formula:
    """NeMo-RL's loss and metrics as its documentation defines them, in float64."""

    def __init__(self, config: dict, new: torch.Tensor, data: dict):
        self.c, self.new, self.data = ClippedPGLossConfig(**config), new, data
        self.tokens = data["token_mask"][:, 1:]
        self.mask = self.tokens * data["sample_mask"][:, None]
        self.a, self.prev, self.generation, self.reference = (
            data[name][:, 1:]
            for name in ("advantages", "prev_logprobs", "generation_logprobs", "reference_policy_logprobs")
        )
        if self.c.force_on_policy_ratio:
            self.prev = new.detach()

    def by_token(self, x):
        return (x * self.mask).sum() / TOKENS

    def by_sequence(self, x):
        return (x * self.data["sample_mask"]).sum() / SEQUENCES

    def row_mean(self, x):
        return (x * self.tokens).sum(-1) / self.tokens.sum(-1)

    def aggregate(self, x):
        return self.by_token(x) if self.c.token_level_loss else self.by_sequence(self.row_mean(x))

    def ratio(self):
        c, d = self.c, self.new - self.prev
        if c.force_on_policy_ratio:
            return d.exp(), d.exp()
        if c.disable_ppo_ratio:
            return self.new, self.new
        if c.sequence_level_importance_ratios:
            d = self.row_mean(d)[:, None].expand_as(d)
        return d.exp(), d.exp().clamp(1 - c.ratio_clip_min, 1 + c.ratio_clip_max)

    def importance(self):
        """Return the weights (B, T) and where they are outside of the bounds."""
        c, d = self.c, self.prev - self.generation
        raw = (d * self.mask).sum(-1, keepdim=True).exp() if c.sequence_level_importance_ratios else d.exp()
        raw = raw.expand_as(d)
        low, high = c.truncated_importance_sampling_ratio_min or 0, c.truncated_importance_sampling_ratio
        kind = c.truncated_importance_sampling_type
        if kind is None:
            return raw, None
        x = self.row_mean(d).exp()[:, None].expand_as(d) if kind == "seq-mask-tis" else raw
        outside = (x < low) | (x > high)
        return raw.clamp(low, high) if kind == "tis" else raw * ~outside, outside.double()

    def kl(self):
        c = self.c
        sampler = self.generation if c.use_on_policy_kl_approximation else self.new.detach()
        d = self.new - self.reference
        weight = (self.new - sampler).exp()
        if c.kl_input_clamp_value is not None:
            far = d.abs() > c.kl_input_clamp_value
            d = d.clamp(-c.kl_input_clamp_value, c.kl_input_clamp_value)
            weight = torch.where(far, weight.detach(), weight)
        kl = {"k1": d, "k2": d**2 / 2, "k3": (-d).exp() - 1 + d}[c.reference_policy_kl_type] * weight
        most = c.kl_output_clamp_value
        return self.aggregate(kl if most is None else kl.clamp(-most, most))

    def loss(self):
        c, a = self.c, self.a
        r, clipped = self.ratio()
        terms = -a * clipped.detach() * self.new if c.use_cispo else torch.maximum(-a * r, -a * clipped)
        if c.ratio_clip_c is not None:
            terms = torch.where(a < 0, torch.minimum(terms, -a * c.ratio_clip_c), terms)
        weights, _ = self.importance()
        total = self.aggregate(terms * weights if c.use_importance_sampling_correction else terms)
        if not c.use_kl_in_reward:
            total = total + c.reference_policy_kl_penalty * self.kl()
        return total + c.positive_example_nll_weight * self.nll()

    def nll(self):
        correct = self.mask * (self.data["rewards"] > 0)[:, None]
        return -(self.new * correct).sum() / correct.sum()

    def metrics(self):
        c, mean = self.c, self.by_token
        weights, outside = self.importance()
        inside = self.mask > 0
        found = {}
        for name, x in zip(("probs_ratio", "probs_ratio_clamped"), self.ratio(), strict=True):
            found |= {name: mean(x), f"{name}_min": x[inside].min(), f"{name}_max": x[inside].max()}
        d = self.prev - self.generation
        mixed = ((self.prev.exp() + self.generation.exp()) / 2).log()
        k3 = [x - mixed for x in (self.prev, self.generation)]
        found |= {
            "token_mult_prob_error": mean(d.abs().exp()),
            "gen_kl_error": mean(d.exp() - 1 - d),  # k3, as reference_policy_kl_type
            "policy_kl_error": mean((-d).exp() - 1 + d),
            "js_divergence_error": mean(sum(x.exp() - x - 1 for x in k3) / 2),
            "num_valid_samples": self.data["sample_mask"].sum(),
            "approx_entropy": -mean((self.new - self.generation).exp() * self.new),
        }
        whole = c.sequence_level_importance_ratios
        found["sampling_importance_ratio"] = self.by_sequence(weights[:, 0]) if whole else mean(weights)
        if outside is not None:
            masked = c.truncated_importance_sampling_type == "seq-mask-tis"
            found["is_oob_ratio"] = self.by_sequence(outside[:, 0]) if masked else mean(outside)
        return found


KL = {"reference_policy_kl_penalty": 0.5}
OBJECTIVES = {
    "clip": {},
    "clip-higher, dual clip": {"ratio_clip_max": 0.4, "ratio_clip_c": 1.2},
    "sequence means": {"token_level_loss": False},
    "GSPO": {"token_level_loss": False, "sequence_level_importance_ratios": True},
    "REINFORCE": {"disable_ppo_ratio": True},
    "CISPO": {"use_cispo": True},
    "on-policy": {"force_on_policy_ratio": True},
    "positive examples": {"positive_example_nll_weight": 0.3},
}
KLS = {
    "k1": KL | {"reference_policy_kl_type": "k1"},
    "k2": KL | {"reference_policy_kl_type": "k2"},
    "k3": KL,
    "on-policy weights": KL | {"use_on_policy_kl_approximation": True},
    "clamps": KL | {"kl_input_clamp_value": 0.3, "kl_output_clamp_value": 0.04, "use_on_policy_kl_approximation": True},
    "no clamps": KL | {"kl_input_clamp_value": None, "kl_output_clamp_value": None},
    "in the reward": KL | {"use_kl_in_reward": True},
}
WEIGHTS = {"use_importance_sampling_correction": True}


def truncation(kind: str, high: float, low: float | None = None) -> dict:
    names = ("type", "ratio", "ratio_min")
    return WEIGHTS | {f"truncated_importance_sampling_{n}": x for n, x in zip(names, (kind, high, low), strict=True)}


IMPORTANCE = {
    "weights": WEIGHTS,
    "tis": truncation("tis", 1.1),
    "tis, two bounds": truncation("tis", 1.1, 0.9),
    "icepop": truncation("icepop", 1.1, 0.9),
    "seq-mask-tis": truncation("seq-mask-tis", 1.05, 0.98),
}


def cases():
    yield from OBJECTIVES.items()
    for name, level in itertools.product(KLS, ("token", "row")):
        yield f"KL {name}, {level}", KLS[name] | {"token_level_loss": level == "token"}
    for name, rule in itertools.product(("clip", "sequence means", "GSPO"), IMPORTANCE):
        if (name, rule) != ("GSPO", "seq-mask-tis"):
            yield f"{name}, {rule}", OBJECTIVES[name] | IMPORTANCE[rule]


CASES = dict(cases())


@pytest.mark.parametrize("name", CASES)
def test_loss_gradient_and_metrics(name):
    options = CASES[name]
    new, data = batch()
    new = new.requires_grad_()
    loss, metrics = ClippedPGLossFn(ClippedPGLossConfig(**options))(
        new, data, torch.tensor(SEQUENCES), torch.tensor(TOKENS)
    )
    (gradient,) = torch.autograd.grad(loss, new)
    wide, wide_data = batch(wide=True)
    formula = Formula(options, wide.requires_grad_(), wide_data)
    total = formula.loss()
    (slope,) = torch.autograd.grad(total, wide)
    assert loss.item() == pytest.approx(total.item(), rel=1e-6)
    torch.testing.assert_close(gradient.double(), slope, rtol=0, atol=1e-6 * slope.abs().max().item())
    expected = formula.metrics() if options.get("reference_policy_kl_type", "k3") == "k3" else {}
    for key, x in expected.items():
        assert metrics[key] == pytest.approx(x.item(), rel=2e-6, abs=1e-7), key
    assert metrics["loss"] == loss.item()
    kl = 0.0 if formula.c.use_kl_in_reward else formula.kl().item()
    assert metrics["kl_penalty"] == pytest.approx(kl, rel=1e-5)
    nll = formula.nll().item() if formula.c.positive_example_nll_weight else 0.0
    assert metrics["positive_nll_loss"] == pytest.approx(nll, rel=1e-6)
    assert not expected or set(metrics) == set(expected) | {"loss", "kl_penalty", "positive_nll_loss"}


def test_two_tokens_by_hand():
    """A ratio of 2 is clipped at 1.2 for A = 1, not for A = -1: the loss is (-1.2 + 2) / 2. The first entry is no token."""
    new = torch.full((1, 2), math.log(0.5), requires_grad=True)
    old = torch.full((1, 3), math.log(0.25))
    data = {
        "advantages": torch.tensor([[9.0, 1, -1]]),
        "prev_logprobs": old,
        "generation_logprobs": old,
        "token_mask": torch.ones(1, 3),
        "sample_mask": torch.ones(1),
    }
    loss, metrics = ClippedPGLossFn({"reference_policy_kl_penalty": 0.0})(new, data, None, None)
    loss.backward()
    assert loss.item() == pytest.approx(0.4) and new.grad[0].tolist() == pytest.approx([0, 1])
    assert metrics["probs_ratio"] == pytest.approx(2) and metrics["probs_ratio_clamped"] == pytest.approx(1.2)


def test_unfiltered_logprobs_have_the_kl():
    """With `curr_logprobs_unfiltered` the KL and its gradient are of this tensor, not of the filtered log-probs."""
    new, data = batch()
    unfiltered = (new - 0.3).requires_grad_()
    data["advantages"] = torch.zeros(B, S)
    loss, _ = ClippedPGLossFn(KL)(new.requires_grad_(), data | {"curr_logprobs_unfiltered": unfiltered}, None, TOKENS)
    slopes = torch.autograd.grad(loss, (new, unfiltered))
    assert not slopes[0].any() and slopes[1].any()


def test_half_precision():
    """Log-probs in bfloat16 give the loss and the metrics of the same numbers in float32."""
    new, data = batch()
    rounded = {k: x.bfloat16() if "logprobs" in k else x for k, x in data.items()}
    for options in (truncation("tis", 1.1), {"disable_ppo_ratio": True}):
        loss_fn = ClippedPGLossFn(options)
        half, metrics = loss_fn(new.bfloat16(), rounded, SEQUENCES, TOKENS)
        full, expected = loss_fn(new.bfloat16().float(), {k: x.float() for k, x in rounded.items()}, SEQUENCES, TOKENS)
        assert half.item() == full.item() and metrics == expected


def test_a_tensor_of_another_shape_is_refused_by_name():
    new, data = batch()
    with pytest.raises(ValueError, match=r"generation_logprobs: got shape \(6, 8\), expected \(6, 9\)"):
        short = data["generation_logprobs"][:, 1:]
        ClippedPGLossFn({})(new, data | {"generation_logprobs": short}, None, None)


def test_without_a_token_the_loss_is_zero():
    new, data = batch()
    new = new.requires_grad_()
    for options in ({}, {"token_level_loss": False}, {"positive_example_nll_weight": 1.0}):
        nothing = data | {"sample_mask": torch.zeros(B)}
        loss, metrics = ClippedPGLossFn(options)(new, nothing, torch.tensor(0.0), torch.tensor(0.0))
        (slope,) = torch.autograd.grad(loss, new)
        assert loss.item() == 0 and not slope.any() and metrics["probs_ratio_min"] == math.inf


def test_the_mixin_keeps_the_attributes_of_the_original():
    class Original:
        input_type = "their input type"

        def __init__(self, cfg, use_fused_linear_logprobs=False):
            self.metric_normalizations = {"loss": "tokens"}
            self.use_fused_linear_logprobs = use_fused_linear_logprobs

        def __call__(self, *_):
            raise AssertionError

    made = type("Fused", (ClippedPGLossMixin, Original), {})(SimpleNamespace(use_cispo=True), True)
    new, data = batch()
    assert torch.equal(made(new, data, None, None)[0], ClippedPGLossFn({"use_cispo": True})(new, data, None, None)[0])
    assert made.metric_normalizations and made.use_fused_linear_logprobs and made.input_type == "their input type"


REFUSED = {
    "cfg: got 'ratio_clip', expected one of .*did you mean 'ratio_clip_": {"ratio_clip": 0.2},
    "cfg.ratio_clip_c: got 3.0 with disable_ppo_ratio": {"disable_ppo_ratio": True, "ratio_clip_c": 3.0},
    "cfg.ratio_clip_c: got 1.0, expected a number above 1": {"ratio_clip_c": 1.0},
    "cfg.reference_policy_kl_type: got 'k4'": {"reference_policy_kl_type": "k4"},
    "pass token_level_loss=False with sequence_level": {"sequence_level_importance_ratios": True},
    "pass use_cispo or ratio_clip_c, not both": {"use_cispo": True, "ratio_clip_c": 3.0},
    "pass use_cispo or force_on_policy_ratio, not both": {"use_cispo": True, "force_on_policy_ratio": True},
    "token_level_loss: got False with use_cispo": {"use_cispo": True, "token_level_loss": False},
    "truncated_importance_sampling_type is not set": {"truncated_importance_sampling_ratio": 2.0},
    "type: got 'ice', expected one of": WEIGHTS | {"truncated_importance_sampling_type": "ice"},
    "'tis' needs use_importance_sampling_correction": {"truncated_importance_sampling_type": "tis"},
    "truncated_importance_sampling_ratio is not set": WEIGHTS | {"truncated_importance_sampling_type": "tis"},
    "ratio_min is not set, but 'icepop' needs it": truncation("icepop", 2.0),
    "ratio_min: got 3.0, expected at most 2.0": truncation("tis", 2.0, 3.0),
    "type='seq-mask-tis' or sequence_level_importance_ratios": OBJECTIVES["GSPO"]
    | truncation("seq-mask-tis", 2.0, 0.5),
}


@pytest.mark.parametrize("message", REFUSED)
def test_options_that_do_not_fit_are_refused_by_name(message):
    with pytest.raises(ValueError, match=message):
        ClippedPGLossFn(REFUSED[message])
