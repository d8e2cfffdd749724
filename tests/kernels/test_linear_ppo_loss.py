"""`linear_ppo_loss`: outputs and all gradients against float64, rows in the products, bits, memory, invalid arguments."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from rlhf_kernels import METRICS, has_products, linear_ppo_loss, linear_token_logprobs, ppo_loss, reference
from rlhf_kernels._options import PPOArguments
from rlhf_kernels.launch_args import Transform, flatten
from rlhf_kernels.ops import weights as matrices
from rlhf_kernels.ops.linear_ppo_loss import Inputs, Leaves
from rlhf_kernels.ops.linear_token_logprobs import HeadInputs, Storage, stats_of
from rlhf_kernels.ops.objective import ObjectiveTerms

from .helpers.head_loss import FLAGS, OPTIONS, check_loss, chosen_of, reference_loss, run
from .helpers.heads import differentiate, make, widen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("options", OPTIONS)
def test_matches_float64(dtype, flags, options):
    leaves, constants, extra = make(sorted(OPTIONS).index(options), dtype, b=8, t=64)
    check_loss(linear_ppo_loss, leaves, constants, chosen_of(flags, options, extra), dtype)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("seed", range(8))
def test_every_flag_on_small_draws(options, seed):
    """Few rows with one temperature each and tokens far from the reference: a single token often dominates the gradient."""
    leaves, constants, extra = make(seed, t=10)
    constants["advantages"][:, ::3] = 0
    check_loss(linear_ppo_loss, leaves, constants, chosen_of("everything", options, extra), torch.float32)


@pytest.mark.parametrize("seed", range(12))
def test_random_shapes(isa, seed):
    """Odd sizes, one row, one token, wide and narrow heads, with every flag on."""
    g = torch.Generator().manual_seed(seed)
    sizes = [int(torch.randint(1, high, (1,), generator=g)) for high in (4, 30, 700, 40)]
    b, t, v, h = [(1, 1, 2, 1), (1, 1, 700, 33), (3, 1, 65, 7)][seed] if seed < 3 else sizes
    leaves, constants, extra = make(seed, b=b, t=t, vocabulary=max(v, 2), hidden=h)
    options = chosen_of("everything", "softcap", extra) | {"kl_coef": 0.1, "temperature": extra["temperature"]}
    check_loss(linear_ppo_loss, leaves, constants, options, torch.float32)


@pytest.mark.parametrize("chunk_tokens", [1, 16, 33, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_change_nothing(dtype, chunk_tokens):
    leaves, constants, extra = make(3, dtype)
    options = {k: extra[k] for k in FLAGS["values"]} | {"entropy_coef": 0.01}
    whole, gradients = run(linear_ppo_loss, leaves, constants, options, dtype)
    parts, part_gradients = run(linear_ppo_loss, leaves, constants, options | {"chunk_tokens": chunk_tokens}, dtype)
    assert torch.equal(whole.loss, parts.loss)
    assert all(torch.equal(whole.metrics[k], parts.metrics[k]) for k in METRICS)
    for name, gradient in gradients.items():
        # In half precision each chunk's product is rounded once. In float32 the library sums in a different order.
        bound = (8 if dtype == torch.float32 else 2) * torch.finfo(dtype).eps * gradient.abs().max()
        assert bool((part_gradients[name] - gradient).abs().max() <= bound), name


@pytest.fixture
def products(monkeypatch):
    """Shapes of the operands of every matrix product of the head."""
    seen = []
    mm = torch.mm

    def counted(a, b, **kwargs):
        seen.append((tuple(a.shape), tuple(b.shape)))
        return mm(a, b, **kwargs)

    monkeypatch.setattr(torch, "mm", counted)
    return seen


def test_rows_in_the_products(products):
    """Masked rows are in no product, rows without a gradient in no backward product, and no product is [N, V]."""
    leaves, constants, _ = make(5, b=8, t=40, drift=0.0)
    leaves = {k: leaves[k] for k in ("hidden", "weight")}
    constants["old_logprobs"] = linear_token_logprobs(**leaves, ids=constants["ids"]).logprobs
    constants["advantages"] = torch.ones(8, 40)
    constants["advantages"][:, ::2] = 0  # no gradient: the ratio is 1, within the clip range, and no other terms
    products.clear()
    result, _ = run(linear_ppo_loss, leaves, constants, {"chunk_tokens": 32}, torch.float32)
    counted, (vocabulary, hidden) = int(constants["mask"].sum()), leaves["weight"].shape
    active = int((constants["mask"] & (constants["advantages"] != 0)).sum())
    forward = [a[0] for a, b in products if b == (hidden, vocabulary)]
    into_hidden = [a[0] for a, b in products if b == (vocabulary, hidden)]
    assert max(forward) <= 32
    assert counted <= sum(forward) < counted + 16  # the last chunk is padded up to 16 rows
    assert sum(into_hidden) == active
    assert result.metrics["active_fraction"].item() == pytest.approx(active / counted)


def test_all_clipped_rows_have_no_gradient(products):
    """Clipped tokens have no gradient, and there are no backward products."""
    leaves, constants, _ = make(6)
    leaves = {k: leaves[k] for k in ("hidden", "weight")}
    logprobs = linear_token_logprobs(**leaves, ids=constants["ids"]).logprobs
    constants["old_logprobs"] = logprobs - 1  # ratio e
    constants["advantages"] = torch.ones_like(logprobs)
    products.clear()
    result, gradients = run(linear_ppo_loss, leaves, constants, {}, torch.float32)
    assert result.loss.item() == pytest.approx(-1.2, rel=1e-6)
    assert all((g == 0).all() for g in gradients.values())
    assert len(products) == 1


@pytest.mark.parametrize("objective", ["ipo", "dppo_tv", "dppo_kl"])
def test_rows_outside_the_trust_region_are_in_no_backward_product(products, objective):
    leaves, constants, _ = make(6, b=8, t=40)
    leaves = {k: leaves[k] for k in ("hidden", "weight")}
    logprobs = linear_token_logprobs(**leaves, ids=constants["ids"]).logprobs
    constants["old_logprobs"] = torch.where(torch.arange(40) % 4 > 0, logprobs - 3, logprobs)  # ratio e^3, or 1
    constants["advantages"] = torch.ones_like(logprobs)
    products.clear()
    options = {"objective": objective, "divergence": 1e-6, "log_ratio_coef": 0.0}
    result, gradients = run(linear_ppo_loss, leaves, constants, options, torch.float32)
    inside = constants["mask"] & (torch.arange(40) % 4 == 0)
    (into_hidden,) = (a[0] for a, b in products if b == tuple(leaves["weight"].shape))
    assert into_hidden == int(inside.sum())
    assert result.metrics["clipfrac"].item() == pytest.approx(1 - inside.sum().item() / constants["mask"].sum().item())
    assert (gradients["hidden"][~inside] == 0).all() and (gradients["hidden"][inside] != 0).any(-1).all()


def test_gradients_only_for_inputs_that_require_them(products):
    leaves, constants, _ = make(7)
    hidden, weight = leaves["hidden"].clone().requires_grad_(), leaves["weight"]
    linear_ppo_loss(hidden, weight, **constants).loss.backward()
    assert len(products) == 2 and weight.grad is None  # a frozen head: 2 products
    products.clear()
    with torch.no_grad():
        assert not linear_ppo_loss(hidden, weight, **constants).loss.requires_grad
    assert len(products) == 1


def test_frozen_hidden_states(products):
    leaves, constants, _ = make(7)
    weight = leaves["weight"].clone().requires_grad_()
    linear_ppo_loss(leaves["hidden"], weight, **constants).loss.backward()
    assert len(products) == 2 and weight.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs_are_bit_identical_in_any_batch(dtype):
    """A row has the same bits by itself, in a batch, and in any chunk of 16 rows or more."""
    leaves, constants, _ = make(8, dtype, b=10, t=40, vocabulary=1003, hidden=96)
    hidden, weight, ids = leaves["hidden"].view(400, 96), leaves["weight"], constants["ids"].view(400)
    whole = linear_token_logprobs(hidden, weight, ids, entropy=True)
    for chunk in (16, 17, 50, 333):
        part = linear_token_logprobs(hidden, weight, ids, entropy=True, chunk_tokens=chunk)
        assert torch.equal(part.logprobs, whole.logprobs) and torch.equal(part.entropy, whole.entropy), chunk
    for rows in (slice(5, 6), slice(3, 12), slice(100, 117), slice(0, 399)):
        assert torch.equal(linear_token_logprobs(hidden[rows], weight, ids[rows]).logprobs, whole.logprobs[rows]), rows


def test_same_bits_twice():
    leaves, constants, extra = make(9)
    options = {k: extra[k] for k in FLAGS["values"]} | {"entropy_coef": 0.01}
    (first, first_gradients), (second, second_gradients) = (
        run(linear_ppo_loss, leaves, constants, options, torch.float32) for _ in range(2)
    )
    assert torch.equal(first.loss, second.loss)
    assert all(torch.equal(first_gradients[k], second_gradients[k]) for k in first_gradients)


def test_ratios_are_exactly_one_for_rescored_rollouts():
    leaves, constants, _ = make(10, torch.bfloat16)
    head = {k: leaves[k] for k in ("hidden", "weight", "bias")}
    constants["old_logprobs"] = linear_token_logprobs(**head, ids=constants["ids"], mask=constants["mask"]).logprobs
    metrics = linear_ppo_loss(**head, **constants).metrics
    assert metrics["ratio_mean"] == 1 and metrics["ratio_max"] == 1 and metrics["approx_kl"] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("retain", [True, False])
def test_second_backward_raises(dtype, retain):
    leaves, constants, _ = make(11, dtype)
    weight = leaves["weight"].clone().requires_grad_()
    loss = linear_ppo_loss(leaves["hidden"], weight, **constants).loss
    loss.backward(retain_graph=retain)
    with pytest.raises(RuntimeError, match=r"^linear_ppo_loss: backward was called twice for one loss;.*again$"):
        loss.backward()


def test_second_backward_raises_where_hooks_replace_saved_tensors():
    """Autograd does not check the version of tensors that hooks return, so it would scale a gradient twice."""
    leaves, constants, _ = make(11)
    weight = leaves["weight"].clone().requires_grad_()
    with torch.autograd.graph.save_on_cpu():
        loss = linear_ppo_loss(leaves["hidden"], weight, **constants).loss
    (0.5 * loss).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward was called twice"):
        loss.backward()


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("inside", [True, False])
def test_checkpointed_regions_give_the_same_gradients(use_reentrant, inside):
    """The loss may be inside a checkpointed region, or read the output of one."""
    leaves, constants, _ = make(15)

    def gradients(region):
        x = {k: leaves[k].clone().requires_grad_() for k in ("hidden", "weight")}
        return differentiate(region(**x), x, 0.37)

    def checkpointed(hidden, weight):
        if inside:
            return checkpoint(plain, hidden, weight, use_reentrant=use_reentrant)
        return linear_ppo_loss(checkpoint(torch.tanh, hidden, use_reentrant=use_reentrant), weight, **constants).loss

    def plain(hidden, weight):
        return linear_ppo_loss(hidden.tanh(), weight, **constants).loss

    expected, got = gradients(plain), gradients(checkpointed)
    assert expected.keys() == got.keys() and all(torch.equal(expected[k], got[k]) for k in got)


def test_two_losses_in_one_backward():
    leaves, constants, _ = make(12)
    names = ("hidden", "weight")
    apart = []
    for objective, factor in (("clip", 0.37), ("ratio", 2.0)):
        x = {k: leaves[k].clone().requires_grad_() for k in names}
        apart.append(differentiate(linear_ppo_loss(**x, **constants, objective=objective).loss, x, factor))
    x = {k: leaves[k].clone().requires_grad_() for k in names}
    clip, ratio = (linear_ppo_loss(**x, **constants, objective=o).loss for o in ("clip", "ratio"))
    (0.37 * clip + 2 * ratio).backward()
    for name in names:
        torch.testing.assert_close(x[name].grad, apart[0][name] + apart[1][name])


def test_grad_dtype_is_respected():
    """A half-precision parameter with float32 gradients gets the sum over chunks without rounding."""
    leaves, constants, _ = make(13, torch.bfloat16)
    weight = torch.nn.Parameter(leaves["weight"].clone())
    weight.grad_dtype = torch.float32
    linear_ppo_loss(leaves["hidden"], weight, **constants, chunk_tokens=32).loss.backward()
    assert weight.grad.dtype == torch.float32
    rounded = torch.nn.Parameter(leaves["weight"].clone())
    linear_ppo_loss(leaves["hidden"], rounded, **constants, chunk_tokens=32).loss.backward()
    assert torch.equal(weight.grad.bfloat16(), rounded.grad)
    assert not torch.equal(weight.grad, rounded.grad.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_empty_mask_gives_zeros(dtype):
    """For an empty mask and for an empty batch, loss and gradients are 0, not NaN."""
    leaves, constants, extra = make(14, dtype)
    constants["mask"][:] = False
    options = {k: extra[k] for k in FLAGS["values"]} | {"entropy_coef": 0.1}
    result, gradients = run(linear_ppo_loss, leaves, constants, options, dtype)
    assert result.loss.item() == 0 and all((g == 0).all() for g in gradients.values())
    leaves["hidden"] = leaves["hidden"][:, :0]
    constants, options = (
        {k: v[:, :0] if torch.is_tensor(v) else v for k, v in t.items()} for t in (constants, options)
    )
    result, gradients = run(linear_ppo_loss, leaves, constants, options, dtype)
    assert result.loss.item() == 0 and all((g == 0).all() for g in gradients.values())


def test_masked_rows_do_not_matter():
    leaves, constants, extra = make(15)
    options = {k: extra[k] for k in FLAGS["everything"]} | {"entropy_coef": 0.1, "kl_coef": 0.1}
    clean, clean_gradients = run(linear_ppo_loss, leaves, constants, options, torch.float32)
    out = ~constants["mask"]
    constants["ids"] = constants["ids"].masked_fill(out, -100)
    for tensors in (constants, options):
        for name, x in tensors.items():
            if torch.is_tensor(x) and x.is_floating_point() and name != "temperature":
                tensors[name] = x.masked_fill(out, torch.nan)
    dirty, gradients = run(linear_ppo_loss, leaves, constants, options, torch.float32)
    assert torch.equal(clean.loss, dirty.loss)
    assert all(torch.equal(gradients[k], clean_gradients[k]) for k in gradients)


def test_half_precision_gradients_do_not_underflow():
    """A denominator of 10^7 in float16: dividing before the cast of dlogits would flush every gradient to zero."""
    leaves, constants, _ = make(16, torch.float16)
    x = leaves["hidden"].clone().requires_grad_()
    head = (leaves["weight"],)
    loss = linear_ppo_loss(x, *head, **constants, num_tokens=10_000_000).loss
    (loss * 65536.0).backward()
    exact = leaves["hidden"].double().requires_grad_()
    wide = {k: widen(v, torch.float64) for k, v in constants.items()}
    (65536.0 * linear_ppo_loss(exact, leaves["weight"].double(), **wide, num_tokens=10_000_000).loss).backward()
    assert (x.grad.double() - exact.grad).norm() <= 0.01 * exact.grad.norm()


@pytest.mark.parametrize("op", ["loss", "logprobs"])
def test_sums_over_many_rows_do_not_overflow_half_precision(op):
    """The gradients of 2048 rows have the same direction: their float16 sum exceeds 65504 before the division by 2048."""
    torch.manual_seed(0)
    hidden, weight = (50 + 2 * torch.randn(2048, 32)).half(), torch.randn(64, 32).half().requires_grad_()
    ids, ones = torch.zeros(2048, dtype=torch.long), torch.ones(2048)
    if op == "loss":
        linear_ppo_loss(hidden, weight, ids, ones, ones, ones.bool(), objective="policy_gradient").loss.backward()
    else:
        (-linear_token_logprobs(hidden, weight, ids).logprobs.mean()).backward()
    exact = weight.detach().double().requires_grad_()
    (-reference.linear_token_logprobs(hidden.double(), exact, ids).logprobs.mean()).backward()
    assert (weight.grad - exact.grad).abs().max() <= 2e-3 * exact.grad.abs().max()


def test_masked_hidden_states_may_be_nan():
    leaves, constants, extra = make(23)
    options = {k: extra[k] for k in FLAGS["values"]}
    clean, clean_gradients = run(linear_ppo_loss, leaves, constants, options, torch.float32)
    leaves["hidden"] = leaves["hidden"].masked_fill(~constants["mask"][..., None], torch.nan)
    for function in (linear_ppo_loss, reference_loss):
        dirty, gradients = run(function, leaves, constants, options, torch.float32)
        torch.testing.assert_close(dirty.loss, clean.loss)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, clean_gradients[name], rtol=1e-4, atol=1e-6)


def test_float64_tensors_with_float32_hidden_states():
    """Values and the value head may have a wider dtype than the hidden states."""
    leaves, constants, extra = make(24)
    options = {k: extra[k].double() for k in FLAGS["values"]}
    head = {k: leaves[k] for k in ("hidden", "weight")}
    value_weight = leaves["value_weight"].double().requires_grad_()
    got = linear_ppo_loss(**head, **constants, value_weight=value_weight, **options)
    narrow = {k: v.float() for k, v in options.items()}
    expected = linear_ppo_loss(**head, **constants, value_weight=leaves["value_weight"], **narrow)
    torch.testing.assert_close(got.loss, expected.loss)
    got.loss.backward()
    assert value_weight.grad.dtype == torch.float64 and value_weight.grad.isfinite().all()


def test_second_derivatives_are_refused():
    leaves, constants, _ = make(25)
    x = leaves["hidden"].clone().requires_grad_()
    old, tokens = constants["old_logprobs"], constants["old_logprobs"].clone().requires_grad_()
    with pytest.raises(RuntimeError, match="differentiates once"):
        loss = ppo_loss(tokens, old, constants["advantages"], constants["mask"]).loss
        torch.autograd.grad(loss, tokens, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiates once"):
        torch.autograd.grad(linear_ppo_loss(x, leaves["weight"], **constants).loss, x, create_graph=True)
    out = linear_token_logprobs(x, leaves["weight"], constants["ids"]).logprobs.sum()
    (gradient,) = torch.autograd.grad(out, x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiates once"):
        gradient.square().sum().backward()


def test_non_contiguous_inputs():
    leaves, constants, _ = make(17)
    expected = linear_ppo_loss(leaves["hidden"], leaves["weight"], **constants)
    hidden = leaves["hidden"].transpose(0, 1).contiguous().transpose(0, 1)
    weight = leaves["weight"].t().contiguous().t()
    strided = {k: v.t().contiguous().t() for k, v in constants.items()}
    hidden.requires_grad_(), weight.requires_grad_()
    got = linear_ppo_loss(hidden, weight, **strided)
    torch.testing.assert_close(got.loss, expected.loss)
    got.loss.backward()
    assert hidden.grad.isfinite().all() and weight.grad.isfinite().all()


def test_autocast_casts_as_for_a_linear_layer():
    """Under autocast, the products of float32 parameters are in bfloat16 and the parameters' gradients in float32."""
    leaves, constants, _ = make(22)
    x = {k: leaves[k].clone().requires_grad_() for k in ("hidden", "weight", "bias")}
    with torch.autocast("cpu", torch.bfloat16):
        result = linear_ppo_loss(**x, **constants)
    gradients = differentiate(result.loss, x)
    half = {k: v.detach().bfloat16().requires_grad_() for k, v in x.items()}
    expected = linear_ppo_loss(**half, **constants)
    assert torch.equal(result.loss, expected.loss)
    for name, gradient in differentiate(expected.loss, half).items():
        assert gradients[name].dtype == torch.float32 and torch.equal(gradients[name], gradient.float())


def test_autocast_leaves_the_value_head_in_float32():
    leaves, constants, extra = make(22)
    x = {k: leaves[k].clone().requires_grad_() for k in ("hidden", "weight", "value_weight", "value_bias")}
    options = constants | {k: extra[k] for k in ("old_values", "returns")}
    with torch.autocast("cpu", torch.bfloat16):
        result = linear_ppo_loss(**x, **options)
    half = {k: v.detach() if "value" in k else v.detach().bfloat16() for k, v in x.items()}
    half = {k: v.requires_grad_() for k, v in half.items()}
    expected = linear_ppo_loss(**half, **options)
    assert torch.equal(result.loss, expected.loss)
    gradients = differentiate(result.loss, x)
    for name, gradient in differentiate(expected.loss, half).items():
        assert gradients[name].dtype == torch.float32 and torch.equal(gradients[name], gradient.float())


def test_separate_value_model():
    leaves, constants, extra = make(18)
    values = torch.randn(4, 40, requires_grad=True)
    options = {k: extra[k] for k in FLAGS["values"]}
    linear_ppo_loss(leaves["hidden"], leaves["weight"], **constants, values=values, **options).loss.backward()
    exact = values.detach().double().requires_grad_()
    wide = {k: widen(v, torch.float64) for k, v in (constants | options).items()}
    reference_loss(
        hidden=leaves["hidden"].double(), weight=leaves["weight"].double(), values=exact, **wide
    ).loss.backward()
    torch.testing.assert_close(values.grad.double(), exact.grad)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": torch.full((4, 40), 203)}, "ids: got 203"),
        ({"weight": torch.zeros(203, 25)}, r"weight: got shape \(203, 25\)"),
        (
            {"weight": torch.zeros(203, 24, dtype=torch.float64)},
            "weight: got dtype torch.float64, expected torch.float32",
        ),
        ({"bias": torch.zeros(3)}, r"bias: got shape \(3\)"),
        ({"value_weight": torch.zeros(24)}, "returns is not set, but the value loss needs it"),
        ({"value_bias": torch.zeros(())}, "value_bias is set but value_weight is not"),
        ({"entropy": torch.zeros(4, 40)}, "entropy: got a tensor, expected None"),
        ({"temperature": -2.0}, "temperature: got -2.0"),
        ({"chunk_tokens": 0}, "chunk_tokens: got 0"),
        (
            {"values": torch.zeros(4, 40), "value_weight": torch.zeros(24), "returns": torch.zeros(4, 40)},
            "pass values or value_weight, not both",
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_mistakes_are_named(change, message):
    leaves, constants, _ = make(19)
    arguments = {k: leaves[k] for k in ("hidden", "weight")} | constants | change
    with pytest.raises(ValueError, match=message):
        linear_ppo_loss(**arguments)


def test_unknown_option_names_the_nearest():
    leaves, constants, _ = make(20)
    with pytest.raises(TypeError, match="'clip_range'; did you mean 'cliprange'"):
        linear_ppo_loss(leaves["hidden"], leaves["weight"], **constants, clip_range=0.1)


@pytest.mark.parametrize("known", [False, True])
def test_opcheck(known):
    n, v, h = 9, 37, 8
    args = PPOArguments(returns=torch.randn(n), entropy_coef=0.1)
    terms = ObjectiveTerms.of(args, torch.randn(n) - 3, torch.randn(n), torch.rand(n) > 0.3)
    of_head = HeadInputs(*(torch.randn(shape) for shape in ((n, h), (v, h), (v,), (n, 3), (v, 3))))
    leaves = Leaves(of_head, torch.randn(h), torch.randn(()), None)
    head = of_head, Storage.of(of_head.weight), torch.randint(0, v, (n,))
    inputs = Inputs(
        leaves=leaves,
        needs=[True] * 7 + [False],
        storage=head[1],
        ids=head[2],
        transform=Transform(),
        chunk_tokens=None,
        compact=False,
        stats=stats_of(*head, terms.mask, Transform(), None, "cpu") if known else None,
        old_values=None,
        returns=args.returns,
        terms=terms,
        backend="cpu",
    )
    result = torch.library.opcheck(torch.ops.rlhf_kernels.linear_ppo_loss, flatten(inputs))
    assert set(result.values()) == {"SUCCESS"}


def test_compiles_as_one_graph():
    leaves, constants, extra = make(21, torch.bfloat16)
    options = {k: extra[k] for k in FLAGS["values"]} | {"entropy_coef": 0.01, "aggregation": "seq_mean_token_mean"}

    def loss(hidden, weight, value_weight):
        result = linear_ppo_loss(hidden * 1, weight, **constants, value_weight=value_weight, **options)
        return result.loss, result.metrics["entropy"]

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True)):
        x = {k: leaves[k].clone().requires_grad_() for k in ("hidden", "weight", "value_weight")}
        value, entropy = function(*x.values())
        results.append((value, entropy, differentiate(value, x)))
    (eager, eager_entropy, gradients), (got, entropy, compiled) = results
    assert torch.equal(eager, got) and torch.equal(eager_entropy, entropy)
    for name, gradient in gradients.items():
        torch.testing.assert_close(compiled[name], gradient)


@pytest.mark.parametrize("compact", [False, "yes", 2])
def test_invalid_compact_raises(compact):
    leaves, constants, _ = make(22)
    with pytest.raises(ValueError, match=f"compact: got {compact!r}, expected None"):
        linear_ppo_loss(leaves["hidden"], leaves["weight"], **constants, compact=compact)


@pytest.mark.parametrize("shape", [(40, 3000, 24), (40, 24, 3000), (3000, 40, 24), (17, 8, 9)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("add", [False, True])
def test_products_of_a_processor_without_half_precision(monkeypatch, shape, dtype, add):
    """Products are float32 sums of the rounded factors, rounded once, for any longest dimension."""
    monkeypatch.setattr(matrices, "has_products", lambda dtype, device: dtype == torch.float32)
    rows, terms, columns = shape
    a, b = torch.randn(rows, terms).to(dtype), torch.randn(columns, terms).to(dtype).t()
    for out in (
        torch.randn(rows, columns),
        torch.randn(rows, columns).to(dtype),
        torch.randn(columns, rows).to(dtype).t(),
    ):
        exact = a.double() @ b.double() + (out.double() if add else 0.0)
        with torch.autocast("cpu", torch.bfloat16):  # autocast would round float32 factors again
            matrices.product(a, b, out, add=add)
        bound = torch.finfo(out.dtype).eps * exact.abs() + 1e-6 * (a.double().abs() @ b.double().abs() + 1.0)
        assert bool(((out.double() - exact).abs() <= bound).all())


def test_same_loss_without_half_precision_products(monkeypatch):
    """No product is in half precision, with a bias and with several chunks, whose weight gradients are summed."""
    leaves, constants, extra = make(12, torch.bfloat16)
    options = constants | {k: extra[k] for k in FLAGS["values"]} | {"chunk_tokens": 16}
    bias = torch.randn(leaves["weight"].shape[0]).bfloat16()
    x = {name: leaf.detach().requires_grad_() for name, leaf in (leaves | {"bias": bias}).items()}
    seen, found = [], []

    def noted(product):
        return lambda *factors, **rest: seen.append(factors[-1].dtype) or product(*factors, **rest)

    monkeypatch.setattr(torch, "mm", noted(torch.mm))
    monkeypatch.setattr(torch, "addmm", noted(torch.addmm))
    for has in (True, False):
        monkeypatch.setattr(matrices, "has_products", lambda dtype, device, has=has: has or dtype == torch.float32)
        seen.clear()
        result = linear_ppo_loss(**x, **options)
        found.append([result.loss.detach(), *differentiate(result.loss, x).values()])
        assert (torch.bfloat16 in seen) == has
    for ours, theirs in zip(*found, strict=True):
        assert float((ours - theirs).float().norm()) <= 0.02 * float(theirs.float().norm())


def test_has_products():
    """Products in float32 and float64 and all products on a GPU are supported."""
    assert (
        has_products(torch.float64, "cpu")
        and has_products(torch.float32, "cpu")
        and has_products(torch.bfloat16, "cuda")
    )
