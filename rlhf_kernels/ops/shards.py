# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false
# torch does not declare the types of the collectives.
"""An output layer whose weight is sharded by rows over the ranks of a process group: sums, epilogue in two steps.

All ranks call the op with the same hidden states, ids and options, each with its own rows of the weight. Per chunk of rows, a
rank computes the logits of its ids and their statistics. The ranks gather each other's statistics, four float64 numbers per
row, and combine them in the order of the ranks, so that all have the same bits. The gradient of the logits then needs no
further exchange. The gradients of the replicated inputs are summed over the ranks in place, once per call.

Legend: N tokens, m rows of a chunk, V vocabulary, H hidden, R rank of the low-rank term.
"""

import math
from dataclasses import replace
from typing import Any, NamedTuple, cast
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from ..backend import Kernels, kernels
from ..launch_args import LogitRows, PpoRows, RowStats, Sequences, Transform
from .head import write_gradient

Group = Any
"""A `torch.distributed.ProcessGroup`, which a torch without `torch.distributed` does not define."""

_GROUPS: WeakValueDictionary[str, Group] = WeakValueDictionary()
"""The process groups of calls so far by name, because a registered op cannot receive a group."""


class Shards(NamedTuple):
    """The place of this rank's rows of the weight among those of all ranks; `WHOLE` if the weight is not sharded."""

    group_name: str  # empty: the weight is whole
    begin: int  # first id of this rank's rows
    total: int  # ids of all ranks
    largest: int  # rows of the largest shard

    @classmethod
    def of(cls, group: Group, begin: int, total: int, largest: int) -> "Shards":
        """Return the place in a group."""
        _GROUPS[group.group_name] = group
        return cls(group.group_name, begin, total, largest)

    @property
    def group(self) -> Group:
        """The process group."""
        return _GROUPS[self.group_name]

    def kernels(self, backend: str) -> Kernels:
        """Return the launchers of `backend`, whose statistics are those of whole rows."""
        plain = kernels(backend)
        return cast(Kernels, ShardKernels(plain, self, backend)) if self.group_name else plain

    def local(self, ids: Tensor) -> Tensor:
        """Return the ids relative to this rank's rows; ids of other ranks are outside of them."""
        return ids - self.begin if self.begin else ids

    def logits_rows(self, vocabulary: int) -> int:
        """Return the number of ids for which the chunks are planned, the same on all ranks."""
        return self.largest or vocabulary

    def own_rows(self, n: int) -> slice:
        """Return the tokens whose value this rank computes: a part of N, so that the ranks compute each value once."""
        if not self.group_name:
            return slice(0, n)
        rank, size = dist.get_rank(self.group), dist.get_world_size(self.group)
        return slice(n * rank // size, n * (rank + 1) // size)

    def gathered(self, x: Tensor, own: slice, n: int) -> Tensor:
        """Return the numbers of all tokens (N,) from those of this rank's tokens."""
        if not self.group_name:
            return x
        every = x.new_zeros(n)
        every[own] = x
        dist.all_reduce(every, group=self.group)
        return every

    def sum_(self, *partial: Tensor | None) -> None:
        """Replace each of the tensors by its sum over the ranks, in place."""
        for x in partial if self.group_name else ():
            if x is not None and x.numel():
                dist.all_reduce(x, group=self.group)


WHOLE = Shards("", 0, 0, 0)


def all_gathered(x: Tensor, group: Group) -> Tensor:
    """Return the tensors of all ranks, of the same shape as `x`, stacked in the order of the ranks."""
    every = x.new_empty(dist.get_world_size(group), *x.shape)
    dist.all_gather(list(every.unbind()), x, group=group)
    return every


# ---- the epilogue in two steps ----


class ShardKernels:
    """The launchers of a backend for the logits of one shard, with the statistics of whole rows.

    `ids` of the rows are relative to this rank's rows. The launchers that do not read logits are those of the backend.
    """

    def __init__(self, plain: Kernels, shards: Shards, backend: str):
        self.plain: Kernels = plain
        self.shards: Shards = shards
        self.log2: bool = backend == "triton"  # its exponentials are powers of 2

    def __getattr__(self, name: str) -> Any:
        return getattr(self.plain, name)

    def token_logprobs_forward(self, x: LogitRows, stats: RowStats) -> None:
        """Compute the statistics of the whole rows, the same bits on all ranks."""
        local = RowStats.empty(len(x.ids), x.ids.device)
        self.plain.token_logprobs_forward(x, local)
        stats.buffer.copy_(self._combined(self._gathered(x, local), x))

    def token_logprobs_backward(
        self, x: LogitRows, stats: RowStats, out: Tensor, grad_logprobs: Tensor | None, grad_entropy: Tensor | None
    ) -> None:
        """Write the gradient of this rank's logits."""
        if grad_logprobs is not None and x.ids.is_cuda:  # on a CPU an invalid id has raised
            grad_logprobs = torch.where(self._invalid(x.ids), torch.nan, grad_logprobs)
        self.plain.token_logprobs_backward(replace(x, part=True), stats, out, grad_logprobs, grad_entropy)

    def ppo_epilogue(self, x: LogitRows, stats: RowStats, ppo: PpoRows, out: Tensor) -> Tensor:
        """Compute the statistics, write the gradient of this rank's logits, and return which rows have one."""
        self.token_logprobs_forward(x, stats)
        n = len(x.ids)
        mask = torch.ones(n, dtype=torch.bool, device=x.ids.device) if x.mask is None else x.mask.contiguous()
        slope, _, _ = self.plain.ppo_loss(
            ppo=ppo,
            sequences=Sequences(1, n, None),
            sequence_level=False,
            mask=mask,
            logprobs=stats.logprobs,
            entropy=None,
            values=None,
            old_values=None,
            returns=None,
            value_mask=mask,
            value_row_weight=None,
        )
        slope = torch.where(stats.logprobs.isnan(), torch.nan, slope)  # of an invalid id, with every objective
        entropy_slope = None
        if ppo.scalars.entropy_coef:
            entropy_slope = -ppo.scalars.entropy_coef * (
                mask.float() if ppo.row_weight is None else ppo.row_weight * mask
            )
        return write_gradient(cast(Kernels, self), x, stats, slope, entropy_slope, out)

    def _invalid(self, ids: Tensor) -> Tensor:
        """Return which ids are outside the vocabulary of all ranks."""
        first = self.shards.begin
        return (ids < -first) | (ids >= self.shards.total - first)

    def _gathered(self, x: LogitRows, local: RowStats) -> Tensor:
        """Return maximum, sum of exponentials, mean exponent and the logit of the id of all shards, (shards, 4, m) in float64.

        The logit of the id is 0 on ranks that do not have the id.
        """
        _, entropy, shift, inv_sum = local.buffer.double().unbind()
        total = 1 / inv_sum
        # A shard with no logit above -inf contributes nothing; its mean is not defined.
        empty = (shift == -torch.inf) & (inv_sum == torch.inf)
        total, mean = torch.where(empty, 0, total), torch.where(empty, 0, total.log() - entropy)
        owned = (x.ids >= 0) & (x.ids < x.logits.shape[-1])
        taken = x.logits.gather(-1, torch.where(owned, x.ids, 0)[:, None]).squeeze(-1)
        taken = torch.where(
            owned, capped(x.transform, taken.double()), torch.where(self._invalid(x.ids), torch.nan, 0.0)
        )
        own = torch.stack((shift, total, mean, taken))
        return all_gathered(own, self.shards.group)

    def _combined(self, every: Tensor, x: LogitRows) -> Tensor:
        """Return the statistics of the whole rows, (4, m), from those of all shards."""
        shifts, totals, means, taken = every.unbind(1)
        exact = factor(x.transform)
        rounded = torch.as_tensor(exact * math.log2(math.e)).float().double() / math.log2(math.e) if self.log2 else None
        rounded = torch.as_tensor(exact).float().double() if rounded is None else rounded
        shift = shifts.amax(0)
        moved = torch.where(totals == 0, 0, (shifts - shift) * rounded)
        moved = torch.where(shifts == shift, 0, moved)
        parts = totals * moved.exp()
        total = parts.sum(0)
        mean = (parts * (means + moved)).sum(0) / total
        log_sum = total.log()
        # As taken_logprob of csrc/math/logits.h: the last term corrects the rounding of the factor in all exponents.
        logprob = (taken.sum(0) - shift) * exact - log_sum - (exact / rounded - 1) * mean
        stats = torch.stack((logprob, log_sum - mean, shift, 1 / total))
        return stats if x.mask is None else torch.where(x.mask, stats, 0)


def factor(t: Transform) -> Tensor | float:
    """Return z / w in float64, where w is the logit after the softcap."""
    scale = 1.0 if t.softcap is not None else t.logit_scale
    return scale / (t.temperature if t.temperatures is None else t.temperatures.double())


def capped(t: Transform, u: Tensor) -> Tensor:
    """Return the logits w after the softcap, of which `factor` is a multiple."""
    return u if t.softcap is None else t.capped(u)
