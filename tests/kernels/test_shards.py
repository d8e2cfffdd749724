"""The head with a weight that is sharded by rows, in groups of 2 and 4 processes: against float64 and the whole weight.

The same processes run all cases, because a process takes seconds to start.
"""

import multiprocessing

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from rlhf_kernels import FusedHead, reference
from rlhf_kernels.ops import agreement

from .helpers import shards
from .helpers.bounds import check_error, check_temperature_costs_nothing, temperature_scene
from .helpers.head_loss import check_results
from .helpers.heads import differentiate, make


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """The results of each rank."""
    folder = tmp_path_factory.mktemp("ranks")
    # The fork server imports this module once for all processes; `spawn` would import it in each.
    multiprocessing.set_forkserver_preload([__name__])
    torch.multiprocessing.start_processes(
        shards.in_every_process, args=(str(folder),), nprocs=4, start_method="forkserver"
    )
    return [torch.load(folder / f"rank{rank}", weights_only=False) for rank in range(4)]


def of_case(ranks, name):
    """Return the results of the ranks that ran a case."""
    return [found[name] for found in ranks if name in found]


def merged(gradients):
    """Return the gradients of the whole head; the replicated ones have the same bits on all ranks."""
    whole = {}
    for name, first in gradients[0].items():
        if name in shards.BY_ROWS:
            whole[name] = torch.stack([one[name].float() for one in gradients]).sum(0).to(first.dtype)
        else:
            assert all(torch.equal(one[name], first) for one in gradients), name
            whole[name] = first
    return whole


class Result:
    def __init__(self, loss, metrics):
        self.loss, self.metrics = loss, metrics


def same_on_all(ranks, case):
    """Return loss and metrics, which have the same bits on all ranks, and the gradients."""
    found = of_case(ranks, str(case))
    assert len(found) == case.shards
    loss, metrics, _ = found[0]
    for other, other_metrics, _ in found[1:]:
        assert torch.equal(other, loss)
        assert all(torch.equal(other_metrics[name], x) for name, x in metrics.items())
    return Result(loss, metrics), merged([gradients for _, _, gradients in found])


@pytest.mark.parametrize("case", shards.BOUNDED, ids=str)
def test_matches_float64(ranks, case):
    check_results(*same_on_all(ranks, case), *shards.inputs_of(case), case.dtype)


@pytest.mark.parametrize("case", shards.FORMS, ids=str)
def test_matches_the_whole_weight(ranks, case):
    """Adapters, quantised weights, DTensors, packed sequences, terms and functions; sums are in a different order."""
    (got, gradients), (whole, expected) = same_on_all(ranks, case), shards.result_of(case)
    torch.testing.assert_close(got.loss, whole.loss.detach(), rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(got.metrics, whole.metrics, rtol=1e-5, atol=1e-5)
    for name, x in expected.items():
        assert (gradients[name] - x).abs().max() <= 2e-6 * max(x.abs().max(), 1e-3), name


@pytest.mark.parametrize("count, dtype, backend", shards.LOGPROBS, ids=str)
def test_logprobs(ranks, count, dtype, backend):
    found = of_case(ranks, f"{count}, {dtype}, {backend}")
    assert len(found) == 4
    logprobs, entropy, _ = found[0]
    assert all(torch.equal(x, logprobs) and torch.equal(h, entropy) for x, h, _ in found)
    gradients = merged([one for _, _, one in found[:count]])
    leaves, constants, extra = make(5, dtype, **shards.Case(2, "clip").sizes)

    def eager(kind):
        x = {k: leaves[k].to(kind, copy=True).requires_grad_() for k in ("hidden", "weight", "bias")}
        taken = reference.linear_token_logprobs(
            **x, ids=constants["ids"], mask=constants["mask"], temperature=extra["temperature"], softcap=3.0,
            logit_scale=0.7, entropy=True,
        )  # fmt: skip
        loss = (taken.logprobs * extra["weights"]).sum() + (taken.entropy * extra["returns"]).sum()
        return {"logprobs": taken.logprobs, "entropy": taken.entropy} | differentiate(loss, x)

    rounded, exact = eager(dtype), eager(torch.float64)
    for name, x in {"logprobs": logprobs, "entropy": entropy, **gradients}.items():
        check_error(name, x, rounded[name], exact[name])


@pytest.mark.parametrize("kind", ["row, scaled", "0.3"])
def test_log_probs_are_rounded_once(ranks, kind):
    """The factor 1 / T is rounded in the exponents of every shard, but not in the logit of the id."""
    for found in ranks:
        check_temperature_costs_nothing(found["temperature"][kind], *temperature_scene(kind))


def test_logits_take_the_memory_of_one_shard(ranks):
    rows, vocabulary, _ = shards.MEMORY.values()
    for found in ranks:
        for count, largest in found["memory"].items():
            assert largest == rows * vocabulary * 4 // count


def test_gradient_of_a_dtensor_is_sharded_like_it(ranks):
    for found in ranks:
        placements, rows, exact = found["parameter"]
        assert placements == "(Shard(dim=0),)"
        torch.testing.assert_close(rows, exact, rtol=1e-5, atol=1e-7)


def test_fused_head_of_a_sharded_layer(ranks):
    leaves, constants, _ = make(0, b=2, t=4, vocabulary=shards.VOCABULARY, hidden=shards.HIDDEN)
    layer = torch.nn.Linear(shards.HIDDEN, shards.VOCABULARY, bias=False)
    layer.weight.data.copy_(leaves["weight"])
    head, cuts = FusedHead(layer, softcap=3.0), shards.chunks(2)
    expected = head.ppo_loss(leaves["hidden"], **constants).loss
    expected.backward()
    for rank, found in enumerate(ranks):
        logprobs, loss, gradient, messages = found["module"]
        torch.testing.assert_close(logprobs, head.logprobs(leaves["hidden"], constants["ids"]).logprobs.detach())
        torch.testing.assert_close(loss, expected.detach())
        torch.testing.assert_close(gradient, layer.weight.grad[cuts[rank % 2] : cuts[rank % 2 + 1]])
        assert all("FusedHead needs the logits of all ids" in one for one in messages) and len(messages) == 3


BOTH = {
    "id": "ids: got 67, expected ids in [0, 67) wherever the mask is True",
    "negative id": "ids: got -1, expected ids in [0, 67) wherever the mask is True",
    "width": "group: got 15 for the width of hidden on rank 1 of the group and 16 on rank 0",
    "dtype": "group: got torch.bfloat16 for the dtype of hidden and weight on rank 1 of the group and torch.float32 on rank 0",
    "tokens": "group: got 4 for the number of tokens on rank 1 of the group and 8 on rank 0; all ranks pass the same tokens. A "
    "weight that FSDP2 sharded is for different tokens per rank: call the function inside the model's forward, where the "
    "weight is whole",
    "mask": "group: got 8 for the number of unmasked tokens on rank 1 of the group and 0 on rank 0; all ranks pass",
    "ids": "for the sum of the unmasked ids on rank 1 of the group and",
    "options": "group: the options, the shapes of the other tensors or the inputs that need a gradient differ between rank 1 "
    "and rank 0 of the group; pass the same arguments on all ranks",
    "backend": "group: got 'reference' for the backend on rank 1 of the group and 'cpu' on rank 0",
    "not a group": "group: got int, expected a torch.distributed.ProcessGroup or None; for a mesh, pass mesh.get_group()",
    "not a member": "group: this process is not a member of the group; call the function on its members only",
    "replicated": "weight: got placements (Replicate(),) on a mesh of 1 dimensions, expected (Shard(dim=0),) on a mesh of one "
    "dimension; redistribute it, or pass this rank's rows and group",
    "local bias": "bias: got a local tensor together with a DTensor for weight; pass DTensors for all of weight, bias and "
    "low_rank.weight, or local tensors and group",
    "other group": "group: got a group that is not the one of the DTensor weight; leave group out, or pass mesh.get_group()",
    "hidden": "hidden: got a DTensor, which linear_ppo_loss does not take; pass hidden.full_tensor(), or its to_local() if it "
    "is replicated",
    "topk": "weight: got a DTensor, which linear_topk_kl does not take",
}
"""Mistakes that all ranks report, and a part of the message."""


@pytest.mark.parametrize("name", BOTH)
def test_mistakes_are_refused_on_all_ranks(ranks, name):
    for found in ranks:
        assert BOTH[name] in found["messages"][name]


@pytest.mark.parametrize(
    ("backends", "captured", "message"),
    [
        (
            "cpu:gloo,cuda:gloo",
            False,
            "got a group with the backends 'cpu:gloo,cuda:gloo' for tensors on a GPU, expected nccl",
        ),
        ("cpu:gloo", False, "got a group with the backends 'cpu:gloo' for tensors on a GPU, expected nccl"),
        ("cpu:gloo,cuda:nccl", True, "got a group while a CUDA graph is captured, expected None"),
        ("cuda:nccl", False, ""),
    ],
)
def test_groups_of_tensors_on_a_gpu(monkeypatch, backends, captured, message):
    monkeypatch.setattr(agreement.dist, "get_backend_config", lambda group: backends)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: captured)
    with FakeTensorMode():
        hidden = torch.empty(2, 4, device="cuda")

        def check():
            agreement._check_device(object(), hidden)

        assert message in shards.message(check) and bool(message) == bool(shards.message(check))


def test_a_mistake_of_one_rank_ends_the_call_on_all(ranks):
    for rank, found in enumerate(ranks):
        message = found["messages"]["one rank"]
        if rank % 2:
            assert message == "advantages: got shape (1, 4), expected (2, 4) = the token shape of ids"
        else:
            assert message == (
                "group: rank 1 of the group refused its arguments; the error on that rank has the reason"
            )
