"""The options of the PPO objective: `PPOOptions` for users and type checkers, `PPOArguments` as the table of all options.

The checks (ops/objective.py), the launchers (launch_args.PpoScalars), the Triton kernels and the bindings read that
table. To add an option, declare it in both classes here, write its formula in reference/ppo_loss.py, csrc/math/ppo.h
and _triton/math.py, and describe it in the docstring of `ppo_loss`. `python -m docs.generate` writes the table of the
options in docs/reference/kernels.md from this file.

Legend: B sequences, T positions, N tokens.
"""

from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, field, fields
from enum import IntEnum
from typing import Any, Literal, NamedTuple, TypedDict, get_args

from torch import Tensor

Objective = Literal[
    "clip", "kl_penalty", "ratio", "policy_gradient", "cispo", "sapo", "ipo", "dppo_tv", "dppo_kl", "gspo_token", "gmpo"
]  # fmt: skip
ObjectiveFunction = Callable[..., Tensor]
"""`f(logprobs, old_logprobs, advantages, **objective_inputs) -> loss of each token`, on tensors of shape (N,)."""
KlEstimator = Literal["k1", "k2", "k3", "abs"]
KlWeighting = Literal["none", "ratio"]
RatioLevel = Literal["token", "sequence"]
Aggregation = Literal["token_mean", "seq_mean_token_sum", "seq_mean_token_mean", "token_sum"]

ACTIVE_TRIALS: set[str] = set()
"""Names of the kernels without a timing that `trials.trial` has turned on."""


class Term(IntEnum):
    """What the loss of a token is; the codes of the option `term`."""

    RL = 0
    """The objective, with entropy bonus and KL to the reference."""
    CROSS_ENTROPY = 1
    """Minus the log-prob of the token."""
    KL = 2
    """KL(policy || reference), by `kl_estimator`."""


OBJECTIVES: tuple[str, ...] = get_args(Objective)
KL_ESTIMATORS: tuple[str, ...] = get_args(KlEstimator)
KL_WEIGHTINGS: tuple[str, ...] = get_args(KlWeighting)
"""The kernels (csrc/math) receive a choice as its index in these tuples."""
WITH_RATIO: tuple[str, ...] = tuple(name for name in OBJECTIVES if name != "policy_gradient")
"""Objectives that depend on the ratio of new to old probabilities."""
WITH_DIVERGENCE = ("ipo", "dppo_tv", "dppo_kl")
"""Objectives that compare the probability of each token with its old probability."""
OF_SEQUENCES = ("gspo_token", "gmpo")
"""Objectives whose ratio is always one number per sequence."""
WITH_LEVEL: tuple[str, ...] = tuple(name for name in WITH_RATIO if name not in WITH_DIVERGENCE + OF_SEQUENCES)
"""Objectives whose ratio can be the token's or the sequence's."""
FUNCTION = "a function"
"""Represents an `ObjectiveFunction` among the objectives that read an option."""
CLIPPED = ("clip", "cispo", "gspo_token", "gmpo")
"""Objectives that limit the ratio to a range."""


class PPOOptions(TypedDict, total=False):
    """Keyword options of `ppo_loss`, `logits_ppo_loss` and `linear_ppo_loss`; the docstring of `ppo_loss` defines them.

    `logits_ppo_loss` and `linear_ppo_loss` compute the entropy, so they raise ValueError if `entropy` is passed.
    """

    objective: Objective | ObjectiveFunction
    """Policy term: a name, or a function of the log-probs. [Objectives](objectives.md) has the formula and the source of
    each."""
    objective_inputs: Mapping[str, Tensor] | None  # each (B, T) or (N,)
    """Tensors with one entry per token that a function receives by name, flat, as constants."""
    cliprange: float
    """Lower bound of the ratio is 1 minus this number; for `gmpo`, lower bound of the log-ratio is minus this number."""
    cliprange_high: float | None
    """Upper bound of the ratio is 1 plus this number (clip-higher, DAPO); for `gmpo`, upper bound of the log-ratio is this
    number. None: `cliprange`."""
    dual_clip: float | None
    """For a negative advantage A, the term is at most `-dual_clip * A`. None: no such limit."""
    log_ratio_clamp: float | None
    """The log-ratio is limited to ± this number, and the gradient through the ratio is 0 outside. None: no limit."""
    old_kl_coef: float
    """Coefficient of KL(old policy || policy), which the objective adds to the loss."""
    tau_pos: float
    """Temperature of the gate for tokens with a positive advantage."""
    tau_neg: float
    """Temperature of the gate for the other tokens."""
    divergence: float | None
    """Largest divergence from the old probability; tokens above it have no policy gradient. For `dppo_tv` and `dppo_kl`, the
    bound of tokens without a positive advantage. None: 0.1 for `ipo`, 0.2 for `dppo_tv`, 0.05 for `dppo_kl`."""
    divergence_high: float | None
    """The same for tokens with a positive advantage. None: `divergence`."""
    ratio_limit: float | None
    """Largest factor of the gradient that a ratio gives (truncated importance sampling). None: no limit."""
    log_ratio_coef: float | None
    """Coefficient of the squared log-ratio, which the objective adds to the loss. None: 0.001 for `ipo`, otherwise 0."""
    ratio_level: RatioLevel
    """`sequence`: the log-ratio of a token is the mean over the actions of its sequence (GSPO)."""
    weights: Tensor | None  # (B, T) or (N,)
    """Factor of the policy term of each token. None: 1."""
    term: Tensor | None  # (B, T) or (N,), int64 or int32
    """Code of what the loss of each token is, see `Term`. None: `Term.RL` everywhere."""
    term_weights: Tensor | None  # (B, T) or (N,)
    """Factor of the whole loss of each token except its value loss. None: 1."""
    nll_mask: Tensor | None  # (B, T) or (N,), bool
    """Tokens of positive examples, whose `-log π` is added to the loss (VAPO); they may be tokens of `mask` as well."""
    nll_coef: float
    """Coefficient of this loss; with 0 it is only a metric."""
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
    """Tokens of the value loss. None: the tokens of `mask` with `Term.RL`."""
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
    """Denominator of `token_mean` and of the metrics: the tokens with `Term.RL` of all micro-batches and ranks. None: those of
    this call."""
    num_value_tokens: float | Tensor | None
    """The same for the value loss. None: the tokens of the value loss in this call."""
    num_cross_entropy_tokens: float | Tensor | None
    """The same for tokens with `Term.CROSS_ENTROPY`. None: those of this call."""
    num_kl_tokens: float | Tensor | None
    """The same for tokens with `Term.KL`. None: those of this call."""
    num_nll_tokens: float | Tensor | None
    """The same for the tokens of `nll_mask`. None: those of this call."""
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
    # What the kernels receive for None: a number, the value of the named option, or a number per objective (others: 0).
    off: float | str | dict[str, float] | None = None
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

    objective: str | ObjectiveFunction = _scalar("clip", choices=OBJECTIVES)  # noqa: RUF009  # a dataclass field
    objective_inputs: Mapping[str, Tensor] | None = None
    cliprange: float = _scalar(0.2, limits={"least": 0}, objectives=CLIPPED)
    cliprange_high: float | None = _scalar(None, limits={"least": 0}, off="cliprange", objectives=CLIPPED)
    dual_clip: float | None = _scalar(None, limits={"above": 1}, off=float("inf"), objectives=("clip", "gspo_token"))
    log_ratio_clamp: float | None = _scalar(None, limits={"above": 0}, off=float("inf"), objectives=WITH_RATIO)
    old_kl_coef: float = _scalar(0.0, objectives=("kl_penalty",))
    tau_pos: float = _scalar(1.0, limits={"above": 0}, objectives=("sapo",))
    tau_neg: float = _scalar(1.05, limits={"above": 0}, objectives=("sapo",))
    divergence: float | None = _scalar(
        None, limits={"least": 0}, off={"ipo": 0.1, "dppo_tv": 0.2, "dppo_kl": 0.05}, objectives=WITH_DIVERGENCE
    )
    divergence_high: float | None = _scalar(
        None, limits={"least": 0}, off="divergence", objectives=("dppo_tv", "dppo_kl")
    )
    ratio_limit: float | None = _scalar(None, limits={"above": 0}, off=float("inf"), objectives=("dppo_tv", "dppo_kl"))
    log_ratio_coef: float | None = _scalar(None, limits={"least": 0}, off={"ipo": 1e-3}, objectives=WITH_DIVERGENCE)
    ratio_level: str = _scalar("token", choices=get_args(RatioLevel), objectives=WITH_LEVEL, kernel=False)
    weights: Tensor | None = None
    term: Tensor | None = None
    term_weights: Tensor | None = None
    nll_mask: Tensor | None = None
    nll_coef: float = _scalar(0.0, limits={"least": 0}, kernel=False)
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
    kl_weighting: str = _scalar("none", choices=KL_WEIGHTINGS, objectives=(*WITH_RATIO, FUNCTION), needs="kl_coef")
    aggregation: str = _scalar("token_mean", choices=get_args(Aggregation), kernel=False)
    num_tokens: float | Tensor | None = None
    num_value_tokens: float | Tensor | None = None
    num_cross_entropy_tokens: float | Tensor | None = None
    num_kl_tokens: float | Tensor | None = None
    num_nll_tokens: float | Tensor | None = None
    num_sequences: float | Tensor | None = None
    cu_seqlens: Tensor | None = None


def _row(option: Field[Any]) -> Scalar:
    return Scalar(option.name, option.default, **option.metadata["row"])


OPTIONS: tuple[str, ...] = tuple(option.name for option in fields(PPOArguments))
SCALARS: tuple[Scalar, ...] = tuple(_row(option) for option in fields(PPOArguments) if "row" in option.metadata)
"""The rows of the table, in the order of `PPOArguments`."""
TOKEN_TENSORS = ("weights", "term_weights", "values", "old_values", "returns", "entropy", "ref_logprobs")
DENOMINATORS = (
    *("num_tokens", "num_value_tokens", "num_cross_entropy_tokens", "num_kl_tokens", "num_nll_tokens"),
    "num_sequences",
)
