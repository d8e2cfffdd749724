"""`linear_topk_kl` in Triton."""

import math

import pytest
import torch

from rlhf_kernels import linear_topk_kl
from rlhf_kernels.backend import kernels
from rlhf_kernels.launch_args import LogitRows, Transform
from rlhf_kernels.ops.head import front_of
from rlhf_kernels.token_args import TopkRows, TopkRule

from .helpers.distillation import OPTIONS, check, make, run
from .helpers.gpu import DEVICE, to_device


@pytest.mark.parametrize("options", OPTIONS)
def test_matches_float64(options):
    leaves, constants, extra = make(0, b=2, t=20)
    more = {"weights": extra["weights"], "temperature": extra["temperature"]} if "lump" in options else {}
    check(leaves, constants, OPTIONS[options] | more, torch.float32, backend="triton", chunk_tokens=16)


@pytest.mark.parametrize("compact", [None, True])
def test_compact_changes_no_result(compact):
    leaves, constants, extra = make(1, b=2, t=20)
    check(leaves, constants, {"weights": extra["weights"]}, torch.float32, backend="triton", compact=compact)


def test_half_precision_gradients_share_the_memory_of_the_logits():
    """The gradient is bf16 at the front of each row of float32 logits, and is written while later columns are read."""
    leaves, constants, _ = make(2, torch.bfloat16, b=2, t=20, vocabulary=600)
    got, gradients = run(
        linear_topk_kl, *to_device((leaves, constants)), {"backend": "triton", "tail": "lump"}, torch.bfloat16
    )
    expected, others = run(linear_topk_kl, leaves, constants, {"tail": "lump"}, torch.float32)
    torch.testing.assert_close(got.loss.cpu(), expected.loss, rtol=1e-2, atol=0)
    for name, gradient in gradients.items():
        largest = others[name].abs().max().item()
        torch.testing.assert_close(gradient.float().cpu(), others[name], rtol=0.05, atol=0.03 * largest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [1, 16, 33])
def test_repeated_and_unused_ids(dtype, k):
    """An id that is listed several times has the gradient of all its entries, also where columns past V are not written."""
    g = torch.Generator().manual_seed(k)
    logits, ids = torch.randn(3, 150, generator=g), torch.randint(0, 150, (3, k), generator=g)
    ids[0] = ids[0, 0]
    teacher = (torch.rand(3, k, generator=g) / k).log()
    teacher[1, k // 2 :] = -torch.inf
    ids[1, k // 2 :] = 10**12
    x = LogitRows(logits.to(DEVICE, copy=True), torch.zeros(3, dtype=torch.int64, device=DEVICE), Transform.of())
    rows = TopkRows(TopkRule(0, False, 0.5), ids.to(DEVICE), teacher.to(DEVICE), None)
    found, out = torch.empty(3, 3, device=DEVICE), front_of(x.logits, dtype)
    active = kernels("triton").topk_epilogue(x, rows, found, out)
    p = torch.where(teacher == -torch.inf, 0, teacher.exp())
    expected = p.sum(1, keepdim=True) * logits.softmax(-1)
    expected.scatter_add_(1, torch.where(ids < 150, ids, 0), -p)
    atol = 1e-6 if dtype == torch.float32 else 8e-3
    torch.testing.assert_close(out.float().cpu(), expected, rtol=0, atol=atol)
    assert active.tolist() == [True, k > 1, True]


def test_an_id_outside_the_vocabulary_gives_nan_in_its_row():
    """On a device the host does not check the ids; the kernel reads nothing outside of the row."""
    logits = torch.randn(2, 40)
    x = LogitRows(logits.to(DEVICE), torch.zeros(2, dtype=torch.int64, device=DEVICE), Transform.of())
    rows = TopkRows(
        TopkRule(1, True, 0.5), torch.tensor([[3, 10**12], [4, 5]], device=DEVICE),
        torch.full((2, 2), -1.0, device=DEVICE), None,
    )  # fmt: skip
    found = torch.empty(3, 2, device=DEVICE)
    active = kernels("triton").topk_epilogue(x, rows, found, x.logits)
    assert found[0].isnan().tolist() == [True, False] and active.all()
    assert x.logits[0].isnan().all() and x.logits[1].isfinite().all()


def test_nothing_is_active_without_weights_and_masked_rows_are_zero():
    leaves, constants, _ = make(3, b=2, t=9)
    constants["teacher_logprobs"] = torch.where(constants["mask"][..., None], constants["teacher_logprobs"], math.nan)
    given = to_device((leaves, constants, {"weights": torch.zeros(2, 9)}))
    got, gradients = run(linear_topk_kl, *given[:2], given[2] | {"backend": "triton"}, torch.float32)
    assert got.loss.item() == 0 and not any(x.any() for x in gradients.values())
    assert got.kl.isfinite().all() and not got.kl[~given[1]["mask"]].any() and got.kl.any()
