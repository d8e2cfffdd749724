"""The fused head with an adapter and with int8 and NF4 weights: against float64, products, bits, memory, mistakes."""

import pytest
import torch

from rlhf_kernels import METRICS, LowRank, QuantisedWeight, linear_ppo_loss, linear_token_logprobs

from .helpers.bounds import check_error
from .helpers.compiled import compile_whole
from .helpers.head_forms import (
    DRAWS,
    FORMS,
    check_forms,
    form_of,
    int8_of,
    logprobs_form,
    low_rank,
    nf4_of,
    small_tiles,
)
from .helpers.head_loss import OPTIONS, chosen_of, run
from .helpers.heads import differentiate, make, widen
from .helpers.memory import largest_block

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BACKENDS = ["cpu", "triton"]
SIZES = {"cpu": {"b": 8, "t": 32}, "triton": {"t": 5}}
WITH_HALF = [*((dtype, form) for dtype in DTYPES[:2] for form in FORMS), (torch.float16, "nf4 lora")]
PATHS = ["clip", "entropy_kl", "sequence", "softcap"]
"""Options whose logits or their gradients are computed in different ways. The others only change a row's coefficient."""
LOSSES = [
    *((dtype, form, options) for dtype, form in WITH_HALF for options in PATHS),
    *((dtype, "nf4 lora", options) for dtype in DTYPES for options in OPTIONS if options not in PATHS),
]


@pytest.mark.parametrize(("dtype", "form", "options"), LOSSES)
def test_loss_matches_float64(monkeypatch, form, options, dtype):
    """Value head, one temperature per row, masks and zero coefficients: all options of the objective, and all forms."""
    small_tiles(monkeypatch)
    draws = [form_of(form, seed, dtype, **SIZES["cpu"]) for seed in range(DRAWS["cpu"])]
    check_forms(draws, lambda made: chosen_of("everything", options, made.extra), dtype)


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("options", ["sequence", "softcap"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("compact", [True, None])
def test_loss_on_a_gpu_matches_float64(monkeypatch, form, options, dtype, compact):
    small_tiles(monkeypatch)
    draws = [form_of(form, seed, dtype, "triton", **SIZES["triton"]) for seed in range(DRAWS["triton"])]
    for made in draws:
        made.constants["advantages"][:, ::3] = 0
    without = {"entropy_coef": 0.0} if options == "softcap" else {}
    how = {"compact": compact, "chunk_tokens": 17}
    check_forms(draws, lambda made: chosen_of("everything", options, made.extra) | without, dtype, how)


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("chunk_tokens", [None, 48])
def test_packed_sequences_match_float64(monkeypatch, form, dtype, chunk_tokens):
    small_tiles(monkeypatch)

    def packed(made):
        leaves = made.leaves | {"hidden": made.leaves["hidden"].flatten(0, 1)}
        constants, extra = ({k: x.flatten(0, 1) for k, x in t.items()} for t in (made.constants, made.extra))
        return made._replace(leaves=leaves, constants=constants, extra=extra, before=made.before.flatten(0, 1))

    def options_of(made):
        chosen = {k: made.extra[k] for k in ("returns", "old_values", "ref_logprobs", "temperature")}
        chosen |= {"cu_seqlens": torch.tensor([0, 5, 5, 100, 180, 256], dtype=torch.int32)}
        chosen |= {"ratio_level": "sequence", "aggregation": "seq_mean_token_mean"}
        return chosen | {"entropy_coef": 0.02, "kl_coef": 0.1}

    draws = [packed(form_of(form, seed, dtype, **SIZES["cpu"])) for seed in range(DRAWS["cpu"])]
    check_forms(draws, options_of, dtype, {"chunk_tokens": chunk_tokens})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "form"), WITH_HALF)
@pytest.mark.parametrize(
    "options",
    [{}, {"softcap": 3.0, "logit_scale": 0.7}, {"temperature": "row"}, {"chunk_tokens": 17}],
    ids=str,
)
def test_logprobs_match_float64(monkeypatch, form, options, dtype, backend):
    small_tiles(monkeypatch)
    draws = [logprobs_form(form, seed, dtype, backend, **SIZES[backend]) for seed in range(DRAWS[backend])]

    def results(made, way, dtype):
        chosen = options | {"mask": made.constants["mask"]}
        if options.get("temperature") == "row":
            chosen["temperature"] = made.extra["temperature"].to(torch.promote_types(dtype, torch.float32))
        if way != "fused":
            chosen.pop("chunk_tokens", None)
        ids = made.constants["ids"]
        weights = torch.linspace(-1, 1, ids.numel(), dtype=torch.float64, device=ids.device).view(ids.shape)
        x = {k: leaf.to(dtype).clone().requires_grad_() for k, leaf in made.leaves.items()}
        out = getattr(made, way)(**x, ids=ids, entropy=True, **chosen)
        found = differentiate((out.logprobs * weights).sum() - 0.3 * (out.entropy * weights.flip(0)).sum(), x)
        return found | {"logprobs": out.logprobs, "entropy": out.entropy}

    def stacked(way, dtype):
        found = [results(made, way, dtype) for made in draws]
        return {name: torch.stack([one[name] for one in found]) for name in found[0]}

    got, exact = stacked("fused", dtype), stacked("exact", torch.float64)
    eager = [stacked(way, dtype) for way in ("eager", "exact")]
    for name, x in got.items():
        if name in draws[0].frozen:
            assert not x.any()
        else:
            check_error(name, x, [one[name] for one in eager], exact[name])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("op", [linear_ppo_loss, linear_token_logprobs])
def test_float64_uses_the_reference(form, op):
    """The float64 result equals that of the head `W + s B A`."""
    made = form_of(form, 3, op=op) if op is linear_ppo_loss else logprobs_form(form, 3)
    leaves = {k: x.double() for k, x in made.leaves.items()}
    chosen = {k: widen(x, torch.float64) for k, x in made.constants.items() if op is linear_ppo_loss or k == "ids"}
    if op is linear_ppo_loss:
        chosen |= {"returns": made.extra["returns"].double(), "entropy_coef": 0.02}
    arguments = leaves | chosen
    if made.weight is not None:
        arguments["weight"] = made.weight
    if "lora_a" in leaves:
        adapter = arguments.pop("lora_a"), arguments.pop("lora_b")
        arguments["low_rank"] = low_rank(leaves["hidden"], *adapter)
    got, exact = op(**arguments), made.exact(**leaves, **chosen)
    torch.testing.assert_close(got[0], exact[0], rtol=1e-12, atol=1e-12)


# ---- products ----


@pytest.fixture
def operations(monkeypatch):
    """Multiplications and additions of every matrix product of the head, by the shapes of its factors."""
    seen = []

    def counted(function, first):
        def call(*arguments, **options):
            a, b = arguments[first : first + 2]
            seen.append(2 * a.shape[0] * a.shape[1] * b.shape[1])
            return function(*arguments, **options)

        return call

    monkeypatch.setattr(torch, "mm", counted(torch.mm, 0))
    monkeypatch.setattr(torch, "addmm", counted(torch.addmm, 1))
    monkeypatch.setattr(torch.Tensor, "addmm_", counted(torch.Tensor.addmm_, 1))
    return seen


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("form", FORMS)
def test_a_frozen_head_needs_two_products(monkeypatch, operations, form, dtype):
    """Without a weight gradient the products cost 4NVH, and three products of 2NVR for the adapter."""
    small_tiles(monkeypatch)
    made = form_of(form, 7, dtype, b=2, t=32, keep=2.0)
    made.constants["advantages"].fill_(1.0)
    n, (v, h) = 64, made.leaves["weight"].shape
    trained = [k for k in made.leaves if k == "hidden" or k.startswith("lora")]
    leaves = {k: made.leaves[k].clone().requires_grad_(k in trained) for k in ("hidden", "weight", *trained)}
    loss = made.fused(**leaves, **made.constants, objective="policy_gradient").loss
    r = 5 if form.endswith("lora") else 0
    assert sum(operations) == 4 * n * v * h + 3 * 2 * n * v * r
    loss.backward()  # the products of A are not products of the head
    assert leaves["weight"].grad is None and all(leaves[k].grad.abs().max() > 0 for k in trained)


def test_gradients_only_for_inputs_that_require_them(operations):
    made = form_of("lora", 7)
    _, whole = run(made.fused, made.leaves, made.constants, {}, torch.float32)
    for wanted in ("hidden", "weight", "lora_a", "lora_b"):
        x = {k: v.clone().requires_grad_(k == wanted) for k, v in made.leaves.items() if not k.startswith("value")}
        (0.37 * made.fused(**x, **made.constants).loss).backward()
        assert torch.equal(x[wanted].grad, whole[wanted]), wanted
        assert all(v.grad is None for k, v in x.items() if k != wanted)


# ---- memory ----


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("form", FORMS)
def test_no_tensor_has_the_size_of_the_frozen_weight(monkeypatch, form, dtype):
    """Neither the loss nor the log-probs, nor their gradients, allocate V x H elements, not even of one byte each."""
    monkeypatch.setattr("rlhf_kernels.ops.weights.TILE_BYTES", 2**16)
    # Rows of a half-precision weight that are in float32 at a time, on a processor without half-precision products.
    monkeypatch.setattr("rlhf_kernels.ops.weights._PART", 64)
    v, h = 2048, 512
    g = torch.Generator().manual_seed(0)
    weight = 0.1 * torch.randn(v, h, generator=g)
    weight = weight.to(dtype) if form == "lora" else (int8_of if form.startswith("int8") else nf4_of)(weight)
    hidden = torch.randn(32, h, generator=g).to(dtype).requires_grad_()
    adapter = [(0.1 * torch.randn(*shape, generator=g)).to(dtype).requires_grad_() for shape in ((4, h), (v, 4))]
    ids, ones = torch.randint(0, v, (32,), generator=g), torch.ones(32)

    def losses():
        low = {"low_rank": LowRank.lora(hidden, *adapter, 2.0)} if form.endswith("lora") else {}
        yield linear_ppo_loss(hidden, weight, ids, -ones, ones, ones.bool(), **low).loss
        low = {"low_rank": LowRank.lora(hidden, *adapter, 2.0)} if form.endswith("lora") else {}
        yield linear_token_logprobs(hidden, weight, ids, **low).logprobs.sum()

    def step():
        for loss in losses():
            loss.backward()

    step()  # the first call allocates the block of memory for the logits, which has 32 x V elements
    assert largest_block(step) < v * h / 4
    assert hidden.grad.isfinite().all()


# ---- bits ----


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("form", FORMS)
def test_the_bits_of_a_row_do_not_depend_on_the_batch(monkeypatch, form, dtype, backend):
    small_tiles(monkeypatch)
    made = logprobs_form(form, 8, dtype, backend, b=1, t=40)
    hidden, ids = made.leaves["hidden"].view(40, -1), made.constants["ids"].view(40)
    rest = {k: x for k, x in made.leaves.items() if k != "hidden"}
    options = {"entropy": True, "chunk_tokens": 16}
    whole = made.fused(hidden=hidden, ids=ids, **rest, **options)
    low = low_rank(hidden, rest.pop("lora_a"), rest.pop("lora_b")) if "lora_a" in rest else None
    rest |= {"weight": made.weight} if made.weight is not None else {}
    for rows in (slice(None), slice(5, 6), slice(3, 12), slice(1, 18), slice(0, 39)):
        part = {} if low is None else {"low_rank": LowRank(low.states[rows], low.weight)}
        got = linear_token_logprobs(hidden[rows], ids=ids[rows], backend=backend, **part, **rest, **options)
        assert torch.equal(got.logprobs, whole.logprobs[rows]) and torch.equal(got.entropy, whole.entropy[rows]), rows


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("form", FORMS)
def test_same_bits_twice(monkeypatch, form, dtype, backend):
    small_tiles(monkeypatch)
    made = form_of(form, 9, dtype, backend, t=10)
    options = chosen_of("everything", "entropy_kl", made.extra) | {"chunk_tokens": 16}
    (a, first), (b, second) = (run(made.fused, made.leaves, made.constants, options, dtype) for _ in range(2))
    assert torch.equal(a.loss, b.loss) and all(torch.equal(a.metrics[k], b.metrics[k]) for k in METRICS)
    assert all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
def test_masked_hidden_states_may_be_nan(form, backend):
    made = form_of(form, 15, torch.float32, backend, t=10)
    options = chosen_of("everything", "entropy_kl", made.extra)
    clean, clean_gradients = run(made.fused, made.leaves, made.constants, options, torch.float32)
    out = ~made.constants["mask"]
    leaves = made.leaves | {"hidden": made.leaves["hidden"].masked_fill(out[..., None], torch.nan)}
    dirty, gradients = run(made.fused, leaves, made.constants, options, torch.float32)
    assert torch.equal(clean.loss, dirty.loss)
    assert all(torch.equal(gradients[k], clean_gradients[k]) for k in gradients)


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_states_of_the_low_rank_term_may_be_nan(backend):
    made = form_of("lora", 15, torch.float32, backend, t=10)
    hidden, weight, a, b = (made.leaves[k] for k in ("hidden", "weight", "lora_a", "lora_b"))
    mask, results = made.constants["mask"], []
    for states in (hidden @ a.T, (hidden @ a.T).masked_fill(~mask[..., None], torch.nan)):
        term = LowRank(states.requires_grad_(), b.clone().requires_grad_())
        loss = linear_ppo_loss(hidden, weight, **made.constants, low_rank=term, backend=backend).loss
        results.append((loss, *torch.autograd.grad(loss, term)))
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_an_empty_mask_gives_zeros(form):
    made = form_of(form, 14)
    made.constants["mask"][:] = False
    result, gradients = run(made.fused, made.leaves, made.constants, {"entropy_coef": 0.1}, torch.float32)
    assert result.loss.item() == 0 and all((g == 0).all() for g in gradients.values())


# ---- autocast, compilation ----


@pytest.mark.parametrize("form", FORMS)
def test_autocast_casts_as_for_a_linear_layer(form):
    """Products are in bfloat16 and gradients in float32. The low-rank term is cast as well, after its states are computed."""
    made = form_of(form, 22)
    names = ("hidden", "weight", "lora_a", "lora_b")
    x = {k: made.leaves[k].clone().requires_grad_() for k in names if k in made.leaves}
    with torch.autocast("cpu", torch.bfloat16):
        result = made.fused(**x, **made.constants)
    half = {k: v.detach().bfloat16().requires_grad_() for k, v in x.items()}
    expected = made.fused(**half, **made.constants)
    torch.testing.assert_close(result.loss, expected.loss, rtol=1e-3, atol=1e-3)
    gradients = differentiate(result.loss, x)
    for name, gradient in differentiate(expected.loss, half).items():
        got = gradients[name]
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, gradient.float(), rtol=0, atol=2e-2 * gradient.abs().max().item())


@pytest.mark.parametrize("form", FORMS)
def test_compiles_as_one_graph(form):
    made = form_of(form, 21, t=8)
    names = [k for k in ("hidden", "weight", "lora_a", "lora_b") if k in made.leaves]

    def loss(*tensors):
        arguments = dict(zip(names, tensors, strict=True))
        adapter = (arguments.pop("lora_a"), arguments.pop("lora_b")) if form.endswith("lora") else None
        if made.weight is not None:
            arguments["weight"] = made.weight
        if adapter is not None:
            arguments["low_rank"] = low_rank(arguments["hidden"], *adapter)
        logprobs = linear_token_logprobs(**arguments, ids=made.constants["ids"]).logprobs
        return linear_ppo_loss(**arguments, **made.constants).loss + 0.01 * logprobs.sum()

    trained = [k for k in names if k not in made.frozen]
    results = []
    for function in (loss, compile_whole(loss)):
        x = {k: made.leaves[k].clone().requires_grad_(k in trained) for k in names}
        value = function(*x.values())
        results.append((value, torch.autograd.grad(value, [x[k] for k in trained])))
    (eager, gradients), (got, compiled) = results
    torch.testing.assert_close(eager, got)
    for name, a, b in zip(trained, gradients, compiled, strict=True):
        torch.testing.assert_close(a, b, msg=name)


# ---- mistakes ----

A, B = torch.zeros(5, 24), torch.zeros(200, 5)


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ((A[:, :7], B, 1.0), r"lora_a: got shape \(5, 7\), expected \(5, 24\) = \[R, H\]"),
        ((A[0], B, 1.0), r"lora_a: got shape \(24\), expected \[R, H\]"),
        ((A, B[:, :3], 1.0), r"lora_b: got shape \(200, 3\), expected \(200, 5\) = \[V, R\]"),
        ((A, B[0], 1.0), r"lora_b: got shape \(5\), expected \[V, R\]"),
        ((A, B.long(), 1.0), r"lora_b: got dtype torch.int64"),
        ((A, B, float("nan")), r"scale: got nan, expected a finite number"),
        ((A, B, [1.0]), r"scale: got \[1.0\], expected a finite number"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_mistakes_in_an_adapter_are_named(adapter, message):
    with pytest.raises(ValueError, match=message):
        LowRank.lora(torch.zeros(4, 40, 24), *adapter)


STATES = torch.zeros(4, 40, 5)


@pytest.mark.parametrize("op", [linear_ppo_loss, linear_token_logprobs])
@pytest.mark.parametrize(
    ("term", "message"),
    [
        (LowRank(STATES, B[:100]), r"low_rank.weight: got shape \(100, 5\), expected \(200, 5\) = \[V, R\]"),
        (LowRank(STATES, B[:, :0]), r"low_rank.weight: got shape \(200, 0\), expected R >= 1"),
        (LowRank(STATES[..., :3], B), r"low_rank.states: got shape \(4, 40, 3\), expected \(4, 40, 5\) = \[..., R\]"),
        (LowRank(STATES[:3], B), r"low_rank.states: got shape \(3, 40, 5\)"),
        (LowRank(STATES.double(), B), r"low_rank.states: got dtype torch.float64, expected torch.float32"),
        (LowRank(STATES, B.bfloat16()), r"low_rank.weight: got dtype torch.bfloat16, expected torch.float32"),
        (STATES, r"low_rank: got Tensor, expected LowRank\(states, weight\)"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_mistakes_in_the_low_rank_term_are_named(op, term, message):
    made = form_of("lora", 0)
    names = made.constants if op is linear_ppo_loss else ("ids",)
    arguments = {k: made.leaves[k] for k in ("hidden", "weight")} | {k: made.constants[k] for k in names}
    with pytest.raises(ValueError, match=message):
        op(**arguments, low_rank=term)


@pytest.mark.parametrize("op", [linear_ppo_loss, linear_token_logprobs])
def test_a_quantised_weight_of_another_width_is_named(op):
    made = form_of("int8", 0)
    names = made.constants if op is linear_ppo_loss else ("ids",)
    arguments = {k: made.constants[k] for k in names}
    weight = QuantisedWeight.int8(torch.zeros(200, 25, dtype=torch.int8), torch.ones(200))
    with pytest.raises(ValueError, match=r"weight: got shape \(200, 25\), expected \(200, 24\) = \[V, H\]"):
        op(made.leaves["hidden"], weight, **arguments)


def test_an_adapter_of_zeros_changes_no_bit():
    """B starts at zero in LoRA, and the policy with it equals its reference."""
    leaves, constants, _ = make(3, vocabulary=200)
    hidden, weight = leaves["hidden"], leaves["weight"]
    plain = linear_token_logprobs(hidden, weight, constants["ids"]).logprobs
    term = LowRank.lora(hidden, torch.randn(5, 24), torch.zeros(200, 5))
    assert torch.equal(linear_token_logprobs(hidden, weight, constants["ids"], low_rank=term).logprobs, plain)
