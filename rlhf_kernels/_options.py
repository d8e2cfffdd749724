"""The options of the PPO objective: `PPOOptions` for users and type checkers, `PPOArguments` as the table of all options.

The checks (ops/objective.py), the launchers (launch_args.PpoScalars), the Triton kernels and the bindings read that
table. To add an option, declare it in both classes here, write its formula in reference/ppo_loss.py, csrc/math/ppo.h
and _triton/math.py, and describe it in the docstring of `ppo_loss`.

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
    cliprange: float
    cliprange_high: float | None
    dual_clip: float | None
    log_ratio_clamp: float | None
    old_kl_coef: float
    ratio_level: RatioLevel
    weights: Tensor | None  # (B, T) or (N,)
    values: Tensor | None  # (B, T) or (N,), differentiable
    old_values: Tensor | None  # (B, T) or (N,)
    returns: Tensor | None  # (B, T) or (N,)
    cliprange_value: float | None
    vf_coef: float
    value_mask: Tensor | None  # (B, T) or (N,), bool
    entropy: Tensor | None  # (B, T) or (N,), differentiable
    entropy_coef: float
    ref_logprobs: Tensor | None  # (B, T) or (N,)
    kl_coef: float
    kl_estimator: KlEstimator
    kl_weighting: KlWeighting
    aggregation: Aggregation
    num_tokens: float | Tensor | None
    num_value_tokens: float | Tensor | None
    num_sequences: float | Tensor | None
    cu_seqlens: Tensor | None  # (B + 1,), int32


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
