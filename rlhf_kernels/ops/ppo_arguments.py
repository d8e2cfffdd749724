"""The options that `ppo_loss`, `logits_ppo_loss` and `linear_ppo_loss` share, with their one check."""

from dataclasses import dataclass, fields
from difflib import get_close_matches

from torch import Tensor

from ..launch_args import KL_ESTIMATORS, OBJECTIVES
from . import checks

AGGREGATIONS = ("token_mean", "seq_mean_token_sum", "seq_mean_token_mean", "token_sum")
TOKEN_TENSORS = ("weights", "values", "old_values", "returns", "entropy", "ref_logprobs")


@dataclass(frozen=True)
class PPOArguments:
    """Keyword arguments of the PPO losses; `ppo_loss` says what each of them means."""

    objective: str = "clip"
    cliprange: float = 0.2
    cliprange_high: float | None = None
    dual_clip: float | None = None
    log_ratio_clamp: float | None = None
    old_kl_coef: float = 0.0
    ratio_level: str = "token"
    weights: Tensor | None = None
    values: Tensor | None = None
    old_values: Tensor | None = None
    returns: Tensor | None = None
    cliprange_value: float | None = 0.2
    vf_coef: float = 0.1
    value_mask: Tensor | None = None
    entropy: Tensor | None = None
    entropy_coef: float = 0.0
    ref_logprobs: Tensor | None = None
    kl_coef: float = 0.0
    kl_estimator: str = "k3"
    aggregation: str = "token_mean"
    num_tokens: float | Tensor | None = None
    num_value_tokens: float | Tensor | None = None
    num_sequences: float | Tensor | None = None
    cu_seqlens: Tensor | None = None

    @classmethod
    def parse(cls, caller: str, options: dict) -> "PPOArguments":
        """The options of a call; TypeError with the nearest name for one that does not exist."""
        for name in options:
            if name not in NAMES:
                near = get_close_matches(name, NAMES, 1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; the options are {', '.join(NAMES)}"
                raise TypeError(f"{caller}() got an unexpected keyword argument {name!r}{hint}")
        return cls(**options)

    def options(self) -> dict:
        """All of them by name, as the reference takes them."""
        return {name: getattr(self, name) for name in NAMES}

    def check(
        self,
        rows: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        mask: Tensor,
        *,
        name: str,
        value_head: bool = False,
        entropy_made: bool = False,
    ) -> None:
        """Checks everything against `rows`, a tensor of the token shape called `name`.

        `value_head` and `entropy_made` say that the op makes the values and the entropy itself.
        """
        needs_sequences = self.ratio_level == "sequence" or self.aggregation.startswith("seq")
        checks.sequences(rows, self.cu_seqlens, name=name, needed=needs_sequences)
        like = {"like": rows, "expected": rows.shape, "what": f"the token shape of {name}"}
        checks.tensor("old_logprobs", old_logprobs, **like)
        checks.tensor("advantages", advantages, **like)
        checks.mask("mask", mask, **like)
        for field in TOKEN_TENSORS:
            if getattr(self, field) is not None:
                checks.tensor(field, getattr(self, field), **like)
        if self.value_mask is not None:
            checks.mask("value_mask", self.value_mask, **like)
        self._check_scalars()
        self._check_combinations(entropy_made)
        self._check_values(value_head)

    def _check_scalars(self) -> None:
        checks.choice("objective", self.objective, OBJECTIVES)
        checks.choice("aggregation", self.aggregation, AGGREGATIONS)
        checks.choice("ratio_level", self.ratio_level, ("token", "sequence"))
        checks.choice("kl_estimator", self.kl_estimator, KL_ESTIMATORS)
        checks.number("cliprange", self.cliprange, least=0)
        checks.number("cliprange_high", self.cliprange_high, least=0, optional=True)
        checks.number("dual_clip", self.dual_clip, above=1, optional=True)
        checks.number("log_ratio_clamp", self.log_ratio_clamp, above=0, optional=True)
        checks.number("cliprange_value", self.cliprange_value, least=0, optional=True)
        for name in ("old_kl_coef", "entropy_coef", "kl_coef", "vf_coef"):
            checks.number(name, getattr(self, name))
        for name in ("num_tokens", "num_value_tokens", "num_sequences"):
            checks.denominator(name, getattr(self, name))

    def _check_combinations(self, entropy_made: bool) -> None:
        """Nothing that was asked for is ignored."""
        if self.ratio_level == "sequence" and self.objective == "policy_gradient":
            raise ValueError("ratio_level: got 'sequence' with objective='policy_gradient', which has no ratio")
        if self.log_ratio_clamp is not None and self.objective == "policy_gradient":
            raise ValueError(
                f"log_ratio_clamp: got {self.log_ratio_clamp} with objective='policy_gradient', which has no ratio"
            )
        for name, objective in (("cliprange_high", "clip"), ("dual_clip", "clip"), ("old_kl_coef", "kl_penalty")):
            value = getattr(self, name)
            if value not in (None, 0) and self.objective != objective:
                raise ValueError(f"{name}: got {value} with objective={self.objective!r}; only {objective!r} has it")
        if self.kl_coef and self.ref_logprobs is None:
            raise ValueError(f"ref_logprobs: got None with kl_coef={self.kl_coef}, expected the reference's log-probs")
        if self.entropy_coef and self.entropy is None and not entropy_made:
            raise ValueError(
                f"entropy: got None with entropy_coef={self.entropy_coef}, expected the entropy of each token"
            )
        if entropy_made and self.entropy is not None:
            raise ValueError("entropy: got a tensor, expected None: this op makes the entropy itself")

    def _check_values(self, value_head: bool) -> None:
        if value_head and self.values is not None:
            raise ValueError("values: got a tensor together with value_weight, expected one of them")
        predicted = value_head or self.values is not None
        if predicted and self.returns is None:
            raise ValueError("returns: got None, expected the value targets, since values are trained in this call")
        for name in ("returns", "old_values", "value_mask", "num_value_tokens"):
            if getattr(self, name) is not None and not predicted:
                raise ValueError(f"values: got None with {name}, expected the predictions that it belongs to")


NAMES = tuple(f.name for f in fields(PPOArguments))
