"""Table of the objectives: formulas and names in other trainers from here, options and cost from `rlhf_kernels/_options.py`."""

from __future__ import annotations

from typing import NamedTuple

from docs._tables import table
from rlhf_kernels._options import FUNCTION, OBJECTIVES, OF_SEQUENCES, SCALARS, WITH_LEVEL


class Described(NamedTuple):
    """An objective: the loss of a token, the paper, and its names in other trainers."""

    formula: str
    source: str
    elsewhere: str = ""


CLIP = "`clip(r, 1 - cliprange, 1 + cliprange_high)`"

DESCRIBED = {
    "clip": Described(
        f"`-min(r A, c A)` with c = {CLIP}; at most `-dual_clip A` where A < 0",
        "PPO (Schulman et al. 2017) eq. 7; DAPO (Yu et al. 2025) eq. 10; dual clip (Ye et al. 2020) eq. 5",
        "TRL `grpo`, `bnpo`, `dr_grpo`, `dapo` (they differ in `aggregation`); verl `vanilla`; SkyRL `regular`, `dual_clip`",
    ),
    "kl_penalty": Described(
        "`-(r A - old_kl_coef (r - 1 - log r))`", "PPO (Schulman et al. 2017) eq. 8, with the estimator k3"
    ),
    "ratio": Described("`-r A`", "TRPO (Schulman et al. 2015) eq. 14"),
    "policy_gradient": Described("`-A log π`", "REINFORCE (Williams 1992)", "verl `gpg`"),
    "cispo": Described(
        f"`-c A log π` with the constant c = {CLIP}",
        "MiniMax-M1 (2025) eq. 4 and 5",
        "verl `cispo` (`clip_ratio_low`, `clip_ratio_high`); SkyRL `cispo`; TRL `cispo`, whose `epsilon_high` is "
        "`1 + cliprange_high`, with `cliprange=1`",
    ),
    "sapo": Described(
        "`-(4 / τ) sigmoid(τ (r - 1)) A`, τ = `tau_pos` where A > 0, else `tau_neg`",
        "SAPO (Gao et al. 2025), section 3",
        "verl and SkyRL `sapo` (`tau_pos`, `tau_neg`); TRL `sapo` (`sapo_temperature_pos`, `sapo_temperature_neg`)",
    ),
    "ipo": Described(
        "`-m r A + log_ratio_coef (log r)²`, m = 0 where `abs(π - π_old) > divergence`, else 1",
        "prime-rl (2026)",
        "prime-rl `ipo` (`ipo_threshold`, `kl_tau`)",
    ),
    "dppo_tv": Described(
        "`-m r A + log_ratio_coef (log r)²`, m = 0 where A > 0 and `π - π_old > divergence_high`, or A ≤ 0 and "
        "`π_old - π > divergence`",
        "DPPO (Qi et al. 2026) eq. 13",
        "verl `dppo_tv` (`clip_ratio_low`, `clip_ratio_high`; `clip_ratio_c` is `ratio_limit`); SkyRL `dppo` with "
        "`binary_tv` (`delta_low`, `delta_high`); prime-rl `default` (`log_ratio_coef` is `kl_tau`)",
    ),
    "dppo_kl": Described(
        "`-m r A + log_ratio_coef (log r)²`, m = 0 where π moved towards A and `KL > divergence_high` (A > 0) or "
        "`KL > divergence`; KL is that of the choice between the token and any other",
        "DPPO (Qi et al. 2026) eq. 14",
        "verl `dppo_kl`; SkyRL `dppo` with `binary_kl`",
    ),
    "gspo_token": Described(
        "`clip` with the sequence's ratio, whose gradient is the token's: r = `sg(s) π / sg(π)`",
        "GSPO (Zheng et al. 2025), section 4.3 (GSPO-token)",
        "verl and SkyRL `gspo`; TRL `importance_sampling_level='sequence_token'`",
    ),
    "gmpo": Described(
        "`-R A`, log R = mean over the sequence of the log-ratios, at most `cliprange_high` where A > 0, else at least "
        "`-cliprange`",
        "GMPO (Zhao et al. 2025), section 3",
        "verl `geo_mean`; TRL `GMPOTrainer` (`epsilon`, 0.4 by default)",
    ),
}


def objectives() -> str:
    """Return a table of the objectives: formula, source, names in other trainers, options, matrix products."""
    if tuple(DESCRIBED) != OBJECTIVES:
        raise ValueError(f"docs/_objectives.py: describe {sorted(set(OBJECTIVES) ^ set(DESCRIBED))} in DESCRIBED")
    rows = []
    for name, (formula, source, elsewhere) in DESCRIBED.items():
        rows.append((f"`{name}`", formula, source, elsewhere, _options(name), _products(name)))
    named = "a function", "the loss of each token that it returns", "", "prime-rl `custom`", _options(FUNCTION), "4"
    head = "objective", "loss of a token", "source", "elsewhere", "options", "matrix products"
    return table(head, [*rows, named])


def _options(objective: str) -> str:
    """Return the options that are read by some objectives only, among them this one."""
    some = [row for row in SCALARS if row.objectives != OBJECTIVES and objective in row.objectives]
    return ", ".join(f"`{row.name}`" for row in some)


def _products(objective: str) -> str:
    if objective in OF_SEQUENCES:
        return "3; 4 for long sequences"
    return "3; 4 for long sequences with `ratio_level='sequence'`" if objective in WITH_LEVEL else "3"
