"""Ratios per sequence in `linear_ppo_loss`: rows in the products, long sequences, memory."""

import pytest
import torch

from rlhf_kernels import head_workspace_bytes, lend_workspace, linear_ppo_loss, linear_token_logprobs

from .helpers.gpu import to_device
from .helpers.head_loss import check_loss, run
from .helpers.heads import make

RATIOS = [
    {"ratio_level": "sequence"},
    {"objective": "cispo", "ratio_level": "sequence"},
    {"objective": "gspo_token"},
    {"objective": "gmpo"},
]
ALL = 2.0  # a share of unmasked tokens above 1: every token


class Products(list[tuple[int, int, int]]):
    """Rows, columns and terms of every matrix product of a head with `weight` (V, H)."""

    def watch(self, monkeypatch, weight):
        self.shape = tuple(weight.shape)
        mm, addmm = torch.mm, torch.Tensor.addmm_
        monkeypatch.setattr(torch, "mm", lambda a, b, **k: (self.add(a, b), mm(a, b, **k))[1])
        monkeypatch.setattr(torch.Tensor, "addmm_", lambda x, a, b, **k: (self.add(a, b), addmm(x, a, b, **k))[1])
        return self

    def add(self, a, b):
        self.append((a.shape[0], b.shape[1], a.shape[1]))

    def rows(self) -> tuple[int, int, int]:
        """Return the rows in the products for the logits, for the hidden states' gradient and for the weight's."""
        v, h = self.shape
        logits, hidden = (sum(rows for rows, *rest in self if rest == dims) for dims in ([v, h], [h, v]))
        return logits, hidden, sum(terms for rows, columns, terms in self if (rows, columns) == (v, h))


def head_of(**sizes):
    """Return hidden states and weight, and constants for which no token is clipped and no coefficient is 0."""
    leaves, constants, _ = make(5, **sizes)
    leaves = {k: leaves[k] for k in ("hidden", "weight")}
    logprobs = linear_token_logprobs(**leaves, ids=constants["ids"]).logprobs
    return leaves, constants | {"old_logprobs": logprobs - 0.05, "advantages": 1 + constants["advantages"].abs()}


def flat(leaves, constants, lengths):
    """Return the batch packed, with sequences of these lengths."""
    leaves = leaves | {"hidden": leaves["hidden"].flatten(0, 1)}
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return leaves, {k: x.flatten(0, 1) for k, x in constants.items()}, {"cu_seqlens": ends}


@pytest.mark.parametrize("options", RATIOS, ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_three_products(monkeypatch, options, packed):
    """Chunks of 32 rows: two sequences of 16 per chunk, or sequences of 30, 0, 2, 20 and 12 rows, in three products."""
    leaves, constants = head_of(b=4, t=16, keep=ALL)
    if packed:
        leaves, constants, bounds = flat(leaves, constants, [30, 0, 2, 20, 12])
        options = options | bounds
    seen = Products().watch(monkeypatch, leaves["weight"])
    run(linear_ppo_loss, leaves, constants, options | {"chunk_tokens": 32}, torch.float32)
    assert seen.rows() == (64, 64, 64)


@pytest.mark.parametrize("options", RATIOS, ids=str)
def test_two_products_with_a_frozen_weight(monkeypatch, options):
    leaves, constants = head_of(b=4, t=16, keep=ALL)
    seen = Products().watch(monkeypatch, leaves["weight"])
    linear_ppo_loss(leaves["hidden"].requires_grad_(), leaves["weight"], **constants, **options).loss.backward()
    assert seen.rows() == (64, 64, 0)


def test_one_product_without_gradients(monkeypatch):
    leaves, constants = head_of(b=4, t=16, keep=ALL)
    seen = Products().watch(monkeypatch, leaves["weight"])
    linear_ppo_loss(**leaves, **constants, objective="gmpo")
    assert seen.rows() == (64, 0, 0)


def test_a_long_sequence_needs_a_fourth_product(monkeypatch):
    """Sequences of 16 and 48 rows in chunks of 16: only the rows of the longer one are in a second product for logits."""
    leaves, constants = head_of(b=1, t=64, keep=ALL)
    leaves, constants, bounds = flat(leaves, constants, [16, 48])
    seen = Products().watch(monkeypatch, leaves["weight"])
    run(linear_ppo_loss, leaves, constants, {"ratio_level": "sequence", "chunk_tokens": 16, **bounds}, torch.float32)
    assert seen.rows() == (16 + 2 * 48, 64, 64)


@pytest.mark.parametrize("chunk_tokens", [16, 1024])
def test_clipped_sequences_are_in_no_backward_product(monkeypatch, chunk_tokens):
    """Each second sequence has a ratio of e, for which the clipped term has no gradient."""
    leaves, constants = head_of(b=4, t=32)
    logprobs = linear_token_logprobs(**leaves, ids=constants["ids"]).logprobs
    far = torch.arange(4)[:, None].expand(4, 32) % 2 == 1
    constants |= {"old_logprobs": logprobs - far.float(), "advantages": torch.ones(4, 32)}
    seen = Products().watch(monkeypatch, leaves["weight"])
    options = {"ratio_level": "sequence", "chunk_tokens": chunk_tokens}
    result, gradients = run(linear_ppo_loss, leaves, constants, options, torch.float32)
    count, active = int(constants["mask"].sum()), int((constants["mask"] & ~far).sum())
    logits, *backward = seen.rows()
    assert backward == [active, active]
    assert logits == count if chunk_tokens == 1024 else count + active <= logits <= count + active + 32
    assert (gradients["hidden"][far] == 0).all()
    assert result.metrics["active_fraction"].item() == pytest.approx(active / count)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", RATIOS, ids=str)
@pytest.mark.parametrize("chunk_tokens", [16, 40, 300])
def test_chunks_of_any_size_match_float64(options, dtype, chunk_tokens):
    """No sequence, some sequences, or all of them fit in a chunk."""
    leaves, constants, extra = make(4, dtype, b=6, t=40)
    constants["mask"][0] = False
    constants["mask"][1, 5:] = False
    chosen = options | {"aggregation": "seq_mean_token_mean", "weights": extra["weights"], "entropy_coef": 0.02}
    check_loss(linear_ppo_loss, leaves, constants, chosen, dtype, {"chunk_tokens": chunk_tokens})


@pytest.mark.parametrize("frozen", [False, True])
def test_memory_is_that_of_other_objectives(frozen):
    """Sequences of 300 bfloat16 rows, more than the 256 rows of a step, in the workspace that every objective needs."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 300, 8, generator=g).bfloat16().requires_grad_()
    weight = torch.randn(64, 8, generator=g).bfloat16().requires_grad_(not frozen)
    ids, ones = torch.randint(0, 64, (3, 300), generator=g), torch.ones(3, 300)
    size = head_workspace_bytes(64, torch.bfloat16, tokens=900, gradient=not frozen)
    options = {"objective": "gspo_token", "aggregation": "seq_mean_token_mean"}
    with lend_workspace(torch.empty(size, dtype=torch.uint8)):
        linear_ppo_loss(hidden, weight, ids, -4 * ones, ones, ones.bool(), **options).loss.backward()
    assert hidden.grad.isfinite().all() and (frozen or weight.grad.abs().max() > 0)


# ---- a GPU, or Triton's interpreter ----


@pytest.mark.parametrize("options", RATIOS[1:], ids=str)
@pytest.mark.parametrize(
    ("compact", "packed", "logits"), [(None, False, 48), (True, False, 48), (True, True, 48), (None, True, 96)]
)
def test_products_on_a_gpu(monkeypatch, options, compact, packed, logits):
    """Three products, but four where the host would have to wait for the bounds of packed sequences."""
    leaves, constants = map(to_device, head_of(b=6, t=8, keep=ALL))
    if packed:
        leaves, constants, bounds = flat(leaves, constants, [9, 7, 16, 0, 16])
        options = options | to_device(bounds)
    seen = Products().watch(monkeypatch, leaves["weight"])
    for x in leaves.values():
        x.requires_grad_()
    linear_ppo_loss(
        **leaves, **constants, **options, chunk_tokens=16, compact=compact, backend="triton"
    ).loss.backward()
    assert seen.rows() == (logits, 48, 48)


@pytest.mark.parametrize("options", RATIOS[2:], ids=str)
@pytest.mark.parametrize("compact", [True, None])
@pytest.mark.parametrize("chunk_tokens", [16, 17, 40])
def test_chunks_on_a_gpu_match_float64(options, compact, chunk_tokens):
    leaves, constants, extra = map(to_device, make(4, b=4, t=12))
    chosen = options | {"aggregation": "seq_mean_token_mean", "weights": extra["weights"], "entropy_coef": 0.02}
    how = {"chunk_tokens": chunk_tokens, "compact": compact, "backend": "triton"}
    check_loss(linear_ppo_loss, leaves, constants, chosen, torch.float32, how)
