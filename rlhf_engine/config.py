"""Every setting of a run: frozen dataclasses, YAML in and out.

`load_config(path, overrides=["ppo.kl_coef=0.05"])` reads a file, applies command-line overrides and checks names,
types and ranges. Defaults are InstructGPT's where the paper gives a value.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from rlhf_engine.schema import (
    Count,
    LearningRate,
    NonNegative,
    Positive,
    PositiveShare,
    Section,
    Seed,
    Share,
    WholeNumber,
)


@dataclass(frozen=True)
class ModelConfig(Section):
    """The causal language model that the policy starts from."""

    path: str | None = None
    """Folder of a Hugging Face causal LM and its tokenizer; None where an earlier stage makes the model."""
    attention: Literal["sdpa", "eager"] = "sdpa"
    """Attention implementation that transformers is asked for."""


@dataclass(frozen=True)
class OptimConfig(Section):
    """AdamW and its learning-rate schedule."""

    lr: LearningRate = 1e-5
    """Peak learning rate; AdamW moves a weight by about this much a step."""
    betas: tuple[Share, Share] = (0.9, 0.95)
    """Decay of the first and second moments."""
    eps: Positive = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay of matrices; vectors (norms, biases) are never decayed."""
    warmup_steps: WholeNumber = 0
    """Optimiser steps over which the learning rate climbs linearly from 0."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the learning rate after the warm-up, down to `final_lr_share` at the last step."""
    final_lr_share: Share = 0.1
    """Share of `lr` left at the last step of a linear or cosine schedule."""
    max_grad_norm: Positive | None = 1.0
    """Global gradient norm above which gradients are scaled down; None leaves them alone."""


@dataclass(frozen=True)
class HygieneConfig(Section):
    """What `rlhf data clean` does to prompts (InstructGPT, section 3.2); see rlhf_engine/data/hygiene.py."""

    prefix_chars: Count = 128
    """Two prompts whose first characters, this many, are the same count as one; shorter ones must be the same."""
    user_limit: Count = 200
    """Most prompts of one user."""
    validation_share: Share = 0.1
    """Share of the users whose prompts are for validation."""
    test_share: Share = 0.1
    """Share of the users whose prompts are for the test."""
    split_seed: Seed = 0
    """Another seed gives another split."""
    pii: Literal["drop", "redact", "keep"] = "drop"
    """Training prompts with personal information are dropped, lose it to a mark such as [EMAIL], or stay."""
    phone_regions: tuple[str, ...] = ("US", "GB")
    """Countries that a phone number without a country code may be of."""
    bad_lines: Literal["refuse", "skip"] = "refuse"
    """A line that holds no prompt with a user id stops the run, or is skipped and counted."""

    def check(self) -> None:
        """Something is left to train on."""
        if self.validation_share + self.test_share >= 1.0:
            raise ValueError(
                f"test_share: got {self.test_share} beside validation_share {self.validation_share}, expected less than 1 "
                "together"
            )


@dataclass(frozen=True)
class DataConfig(Section):
    """Where the records come from."""

    demonstrations: str | None = None
    """JSONL of prompt, response."""
    comparisons: str | None = None
    """JSONL of prompt, completions, ranking ("D > C > A = B")."""
    prompts: str | None = None
    """JSONL of prompt, user_id and, if wanted, split."""
    prompt_template: str = "{prompt}\n"
    """Frame of a prompt; `{prompt}` stands for its text."""
    long_prompts: Literal["refuse", "truncate"] = "refuse"
    """What happens to a prompt longer than rollout.max_prompt_tokens: refused, or cut on the left and counted."""
    max_response_tokens: Count = 512
    """Longest answer in the files, EOS included; a longer one is refused."""
    validation_share: PositiveShare = 0.1
    """Share of the demonstrations and of the rankings that is held out for validation."""
    hygiene: HygieneConfig = field(default_factory=HygieneConfig)
    """Cleaning of prompts, before any training."""


@dataclass(frozen=True)
class SFTConfig(Section):
    """Supervised fine-tuning on demonstrations."""

    epochs: Count = 16
    """Most passes over the demonstrations; the run stops at the validation minimum before that."""
    batch_size: Count = 32
    """Demonstrations of one optimiser step."""
    microbatch: WholeNumber = 0
    """Demonstrations of one forward and backward pass; 0 takes the whole batch at once."""
    evaluate_every: WholeNumber = 0
    """Optimiser steps between validations; 0 validates after each epoch."""
    patience: Count = 2
    """Validations without a new minimum after which the run stops; the weights of the minimum are kept."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimiser of this stage."""


@dataclass(frozen=True)
class RewardConfig(Section):
    """Training of the reward model on rankings."""

    path: str | None = None
    """Folder of a trained reward model, which PPO scores with."""
    epochs: Count = 1
    """Passes over the rankings; more than one over-fits (InstructGPT, appendix C.2)."""
    batch_size: Count = 8
    """Prompts of one optimiser step, each with all its completions and pairs."""
    microbatch: WholeNumber = 0
    """Prompts of one forward and backward pass; 0 takes the whole batch at once."""
    evaluate_every: WholeNumber = 0
    """Optimiser steps between validations; 0 validates at the end only."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimiser of this stage."""


@dataclass(frozen=True)
class RolloutConfig(Section):
    """How responses are sampled."""

    max_prompt_tokens: Count = 512
    """Longest prompt, its frame included; data.long_prompts says what happens to a longer one."""
    max_response_tokens: Count = 256
    """Token budget of a response, EOS included."""
    temperature: Positive = 1.0
    """Divides the logits, in sampling and in the loss alike."""
    top_k: Count | None = None
    """Sample among the k likeliest tokens; None keeps all."""
    top_p: PositiveShare | None = None
    """Sample among the likeliest tokens that hold this probability mass; None keeps all."""
    min_p: Share | None = None
    """Sample among tokens at least this share as likely as the likeliest; None keeps all."""
    batch_size: Count = 64
    """Most sequences that are decoded together."""


@dataclass(frozen=True)
class PPOConfig(Section):
    """PPO on a token-level environment with the score at the end (InstructGPT, section 3.5)."""

    updates: Count = 100
    """Outer iterations: collect, score, advantages, update."""
    rollout_batch: Count = 512
    """Sequences collected for one update."""
    minibatch: Count = 64
    """Sequences of one optimiser step."""
    microbatch: Count = 16
    """Sequences of one forward and backward pass; changes memory and speed, not the gradient."""
    ppo_epochs: Count = 1
    """Passes over the rollout batch."""
    kl_coef: NonNegative = 0.02
    """beta, the weight of KL(policy || reference) in every token's reward."""
    kl_estimator: Literal["k1", "k2", "k3", "abs"] = "k1"
    """Estimator of that KL."""
    gamma: Share = 1.0
    """Discount of rewards."""
    lam: Share = 0.95
    """lambda of generalised advantage estimation."""
    score_clip: Positive | None = None
    """Scores are clipped to [-score_clip, score_clip]; None leaves them alone."""
    missing_eos_penalty: NonNegative = 0.0
    """Taken off the score of a response that ran out of budget before EOS."""
    whiten_rewards: bool = False
    """Divide the rewards of the batch by their standard deviation."""
    whiten_advantages: bool = True
    """Give the advantages of the batch mean 0 and variance 1."""
    objective: Literal["clip", "kl_penalty", "ratio", "policy_gradient"] = "clip"
    """Policy objective: clipped surrogate, KL-penalised, unclipped ratio, or plain policy gradient."""
    cliprange: Positive = 0.2
    """epsilon of the clipped surrogate."""
    cliprange_high: Positive | None = None
    """Upper epsilon where it differs from `cliprange`."""
    dual_clip: Positive | None = None
    """Bound c > 1 on the ratio's loss when the advantage is negative; None turns it off."""
    log_ratio_clamp: Positive | None = None
    """Log-ratios are clamped to [-log_ratio_clamp, log_ratio_clamp]; None leaves them alone."""
    old_kl_coef: NonNegative = 0.0
    """Weight of KL(old || new) in the objective `kl_penalty`."""
    ratio_level: Literal["token", "sequence"] = "token"
    """Whether a ratio belongs to a token or (length-normalised) to its sequence."""
    cliprange_value: Positive | None = 0.2
    """Clip of the new value around the old one; None turns it off."""
    vf_coef: NonNegative = 0.1
    """Weight of the value loss."""
    entropy_coef: NonNegative = 0.0
    """Weight of the entropy bonus."""
    aggregation: Literal["token_mean", "seq_mean_token_sum", "seq_mean_token_mean", "token_sum"] = "token_mean"
    """How per-token losses of a minibatch become one number."""
    old_logprobs: Literal["sampled", "rescored"] = "sampled"
    """Whose log-probs are the old policy's: those of sampling, or of one more forward pass of the learner."""
    importance_cap: Positive | None = None
    """Cap of the weight pi / pi_sampling of a token when top_k, top_p or min_p is set; None gives every token 1."""
    checkpoint_every: WholeNumber = 0
    """Updates between checkpoints; 0 writes one at the end only."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=9e-6, eps=1e-5))
    """Optimiser of this stage."""

    def check(self) -> None:
        """Batches divide each other, so that every optimiser step sees the same number of sequences."""
        if self.rollout_batch % self.minibatch:
            raise ValueError(
                f"minibatch: got {self.minibatch}, expected a divisor of rollout_batch {self.rollout_batch}"
            )
        if self.microbatch > self.minibatch:
            raise ValueError(f"microbatch: got {self.microbatch}, expected at most minibatch {self.minibatch}")
        if self.dual_clip is not None and self.dual_clip <= 1.0:
            raise ValueError(f"dual_clip: got {self.dual_clip}, expected a number above 1")
        # An option that the objective would not read is a mistake, not a detail.
        for name, unused, objective in (
            ("cliprange_high", None, "clip"),
            ("dual_clip", None, "clip"),
            ("old_kl_coef", 0.0, "kl_penalty"),
        ):
            value = getattr(self, name)
            if value != unused and self.objective != objective:
                raise ValueError(
                    f"{name}: got {value} with objective {self.objective!r}, expected {unused}; only {objective!r} reads it"
                )


@dataclass(frozen=True)
class DemoConfig(Section):
    """The demo's own stages, before SFT and after PPO: a model from nothing, and its examination."""

    vocab_size: Count = 1536
    """Entries of the byte-level BPE tokenizer."""
    hidden_size: Count = 256
    """Width of the Llama-family model."""
    intermediate_size: Count = 704
    """Width of its feed-forward layers."""
    layers: Count = 2
    """Number of its layers."""
    heads: Count = 8
    """Attention heads of a layer."""
    pretrain: SFTConfig = field(default_factory=SFTConfig)
    """Language modelling on plain text."""
    samples: Count = 16
    """SFT answers to each held-out prompt, among which best-of-n chooses."""
    opponents: Count = 4
    """Answers to each held-out prompt by PPO, and by SFT with another seed."""


@dataclass(frozen=True)
class RunConfig(Section):
    """A whole run: where it happens and the settings of every stage."""

    seed: Seed = 0
    """Seed of initialisation, data order and sampling."""
    output_dir: str = "runs/default"
    """Folder that receives checkpoints, metrics.jsonl, tensorboard/ and plots/."""
    device: str = "cpu"
    """torch device of the models, such as cpu or cuda:0."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the weights; training needs float32."""
    backend: Literal["auto", "reference", "cpu"] = "auto"
    """Backend of the rlhf_kernels operations."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The language model."""
    data: DataConfig = field(default_factory=DataConfig)
    """The data set."""
    sft: SFTConfig = field(default_factory=SFTConfig)
    """Supervised fine-tuning."""
    reward: RewardConfig = field(default_factory=RewardConfig)
    """The reward model."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """Sampling."""
    ppo: PPOConfig = field(default_factory=PPOConfig)
    """Reinforcement learning."""
    demo: DemoConfig = field(default_factory=DemoConfig)
    """Used by `rlhf demo` alone."""

    def check(self) -> None:
        """Weights are float32: an update is often smaller than the spacing of bfloat16 or float16 around a weight."""
        if self.dtype != "float32":
            raise ValueError(
                f"dtype: got {self.dtype!r}, expected 'float32'; training in {self.dtype} needs float32 master weights, "
                "which are not there yet"
            )


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, except that `1e-5` is a number and not a string."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file, or the defaults if `path` is None, and apply overrides such as `ppo.optim.lr=1e-5` in order.

    Raises ValueError naming the file and key for YAML that does not parse, an unknown key, a wrong type, a value out
    of range or an override without `=`.
    """
    given = {} if path is None else _read_yaml(Path(path))
    for override in overrides:
        _apply_override(given, override)
    source = ", ".join(filter(None, [str(path or ""), " ".join(overrides)]))
    try:
        return RunConfig.from_dict(given)
    except ValueError as error:
        raise ValueError(f"{source}: {error}" if source else str(error)) from None


def save_config(config: RunConfig, path: str | Path) -> None:
    """Write `config` as YAML that `load_config` reads back to an equal config."""
    Path(path).write_text(yaml.safe_dump(config.to_dict(), sort_keys=False), encoding="utf-8")


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path}: no such config file")
    try:
        given = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from None
    if given is not None and not isinstance(given, dict):
        raise ValueError(f"{path}: got {type(given).__name__}, expected a mapping of keys to values")
    return given or {}


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ValueError(f"override {override!r}: expected section.key=value")
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"override {override!r}: not valid YAML: {error}") from None
    *parents, name = key.split(".")
    node = tree
    for parent in parents:
        # An unknown section becomes a key that RunConfig refuses by name.
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ValueError(f"override {override!r}: {parent!r} is not a section")
        node = child
    node[name] = value
