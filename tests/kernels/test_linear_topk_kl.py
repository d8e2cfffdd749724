"""`linear_topk_kl`: by hand, float64, the whole vocabulary, rows in the products, memory, invalid arguments."""

import math

import pytest
import torch

from rlhf_kernels import LowRank, QuantisedWeight, linear_topk_kl, reference
from rlhf_kernels.launch_args import Transform, flatten
from rlhf_kernels.ops.linear_token_logprobs import HeadInputs, Storage
from rlhf_kernels.ops.linear_topk_kl import Inputs
from rlhf_kernels.token_args import TopkRule

from .helpers.compiled import compile_whole
from .helpers.distillation import OPTIONS, check, make, run

BACKENDS = ("reference", "cpu")
LOG2, LOG3 = math.log(2), math.log(3)


def by_hand(backend, ids, probabilities, **options):
    """Return the result for a student with probabilities 1/2, 1/4, 1/8, 1/8, and the gradient of its logits."""
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log().requires_grad_()
    teacher = torch.tensor([probabilities]).log()
    mask = torch.ones(1, dtype=torch.bool)
    got = linear_topk_kl(logits, torch.eye(4), torch.tensor([ids]), teacher, mask, **options, backend=backend)
    got.loss.backward()
    return got, logits.grad[0].tolist()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("options", "loss", "gradient"),
    [
        # p = 3/4 for id 1, 1/8 for id 0; q = 1/4, 1/2. KL = 3/4 log 3 - 1/8 log 4; dz_j = q_j 7/8 - p_j
        ({}, 0.75 * LOG3 - 0.25 * LOG2, [7 / 16 - 1 / 8, 7 / 32 - 3 / 4, 7 / 64, 7 / 64]),
        # the others have 1/8 and 1/4: + 1/8 log(1/2); dz_j = q_j - p_j, and q_j (1 - 1/2) for the others
        ({"tail": "lump"}, 0.75 * LOG3 - 0.375 * LOG2, [3 / 8, -1 / 2, 1 / 16, 1 / 16]),
        # 1/4 log(1/3) + 1/2 log 4, slopes q (s - t + 1): 1/4 (1 - log 3), 1/2 (1 + 2 log 2)
        (
            {"direction": "reverse"},
            LOG2 - 0.25 * LOG3,
            [
                (0.5 + LOG2) - 0.5 * (0.75 - 0.25 * LOG3 + LOG2),
                0.25 * (1 - LOG3) - 0.25 * (0.75 - 0.25 * LOG3 + LOG2),
                -0.125 * (0.75 - 0.25 * LOG3 + LOG2),
                -0.125 * (0.75 - 0.25 * LOG3 + LOG2),
            ],
        ),
        # + 1/4 log 2; the gradient is q_j (x_j - KL) with x = log(q / p) = 2 log 2, -log 3, log 2
        (
            {"direction": "reverse", "tail": "lump"},
            1.25 * LOG2 - 0.25 * LOG3,
            [
                0.5 * (0.75 * LOG2 + 0.25 * LOG3),
                0.25 * (-1.25 * LOG2 - 0.75 * LOG3),
                0.125 * (-0.25 * LOG2 + 0.25 * LOG3),
                0.125 * (-0.25 * LOG2 + 0.25 * LOG3),
            ],
        ),
        # m = 1/2 for id 1, 5/16 for id 0
        (
            {"direction": "jsd"},
            0.5 * (0.75 * math.log(1.5) + math.log(0.4) / 8) + 0.5 * (-0.25 * LOG2 + 0.5 * math.log(1.6)),
            None,
        ),
        # beta 1/4 of the teacher: m = 3/8 for id 1, 13/32 for id 0
        (
            {"direction": "jsd", "beta": 0.25},
            0.25 * (0.75 * LOG2 + math.log(4 / 13) / 8) + 0.75 * (0.25 * math.log(2 / 3) + 0.5 * math.log(16 / 13)),
            None,
        ),
    ],
)
def test_by_hand(isa, backend, options, loss, gradient):
    got, found = by_hand(backend, [1, 0], [0.75, 0.125], **options)
    assert got.loss.item() == pytest.approx(loss, rel=1e-6)
    assert got.kl.tolist() == pytest.approx([loss], rel=1e-6)
    assert (got.student_mass.item(), got.teacher_mass.item()) == pytest.approx((0.75, 0.875), rel=1e-6)
    if gradient:
        assert found == pytest.approx(gradient, rel=1e-5, abs=1e-7)
    assert sum(found) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [*OPTIONS.values()][:6], ids=[*OPTIONS][:6])
def test_an_unused_entry_changes_nothing(isa, backend, options):
    """Its log-prob is -inf, and its id is not read."""
    options = {k: v for k, v in options.items() if k != "num_tokens"}
    expected, gradient = by_hand(backend, [1, 0], [0.75, 0.125], **options)
    got, found = by_hand(backend, [1, 999, 0], [0.75, 0.0, 0.125], **options)
    assert found == pytest.approx(gradient, rel=1e-6)
    assert [x.item() for x in got] == pytest.approx([x.item() for x in expected], rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_id_that_is_listed_twice_counts_twice(isa, backend):
    """The teacher has 1/2 and 1/4 for id 1: the sum is that of two tokens with q = 1/4, and so is the gradient."""
    got, found = by_hand(backend, [1, 1], [0.5, 0.25])
    assert got.loss.item() == pytest.approx(0.5 * LOG2, rel=1e-6)
    assert got.student_mass.item() == pytest.approx(0.5)
    assert found == pytest.approx([0.375, 0.1875 - 0.75, 0.09375, 0.09375], rel=1e-6)
    lumped, found = by_hand(backend, [1, 1], [0.5, 0.25], tail="lump")
    assert lumped.loss.item() == pytest.approx(0.5 * LOG2 - 0.25 * LOG2, rel=1e-6)
    # the others have q = 1/2 and slope -1/4, of which each entry has the share -q / (1/2)
    assert found == pytest.approx([0.25, -0.375, 0.0625, 0.0625], rel=1e-6)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_matches_float64(dtype, options):
    leaves, constants, extra = make(0, dtype)
    more = {"weights": extra["weights"]} if "lump" in options else {}
    check(leaves, constants, OPTIONS[options] | more, dtype)


@pytest.mark.parametrize("options", ["forward", "jsd, lump"])
def test_every_instruction_set(isa, options):
    leaves, constants, extra = make(1)
    check(leaves, constants, OPTIONS[options] | {"temperature": extra["temperature"]}, torch.float32, chunk_tokens=32)


@pytest.mark.parametrize("direction", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("tail", ["drop", "lump"])
def test_all_tokens_listed_give_the_whole_divergence(direction, tail):
    """With K = V, the tail has no mass (its term is 1e-7 at most) and the sum is that of torch."""
    leaves, constants, _ = make(2, k=50, vocabulary=50, drift=2.0)
    logits = torch.nn.functional.linear(*(x.double() for x in leaves.values()))
    q = logits.log_softmax(-1)
    constants["teacher_logprobs"] = constants["teacher_logprobs"].double()
    teacher = torch.randn(4, 40, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).log_softmax(-1)
    constants |= {"teacher_logprobs": teacher, "teacher_ids": torch.arange(50).expand(4, 40, 50)}
    m = ((q.exp() + teacher.exp()) / 2).log()
    expected = {
        "forward": (teacher.exp() * (teacher - q)).sum(-1),
        "reverse": (q.exp() * (q - teacher)).sum(-1),
        "jsd": (teacher.exp() * (teacher - m) + q.exp() * (q - m)).sum(-1) / 2,
    }[direction]
    got = linear_topk_kl(**leaves, **constants, direction=direction, tail=tail)
    torch.testing.assert_close(got.kl.double(), torch.where(constants["mask"], expected, 0), rtol=1e-4, atol=3e-6)


# ---- rows, memory, gradients ----


@pytest.fixture
def products(monkeypatch):
    """Shapes of the operands of every matrix product of the head."""
    seen = []
    for name in ("mm", "addmm"):
        original = getattr(torch, name)

        def counted(*operands, original=original, **kwargs):
            seen.append(tuple(tuple(x.shape) for x in operands[-2:]))
            return original(*operands, **kwargs)

        monkeypatch.setattr(torch, name, counted)
    return seen


def test_rows_in_the_products(products):
    """Masked rows are in no product, rows with weight 0 in no backward product, and no product is [N, V]."""
    leaves, constants, extra = make(3, b=8)
    hidden, weight = (leaves[k].requires_grad_() for k in ("hidden", "weight"))
    linear_topk_kl(hidden, weight, **constants, weights=extra["weights"], chunk_tokens=32).loss.backward()
    counted = int(constants["mask"].sum())
    active = int((constants["mask"] & (extra["weights"] != 0)).sum())
    shape = tuple(weight.shape)
    forward = [a[0] for a, b in products if b == shape[::-1]]
    assert max(forward) <= 32 and counted <= sum(forward) < counted + 16
    assert sum(a[0] for a, b in products if b == shape) == active < counted
    assert not hidden.grad[~constants["mask"]].any()
    assert not hidden.grad[extra["weights"] == 0].any() and hidden.grad.any()


def test_gradients_only_for_inputs_that_require_them(products):
    leaves, constants, _ = make(4)
    hidden, weight = leaves["hidden"].requires_grad_(), leaves["weight"]
    linear_topk_kl(hidden, weight, **constants).loss.backward()
    assert len(products) == 2 and weight.grad is None  # a frozen head: 2 products
    products.clear()
    with torch.no_grad():
        assert not linear_topk_kl(hidden, weight, **constants).loss.requires_grad
    assert len(products) == 1


def test_micro_batches_with_the_global_number_of_tokens_add_up():
    leaves, constants, _ = make(5)
    total = int(constants["mask"].sum())
    whole, gradients = run(linear_topk_kl, leaves, constants, {}, torch.float32)
    loss, summed = 0.0, {name: torch.zeros_like(x) for name, x in gradients.items()}
    for rows in (slice(0, 1), slice(1, 4)):
        part = leaves | {"hidden": leaves["hidden"][rows]}
        given = {name: x[rows] for name, x in constants.items()}
        result, found = run(linear_topk_kl, part, given, {"num_tokens": total}, torch.float32)
        loss += result.loss
        for name, x in found.items():
            summed[name][rows if name == "hidden" else ...] += x
    torch.testing.assert_close(loss, whole.loss)
    for name, x in gradients.items():
        torch.testing.assert_close(summed[name], x, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens(backend):
    leaves, constants, _ = make(6)
    constants["mask"] = torch.zeros(4, 40, dtype=torch.bool)
    leaves["hidden"] = torch.full_like(leaves["hidden"], math.nan)
    got, gradients = run(linear_topk_kl, leaves, constants, {"backend": backend}, torch.float32)
    assert got.loss.item() == 0 and not got.kl.any() and not any(x.any() for x in gradients.values())


def test_packed_and_padded_have_the_same_bits():
    leaves, constants, _ = make(7)
    padded = linear_topk_kl(**leaves, **constants)
    constants = {name: x.flatten(0, 1) for name, x in constants.items()}
    flat = linear_topk_kl(**leaves | {"hidden": leaves["hidden"].flatten(0, 1)}, **constants)
    assert torch.equal(flat.loss, padded.loss) and torch.equal(flat.kl, padded.kl.flatten())


def test_adapters_and_quantised_weights():
    """The forms of the head that `linear_ppo_loss` takes."""
    leaves, constants, _ = make(8)
    hidden, weight = leaves["hidden"], leaves["weight"]
    a, b = torch.randn(3, 24).requires_grad_(), torch.randn(203, 3).requires_grad_()
    got = linear_topk_kl(hidden, weight, **constants, low_rank=LowRank.lora(hidden, a, b, 0.1))
    expected = linear_topk_kl(hidden, weight + 0.1 * b @ a, **constants)
    torch.testing.assert_close(got.loss, expected.loss)
    for x, y in zip(torch.autograd.grad(got.loss, (a, b)), torch.autograd.grad(expected.loss, (a, b)), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)
    scales = weight.abs().amax(1) / 127
    values = (weight / scales[:, None]).round().to(torch.int8)
    got = linear_topk_kl(hidden, QuantisedWeight.int8(values, scales), **constants)
    torch.testing.assert_close(got.loss, linear_topk_kl(hidden, values * scales[:, None], **constants).loss)


def test_extreme_logits(isa):
    """Probabilities that underflow: the divergences that stay finite are right, and the others are inf."""
    logits = torch.tensor([[0.0, -200.0, -1.0]]).requires_grad_()
    given = torch.eye(3), torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.5]]).log(), torch.ones(1, dtype=torch.bool)
    for direction, tail in (("forward", "drop"), ("reverse", "drop"), ("jsd", "drop"), ("reverse", "lump")):
        got = linear_topk_kl(logits, *given, direction=direction, tail=tail)
        wide = (x.double() if x.is_floating_point() else x for x in given)
        exact = linear_topk_kl(logits.double(), *wide, direction=direction, tail=tail)
        assert got.loss.item() == pytest.approx(exact.loss.item(), rel=1e-5)
        gradient, expected = (torch.autograd.grad(x.loss, logits)[0] for x in (got, exact))
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)
    underflow = torch.tensor([[0.0, -2000.0, -1.0]])
    assert linear_topk_kl(underflow, *given, direction="reverse").loss.isfinite()
    certain = torch.tensor([[1.0, 0.0]]).log()
    got = linear_topk_kl(logits, given[0], given[1], certain, given[3], tail="lump")
    assert got.loss.isfinite() and torch.autograd.grad(got.loss, logits)[0].isfinite().all()


def test_nan_shows_in_its_row_only():
    leaves, constants, _ = make(9)
    constants["mask"][:] = True
    leaves["hidden"][1, 3] = math.nan
    constants["teacher_logprobs"][2, 4, 0] = math.nan
    hidden = leaves["hidden"].requires_grad_()
    got = linear_topk_kl(hidden, leaves["weight"], **constants)
    bad = got.kl.isnan()
    assert bad.nonzero().tolist() == [[1, 3], [2, 4]] and got.loss.isnan()
    got.loss.backward()
    assert torch.equal(hidden.grad.isnan().any(-1), bad)


def test_backward_twice_and_second_derivatives_are_refused():
    leaves, constants, _ = make(10)
    hidden = leaves["hidden"].requires_grad_()
    loss = linear_topk_kl(hidden, leaves["weight"], **constants).loss
    with pytest.raises(RuntimeError, match="differentiates once"):
        torch.autograd.grad(loss, hidden, create_graph=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="linear_topk_kl: backward was called twice"):
        loss.backward()


def test_autocast():
    leaves, constants, _ = make(11)
    x = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
    with torch.autocast("cpu", torch.bfloat16):
        got = linear_topk_kl(**x, **constants)
    got.loss.backward()
    assert all(leaf.grad.dtype == torch.float32 for leaf in x.values())
    half = linear_topk_kl(**{k: v.detach().bfloat16() for k, v in x.items()}, **constants)
    assert torch.equal(got.loss, half.loss)


# ---- errors ----


@pytest.mark.parametrize(
    ("message", "change"),
    [
        (r"teacher_ids: got K = 6 ids per token, expected 1 to 5, the vocabulary of weight", {"weight": torch.zeros(5, 4)}),
        (r"teacher_ids: got K = 0", {"teacher_ids": torch.zeros(2, 3, 0).long(), "teacher_logprobs": torch.zeros(2, 3, 0)}),
        (r"teacher_ids: got 9, expected ids in \[0, 9\) wherever", {"teacher_ids": torch.full((2, 3, 6), 9)}),
        (r"teacher_ids: got -1, expected ids in", {"teacher_ids": torch.full((2, 3, 6), -1)}),
        (r"teacher_ids: got \(2, 3\), expected a tensor of shape \[..., K\]", {"teacher_ids": torch.zeros(2, 3).long()}),
        (r"teacher_ids: got dtype torch.float32", {"teacher_ids": torch.zeros(2, 3, 6)}),
        (r"teacher_ids: got NoneType", {"teacher_ids": None}),
        (r"teacher_logprobs: got shape \(2, 3, 5\)", {"teacher_logprobs": torch.zeros(2, 3, 5)}),
        (r"mask: got dtype torch.float32", {"mask": torch.zeros(2, 3)}),
        (r"weights: got shape \(3\)", {"weights": torch.zeros(3)}),
        (r"direction: got 'revers', expected one of .*; did you mean 'reverse'?", {"direction": "revers"}),
        (r"tail: got 'lumped', expected one of .*; did you mean 'lump'?", {"tail": "lumped"}),
        (r"beta: got 0.3, expected 0.5 with direction='forward', which does not read it", {"beta": 0.3}),
        (r"beta: got 1, expected a number below 1", {"direction": "jsd", "beta": 1}),
        (r"beta: got 0, expected a number above 0", {"direction": "jsd", "beta": 0}),
        (r"num_tokens: got -1, expected at least 0", {"num_tokens": -1}),
        (r"temperature: got 0", {"temperature": 0}),
        (r"compact: got False", {"compact": False}),
        (r"hidden: got shape \(4\)", {"hidden": torch.zeros(4)}),
        (r"backend: got 'fast'", {"backend": "fast"}),
    ],
)  # fmt: skip
def test_mistakes_are_named(message, change):
    given = {
        "hidden": torch.zeros(2, 3, 4),
        "weight": torch.zeros(9, 4),
        "teacher_ids": torch.arange(6).expand(2, 3, 6),
        "teacher_logprobs": torch.zeros(2, 3, 6),
        "mask": torch.ones(2, 3, dtype=torch.bool),
    }
    with pytest.raises(ValueError, match=f"^{message}"):
        linear_topk_kl(**given | change)


def test_masked_rows_may_have_any_ids():
    leaves, constants, _ = make(12)
    expected = linear_topk_kl(**leaves, **constants)
    hidden = constants["mask"][..., None]
    constants |= {
        "teacher_ids": torch.where(hidden, constants["teacher_ids"], 10**9),
        "teacher_logprobs": torch.where(hidden, constants["teacher_logprobs"], math.nan),
    }
    assert torch.equal(linear_topk_kl(**leaves, **constants).loss, expected.loss)
    assert reference.linear_topk_kl(**leaves, **constants).loss.isfinite()


def test_registered_op_and_compile():
    leaves, constants, extra = make(13)
    inputs = Inputs(
        HeadInputs.of(*(leaves[k] for k in ("hidden", "weight", "bias")), None), [True, True, True, False, False],
        Storage.of(leaves["weight"]), torch.zeros(160, dtype=torch.int64), constants["teacher_ids"].flatten(0, 1),
        constants["teacher_logprobs"].flatten(0, 1), constants["mask"].flatten(), extra["weights"].flatten(),
        torch.tensor(7.0), Transform.of(0.8), TopkRule(2, True, 0.3), None, True, "cpu",
    )  # fmt: skip
    torch.library.opcheck(
        torch.ops.rlhf_kernels.linear_topk_kl.default, flatten(inputs),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip

    def loss(hidden, weight):
        return linear_topk_kl(hidden, weight, **constants, direction="reverse", tail="lump").loss

    gradients = []
    for function in (compile_whole(loss), loss):
        x = [leaves[k].clone().requires_grad_() for k in ("hidden", "weight")]
        function(*x).backward()
        gradients.append([y.grad for y in x])
    assert all(map(torch.equal, *gradients))
