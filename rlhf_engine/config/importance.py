"""Settings of the correction for a sampler whose probabilities differ from the policy's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rlhf_engine.config.schema import Section


@dataclass(frozen=True)
class ImportanceConfig(Section):
    """Correction for a sampler whose probabilities differ from the policy's, by `rlhf_kernels.importance_weights`."""

    level: Literal["none", "token", "sequence", "geometric"] = "none"
    """Unit of the ratio rho of the policy's to the sampler's probability: each token, the whole sequence (the product
    of its tokens' ratios) or the geometric mean of the sequence's ratios. none turns the correction off."""
    action: Literal["truncate", "mask", "clip"] = "truncate"
    """Use of the bounds. The policy term of a token is multiplied by rho, which truncate bounds by `high` and clip by
    both. mask leaves the tokens or sequences outside the bounds out of the policy term, of the entropy bonus and of the
    number of tokens that divides them; the value loss keeps them."""
    metric: Literal["ratio", "k1", "k2", "k3"] = "ratio"
    """What `low` and `high` bound: rho, or with action "mask" an estimate of KL(sampler || policy), summed over the
    sequence with level "sequence" and averaged with level "geometric"."""
    low: float | None = None
    """Lower bound. If None, there is none."""
    high: float | None = None
    """Upper bound. If None, there is none."""

    def check(self) -> None:
        """Raise ValueError for bounds that exclude each other or that the action does not read."""
        if self.level == "none":
            for name in ("action", "metric", "low", "high"):
                if getattr(self, name) != getattr(ImportanceConfig, name):
                    raise ValueError(f"{name}: got {getattr(self, name)!r} with level 'none', which does not read it")
            return
        if self.metric != "ratio" and self.action != "mask":
            raise ValueError(f"metric: got {self.metric!r}, expected 'ratio'; only action 'mask' bounds a divergence")
        if self.action == "truncate" and self.low is not None:
            raise ValueError(f"low: got {self.low}, expected None; action 'truncate' has no lower bound")
        if self.action != "truncate" and self.low is None and self.high is None:
            raise ValueError(f"low and high are not set; action {self.action!r} needs at least one of them")
        for name, bound in (("low", self.low), ("high", self.high)):
            if bound is not None and not (abs(bound) < float("inf") and (bound >= 0 or self.metric == "k1")):
                raise ValueError(f"{name}: got {bound}, expected a finite number of at least 0")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"low: got {self.low} with high {self.high}, expected at most high")
