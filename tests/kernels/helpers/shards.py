"""Calls of the head with a sharded weight in four processes, whose results the tests read from files.

Ranks 0 and 1 are a group of two shards, ranks 2 and 3 are the same with other cases, and all ranks are a group of four.
"""

import datetime
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rlhf_kernels import (
    FusedHead,
    LowRank,
    Term,
    linear_ppo_loss,
    linear_token_logprobs,
    linear_topk_kl,
    release_workspace,
)

from .bounds import temperature_scene
from .head_forms import int8_of, nf4_of
from .head_loss import OPTIONS, chosen_of, run
from .heads import differentiate, make
from .memory import largest_block

VOCABULARY, HIDDEN = 67, 16
CUTS = {2: (0, 40, 67), 4: (0, 9, 34, 50, 67)}
"""First id of each shard, and the size of the vocabulary."""
BY_ROWS = ("weight", "bias", "lora_b")
"""The parameters that are sharded."""
MEMORY = {"rows": 64, "vocabulary": 4096, "hidden": 8}


class Case(NamedTuple):
    """A call of `linear_ppo_loss` on a group of `shards` ranks."""

    shards: int
    options: str  # a key of OPTIONS
    flags: str = "everything"
    dtype: torch.dtype = torch.float32
    backend: str = "cpu"
    form: str = "plain"
    chunk_tokens: int | None = 16

    def __str__(self) -> str:
        return f"{self.shards} shards, {self.options}, {self.form}, {self.backend}, {self.dtype}"

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes of the batch; Triton's interpreter takes milliseconds per row."""
        t = 4 if self.backend == "triton" else 16
        hidden = 64 if self.form == "nf4" else HIDDEN  # blocks of NF4 divide every shard
        return {"b": 3, "t": t, "vocabulary": VOCABULARY, "hidden": hidden}


BOUNDED = [
    *(Case(2, options) for options in OPTIONS),
    *(Case(4, options) for options in ("entropy_kl", "sequence", "softcap", "kl_penalty")),
    *(
        Case(2, options, dtype=dtype)
        for options in ("entropy_kl", "sequence")
        for dtype in (torch.bfloat16, torch.float16)
    ),
    Case(4, "entropy_kl", dtype=torch.bfloat16),
    *(Case(2, options, backend="reference") for options in ("entropy_kl", "softcap", "gmpo")),
    *(Case(2, options, backend="triton") for options in ("entropy_kl", "softcap")),
]
"""Cases that are compared with float64."""
FORMS = [
    *(
        Case(2, "entropy_kl", form=form)
        for form in ("dtensor", "lora", "int8", "nf4", "terms", "function", "values", "no logits")
    ),
    Case(2, "sequence", form="packed"),
    Case(4, "entropy_kl", form="dtensor"),
    Case(4, "k2", form="lora"),
    Case(2, "entropy_kl", form="lora", backend="reference"),
]
"""Cases that are compared with the unsharded op."""


def squared(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor) -> Tensor:
    """Return a loss per token, as an objective that is a function."""
    return -advantages * (logprobs - old_logprobs).square()


def inputs_of(case: Case) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """Return leaves, constants and options, the same in all processes."""
    leaves, constants, extra = make(3, case.dtype, **case.sizes)
    g = torch.Generator().manual_seed(4)
    options = chosen_of(case.flags, case.options, extra)
    if case.form == "lora":
        leaves["lora_a"] = 0.2 * torch.randn(5, HIDDEN, generator=g)
        leaves["lora_b"] = 0.2 * torch.randn(VOCABULARY, 5, generator=g)
    if case.form == "terms":
        options["term"] = torch.randint(0, 3, constants["mask"].shape, generator=g)
        options["value_mask"] = constants["mask"] & (options["term"] == Term.RL)
        options |= {"nll_mask": torch.rand(constants["mask"].shape, generator=g) < 0.3, "nll_coef": 0.2}
    if case.form == "no logits":  # in the second shard
        leaves["bias"][CUTS[2][1] :] = -torch.inf
        constants["ids"] %= CUTS[2][1]
    if case.form == "function":
        options = {k: x for k, x in options.items() if k != "weights"} | {"objective": squared}
    if case.form == "values":  # of a separate model
        leaves = {k: x for k, x in leaves.items() if not k.startswith("value")}
        leaves["values"] = torch.randn(constants["mask"].shape, generator=g)
    if case.form == "packed":
        leaves["hidden"] = leaves["hidden"].flatten(0, 1)
        constants = {k: x.flatten() for k, x in constants.items()}
        options = {k: x.flatten() if isinstance(x, Tensor) else x for k, x in options.items()}
        options["cu_seqlens"] = torch.tensor([0, 7, 7, 30, constants["mask"].numel()], dtype=torch.int32)
    return leaves, constants, options


def loss_of(case: Case, group: Any = None, **x: Any) -> Any:
    """Return the loss of leaves, constants and options; if there is a group, with this rank's part of the weight."""
    rows = slice(0, VOCABULARY)
    if group is not None:
        cuts = CUTS[case.shards] if case.form != "dtensor" else chunks(case.shards)
        rank = dist.get_rank(group)
        rows = slice(cuts[rank], cuts[rank + 1])
        x |= {name: x[name][rows] for name in BY_ROWS if name in x} | {"group": group}
    if case.form in ("int8", "nf4"):
        x["weight"] = (int8_of if case.form == "int8" else nf4_of)(x["weight"].detach())
    if case.form == "lora":
        x["low_rank"] = LowRank.lora(x["hidden"], x.pop("lora_a"), x.pop("lora_b"), mask=x["mask"])
    if case.form == "dtensor" and group is not None:
        x |= {name: as_dtensor(x[name], x.pop("group", group)) for name in ("weight", "bias")}
    return linear_ppo_loss(**x, backend=case.backend, chunk_tokens=case.chunk_tokens)


def chunks(shards: int) -> tuple[int, ...]:
    """Return the cuts of a DTensor, which has equal shards but the last."""
    size = -(-VOCABULARY // shards)
    return tuple(min(rank * size, VOCABULARY) for rank in range(shards + 1))


def as_dtensor(local: Tensor, group: Any) -> Any:
    """Return the DTensor whose rows are sharded over the group."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard

    shape = torch.Size((VOCABULARY, *local.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    mesh = DeviceMesh.from_group(group, "cpu")
    return DTensor.from_local(local, mesh, (Shard(0),), run_check=False, shape=shape, stride=stride)


def result_of(case: Case, group: Any = None) -> tuple[Any, dict[str, Tensor]]:
    """Return loss and metrics, and the gradients: of the sharded parameters, zeros for the rows of other ranks."""
    leaves, constants, options = inputs_of(case)
    if case.form != "values":
        return run(partial(loss_of, case, group), leaves, constants, options, case.dtype)
    x = {k: v.clone().requires_grad_() for k, v in leaves.items()}
    result = loss_of(case, group, **x, **constants, **options)
    return result, differentiate(result.loss, x)


def logprobs_of(dtype: torch.dtype, backend: str, group: Any = None) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return log-probs, entropies and the gradients of their weighted sum, of one form of the head."""
    leaves, constants, extra = make(5, dtype, **Case(2, "clip").sizes)
    x = {k: leaves[k].clone().requires_grad_() for k in ("hidden", "weight", "bias")}
    head = dict(x)
    if group is not None:
        cuts, rank = CUTS[dist.get_world_size(group)], dist.get_rank(group)
        head |= {k: x[k][cuts[rank] : cuts[rank + 1]] for k in ("weight", "bias")}
    transform = {"temperature": extra["temperature"], "softcap": 3.0, "logit_scale": 0.7, "chunk_tokens": 16}
    taken = linear_token_logprobs(
        **head, ids=constants["ids"], mask=constants["mask"], entropy=True, group=group, backend=backend, **transform
    )
    loss = (taken.logprobs * extra["weights"]).sum() + (taken.entropy * extra["returns"]).sum()
    return taken.logprobs.detach(), taken.entropy.detach(), differentiate(loss, x)


def at_temperature(kind: str, group: Any) -> Tensor:
    """Return the log-probs of `temperature_scene`, whose logits are the hidden states: the weight is the identity."""
    logits, ids, options = temperature_scene(kind)
    size = logits.shape[1]
    rows = torch.arange(size // 3) if dist.get_rank(group) == 0 else torch.arange(size // 3, size)
    weight = torch.nn.functional.one_hot(rows, size).float()
    return linear_token_logprobs(logits, weight, ids, group=group, **options).logprobs


LOGPROBS = [(2, torch.float32, "cpu"), (4, torch.bfloat16, "cpu"), (2, torch.float32, "reference")]


# ---- the processes ----


def in_every_process(rank: int, folder: str) -> None:
    """Run the cases of all groups of this rank, and save their results."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # uninitialised memory is NaN
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", store, rank=rank, world_size=4, timeout=datetime.timedelta(minutes=5))
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    pair, place = pairs[rank // 2], rank // 2
    found = {}
    for group, shards in ((pair, 2), (dist.group.WORLD, 4)):
        mine = [case for case in BOUNDED + FORMS if case.shards == shards]
        for case in mine[place::2] if shards == 2 else mine:
            result, gradients = result_of(case, group)
            found[str(case)] = result.loss.detach(), result.metrics, gradients
        for shards_of_case, dtype, backend in LOGPROBS:
            if shards_of_case == shards:
                found[f"{shards}, {dtype}, {backend}"] = logprobs_of(dtype, backend, group)
    found["messages"] = {name: message(call) for name, call in mistakes(rank % 2, pair, pairs[1 - place]).items()}
    found["memory"] = {shards: bytes_of(group) for shards, group in ((2, pair), (4, dist.group.WORLD))}
    found["parameter"] = of_a_parameter(pair)
    found["module"] = of_a_module(pair)
    found["temperature"] = {kind: at_temperature(kind, pair) for kind in ("row, scaled", "0.3")}
    torch.save(found, Path(folder) / f"rank{rank}")
    dist.destroy_process_group()


def message(call: Callable[[], object]) -> str:
    """Return the error of a call; empty if there is none."""
    try:
        call()
    except ValueError as error:
        return str(error)
    return ""


def mistakes(rank: int, group: Any, other: Any) -> dict[str, Callable[[], object]]:
    """Return calls that are refused, on a group of two shards. Where only one rank is wrong, it is rank 1."""
    leaves, constants, _ = make(0, b=2, t=4, vocabulary=VOCABULARY, hidden=HIDDEN)
    weight, one = leaves["weight"][40 * rank : 40 + 27 * rank], rank == 1
    right = {"hidden": leaves["hidden"], "weight": weight, **constants, "group": group}

    def loss(op: Callable[..., object] = linear_ppo_loss, **changed: object) -> Callable[[], object]:
        return lambda: op(**(right | changed))

    x, ids, mask = leaves["hidden"], constants["ids"], torch.ones(2, 4, dtype=torch.bool)
    narrow = {"hidden": x[..., :15], "weight": weight[:, :15]} if one else {}
    half = {"hidden": x.bfloat16(), "weight": weight.bfloat16()} if one else {}
    short = {k: y[:1] for k, y in (constants | {"hidden": x}).items()} if one else {}
    dtensor = as_dtensor(leaves["weight"][34 * rank : 34 + 33 * rank], group)
    whole = {"group": None, "weight": dtensor}
    replicated = dtensor.redistribute(placements=[torch.distributed.tensor.Replicate()])
    return {
        "id": loss(ids=torch.full_like(ids, VOCABULARY), mask=mask),
        "negative id": loss(ids=torch.full_like(ids, -1), mask=mask),
        "width": loss(**narrow),
        "dtype": loss(**half),
        "tokens": loss(**short),
        "mask": loss(mask=mask if one else ~mask),
        "ids": loss(mask=mask, ids=ids.roll(1, 0) + one),
        "options": loss(cliprange=0.2 + 0.1 * one),
        "one rank": loss(advantages=constants["advantages"][:1] if one else constants["advantages"]),
        "backend": loss(backend="reference" if one else "cpu"),
        "not a group": loss(group=3),
        "not a member": loss(group=other),
        "replicated": loss(**whole | {"weight": replicated}),
        "local bias": loss(**whole, bias=leaves["bias"]),
        "other group": loss(weight=dtensor, group=dist.group.WORLD),
        "hidden": loss(hidden=replicated),
        "topk": lambda: linear_topk_kl(x, dtensor, ids[..., None], constants["old_logprobs"][..., None], mask),
    }


def bytes_of(group: Any) -> int:
    """Return the bytes of the largest tensor that the loss and its backward allocate, which has the logits of a chunk."""
    rows, v, h = MEMORY.values()
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, h, generator=g).requires_grad_()
    weight = torch.randn(v // size, h, generator=g).requires_grad_()
    ids, ones = torch.randint(0, v, (rows,), generator=torch.Generator().manual_seed(1)), torch.ones(rows)

    def step() -> None:
        linear_ppo_loss(hidden, weight, ids, -ones, ones, ones.bool(), group=group).loss.backward()

    assert rank < size
    release_workspace()
    return largest_block(step)


def of_a_module(group: Any) -> tuple[Tensor, Tensor, Tensor, list[str]]:
    """Return log-probs, loss and this rank's gradient of a FusedHead around a layer with a DTensor, and what it refuses."""
    leaves, constants, _ = make(0, b=2, t=4, vocabulary=VOCABULARY, hidden=HIDDEN)
    cuts, rank, x = chunks(2), dist.get_rank(group), leaves["hidden"]
    layer = nn.Linear(HIDDEN, VOCABULARY, bias=False, device="meta")
    layer.weight = nn.Parameter(as_dtensor(leaves["weight"][cuts[rank] : cuts[rank + 1]], group))
    head = FusedHead(layer, softcap=3.0, group=group)
    logprobs = head.logprobs(x, constants["ids"]).logprobs
    loss = head.ppo_loss(x, **constants).loss
    loss.backward()
    ids, teacher = constants["ids"][..., None], constants["old_logprobs"][..., None]
    calls = (lambda: head.logits(x), lambda: head(x), lambda: head.topk_kl(x, ids, teacher, constants["mask"]))
    return logprobs.detach(), loss.detach(), layer.weight.grad.to_local(), [message(call) for call in calls]


def of_a_parameter(group: Any) -> tuple[str, Tensor, Tensor]:
    """Return placements and rows of the gradient of a parameter that is a DTensor, and this rank's rows of the exact one."""
    case = Case(2, "entropy_kl", form="dtensor")
    leaves, constants, options = inputs_of(case)
    cuts, rank = chunks(2), dist.get_rank(group)
    rows = slice(cuts[rank], cuts[rank + 1])
    parameter = nn.Parameter(as_dtensor(leaves["weight"][rows], group))
    leaves |= {"weight": parameter, "bias": as_dtensor(leaves["bias"][rows], group)}
    (0.37 * linear_ppo_loss(**leaves, **constants, **options, backend="cpu", chunk_tokens=16).loss).backward()
    assert parameter.grad is not None
    _, exact = result_of(case)
    return str(parameter.grad.placements), parameter.grad.to_local(), exact["weight"][rows]
