"""`linear_ppo_loss` on a GPU: outputs and all gradients against float64, compaction, reproducible bits, NaN in masked rows."""

import pytest
import torch

from rlhf_kernels import METRICS, linear_ppo_loss, logits_ppo_loss, reference

from .helpers.bounds import check_error
from .helpers.gpu import to_device
from .helpers.head_loss import FLAGS, OPTIONS, check_loss, chosen_of, reference_loss, run
from .helpers.heads import differentiate, make, widen

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def batch(seed, dtype=torch.float32, *, t=10, **sizes):
    return map(to_device, make(seed, dtype, t=t, **sizes))


def fused(**arguments):
    return linear_ppo_loss(**arguments, backend="triton")


@pytest.mark.parametrize(
    ("dtype", "flags"),
    [*((torch.float32, f) for f in FLAGS), (torch.bfloat16, "plain"), *((d, "everything") for d in DTYPES[1:])],
)
@pytest.mark.parametrize("options", OPTIONS)
def test_matches_float64(dtype, flags, options):
    leaves, constants, extra = batch(sorted(OPTIONS).index(options), dtype)
    check_loss(fused, leaves, constants, chosen_of(flags, options, extra), dtype)


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("options", ["clip_higher_dual", "sequence", "softcap"])
@pytest.mark.parametrize("compact", [True, None])
@pytest.mark.parametrize(("chunk_tokens", "seed"), [(1, 3), (17, 4), (17, 5), (17, 6)])
def test_compaction_and_chunks(dtype, options, compact, chunk_tokens, seed):
    """The error bound is the same with and without compaction, in chunks that do not divide N."""
    leaves, constants, extra = batch(seed, dtype)
    constants["advantages"][:, ::3] = 0
    chosen = chosen_of("everything", options, extra) | ({"entropy_coef": 0.0} if options == "softcap" else {})
    check_loss(fused, leaves, constants, chosen, dtype, {"compact": compact, "chunk_tokens": chunk_tokens})


@pytest.mark.parametrize(
    ("b", "t", "vocabulary", "hidden"), [(1, 1, 2, 1), (1, 1, 9001, 33), (3, 1, 65, 7), (1, 7, 701, 5)]
)
@pytest.mark.parametrize("compact", [True, None])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_odd_shapes(b, t, vocabulary, hidden, compact, seed):
    leaves, constants, extra = batch(seed, b=b, t=t, vocabulary=vocabulary, hidden=hidden)
    constants["mask"].view(-1)[0] = True
    chosen = chosen_of("everything", "softcap", extra) | {"kl_coef": 0.1, "temperature": extra["temperature"]}
    check_loss(fused, leaves, constants, chosen, torch.float32, {"compact": compact})


@pytest.mark.parametrize("compact", [True, None])
def test_rows_in_the_backward_products(monkeypatch, compact):
    """With `compact` only rows with a gradient enter the products. Otherwise all rows do, and the host does not wait."""
    leaves, constants, _ = batch(5)
    leaves = {k: leaves[k].requires_grad_() for k in ("hidden", "weight")}
    constants["advantages"] = torch.ones_like(constants["advantages"])
    constants["advantages"][:, ::2] = 0
    constants["old_logprobs"] = reference.linear_token_logprobs(*leaves.values(), constants["ids"]).logprobs.detach()
    rows, mm = [], torch.mm

    def counted(a, b, **kwargs):
        if b.shape == leaves["weight"].shape:
            rows.append(len(a))
        return mm(a, b, **kwargs)

    monkeypatch.setattr(torch, "mm", counted)
    linear_ppo_loss(**leaves, **constants, compact=compact, backend="triton")
    active = int((constants["mask"] & (constants["advantages"] != 0)).sum())
    assert sum(rows) == (active if compact else constants["mask"].numel())


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("compact", [True, None])
@pytest.mark.parametrize("options", ["entropy_kl", "sequence"])
def test_masked_rows_have_no_effect(dtype, compact, options):
    """NaN in masked hidden states and constants, and invalid ids, do not change the bits."""
    leaves, constants, extra = batch(15, dtype)
    chosen = chosen_of("everything", options, extra) | {"compact": compact}
    clean, clean_gradients = run(fused, leaves, constants, chosen, dtype)
    out = ~constants["mask"]
    leaves["hidden"] = leaves["hidden"].masked_fill(out[..., None], torch.nan)
    constants["ids"] = constants["ids"].masked_fill(out, -100)
    for tensors in (constants, chosen):
        for name, x in tensors.items():
            if torch.is_tensor(x) and x.is_floating_point() and name != "temperature":
                tensors[name] = x.masked_fill(out, torch.nan)
    dirty, gradients = run(fused, leaves, constants, chosen, dtype)
    assert torch.equal(clean.loss, dirty.loss)
    assert all(torch.equal(gradients[k], clean_gradients[k]) for k in gradients)


@pytest.mark.parametrize("compact", [True, None])
def test_same_bits_twice(compact):
    leaves, constants, extra = batch(9, torch.bfloat16)
    chosen = chosen_of("everything", "entropy_kl", extra) | {"compact": compact, "chunk_tokens": 16}
    (a, first), (b, second) = (run(fused, leaves, constants, chosen, torch.bfloat16) for _ in range(2))
    assert torch.equal(a.loss, b.loss) and all(torch.equal(a.metrics[k], b.metrics[k]) for k in METRICS)
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_two_losses_in_one_backward():
    leaves, constants, _ = batch(12)
    names = ("hidden", "weight")
    apart = []
    for objective, factor in (("clip", 0.37), ("ratio", 2.0)):
        x = {k: leaves[k].clone().requires_grad_() for k in names}
        apart.append(differentiate(fused(**x, **constants, objective=objective).loss, x, factor))
    x = {k: leaves[k].clone().requires_grad_() for k in names}
    clip, ratio = (fused(**x, **constants, objective=o).loss for o in ("clip", "ratio"))
    (0.37 * clip + 2 * ratio).backward()
    for name in names:
        torch.testing.assert_close(x[name].grad, apart[0][name] + apart[1][name])


def test_second_backward_raises():
    leaves, constants, _ = batch(11, torch.float32)
    weight = leaves["weight"].clone().requires_grad_()
    loss = fused(hidden=leaves["hidden"], weight=weight, **constants).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"^linear_ppo_loss: backward was called twice"):
        loss.backward()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("compact", [True, None])
def test_no_token_counts(dtype, compact):
    """If all tokens are masked, or the batch is empty, the loss and the gradients are 0, not NaN."""
    leaves, constants, extra = batch(14, dtype)
    constants["mask"][:] = False
    chosen = chosen_of("values", "clip", extra) | {"entropy_coef": 0.1, "compact": compact}
    for _ in range(2):
        result, gradients = run(fused, leaves, constants, chosen, dtype)
        assert result.loss.item() == 0 and all((g == 0).all() for g in gradients.values())
        leaves["hidden"] = leaves["hidden"][:, :0]
        constants, chosen = (
            {k: v[:, :0] if torch.is_tensor(v) else v for k, v in t.items()} for t in (constants, chosen)
        )


def test_half_precision_gradients_do_not_underflow():
    """The denominator is 10^7. Dividing by it before the cast of dlogits to float16 would flush every gradient to zero."""
    leaves, constants, _ = batch(16, torch.float16)
    leaves = {k: leaves[k] for k in ("hidden", "weight")}
    options = {"num_tokens": 10_000_000}
    _, got = run(fused, leaves, constants, options, torch.float16, upstream=65536.0)
    _, exact = run(reference_loss, leaves, constants, options, torch.float64, upstream=65536.0)
    for name, gradient in got.items():
        assert (gradient.double() - exact[name]).norm() <= 0.01 * exact[name].norm(), name


def test_gradients_only_for_inputs_that_require_them():
    leaves, constants, extra = batch(7, torch.bfloat16)
    chosen = chosen_of("values", "entropy_kl", extra)
    _, whole = run(fused, leaves, constants, chosen, torch.bfloat16)
    for wanted in leaves:
        x = {k: v.clone().requires_grad_(k == wanted) for k, v in leaves.items()}
        (0.37 * fused(**x, **constants, **chosen).loss).backward()
        assert torch.equal(x[wanted].grad, whole[wanted]), wanted
        assert all(v.grad is None for k, v in x.items() if k != wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inplace", [False, True])
def test_the_op_on_logits(dtype, inplace):
    """Check `logits_ppo_loss` of shifted logits with many options; with `inplace` the gradient overwrites the logits."""
    leaves, constants, extra = batch(2, t=9)
    base = (leaves["hidden"] @ leaves["weight"].t()).to(dtype)
    constants, extra = ({k: v[:, 1:] for k, v in x.items()} for x in (constants, extra))
    options = {"entropy_coef": 0.05, "softcap": 3.0, "logit_scale": 1.0, "kl_coef": 0.1}
    options |= {k: extra[k] for k in ("temperature", "ref_logprobs")}
    results = []
    for function, kind in (
        (logits_ppo_loss, dtype),
        (reference.logits_ppo_loss, dtype),
        (reference.logits_ppo_loss, torch.float64),
    ):
        leaf = base.to(kind).requires_grad_()
        work = leaf * 1
        wide = torch.promote_types(kind, torch.float32)
        arguments = {k: widen(v, wide) for k, v in (constants | options).items()}
        if function is logits_ppo_loss:
            arguments |= {"backend": "triton", "inplace": inplace}
        loss = function(work[:, :-1], **arguments).loss
        results.append((loss, torch.autograd.grad(0.37 * loss, leaf)[0]))
    check_error("loss", *(r[0] for r in results), scale=1.0)
    check_error("gradient", *(r[1] for r in results))
