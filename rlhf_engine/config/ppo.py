"""Settings of the optimiser and of reinforcement learning, apart from the rest of `config.py`.

Each detail that "The N implementation details of RLHF with PPO" (Huang et al. 2024) counts is an option here, in
`RolloutConfig` or in `DataConfig`, or fixed; README's "Implementation details" has them in a table, each with its default,
why it is that, and OpenAI's value of 2019.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal, Self

from rlhf_engine.config.optim import OptimConfig
from rlhf_engine.config.schema import (
    Count,
    NonNegative,
    Positive,
    PositiveShare,
    Section,
    Share,
    WholeNumber,
)


@dataclass(frozen=True)
class TRPOConfig(Section):
    """The constrained step of objective "trpo": eager attention, models of up to about 50 million parameters."""

    max_kl: Positive = 0.01
    """delta, the largest mean KL(old || new) of a step, in nats a token; the paper's value."""
    cg_iterations: Count = 10
    """Iterations of conjugate gradient, one Fisher-vector product each; the paper's value."""
    cg_tolerance: Share = 1e-5
    """Residual, as a share of the gradient's norm, at which they stop."""
    damping: NonNegative = 0.1
    """Added to the diagonal of the Fisher matrix, which has fewer states than weights and is singular."""
    backtracks: Count = 10
    """Steps tried along the direction, each `shrink` times the one before."""
    shrink: PositiveShare = 0.5
    """Factor between them, below 1."""

    def check(self) -> None:
        """Every step tried is a smaller one."""
        if self.shrink == 1.0:
            raise ValueError("shrink: got 1.0, expected a number below 1: every try would be the same")


_POLICY_GRADIENT = {
    "objective": "policy_gradient",
    "ppo_epochs": 1,
    "whiten_advantages": False,
    "discount_gradient": True,
    "aggregation": "seq_mean_token_sum",
}
PRESETS: dict[str, dict[str, object]] = {
    "reinforce": _POLICY_GRADIENT | {"lam": 1.0, "baseline": "none", "vf_coef": 0.0},
    "reinforce_baseline": _POLICY_GRADIENT | {"lam": 1.0, "cliprange_value": None},
    "actor_critic": _POLICY_GRADIENT | {"lam": 0.0, "cliprange_value": None},
}
"""Sutton & Barto 2018, chapter 13: what each algorithm fixes. Everything else stays a choice."""


@dataclass(frozen=True)
class PPOConfig(Section):
    """PPO on a token-level environment with the score at the end (InstructGPT, section 3.5)."""

    preset: Literal["reinforce", "reinforce_baseline", "actor_critic"] | None = None
    """An older policy gradient in place of PPO: REINFORCE `gamma^t G grad log pi`, with baseline `G - v(s)`, or one-step
    actor-critic `R + gamma v(s') - v(s)`. It sets the options that make it so (`PRESETS`) and refuses other values of them,
    but for their defaults, as a file of all options has them;
    every sample is the present policy's where `minibatch` is `rollout_batch`."""
    updates: Count = 100
    """Outer iterations: collect, score, advantages, update."""
    rollout_batch: Count = 512
    """Sequences collected for one update."""
    minibatch: Count = 64
    """Sequences of one optimiser step."""
    microbatch: Count = 16
    """Sequences of one forward and backward pass; changes memory and speed, not the gradient."""
    microbatch_tokens: Count | None = None
    """Tokens of one forward and backward pass in place of `microbatch` sequences, so that short answers go together and a
    pass costs the same whatever the lengths: packed without padding where torch has the attention for it (a GPU and half
    precision), otherwise sequences of like length, their padding counted. A longer sequence has a pass of its own."""
    ppo_epochs: Count = 1
    """Passes over the rollout batch."""
    kl_coef: NonNegative = 0.02
    """beta, the weight of KL(policy || reference) in every token's reward; the first one where `kl_control` adapts it."""
    kl_control: Literal["fixed", "adaptive"] = "fixed"
    """Fixed beta (InstructGPT), or one that follows the measured KL towards `kl_target` (Ziegler et al. 2019)."""
    kl_target: Positive | None = None
    """KL that adaptive control aims at, in nats a `kl_unit`; OpenAI's runs took 6 a sequence."""
    kl_unit: Literal["sequence", "token"] = "sequence"
    """Whether `kl_target` is of a whole response (OpenAI's) or of a token, which does not grow with the length."""
    kl_horizon: Count = 10_000
    """Sequences over which adaptive control corrects an error in full; OpenAI's value."""
    kl_estimator: Literal["k1", "k2", "k3", "abs"] = "k1"
    """Estimator of that KL."""
    gamma: Share = 1.0
    """Discount of rewards."""
    lam: Share = 0.95
    """lambda of generalised advantage estimation."""
    discount_gradient: bool = False
    """Weight token t's policy term by gamma^t, as the policy-gradient theorem does for the discounted return from the start,
    and nearly no implementation."""
    score_clip: Positive | None = None
    """Scores are clipped to [-score_clip, score_clip]; None leaves them alone."""
    score_scale: Literal["none", "batch", "first", "running"] = "none"
    """Moments by which scores are moved to mean 0 and deviation 1 before they are clipped: none (InstructGPT centres the
    reward model instead), this rollout's, the first rollout's (OpenAI 2019), or those of all rollouts so far. The log has
    both: `score_mean` as the reward function gave it, `scaled_score_mean` as PPO learns from it."""
    missing_eos_penalty: NonNegative = 0.0
    """Taken off the score of a response that ran out of budget before EOS."""
    missing_eos_score: float | None = None
    """Score of such a response in place of the reward function's, which then never sees it; OpenAI's is -1. None: it is
    scored like any other."""
    nonfinite_scores: Literal["stop", "skip"] = "stop"
    """Whether a score that is NaN or infinite ends the run, or its response is left out and counted in `scores_skipped`."""
    whiten_rewards: bool = False
    """Give the rewards of the batch variance 1 around the mean that they have."""
    whiten_advantages: bool = True
    """Give the advantages mean 0 and variance 1."""
    whiten_scope: Literal["batch", "minibatch"] = "batch"
    """Whose mean and variance that takes: the rollout's, which gives a token the same advantage in every epoch, or its
    minibatch's (OpenAI 2019)."""
    objective: Literal["clip", "kl_penalty", "ratio", "policy_gradient", "trpo"] = "clip"
    """Policy objective: clipped surrogate, KL-penalised, unclipped ratio, plain policy gradient, or TRPO, one constrained
    step on the whole rollout after the optimiser's steps, which are the value function's alone."""
    trpo: TRPOConfig = field(default_factory=TRPOConfig)
    """The step of objective "trpo"."""
    cliprange: Positive = 0.2
    """epsilon of the clipped surrogate."""
    cliprange_high: Positive | None = None
    """Upper epsilon where it differs from `cliprange`."""
    dual_clip: Positive | None = None
    """Bound c > 1 on the ratio's loss when the advantage is negative; None turns it off."""
    log_ratio_clamp: Positive | None = None
    """Log-ratios are clamped to [-log_ratio_clamp, log_ratio_clamp]; None leaves them alone."""
    old_kl_coef: NonNegative = 0.0
    """Weight of KL(old || new) in the objective `kl_penalty`; the first one where `old_kl_target` is set."""
    old_kl_target: Positive | None = None
    """KL(old || new) a token at which an update aims; its weight doubles above 1.5 of it and halves below (PPO paper, eq. 8).
    None keeps the weight: the adaptation costs one more forward pass an update."""
    stop_kl: Positive | None = None
    """No further epoch over the batch once KL(old || new) a token was above this in an epoch's last minibatch; None: never."""
    ratio_level: Literal["token", "sequence"] = "token"
    """Whether a ratio belongs to a token or (length-normalised) to its sequence."""
    cliprange_value: Positive | None = 0.2
    """Clip of the new value around the old one; None turns it off."""
    value_model: Literal["head", "backbone"] = "head"
    """Where values come from: a head on the policy's hidden states, which costs nothing, or a trunk of its own (InstructGPT's),
    which the policy's gradients leave alone."""
    value_init: Literal["reward_model", "zero"] = "reward_model"
    """Start of the value function: the reward model's weights (InstructGPT), or a head of zeros, on the policy's trunk where it
    is a backbone."""
    value_warmup: WholeNumber = 0
    """First updates, in which only the value function learns and the policy stays what it was."""
    baseline: Literal["value", "none"] = "value"
    """What is taken off the returns: the values, or nothing (REINFORCE); without values there is nothing to train."""
    vf_coef: NonNegative = 0.1
    """Weight of the value loss."""
    entropy_coef: NonNegative = 0.0
    """Weight of the entropy bonus."""
    ptx_coef: NonNegative = 0.0
    """gamma of PPO-ptx, the weight of the mean log-prob of pretraining tokens in every optimiser step; 0 turns it off.
    InstructGPT's is 27.8, on losses whose normalisation the paper does not give; here both are means over tokens."""
    ptx_ratio: Positive = 1.0
    """Pretraining sequences of an optimiser step for each sequence of its minibatch; InstructGPT took 8."""
    aggregation: Literal["token_mean", "seq_mean_token_sum", "seq_mean_token_mean", "token_sum"] = "token_mean"
    """How per-token losses of a minibatch become one number."""
    old_logprobs: Literal["sampled", "rescored"] = "sampled"
    """Whose log-probs are the old policy's: those of sampling, or of one more forward pass of the learner."""
    importance_cap: Positive | None = None
    """Cap of the weight pi / pi_sampling of a token when top_k, top_p, min_p or repetition_penalty is set; None gives every
    token 1."""
    ema_decay: Share | None = None
    """Decay of a moving average of the weights, one step of it an optimiser step; InstructGPT's is 0.992. It is saved as a
    model of its own in the folder `ema` of the checkpoint. None: no average, which saves a copy of the weights."""
    checkpoint_every: WholeNumber | None = None
    """Updates between checkpoints; 0 writes one only at the end and where the run ends early. None writes one whenever ten
    minutes have passed since the last, or twenty times as long as that one took: the most that `kill -9` can cost."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=9e-6, eps=1e-5))
    """Optimiser of this stage."""

    @classmethod
    def from_dict(cls, given: dict[str, Any], key: str = "") -> Self:
        """As any section; a preset's options need not be given, and give way to it where they have their default.

        So a preset goes over a file that `rlhf config show` wrote, which says nothing about what was chosen.
        """
        name = given.get("preset") if isinstance(given, dict) else None
        if not isinstance(name, str) or name not in PRESETS:
            return super().from_dict(given, key)
        defaults = {item.name: item.default for item in fields(cls)}
        # `True == 1`, so the type counts as well.
        chosen = {
            option: value
            for option, value in given.items()
            if option not in PRESETS[name] or value != defaults[option] or type(value) is not type(defaults[option])
        }
        return super().from_dict(PRESETS[name] | chosen, key)

    def check(self) -> None:
        """Batches divide each other, so that every optimiser step sees the same number of sequences.

        Where `nonfinite_scores` is "skip" and leaves some out, the last step of an epoch sees fewer.
        """
        if self.rollout_batch % self.minibatch:
            raise ValueError(
                f"minibatch: got {self.minibatch}, expected a divisor of rollout_batch {self.rollout_batch}"
            )
        if self.microbatch > self.minibatch and self.microbatch_tokens is None:
            raise ValueError(f"microbatch: got {self.microbatch}, expected at most minibatch {self.minibatch}")
        if self.dual_clip is not None and self.dual_clip <= 1.0:
            raise ValueError(f"dual_clip: got {self.dual_clip}, expected a number above 1")
        for name, value in PRESETS.get(self.preset or "", {}).items():
            if getattr(self, name) != value:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected {value!r} with preset {self.preset!r}")
        # An option that nothing would read is a mistake, not a detail.
        for name, unused, reader, read in self._readers():
            value = getattr(self, name)
            if value != unused and not read:
                raise ValueError(f"{name}: got {value!r}, expected {unused!r}; only {reader} reads it")
        self._check_control()

    def _readers(self) -> tuple[tuple[str, object, str, bool], ...]:
        """(option, value of an option that is not used, what reads it, whether that is on)."""
        clip, penalty = self.objective == "clip", self.objective == "kl_penalty"
        adaptive = self.kl_control == "adaptive"
        return (
            ("microbatch", 16, "microbatch_tokens None", self.microbatch_tokens is None),
            ("missing_eos_penalty", 0.0, "missing_eos_score None", self.missing_eos_score is None),
            ("cliprange", 0.2, "objective 'clip'", clip),
            ("cliprange_high", None, "objective 'clip'", clip),
            ("dual_clip", None, "objective 'clip'", clip),
            ("old_kl_coef", 0.0, "objective 'kl_penalty'", penalty),
            ("trpo", TRPOConfig(), "objective 'trpo'", self.objective == "trpo"),
            ("entropy_coef", 0.0, "an objective other than 'trpo'", self.objective != "trpo"),
            ("ptx_coef", 0.0, "an objective other than 'trpo'", self.objective != "trpo"),
            ("aggregation", "token_mean", "an objective other than 'trpo'", self.objective != "trpo"),
            ("ratio_level", "token", "an objective with a ratio", self.objective not in ("policy_gradient", "trpo")),
            ("importance_cap", None, "an objective other than 'trpo'", self.objective != "trpo"),
            ("discount_gradient", False, "an objective other than 'trpo'", self.objective != "trpo"),
            ("log_ratio_clamp", None, "an objective other than 'trpo'", self.objective != "trpo"),
            ("stop_kl", None, "an objective other than 'trpo'", self.objective != "trpo"),
            ("whiten_scope", "batch", "an objective other than 'trpo'", self.objective != "trpo"),
            ("old_kl_target", None, "objective 'kl_penalty'", penalty),
            ("kl_target", None, "kl_control 'adaptive'", adaptive),
            ("kl_unit", "sequence", "kl_control 'adaptive'", adaptive),
            ("kl_horizon", 10_000, "kl_control 'adaptive'", adaptive),
            ("whiten_scope", "batch", "whiten_advantages", self.whiten_advantages),
            ("value_model", "head", "baseline 'value'", self.baseline == "value"),
            ("value_init", "reward_model", "baseline 'value'", self.baseline == "value"),
            ("value_warmup", 0, "baseline 'value'", self.baseline == "value"),
            ("value_warmup", 0, "vf_coef above 0", self.vf_coef > 0),
            ("vf_coef", 0.0, "baseline 'value'", self.baseline == "value"),
            ("cliprange_value", 0.2, "baseline 'value'", self.baseline == "value" or self.cliprange_value is None),
            ("ptx_ratio", 1.0, "ptx_coef above 0", self.ptx_coef > 0),
            ("stop_kl", None, "ppo_epochs above 1", self.ppo_epochs > 1),
        )

    def _check_control(self) -> None:
        if self.value_warmup >= self.updates:
            raise ValueError(f"value_warmup: got {self.value_warmup}, expected fewer than updates {self.updates}")
        if self.ema_decay == 1.0:
            raise ValueError("ema_decay: got 1.0, expected a number below 1: the average would never move")
        if self.objective == "trpo" and self.baseline == "none":
            raise ValueError(
                "baseline: got 'none', expected 'value' with objective 'trpo', whose optimiser trains nothing but values"
            )
        if self.missing_eos_score is not None and not abs(self.missing_eos_score) < float("inf"):
            raise ValueError(f"missing_eos_score: got {self.missing_eos_score}, expected a finite number")
        if round(self.ptx_ratio * self.minibatch) < 1:
            raise ValueError(f"ptx_ratio: got {self.ptx_ratio}, expected at least one sequence to a minibatch")
        if self.kl_control == "adaptive":
            if self.kl_target is None:
                raise ValueError("kl_target: got None, expected a number for kl_control 'adaptive' to aim at")
            if self.kl_coef == 0.0:
                raise ValueError("kl_coef: got 0.0, expected a number above 0, which kl_control 'adaptive' multiplies")
            if 0.2 * self.rollout_batch >= self.kl_horizon:
                raise ValueError(
                    f"kl_horizon: got {self.kl_horizon}, expected more than {0.2 * self.rollout_batch:g}, a fifth of "
                    "rollout_batch, so that the coefficient stays above 0"
                )
        if self.objective == "kl_penalty" and self.old_kl_coef == 0.0:
            multiplied = "" if self.old_kl_target is None else ", which old_kl_target doubles and halves"
            raise ValueError(
                f"old_kl_coef: got 0.0, expected a number above 0 for objective 'kl_penalty'{multiplied}; without a "
                "penalty that is objective 'ratio'"
            )
