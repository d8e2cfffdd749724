"""A case: one function of one peer, called in the same way with our adapter and with the original, on random batches.

B sequences, T positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

LIMIT = 1e-6
"""Upper bound of the largest difference divided by the largest value, per tensor."""


@dataclass(frozen=True)
class Batch:
    """Inputs of the calls; masks are 0 and 1 in int64, as in most peers."""

    logprobs: Tensor  # (B, T)
    old_logprobs: Tensor
    ref_logprobs: Tensor
    rollout_logprobs: Tensor
    advantages: Tensor
    rewards: Tensor
    values: Tensor
    old_values: Tensor
    returns: Tensor
    mask: Tensor  # (B, T)
    lengths: Tensor  # (B,)
    scores: Tensor  # (B,)
    logits: Tensor  # (B, T, V)
    ids: Tensor  # (B, T)

    def wide(self) -> Batch:
        """Return the batch in float64."""
        return replace(self, **{k: v.double() for k, v in vars(self).items() if v.is_floating_point()})

    def require(self, names: tuple[str, ...]) -> Batch:
        """Return copies of all tensors as leaves; those in `names` require a gradient."""
        leaves = {k: v.detach().clone() for k, v in vars(self).items()}
        for name in names:
            leaves[name].requires_grad_()
        return Batch(**leaves)


@dataclass(frozen=True)
class Case:
    """A comparison of `call(ours, batch)` with `call(theirs, batch)`: results, and gradients of `wrt`."""

    peer: str
    release: str
    function: str
    ours: Any
    theirs: Any
    call: Callable[[Any, Batch], Any]
    wrt: tuple[str, ...] = ()
    batches: tuple[str, ...] = ("holes", "lengths", "full", "one", "extreme")
    note: str = ""
    sizes: Mapping[str, int] = field(default_factory=lambda: {"b": 64, "t": 512, "v": 4})
    """Sizes of the batch on which time and memory are measured."""

    @property
    def name(self) -> str:
        return f"{self.peer} {self.release} {self.function}" + (f", {self.note}" if self.note else "")


def batch(kind: str, b: int = 7, t: int = 12, v: int = 19, seed: int = 0) -> Batch:
    """Return a random batch: lengths include 0, 1 and T; advantages, scores and log-ratios have both signs.

    `kind` is "lengths" or one of: "holes", with masked tokens inside responses; "full", where every length is T; "one", where
    only one token of the batch counts; "extreme", with log-ratios far beyond ±20, where peers clamp.
    """
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*shape, generator=g)

    lengths = torch.randint(2, t, (b,), generator=g)
    lengths[:3] = torch.tensor([0, 1, t])
    if kind == "full":
        lengths[:] = t
    if kind == "one":
        lengths[:] = 0
        lengths[b // 2] = 1
    mask = (torch.arange(t) < lengths[:, None]).long()
    if kind == "holes":
        kept = torch.rand(b, t, generator=g) < 0.6
        kept[:, 0] = True  # the first token of a response counts
        mask = mask * kept.long()
    old = -torch.rand(b, t, generator=g) * 3 - 0.05
    spread = 15.0 if kind == "extreme" else 0.3
    values = normal(b, t)
    # Both signs, but not centered at 0: with a loss whose terms cancel, only their rounding would be compared.
    advantages = normal(b, t) + 0.5
    return Batch(
        logprobs=old + normal(b, t, scale=spread),
        old_logprobs=old,
        ref_logprobs=old + normal(b, t, scale=spread),
        rollout_logprobs=(old + normal(b, t, scale=0.2)).clamp(max=-1e-3),
        advantages=advantages,
        rewards=normal(b, t),
        values=values,
        old_values=values + normal(b, t, scale=0.3),
        returns=normal(b, t),
        mask=mask,
        lengths=lengths,
        scores=normal(b, scale=4.0),
        logits=normal(b, t, v, scale=3.0),
        ids=torch.randint(0, v, (b, t), generator=g),
    )


def flatten(name: str, result: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a result with names; a number becomes a float64 tensor, None is skipped."""
    if isinstance(result, Tensor):
        yield name, result
    elif isinstance(result, (int, float)):
        yield name, torch.tensor(result, dtype=torch.float64)
    elif isinstance(result, Mapping):
        for key in sorted(result):
            yield from flatten(f"{name}.{key}", result[key])
    elif isinstance(result, (tuple, list)):
        for i, part in enumerate(result):
            yield from flatten(f"{name}[{i}]", part)
    elif result is not None:
        raise TypeError(
            f"{name}: got {type(result).__name__}, expected tensors, numbers, or a mapping, tuple or list of them"
        )


def results(case: Case, side: Any, inputs: Batch) -> dict[str, Tensor]:
    """Return all results of one side, and the gradients of the first differentiable one, summed with fixed random weights."""
    inputs = inputs.require(case.wrt)
    made = dict(flatten("result", case.call(side, inputs)))
    if case.wrt:
        first = next(x for x in made.values() if x.requires_grad)
        weights = torch.randn(first.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
        gradients = torch.autograd.grad((first * weights.to(first.dtype)).sum(), [getattr(inputs, n) for n in case.wrt])
        made |= {f"d{name}": gradient for name, gradient in zip(case.wrt, gradients, strict=True)}
    return {name: x.detach() for name, x in made.items()}


@dataclass(frozen=True)
class Difference:
    """Difference between our tensor and theirs."""

    tensor: str
    relative: float
    """Largest difference divided by their largest value."""
    their_noise: float
    """The same ratio for their float32 result against their float64 result."""
    wide: bool
    """Whether ours is compared with their float64 result, because their float32 result is less accurate than ours."""


def compare(case: Case, kind: str) -> list[Difference]:
    """Compare every tensor of one batch; integers must be equal, and NaN must be at the same places."""
    inputs = batch(kind)
    ours, theirs, exact = (
        results(case, side, x) for side, x in ((case.ours, inputs), (case.theirs, inputs), (case.theirs, inputs.wide()))
    )
    assert ours.keys() == theirs.keys(), f"{case.name}: got {sorted(ours)}, expected {sorted(theirs)}"
    return [_difference(case.name, name, ours[name], theirs[name], exact[name]) for name in ours]


def _difference(case: str, name: str, ours: Tensor, theirs: Tensor, exact: Tensor) -> Difference:
    assert ours.shape == theirs.shape, f"{case}, {name}: got shape {tuple(ours.shape)}, expected {tuple(theirs.shape)}"
    if not theirs.is_floating_point():
        assert torch.equal(ours, theirs), f"{case}, {name}: integers differ"
        return Difference(name, 0.0, 0.0, False)
    noise = apart(theirs, exact)
    wide = noise > apart(ours, exact)
    return Difference(name, apart(ours, exact if wide else theirs), noise, wide)


def apart(ours: Tensor, theirs: Tensor) -> float:
    """Return max |ours - theirs| / max |theirs| over finite elements; inf if their infinities or NaNs are at other places."""
    ours, theirs = ours.double(), theirs.double()
    if not torch.equal(ours.isfinite(), theirs.isfinite()) or not torch.equal(ours.isnan(), theirs.isnan()):
        return float("inf")
    keep = theirs.isfinite()
    if not keep.any():
        return 0.0
    difference, scale = (ours - theirs)[keep].abs().max(), theirs[keep].abs().max()
    return 0.0 if difference == 0 else float(difference / scale)
