"""Settings of reinforcement learning.

Each detail in "The N implementation details of RLHF with PPO" (Huang et al. 2024) is fixed or an option here, in
`RolloutConfig` or in `DataConfig`. docs/design/implementation_details.md lists them with the default, the reason for it and
OpenAI's value of 2019.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal, Self

from rlhf_engine.config.importance import ImportanceConfig
from rlhf_engine.config.limits import LimitsConfig
from rlhf_engine.config.optim import OptimConfig
from rlhf_engine.config.schema import (
    Count,
    NonNegative,
    Positive,
    Section,
    Share,
    WholeNumber,
)
from rlhf_engine.config.trpo import TRPOConfig

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
"""Options that each algorithm of Sutton & Barto 2018, chapter 13, sets. All other options can be chosen."""


@dataclass(frozen=True)
class PPOConfig(Section):
    """PPO with one action per token and the score as the reward of the last token (InstructGPT, section 3.5)."""

    preset: Literal["reinforce", "reinforce_baseline", "actor_critic"] | None = None
    """Policy-gradient method instead of PPO: reinforce is REINFORCE, `gamma^t G grad log pi`; reinforce_baseline
    replaces `G` with `G - v(s)`; actor_critic is one-step actor-critic, `R + gamma v(s') - v(s)`. A preset sets
    objective, ppo_epochs, whiten_advantages, discount_gradient, aggregation, lam and what it needs of baseline, vf_coef
    and cliprange_value. A value in the file that is neither the preset's nor the default is an error. Sampling is
    on-policy only if `minibatch` equals `rollout_batch`. If None, no option is changed."""
    updates: Count = 100
    """Number of updates, each of which collects a rollout, scores it, computes advantages and trains on it."""
    rollout_batch: Count = 512
    """Sequences sampled per update."""
    minibatch: Count = 64
    """Sequences per optimizer step; a divisor of `rollout_batch`."""
    microbatch: Count = 16
    """Sequences per forward and backward pass; changes memory and speed, not the gradient."""
    microbatch_tokens: Count | None = None
    """Maximum tokens per forward and backward pass, instead of `microbatch`, so that passes over short and long
    responses cost about the same. Sequences are packed without padding if torch has attention for it (a GPU and half
    precision); otherwise sequences of similar length are batched, and padding counts. A sequence with more tokens is
    processed in a separate pass. If None, `microbatch` applies."""
    ppo_epochs: Count = 1
    """Passes over the rollout per update."""
    kl_coef: NonNegative = 0.02
    """beta, the weight of KL(policy || reference) in the reward of every token; the initial value if `kl_control` is
    adaptive."""
    kl_control: Literal["fixed", "adaptive"] = "fixed"
    """Control of beta: fixed (InstructGPT), or adaptive, which changes it so that the measured KL approaches
    `kl_target` (Ziegler et al. 2019)."""
    kl_target: Positive | None = None
    """Target KL of adaptive control, in nats per `kl_unit`; required for it. OpenAI used 6 per sequence."""
    kl_unit: Literal["sequence", "token"] = "sequence"
    """Unit of `kl_target`: a whole response (as OpenAI's), or a token, whose KL does not grow with the length of the
    response."""
    kl_horizon: Count = 10_000
    """Number of sequences over which adaptive control corrects a relative error of the KL in full. The default is
    OpenAI's value."""
    reference: Literal["auto", "adapter_off", "hydra", "frozen_copy"] = "auto"
    """Policy relative to which the KL is measured, always the one that the run starts from. frozen_copy is a copy of
    its weights. adapter_off is the policy without the adapter that is trained, which needs adapter.rank and no copy.
    hydra needs model.train_layers: the frozen layers below run once per rollout for policy and reference, and their
    output is stored. auto is adapter_off with adapter.rank, otherwise hydra with model.train_layers, otherwise
    frozen_copy."""
    kl_estimator: Literal["k1", "k2", "k3", "abs"] = "k1"
    """Estimator of the KL in the reward."""
    gamma: Share = 1.0
    """Discount factor of rewards, per token."""
    lam: Share = 0.95
    """lambda of generalized advantage estimation."""
    lam_alpha: Positive | None = None
    """alpha of a lambda that grows with the number l of tokens of a response, `1 - 1 / (alpha l)` and at least 0, in
    place of `lam` (VAPO, whose value is 0.05). If None, `lam` is the lambda of every response."""
    value_lam: Share | None = None
    """lambda of the returns, the targets of the value function. VAPO's value is 1, which makes them the sums of the
    rewards. If None, it is the lambda of the advantages."""
    discount_gradient: bool = False
    """Weight the policy term of token t by gamma^t, as in the policy-gradient theorem for the discounted return from
    the start. Few implementations do this."""
    score_clip: Positive | None = None
    """Scores are clipped to [-score_clip, score_clip]. If None, scores are not clipped."""
    score_scale: Literal["none", "batch", "first", "running"] = "none"
    """Moments with which scores are normalized to mean 0 and standard deviation 1 before clipping: none does not
    normalize (InstructGPT centers the reward model instead), batch uses the current rollout, first the first rollout
    (OpenAI 2019), running all rollouts so far. The log has `score_mean`, as returned by the reward function, and
    `scaled_score_mean`, as used by PPO."""
    missing_eos_penalty: NonNegative = 0.0
    """Subtracted from the score of a response that reached rollout.max_response_tokens before it ended."""
    missing_eos_score: float | None = None
    """Score of a response that reached rollout.max_response_tokens before it ended; the reward function is not called
    for it. OpenAI's value is -1. If None, the reward function scores it."""
    nonfinite_scores: Literal["stop", "skip"] = "stop"
    """Handling of a score that is NaN or infinite: stop ends the run with an error, skip leaves the response out of the
    rollout and counts it in `scores_skipped`."""
    whiten_rewards: bool = False
    """Scale the rewards of the rollout to variance 1 and keep their mean."""
    whiten_advantages: bool = True
    """Normalize the advantages to mean 0 and variance 1."""
    whiten_scope: Literal["batch", "minibatch"] = "batch"
    """Scope of the mean and variance for `whiten_advantages`: the rollout (batch), so that a token has the same
    advantage in every epoch, or the minibatch (OpenAI 2019)."""
    objective: Literal[
        "clip", "kl_penalty", "ratio", "policy_gradient", "cispo", "sapo", "ipo", "dppo_tv", "dppo_kl", "gspo_token",
        "gmpo", "trpo",
    ] = "clip"  # fmt: skip
    """Policy objective: clip is PPO's clipped surrogate, kl_penalty PPO's KL-penalized surrogate, ratio the surrogate
    without a bound, policy_gradient the log-prob times the advantage. docs/reference/objectives.md describes cispo, sapo,
    ipo, dppo_tv, dppo_kl, gspo_token and gmpo. trpo makes one constrained step per rollout, after optimizer steps that
    train only the value function."""
    trpo: TRPOConfig = field(default_factory=TRPOConfig)
    """The constrained step of objective "trpo"."""
    cliprange: Positive = 0.2
    """epsilon of the clipped surrogate: the ratio is clipped to [1 - cliprange, 1 + cliprange_high]; in objective
    "gmpo", the log-ratio to [-cliprange, cliprange_high]."""
    cliprange_high: Positive | None = None
    """Upper epsilon of the clipped surrogate. If None, it equals `cliprange`."""
    dual_clip: Positive | None = None
    """Constant c > 1 of dual clipping, which bounds the loss of a token with a negative advantage A by -c A. If None,
    it is off."""
    log_ratio_clamp: Positive | None = None
    """Log-ratios are clamped to [-log_ratio_clamp, log_ratio_clamp]. If None, they are not clamped."""
    old_kl_coef: NonNegative = 0.0
    """Weight of KL(old || new) in objective "kl_penalty"; the initial value if `old_kl_target` is set."""
    tau_pos: Positive = 1.0
    """Temperature of the gate of objective "sapo" for tokens with a positive advantage."""
    tau_neg: Positive = 1.05
    """The same for the other tokens."""
    divergence: NonNegative | None = None
    """Largest divergence from the old probability of a token in objectives "ipo", "dppo_tv" and "dppo_kl"; tokens above
    it have no policy gradient. If None, it is 0.1, 0.2 and 0.05."""
    divergence_high: NonNegative | None = None
    """The same for tokens with a positive advantage, in "dppo_tv" and "dppo_kl". If None, it equals `divergence`."""
    ratio_limit: Positive | None = None
    """Largest factor of the gradient that a ratio gives in "dppo_tv" and "dppo_kl". If None, there is no limit."""
    log_ratio_coef: NonNegative | None = None
    """Weight of the squared log-ratio in "ipo", "dppo_tv" and "dppo_kl". If None, it is 0.001 in "ipo", otherwise 0."""
    old_kl_target: Positive | None = None
    """Target of KL(old || new), in nats per token. After an update, its weight is doubled if the KL is above 1.5 times
    the target, and halved if it is below the target divided by 1.5 (PPO paper, eq. 8). This costs one more forward pass
    per update. If None, the weight is constant."""
    stop_kl: Positive | None = None
    """Limit on KL(old || new), in nats per token. If the last minibatch of an epoch exceeds it, the remaining epochs
    over the rollout are skipped. If None, none is skipped."""
    ratio_level: Literal["token", "sequence"] = "token"
    """Unit of the probability ratio: each token, or the whole sequence (the log-ratio is averaged over its tokens)."""
    cliprange_value: Positive | None = 0.2
    """Maximum change of a value from the old value before the value loss is clipped. If None, it is not clipped."""
    value_model: Literal["head", "backbone"] = "head"
    """Value function: head is a linear head on the hidden states of the policy, which needs almost no memory or time.
    backbone is a separate model with a trunk and a head (as InstructGPT's), which gradients of the policy loss do not
    change. With adapter.rank, it is an adapter and a head, and its trunk is that of the policy."""
    value_init: Literal["reward_model", "zero"] = "reward_model"
    """Initial weights of the value function: those of the reward model (InstructGPT), or a head of zeros. With
    `value_model` backbone, zero also copies the trunk of the policy."""
    value_warmup: WholeNumber = 0
    """Number of updates at the start that train only the value function and leave the policy unchanged."""
    baseline: Literal["value", "none"] = "value"
    """Baseline of the advantages: the values, or none (REINFORCE), in which case no value function is trained."""
    vf_coef: NonNegative = 0.1
    """Weight of the value loss."""
    entropy_coef: NonNegative = 0.0
    """Weight of the entropy bonus."""
    ptx_coef: NonNegative = 0.0
    """gamma of PPO-ptx, the weight of the mean log-prob of pretraining tokens in every optimizer step; 0 turns it off.
    InstructGPT used 27.8 with losses whose normalization the paper does not give; here both losses are means over
    tokens."""
    ptx_ratio: Positive = 1.0
    """Pretraining sequences per sequence of the minibatch in every optimizer step. InstructGPT used 8."""
    positive_nll_coef: NonNegative = 0.0
    """mu, the weight of the mean of -log pi over the tokens of the minibatch's responses with a score above
    `positive_score` (VAPO, whose value is 0.1), reduced by `aggregation`; 0 turns it off."""
    positive_score: float = 0.0
    """Score above which a response is a positive example, as the reward function returns it, before scaling."""
    aggregation: Literal["token_mean", "seq_mean_token_sum", "seq_mean_token_mean", "token_sum"] = "token_mean"
    """Reduction of the token losses of a minibatch: token_mean divides the sum by the number of tokens;
    seq_mean_token_sum sums within each sequence and averages over sequences; seq_mean_token_mean averages within each
    sequence, then over sequences; token_sum is the sum."""
    old_logprobs: Literal["sampled", "rescored"] = "sampled"
    """Source of the old policy's log-probs: sampled stores them during sampling, rescored computes them (and the old
    values) with one more forward pass before training."""
    importance_cap: Positive | None = None
    """Cap of the importance weight of a token, pi / pi_sampling, which differs from 1 if rollout.top_k, top_p, min_p or
    repetition_penalty is set, or if old_logprobs is rescored. It is short for `importance` with level token, action
    truncate and this number as `high`. If None, every token has weight 1."""
    importance: ImportanceConfig = field(default_factory=ImportanceConfig)
    """Weights and masks for tokens by their probability under the policy and the sampler; excludes `importance_cap`."""
    ema_decay: Share | None = None
    """Decay of an exponential moving average of the weights, updated after every optimizer step. InstructGPT's value is
    0.992. The average is saved as a separate model in the folder `ema` of the checkpoint. If None, no average is kept,
    which saves the memory of a copy of the weights."""
    log_samples: WholeNumber = 4
    """Number of responses per update that OUTPUT_DIR/samples.jsonl keeps, with their prompts, scores and KL to the
    reference in nats."""
    profile_update: Count | None = None
    """Number of an update, 2 or later, of which torch.profiler records the operations: OUTPUT_DIR/profile receives a
    table by phase and operation, and a trace for chrome://tracing. It slows that update down. If None, none is."""
    checkpoint_every: WholeNumber | None = None
    """Updates between checkpoints; 0 writes one only when the run ends, also if it ends early. If None, the interval is
    ten minutes, or twenty times the duration of the last checkpoint if that is longer. A killed run (`kill -9`) loses
    at most one interval."""
    on_nonfinite: Literal["stop", "skip", "halve"] = "stop"
    """Handling of a loss, gradient, log-prob or value that is NaN or infinite, before any optimizer step: stop ends the
    run with an error. skip leaves the optimizer step of the minibatch out. halve halves the minibatch until the
    sequences whose gradient is not finite are found, and steps with the others. With skip and halve, sampled sequences
    with such a log-prob or value are left out of the rollout. All three name the sample and the operation, and write a
    file for `rlhf repro`; the log counts in `skipped_steps` and `left_out_sequences`. Objective trpo accepts only stop."""
    ratio_guard: Positive | None = None
    """Largest mean ratio of new to old probability of a minibatch, which bounds the effect of stale samples. TRL's
    PPOConfig has 10. If None, there is none."""
    on_ratio: Literal["skip", "stop"] = "skip"
    """Handling of a minibatch above `ratio_guard`: skip leaves its optimizer step out and counts it in
    `skipped_steps`, stop ends the run."""
    warn_on: LimitsConfig = field(
        default_factory=lambda: LimitsConfig(kl=100.0, kl_per_token=2.0, entropy=0.01, grad_norm=1000.0)
    )
    """Limits whose excess logs a warning. By default a KL of 100 nats per sequence, several times that of useful
    policies of responses up to a few hundred tokens; 2 nats per token, at which the reference gives a token a seventh
    of the policy's probability; an entropy of 0.01, at which samples of a prompt are equal; and a gradient norm of
    1000, a hundred times the usual one (with aggregation token_sum, set a larger one)."""
    stop_on: LimitsConfig = field(default_factory=LimitsConfig)
    """Limits whose excess ends the run with exit code 1, after the finished updates are saved. By default there are
    none."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=9e-6, eps=1e-5))
    """Optimizer of the policy and the value function."""

    @classmethod
    def from_dict(cls, given: dict[str, Any], key: str = "") -> Self:
        """Build the section; a preset sets its options if they are absent or have their default value.

        A preset can thus be set over a file from `rlhf config show`, which contains every option at its default.

        Raises:
            ValueError: as `Section.from_dict`.
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
        """Raise ValueError for options that contradict each other or that nothing reads.

        `minibatch` must divide `rollout_batch`, so that every optimizer step has the same number of sequences. If
        `nonfinite_scores` "skip" removes some, the last step of an epoch has fewer.
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
        # A value that no code would read is reported instead of ignored.
        for name, unused, reader, read in self._readers():
            value = getattr(self, name)
            if value != unused and not read:
                raise ValueError(f"{name}: got {value!r}, expected {unused!r}; only {reader} reads it")
        self._check_control()

    def _readers(self) -> tuple[tuple[str, object, str, bool], ...]:
        """Return tuples of an option, its value when unused, the setting that reads it, and whether that setting is active."""
        penalty, limits = self.objective == "kl_penalty", self.objective in ("clip", "cispo", "gspo_token", "gmpo")
        dppo = self.objective in ("dppo_tv", "dppo_kl")
        leveled = self.objective in ("clip", "kl_penalty", "ratio", "cispo", "sapo")
        adaptive = self.kl_control == "adaptive"
        return (
            ("microbatch", 16, "microbatch_tokens None", self.microbatch_tokens is None),
            ("missing_eos_penalty", 0.0, "missing_eos_score None", self.missing_eos_score is None),
            ("cliprange", 0.2, "objective 'clip', 'cispo', 'gspo_token' or 'gmpo'", limits),
            ("cliprange_high", None, "objective 'clip', 'cispo', 'gspo_token' or 'gmpo'", limits),
            ("dual_clip", None, "objective 'clip' or 'gspo_token'", self.objective in ("clip", "gspo_token")),
            ("tau_pos", 1.0, "objective 'sapo'", self.objective == "sapo"),
            ("tau_neg", 1.05, "objective 'sapo'", self.objective == "sapo"),
            ("divergence", None, "objective 'ipo', 'dppo_tv' or 'dppo_kl'", dppo or self.objective == "ipo"),
            ("divergence_high", None, "objective 'dppo_tv' or 'dppo_kl'", dppo),
            ("ratio_limit", None, "objective 'dppo_tv' or 'dppo_kl'", dppo),
            ("log_ratio_coef", None, "objective 'ipo', 'dppo_tv' or 'dppo_kl'", dppo or self.objective == "ipo"),
            ("old_kl_coef", 0.0, "objective 'kl_penalty'", penalty),
            ("trpo", TRPOConfig(), "objective 'trpo'", self.objective == "trpo"),
            ("entropy_coef", 0.0, "an objective other than 'trpo'", self.objective != "trpo"),
            ("ptx_coef", 0.0, "an objective other than 'trpo'", self.objective != "trpo"),
            ("positive_nll_coef", 0.0, "an objective other than 'trpo'", self.objective != "trpo"),
            ("positive_score", 0.0, "positive_nll_coef above 0", self.positive_nll_coef > 0),
            ("aggregation", "token_mean", "an objective other than 'trpo'", self.objective != "trpo"),
            ("ratio_level", "token", "an objective with a ratio of tokens or sequences", leveled),
            ("importance_cap", None, "an objective other than 'trpo'", self.objective != "trpo"),
            ("importance", ImportanceConfig(), "an objective other than 'trpo'", self.objective != "trpo"),
            ("importance", ImportanceConfig(), "importance_cap None", self.importance_cap is None),
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
            ("lam", 0.95, "lam_alpha None", self.lam_alpha is None),
            ("value_lam", None, "baseline 'value'", self.baseline == "value"),
            ("value_lam", None, "vf_coef above 0", self.vf_coef > 0),
            ("value_init", "reward_model", "baseline 'value'", self.baseline == "value"),
            ("value_warmup", 0, "baseline 'value'", self.baseline == "value"),
            ("value_warmup", 0, "vf_coef above 0", self.vf_coef > 0),
            ("vf_coef", 0.0, "baseline 'value'", self.baseline == "value"),
            ("cliprange_value", 0.2, "baseline 'value'", self.baseline == "value" or self.cliprange_value is None),
            ("ptx_ratio", 1.0, "ptx_coef above 0", self.ptx_coef > 0),
            ("stop_kl", None, "ppo_epochs above 1", self.ppo_epochs > 1),
            ("on_nonfinite", "stop", "an objective other than 'trpo'", self.objective != "trpo"),
            ("on_ratio", "skip", "ratio_guard", self.ratio_guard is not None),
            ("ratio_guard", None, "an objective other than 'trpo'", self.objective != "trpo"),
        )

    def _check_control(self) -> None:
        if self.profile_update is not None and not 2 <= self.profile_update <= self.updates:
            raise ValueError(
                f"profile_update: got {self.profile_update}, expected 2 to updates {self.updates}; the first update also "
                "allocates memory and loads libraries"
            )
        if self.value_warmup >= self.updates:
            raise ValueError(f"value_warmup: got {self.value_warmup}, expected fewer than updates {self.updates}")
        if self.ema_decay == 1.0:
            raise ValueError("ema_decay: got 1.0, expected a number below 1; with 1 the average never changes")
        if self.objective == "trpo" and self.baseline == "none":
            raise ValueError(
                "baseline: got 'none', expected 'value' with objective 'trpo', whose optimizer trains only the value function"
            )
        for name in ("missing_eos_score", "positive_score"):
            if (score := getattr(self, name)) is not None and not abs(score) < float("inf"):
                raise ValueError(f"{name}: got {score}, expected a finite number")
        if round(self.ptx_ratio * self.minibatch) < 1:
            raise ValueError(
                f"ptx_ratio: got {self.ptx_ratio}, expected at least one pretraining sequence per minibatch"
            )
        if self.kl_control == "adaptive":
            if self.kl_target is None:
                raise ValueError("kl_target is not set; kl_control 'adaptive' needs a number")
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
                "penalty, use objective 'ratio'"
            )
