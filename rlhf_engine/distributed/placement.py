"""How a config's weights are placed on the ranks, and the settings that several ranks do not support."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from rlhf_engine.config import RunConfig


@dataclass(frozen=True)
class Placement:
    """`replicate` copies of the trained weights, each sharded over `shard` ranks."""

    shard: int
    replicate: int

    @classmethod
    def of(cls, config: RunConfig, ranks: int, *, parts: bool) -> Self:
        """Return the placement of a run on `ranks` ranks; `parts` is whether only adapters or top layers are trained.

        Raises:
            ValueError: as `planned`, or a setting is not supported.
        """
        found = cls.planned(config, ranks, parts=parts)
        if ranks > 1:
            _refuse_for_several(config, ranks)
        if found.shard > 1:
            _refuse_for_sharded(config, parts=parts)
        return found

    @classmethod
    def planned(cls, config: RunConfig, ranks: int, *, parts: bool) -> Self:
        """Return the placement that the config asks for, without a check of its other settings.

        Raises:
            ValueError: `distributed.shard` times `distributed.replicate` is not the number of ranks.
        """
        given = config.distributed
        shard = given.shard or (ranks // (given.replicate or 1) if not parts or given.replicate else 1)
        replicate = given.replicate or max(1, ranks // shard)
        if shard * replicate != ranks:
            raise ValueError(
                f"distributed: got shard {given.shard} and replicate {given.replicate} for {ranks} "
                f"{'rank' if ranks == 1 else 'ranks'}, expected a product of {ranks}; leave one of them out, or start "
                f"{shard * replicate} ranks"
            )
        return cls(shard, replicate)


def check_whole(config: RunConfig, batch_size: int, key: str, ranks: int) -> None:
    """Check a supervised stage, whose ranks have whole copies of the weights.

    Raises:
        ValueError: the config asks for sharded weights, or the batch, setting `key`, has fewer records than ranks.
    """
    given = config.distributed
    if given.shard not in (None, 1) or given.replicate not in (None, ranks):
        raise ValueError(
            f"distributed: got shard {given.shard} and replicate {given.replicate} for {ranks} ranks, expected shard 1 and "
            f"replicate {ranks}: only rlhf ppo shards weights; leave both out"
        )
    if batch_size < ranks:
        raise ValueError(
            f"{key}: got {batch_size} with {ranks} ranks, expected at least {ranks}; raise it, or start fewer ranks"
        )


def _refuse_for_several(config: RunConfig, ranks: int) -> None:
    """Raise ValueError for a setting that needs one rank."""
    if config.ppo.objective == "trpo":
        raise ValueError(
            f"ppo.objective: got 'trpo' with {ranks} ranks, expected a different objective: the conjugate gradient of the "
            "trust region runs with one rank only"
        )
    if config.ppo.rollout_batch < ranks:
        raise ValueError(
            f"ppo.rollout_batch: got {config.ppo.rollout_batch} with {ranks} ranks, expected at least {ranks}: every rank "
            "samples at least one response; raise it, or start fewer ranks"
        )


def _refuse_for_sharded(config: RunConfig, *, parts: bool) -> None:
    """Raise ValueError for a setting that needs whole weights on every rank."""
    whole = "set distributed.shard=1, which keeps whole weights on every rank"
    if parts:
        raise ValueError(
            "distributed.shard: a model of which only adapters or top layers are trained is not sharded; leave "
            "distributed.shard out, or set it to 1"
        )
    refused = {
        "dtype": (config.dtype, "float32"),
        "memory.optimizer_state": (config.memory.optimizer_state, "resident"),
        "memory.reference": (config.memory.reference, "device"),
        "ppo.ema_decay": (config.ppo.ema_decay, None),
        "ppo.value_model": (config.ppo.value_model, "head"),
    }
    for key, (got, expected) in refused.items():
        if got != expected:
            raise ValueError(f"{key}: got {got!r} with sharded weights, expected {expected!r}; or {whole}")
