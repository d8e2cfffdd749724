# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false
# torch does not declare the types of DTensor's methods.
"""The arguments of a call with a sharded weight: the rows of this rank, and what all ranks must have in common.

Legend: N tokens, V vocabulary, H hidden.
"""

import zlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from ..backend import BACKENDS
from . import checks
from .shards import WHOLE, Group, Shards, all_gathered
from .weights import LowRank, QuantisedWeight


def is_dtensor(x: object) -> bool:
    """Return whether `x` is a DTensor."""
    return type(x) is not Tensor and isinstance(x, Tensor) and hasattr(x, "placements")


def refuse_dtensors(caller: str, **tensors: object) -> None:
    """Raise ValueError for a DTensor among the arguments of a function that takes none."""
    for name, x in tensors.items():
        if is_dtensor(x):
            raise ValueError(
                f"{name}: got a DTensor, which {caller} does not take; pass {name}.full_tensor(), or its to_local() if it is "
                "replicated"
            )


Parts = tuple[Tensor | QuantisedWeight, Tensor | None, LowRank | None, Group | None]


def local_parts(
    caller: str,
    weight: Tensor | QuantisedWeight,
    bias: Tensor | None,
    low_rank: LowRank | None,
    group: Group | None,
    **replicated: Tensor | None,
) -> Parts:
    """Return this rank's rows of the parameters, and the process group; None if the weight is not sharded.

    Raises:
        ValueError: a group that is not a process group or does not have this process; a DTensor that is not sharded by rows
            over a mesh of one dimension; DTensors and local tensors together; a DTensor among the `replicated` arguments.
    """
    low = low_rank[-1] if isinstance(low_rank, tuple) else None  # `check_head` refuses other types
    given = {"weight": weight, "bias": bias, "low_rank.weight": low}
    sharded = {name: x for name, x in given.items() if is_dtensor(x)}
    if group is None and not sharded:
        return weight, bias, low_rank, None
    if torch.compiler.is_compiling():
        raise ValueError(f"group: {caller} with a sharded weight cannot be compiled; call it outside of torch.compile")
    refuse_dtensors(caller, **replicated)
    plain = [name for name, x in given.items() if x is not None and name not in sharded]
    if sharded and plain:
        raise ValueError(
            f"{plain[0]}: got a local tensor together with a DTensor for {next(iter(sharded))}; pass DTensors for all of "
            "weight, bias and low_rank.weight, or local tensors and group"
        )
    for name, x in sharded.items():
        group = _group_of(name, x, group)
    _check_group(group)
    if isinstance(weight, Tensor) and is_dtensor(weight):
        weight = _local(weight)
        bias = None if bias is None else _local(bias)
        low_rank = None if low_rank is None else LowRank(low_rank[0], _local(low_rank[1]))
    return weight, bias, low_rank, group if dist.get_world_size(group) > 1 else None


def _local(x: Tensor) -> Tensor:
    """Return this rank's rows of a DTensor; their gradient is a DTensor of the same placement."""
    return cast(Any, x).to_local()


def _group_of(name: str, x: Any, group: Group | None) -> Group:
    """Return the group over which the rows of a DTensor are sharded."""
    mesh = x.device_mesh
    by_rows = mesh.ndim == 1 and x.placements[0].is_shard(0)
    if not by_rows:
        raise ValueError(
            f"{name}: got placements {x.placements} on a mesh of {mesh.ndim} dimensions, expected (Shard(dim=0),) on a mesh of "
            "one dimension; redistribute it, or pass this rank's rows and group"
        )
    found = mesh.get_group()
    if group is not None and group is not found:
        raise ValueError(
            f"group: got a group that is not the one of the DTensor {name}; leave group out, or pass mesh.get_group()"
        )
    if mesh.get_local_rank() != dist.get_rank(found):
        raise ValueError(
            f"{name}: got a mesh whose order differs from that of its process group, expected the same order"
        )
    return found


def _check_group(group: Group) -> None:
    if dist.is_available() and group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("group: this process is not a member of the group; call the function on its members only")
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        raise ValueError(
            f"group: got {type(group).__name__}, expected a torch.distributed.ProcessGroup or None; for a mesh, pass "
            "mesh.get_group()"
        )


# ---- agreement of the ranks ----

_SAME = (
    "the width of hidden",
    "the dtype of hidden and weight",
    "the number of tokens",
    "the number of unmasked tokens",
    "the sum of the unmasked ids",
    "the backend",
    "the options, the shapes of the other tensors or the inputs that need a gradient",
)
"""What must be equal on all ranks, in the order of `_described`."""
_DATA = ("the number of tokens", "the number of unmasked tokens", "the sum of the unmasked ids")

Result = TypeVar("Result")


def together(group: Group | None, hidden: Tensor, check: Callable[[], Result]) -> Result:
    """Return `check()`; if it raises on one rank, all ranks raise, instead of waiting for that rank."""
    if group is None:
        return check()
    try:
        _check_device(group, hidden)
        return check()
    except (ValueError, TypeError):
        _exchange(group, torch.zeros(2 + len(_SAME), dtype=torch.int64, device=_device(hidden)))
        raise


def _device(hidden: Any) -> torch.device:
    return hidden.device if isinstance(hidden, Tensor) else torch.device("cpu")


def _check_device(group: Group, hidden: Tensor) -> None:
    """Raise ValueError for tensors on a GPU if the group has no backend for them, or if a CUDA graph is captured."""
    if _device(hidden).type != "cuda":
        return
    config = dist.get_backend_config(group)
    if dict(part.split(":") for part in config.split(",")).get("cuda", "gloo") == "gloo":
        raise ValueError(
            f"group: got a group with the backends {config!r} for tensors on a GPU, expected nccl for them; call "
            "init_process_group('nccl')"
        )
    if torch.cuda.is_current_stream_capturing():
        raise ValueError(
            "group: got a group while a CUDA graph is captured, expected None: a sharded weight waits for the device"
        )


def agreed(
    group: Group | None,
    weight: Tensor | QuantisedWeight,
    hidden: Tensor,
    ids: Tensor,
    mask: Tensor | None,
    backend: str,
    options: Mapping[str, object],
) -> Shards:
    """Return the place of this rank's rows, from one exchange of a few numbers, for which the host waits.

    Raises:
        ValueError: the ranks have different hidden sizes, dtypes, tokens or options; a rank raised in `together`; on CPU, an
            id outside the vocabulary of all ranks.
    """
    if group is None:
        return WHOLE
    found = _exchange(group, _described(weight, hidden, ids, mask, backend, options))
    for place, what in enumerate(_SAME, start=2):
        for rank, numbers in enumerate(found):
            if numbers[place] != found[0][place]:
                raise ValueError(_difference(what, rank, numbers[place], found[0][place]))
    rows, rank = [numbers[1] for numbers in found], dist.get_rank(group)
    checks.ids(ids, like=hidden, expected=hidden.shape[:-1], vocabulary=sum(rows), where=mask)
    return Shards.of(group, sum(rows[:rank]), sum(rows), max(rows))


def _difference(what: str, rank: int, got: int, expected: int) -> str:
    if what.startswith("the options"):
        return f"group: {what} differ between rank {rank} and rank 0 of the group; pass the same arguments on all ranks"
    if what == "the dtype of hidden and weight":
        got, expected = (str(checks.FLOATS[x]) for x in (got, expected))  # type: ignore[assignment]
    if what == "the backend":
        got, expected = (repr(BACKENDS[x]) for x in (got, expected))  # type: ignore[assignment]
    hint = (
        "; all ranks pass the same tokens. A weight that FSDP2 sharded is for different tokens per rank: call the function "
        "inside the model's forward, where the weight is whole"
    )
    return f"group: got {got} for {what} on rank {rank} of the group and {expected} on rank 0{hint if what in _DATA else ''}"


def _described(
    weight: Tensor | QuantisedWeight,
    hidden: Tensor,
    ids: Tensor,
    mask: Tensor | None,
    backend: str,
    options: Mapping[str, object],
) -> Tensor:
    """Return the numbers of this rank that the ranks compare: 1, the rows of its shard, and `_SAME`."""
    code = zlib.crc32(repr({name: _text(x) for name, x in options.items()}).encode())
    dtype = checks.FLOATS.index(hidden.dtype)
    kept = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
    known = torch.tensor([1, len(weight), hidden.shape[-1], dtype, ids.numel()], device=hidden.device)
    total = torch.where(kept, ids, 0).sum()
    rest = torch.tensor([BACKENDS.index(backend), code], device=hidden.device)
    return torch.cat((known, torch.stack((kept.sum(), total)), rest))


def _text(x: object) -> object:
    """Return what the ranks compare of an option: a number, a name, or the shape and dtype of a tensor."""
    if isinstance(x, Tensor):
        return tuple(x.shape), x.dtype
    if isinstance(x, Mapping):
        return {name: _text(value) for name, value in cast(Mapping[str, object], x).items()}
    return getattr(x, "__name__", type(x).__name__) if callable(x) else x


def _exchange(group: Group, numbers: Tensor) -> list[list[int]]:
    """Return the numbers of all ranks; raise ValueError if a different rank refused its arguments."""
    found = cast(list[list[int]], all_gathered(numbers, group).tolist())
    refused = [rank for rank, of_rank in enumerate(found) if not of_rank[0]]
    if refused and found[dist.get_rank(group)][0]:
        raise ValueError(
            f"group: rank {refused[0]} of the group refused its arguments; the error on that rank has the reason"
        )
    return found
