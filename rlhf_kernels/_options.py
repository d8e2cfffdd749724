"""The options of the PPO objective: `PPOOptions` for users and type checkers, `PPOArguments` as the table of all options.

The checks (ops/objective.py), the launchers (launch_args.PpoScalars), the Triton kernels and the bindings read that
table. To add an option, declare it in both classes here, write its formula in reference/ppo_loss.py, csrc/math/ppo.h
and _triton/math.py, and describe it in the docstring of `ppo_loss`. `python -m docs.generate` writes the table of the
options in docs/reference/kernels.md from this file.

Legend: B sequences, T positions, N tokens.
"""

from dataclasses import Field, dataclass, field, fields
from typing import Any, Literal, NamedTuple, TypedDict, get_args

from torch import Tensor

Objective = Literal["clip", "kl_penalty", "ratio", "policy_gradient"]
KlEstimator = Literal["k1", "k2", "k3", "abs"]
KlWeighting = Literal["none", "ratio"]
RatioLevel = Literal["token", "sequence"]
Aggregation = Literal["token_mean", "seq_mean_token_sum", "seq_mean_token_mean", "token_sum"]

OBJECTIVES: tuple[str, ...] = get_args(Objective)
KL_ESTIMATORS: tuple[str, ...] = get_args(KlEstimator)
KL_WEIGHTINGS: tuple[str, ...] = get_args(KlWeighting)
"""The kernels (csrc/math) receive a choice as its index in these tuples."""
WITH_RATIO = ("clip", "kl_penalty", "ratio")
"""Objectives that depend on the ratio of new to old probabilities."""


class PPOOptions(TypedDict, total=False):
    """Keyword options of `ppo_loss`, `logits_ppo_loss` and `linear_ppo_loss`; the docstring of `ppo_loss` defines them.

    `logits_ppo_loss` and `linear_ppo_loss` compute the entropy, so they raise ValueError if `entropy` is passed.
    """

    objective: Objective
    """Policy term: PPO's clipped surrogate, PPO's penalised one, TRPO's surrogate, the loss of REINFORCE and actor-critic."""
    cliprange: float
    """Lower bound of the ratio is 1 minus this number."""
    cliprange_high: float | None
    """Upper bound of the ratio is 1 plus this number (clip-higher, DAPO). None: `cliprange`."""
    dual_clip: float | None
    """For a negative advantage A, the term is at most `-dual_clip * A`. None: no such limit."""
    log_ratio_clamp: float | None
    """The log-ratio is limited to ± this number, and the gradient outside is 0. None: no limit."""
    old_kl_coef: float
    """Coefficient of KL(old policy || policy), which the objective adds to the loss."""
    ratio_level: RatioLevel
    """`sequence`: the log-ratio of a token is the mean over the actions of its sequence (GSPO)."""
    weights: Tensor | None  # (B, T) or (N,)
    """Factor of the policy term of each token. None: 1."""
    values: Tensor | None  # (B, T) or (N,), differentiable
    """Predictions of a separate value model; the value loss is added to the loss."""
    old_values: Tensor | None  # (B, T) or (N,)
    """Values of the rollout, around which values are clipped. None: no clipping."""
    returns: Tensor | None  # (B, T) or (N,)
    """Targets of the values; required if there are values."""
    cliprange_value: float | None
    """Range around `old_values` to which values are clipped. None: no clipping."""
    vf_coef: float
    """Coefficient of the value loss."""
    value_mask: Tensor | None  # (B, T) or (N,), bool
    """Tokens of the value loss. None: `mask`."""
    entropy: Tensor | None  # (B, T) or (N,), differentiable
    """Entropy of each token's distribution; only `ppo_loss` accepts it, the other two functions compute it."""
    entropy_coef: float
    """Coefficient of the entropy, which is subtracted from the loss."""
    ref_logprobs: Tensor | None  # (B, T) or (N,)
    """Log-probs of the reference model; required if `kl_coef` is not 0."""
    kl_coef: float
    """Coefficient of KL(policy || reference), which is added to the loss."""
    kl_estimator: KlEstimator
    """Estimator of that KL; see `kl_penalty`."""
    kl_weighting: KlWeighting
    """`ratio`: the KL of a token is multiplied by its ratio (DeepSeek-V3.2)."""
    aggregation: Aggregation
    """Reduction of each term: sum over tokens / `num_tokens`, sum over tokens / `num_sequences`, sum of the sequences' means
    over tokens / `num_sequences`, sum over tokens."""
    num_tokens: float | Tensor | None
    """Denominator of `token_mean` and of the metrics: the tokens of all micro-batches and ranks. None: those of this call."""
    num_value_tokens: float | Tensor | None
    """The same for the value loss. None: the tokens of the value loss in this call."""
    num_sequences: float | Tensor | None
    """Denominator of the aggregations that begin with `seq_mean`. None: the sequences of this call with a token."""
    cu_seqlens: Tensor | None  # (B + 1,), int32
    """Start of each packed sequence, and the total length; token tensors are (N,) then."""


class Scalar(NamedTuple):
    """A row of the table: an option of the objective that is a number or a choice."""

    name: str  # the keyword, the field of PpoScalars and the member of csrc/math/ppo.h
    default: Any
    choices: tuple[str, ...] = ()  # the allowed values of a choice; the kernels receive the index
    limits: dict[str, Any] | None = None  # the range of a number: keywords of checks.number
    off: float | str | None = None  # what the kernels receive for None: a number, or the value of the named option
    objectives: tuple[str, ...] = OBJECTIVES  # the objectives that read it
    needs: str = ""  # the option without which it has no effect
    kernel: bool = True  # whether the kernels receive it


def _scalar(default: Any, **row: Any) -> Any:
    return field(default=default, metadata={"row": row})


@dataclass(frozen=True)
class PPOArguments:
    """The options of one call with their defaults.

    A field with `_scalar` is a row of `SCALARS`; the others are tensors and denominators.
    """

    objective: str = _scalar("clip", choices=OBJECTIVES)
    cliprange: float = _scalar(0.2, limits={"least": 0}, objectives=("clip",))
    cliprange_high: float | None = _scalar(None, limits={"least": 0}, off="cliprange", objectives=("clip",))
    dual_clip: float | None = _scalar(None, limits={"above": 1}, off=float("inf"), objectives=("clip",))
    log_ratio_clamp: float | None = _scalar(None, limits={"above": 0}, off=float("inf"), objectives=WITH_RATIO)
    old_kl_coef: float = _scalar(0.0, objectives=("kl_penalty",))
    ratio_level: str = _scalar("token", choices=get_args(RatioLevel), objectives=WITH_RATIO, kernel=False)
    weights: Tensor | None = None
    values: Tensor | None = None
    old_values: Tensor | None = None
    returns: Tensor | None = None
    cliprange_value: float | None = _scalar(0.2, limits={"least": 0}, off=float("inf"))
    vf_coef: float = _scalar(0.1, kernel=False)
    value_mask: Tensor | None = None
    entropy: Tensor | None = None
    entropy_coef: float = _scalar(0.0)
    ref_logprobs: Tensor | None = None
    kl_coef: float = _scalar(0.0)
    kl_estimator: str = _scalar("k3", choices=KL_ESTIMATORS)
    kl_weighting: str = _scalar("none", choices=KL_WEIGHTINGS, objectives=WITH_RATIO, needs="kl_coef")
    aggregation: str = _scalar("token_mean", choices=get_args(Aggregation), kernel=False)
    num_tokens: float | Tensor | None = None
    num_value_tokens: float | Tensor | None = None
    num_sequences: float | Tensor | None = None
    cu_seqlens: Tensor | None = None


def _row(option: Field[Any]) -> Scalar:
    return Scalar(option.name, option.default, **option.metadata["row"])


OPTIONS: tuple[str, ...] = tuple(option.name for option in fields(PPOArguments))
SCALARS: tuple[Scalar, ...] = tuple(_row(option) for option in fields(PPOArguments) if "row" in option.metadata)
"""The rows of the table, in the order of `PPOArguments`."""
TOKEN_TENSORS = ("weights", "values", "old_values", "returns", "entropy", "ref_logprobs")
DENOMINATORS = ("num_tokens", "num_value_tokens", "num_sequences")
