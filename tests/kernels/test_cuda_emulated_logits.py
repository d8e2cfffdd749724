"""Tests of the CUDA C++ kernel of `logits_ppo_loss`, called through the public function and run on the host by an emulator.

Rows are short, so the tests limit the shared memory per block: a row then takes a cluster of 1, 2, 4 or 8 blocks, or does not
fit and is read twice.
"""

import contextlib
import sys
import types

import pytest
import torch

from rlhf_kernels import _cpu, _cuda, _native, logits_ppo_loss, reference
from rlhf_kernels._options import PPOArguments
from rlhf_kernels.launch_args import LogitRows, RowStats, Transform
from rlhf_kernels.ops import fused_logits_loss
from rlhf_kernels.ops.objective import ObjectiveTerms

from . import cuda_emulator
from .helpers.bounds import TEMPERATURES, check_error, check_temperature_costs_nothing, temperature_scene
from .helpers.heads import differentiate, make, widen

REAL = _native._C
FRONT = 208  # bytes at the start of a block's shared memory, before its part of a row
SPLITS = {"one block": 65536, "two": 464, "four": 240, "eight": 128, "two passes": 16}
"""Bytes per block for its part of a row of 203 logits in float32."""


def ppo_loss(**arguments):
    """Run the CPU launcher of `ppo_loss`: the emulator has no Triton, whose launcher the op would call."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_native, "_C", REAL)
        return _cpu.ppo_loss(**arguments)


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    launchers = {"cuda": _cuda, "triton": types.SimpleNamespace(ppo_loss=ppo_loss)}
    monkeypatch.setattr(fused_logits_loss, "kernels", launchers.__getitem__)
    monkeypatch.setattr(sys.modules["rlhf_kernels.ops.logits_ppo_loss"], "resolve", lambda *_: "cuda")
    with cuda_emulator.emulated():
        yield


@contextlib.contextmanager
def shared_limit(split: str, dtype: torch.dtype = torch.float32):
    """Limit a block's shared memory to the one that gives this split of rows of 203 logits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_emulator.load(), "CUDA_ROW_SHARED", FRONT + SPLITS[split] * dtype.itemsize // 4)
        yield


def batch(dtype, vocabulary=203, seed=0, b=3, t=6):
    leaves, constants, extra = make(seed, b=b, t=t, vocabulary=vocabulary)
    return (leaves["hidden"] @ leaves["weight"].t()).to(dtype), constants, extra


def results(function, logits, arguments, kind=None, upstream=1.0, values=None):
    """Return the loss, the metrics, and the gradients of logits and values."""
    kind = logits.dtype if kind is None else kind
    wide = torch.float64 if kind == torch.float64 else torch.float32
    arguments = {k: widen(v, wide) for k, v in arguments.items()}
    leaves = {"logits": logits.detach().to(kind, copy=True).requires_grad_()}
    if values is not None:
        arguments["values"] = leaves["values"] = values.detach().to(wide, copy=True).requires_grad_()
    if function is reference.logits_ppo_loss:
        arguments = {"temperature": 1.0, "softcap": None, "logit_scale": 1.0} | arguments
        arguments.pop("inplace", None)
    got = function(leaves["logits"] if not arguments.get("inplace") else leaves["logits"] * 1, **arguments)
    return got.loss, got.metrics, differentiate(got.loss, leaves, upstream)


def check(logits, arguments, **how):
    got = results(logits_ppo_loss, logits, arguments, **how)
    eager = results(reference.logits_ppo_loss, logits, arguments, **how)
    exact = results(reference.logits_ppo_loss, logits, arguments, kind=torch.float64, **how)
    check_error("loss", got[0], eager[0], exact[0], scale=1.0)
    for name in ("entropy", "ratio_mean", "approx_kl", "active_fraction", "value_loss"):
        check_error(name, got[1][name], eager[1][name], exact[1][name], scale=1.0)
    for name, gradient in got[2].items():
        check_error(name, gradient, eager[2][name], exact[2][name])
    return got


@pytest.mark.parametrize("kind", TEMPERATURES)
@pytest.mark.parametrize("split", ["eight", "two passes"])
def test_a_temperature_costs_no_accuracy(kind, split):
    """The log-probs in the rows' statistics have no error except their rounding."""
    logits, ids, options = temperature_scene(kind)
    stats = RowStats.empty(len(ids), logits.device)
    transform = Transform.of(**options)
    ones = torch.ones(len(ids))
    args = PPOArguments(objective="policy_gradient")
    terms = ObjectiveTerms.of(args, ones, ones, ones.bool())
    with shared_limit(split):
        rows = LogitRows(logits, ids, transform, terms.mask)
        _cuda.logits_ppo_loss(rows, terms.ppo, stats, torch.empty(2, len(ids)), terms.denominators.policy, None)
    check_temperature_costs_nothing(stats.logprobs, logits, ids, options)


def test_softcap_slope_has_no_cancellation():
    logits = torch.linspace(-7, 7, 141).view(1, 141).requires_grad_()
    one = torch.ones(1)
    logits_ppo_loss(
        logits, torch.tensor([70]), one, one, one.bool(), objective="policy_gradient", softcap=1.0
    ).loss.backward()
    x = logits.detach().double()
    decay = torch.exp(-2 * x.abs())
    exact = (
        (torch.tanh(x).softmax(-1) - torch.nn.functional.one_hot(torch.tensor([70]), 141))
        * 4
        * decay
        / (1 + decay).square()
    )
    assert ((logits.grad.double() - exact).abs() <= 8 * torch.finfo(torch.float32).eps * exact.abs()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("upstream", [1.0, 0.37])
def test_every_split_and_dtype(dtype, split, upstream):
    """With 203 logits, consecutive rows start at different offsets from a 16-byte boundary."""
    logits, constants, extra = batch(dtype)
    constants["ids"][0] = torch.tensor([0, 1, 3, 200, 201, 202])  # single elements at the ends of a row
    constants["mask"][0] = True
    options = {
        "temperature": extra["temperature"],
        "entropy_coef": 0.05,
        "ref_logprobs": extra["ref_logprobs"],
        "kl_coef": 0.1,
    }
    with shared_limit(split, dtype):
        check(logits, constants | options, upstream=upstream)
    blocks = cuda_emulator.load().largest_cluster()
    assert blocks == {"two": 2, "four": 4, "eight": 8}.get(split, 1)


@pytest.mark.parametrize("split", ["one block", "eight", "two passes"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"softcap": 3.0, "logit_scale": 1.5, "temperature": 0.7},
        {"softcap": 3.0, "entropy_coef": 0.1},
        {"logit_scale": 0.5, "cliprange_high": 0.3, "dual_clip": 2.0, "log_ratio_clamp": 0.5},
        {"objective": "kl_penalty", "old_kl_coef": 0.2},
        {"objective": "policy_gradient", "aggregation": "seq_mean_token_mean"},
        {"objective": "ratio", "aggregation": "seq_mean_token_sum"},
        {"aggregation": "token_sum", "num_tokens": 100},
        {"kl_coef": 0.1, "kl_weighting": "ratio", "log_ratio_clamp": 0.5},
        {"objective": "cispo", "cliprange_high": 0.3},
        {"objective": "sapo", "tau_pos": 2.0, "log_ratio_clamp": 0.5},
        {"objective": "ipo", "divergence": 0.001},
        {"objective": "dppo_tv", "divergence": 0.001, "ratio_limit": 1.2},
        {"objective": "dppo_kl", "divergence": 0.0001, "log_ratio_coef": 0.1, "log_ratio_clamp": 0.4},
    ],
    ids=str,
)
def test_options(split, options):
    logits, constants, extra = batch(torch.float32, seed=1)
    given = {k: extra[k] for k in ("weights", "returns", "old_values", "ref_logprobs")}
    with shared_limit(split):
        check(logits, constants | options | given, values=extra["returns"] + 0.3, upstream=1.7)


@pytest.mark.parametrize("vocabulary", [1, 3, 7, 8, 33, 256, 1100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vocabularies(vocabulary, dtype):
    """Rows with fewer logits than blocks, threads, or elements per pack; and rows that take several rounds of loads."""
    logits, constants, _ = batch(dtype, vocabulary)
    for shared in (FRONT + 16 * -(-vocabulary // 16), 65536):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cuda_emulator.load(), "CUDA_ROW_SHARED", shared)
            check(logits, constants)


def test_long_rows():
    """Each thread loads more than one batch of packs."""
    logits, constants, _ = batch(torch.bfloat16, 9001, b=1, t=2)
    for shared in (65536, 8192, 16):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cuda_emulator.load(), "CUDA_ROW_SHARED", shared)
            check(logits, constants | {"mask": torch.ones(1, 2, dtype=torch.bool), "entropy_coef": 0.1})


@pytest.mark.parametrize("split", SPLITS)
def test_masked_rows_are_not_read(split):
    logits, constants, _ = batch(torch.float32)
    mask = constants["mask"]
    with shared_limit(split):
        clean = results(logits_ppo_loss, logits, constants)
        constants["ids"] = torch.where(mask, constants["ids"], 10**15)
        dirty = results(logits_ppo_loss, torch.where(mask[..., None], logits, torch.nan), constants)
    assert torch.equal(clean[0], dirty[0]) and torch.equal(clean[2]["logits"], dirty[2]["logits"])
    assert (clean[2]["logits"][~mask] == 0).all()
    with shared_limit(split):
        none = results(logits_ppo_loss, logits, constants | {"mask": torch.zeros_like(mask)})
    assert none[0] == 0 and (none[2]["logits"] == 0).all()


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("upstream", [1.0, 2.0])
def test_an_id_out_of_range_makes_its_row_nan(split, upstream):
    logits, constants, _ = batch(torch.float32)
    constants["mask"][:] = True
    ids = constants["ids"].clone()
    for row, bad in ((3, -1), (8, 203), (17, 2**40)):
        ids.view(-1)[row] = bad
    rows = LogitRows(logits.view(-1, 203), ids.view(-1), Transform())
    wrong = (ids < 0).view(-1) | (ids >= 203).view(-1)
    for objective in ("clip", "policy_gradient"):
        with shared_limit(split):
            stats, gradient = launch(rows, constants, objective, upstream)
        assert stats.logprobs[wrong].isnan().all() and stats.logprobs[~wrong].isfinite().all()
        assert gradient[wrong].isnan().all() and gradient[~wrong].isfinite().all()


def launch(rows, constants, objective="clip", upstream=1.0):
    """Call the launchers directly, because the public function rejects invalid ids on a CPU."""
    taken = (constants[name] for name in ("old_logprobs", "advantages", "mask"))
    terms = ObjectiveTerms.of(PPOArguments(objective=objective), *taken)
    n = rows.ids.numel()
    stats, coefficients = RowStats.empty(n, rows.ids.device), torch.empty(2, n)
    out = torch.empty(n, rows.logits.shape[-1], dtype=rows.logits.dtype)
    _cuda.logits_ppo_loss(rows, terms.ppo, stats, coefficients, torch.tensor(1.0), out)
    _cuda.rescale_dlogits(rows, terms.ppo, stats, coefficients, out, torch.tensor(upstream))
    return stats, out


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_non_finite_logits_make_only_their_row_non_finite(split, bad):
    logits, constants, _ = batch(torch.float32)
    constants["mask"][:] = True
    logits[0, 1, 150] = bad
    logits[0, 2] = -torch.inf
    with shared_limit(split):
        stats, gradient = launch(LogitRows(logits.view(-1, 203), constants["ids"].view(-1), Transform()), constants)
    wrong = (torch.arange(18) == 1) | (torch.arange(18) == 2)
    assert not stats.logprobs[wrong].isfinite().any() and stats.logprobs[~wrong].isfinite().all()
    assert not gradient[wrong].isfinite().all(-1).any() and gradient[~wrong].isfinite().all()


@pytest.mark.parametrize("split", SPLITS)
def test_logits_of_minus_infinity(split):
    """Logits masked by a constrained decoder have probability 0 and add 0 to the entropy."""
    logits, constants, _ = batch(torch.float32)
    forbidden = torch.rand(logits.shape, generator=torch.Generator().manual_seed(0)) < 0.4
    forbidden[..., 64:] |= torch.arange(18).view(3, 6, 1) == 4
    forbidden.scatter_(-1, constants["ids"][..., None], False)
    with shared_limit(split):
        got = results(logits_ppo_loss, logits.masked_fill(forbidden, -torch.inf), constants | {"entropy_coef": 0.1})
        lowest = results(logits_ppo_loss, logits.masked_fill(forbidden, -1e4), constants | {"entropy_coef": 0.1})
    torch.testing.assert_close(got[2]["logits"], lowest[2]["logits"])
    assert (got[2]["logits"][forbidden] == 0).all()


@pytest.mark.parametrize("split", ["one block", "four", "two passes"])
@pytest.mark.parametrize("upstream", [1.0, 0.37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inplace(split, upstream, dtype):
    logits, constants, _ = batch(dtype)
    with shared_limit(split, dtype):
        check(logits, constants | {"inplace": True, "entropy_coef": 0.05}, upstream=upstream)
        plain = logits.clone().requires_grad_()
        rows = plain * 1
        loss = logits_ppo_loss(rows, **constants, inplace=True).loss
        assert not torch.equal(rows, logits)
        expected = results(logits_ppo_loss, logits, constants)[2]["logits"]
        assert torch.equal(torch.autograd.grad(loss, rows)[0], expected)


def test_inplace_with_saved_tensor_hooks():
    """The gradient is the same if hooks replace saved tensors by copies, as offloading does."""
    logits, constants, _ = batch(torch.bfloat16)
    gradients = []
    for pack in (lambda x: x, lambda x: x.clone()):
        rows = logits.clone().requires_grad_() * 1
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = logits_ppo_loss(rows, **constants, inplace=True).loss
        gradients.append(torch.autograd.grad(0.37 * loss, rows)[0])
    assert torch.equal(*gradients)


def test_inplace_marks_the_logits_as_changed():
    logits, constants, _ = batch(torch.float32)
    rows = logits.requires_grad_() * 1
    other = rows.exp().sum() * 1 + rows.square().sum()  # saved for its own backward
    logits_ppo_loss(rows, **constants, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


def test_inplace_without_a_gradient_keeps_the_logits():
    logits, constants, _ = batch(torch.float32)
    before, version = logits.clone(), logits._version
    with torch.no_grad():
        result = logits_ppo_loss(logits.requires_grad_(), **constants, inplace=True)
    assert torch.equal(logits, before) and logits._version == version
    assert not result.loss.requires_grad


@pytest.mark.parametrize("split", ["eight", "two passes"])
def test_a_slice_is_read_without_a_copy(split):
    logits, constants, _ = batch(torch.bfloat16, t=7)
    cut = {k: v[:, 1:] for k, v in constants.items()}
    with shared_limit(split):
        x = logits.clone().requires_grad_()
        got = torch.autograd.grad(logits_ppo_loss(x[:, :-1], **cut).loss, x)[0]
        whole = logits[:, :-1].contiguous().requires_grad_()
        expected = torch.autograd.grad(logits_ppo_loss(whole, **cut).loss, whole)[0]
    torch.testing.assert_close(got[:, :-1], expected)
    assert (got[:, -1] == 0).all()
    rows = logits.clone()
    with shared_limit(split):
        y = logits_ppo_loss((rows.requires_grad_() * 1)[:, :-1], **cut, inplace=True).loss
        torch.testing.assert_close(torch.autograd.grad(y, rows)[0][:, :-1], expected)


def test_backward_runs_only_once():
    logits, constants, _ = batch(torch.float32)
    loss = logits_ppo_loss(logits.requires_grad_(), **constants).loss
    with pytest.raises(RuntimeError, match="differentiates once"):
        torch.autograd.grad(loss, logits, create_graph=True)
    loss = logits_ppo_loss(logits, **constants).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"^logits_ppo_loss: backward was called twice"):
        loss.backward()


def test_results_are_bitwise_reproducible():
    logits, constants, _ = batch(torch.bfloat16)
    with shared_limit("four"):
        one, two = (results(logits_ppo_loss, logits, constants) for _ in range(2))
    assert torch.equal(one[0], two[0]) and torch.equal(one[2]["logits"], two[2]["logits"])


def test_no_rows():
    logits, constants, _ = batch(torch.float32)
    none = {k: v[:0] for k, v in constants.items()}
    assert results(logits_ppo_loss, logits[:0], none)[2]["logits"].shape == (0, 6, 203)


def test_below_sm_90_there_are_no_clusters():
    logits, constants, _ = batch(torch.float32)
    module = cuda_emulator.load()
    module.largest_cluster()
    module.set_capability(80)
    try:
        for split in ("one block", "eight"):  # without clusters, "eight" takes two passes
            with shared_limit(split):
                check(logits, constants)
        assert module.largest_cluster() == 1
    finally:
        module.set_capability(90)


def test_registered_op(monkeypatch):
    seen = []
    op = torch.ops.rlhf_kernels.logits_ppo_loss.default
    monkeypatch.setattr(fused_logits_loss, "_op", lambda *x: seen.append(x) or op(*x))
    logits, constants, extra = batch(torch.float32, 33, b=2, t=3)
    options = {"temperature": extra["temperature"], "values": extra["returns"] + 0.1, "returns": extra["returns"]}
    logits_ppo_loss(logits.requires_grad_(), **constants, **options)
    torch.library.opcheck(op, seen[0])


def test_compiles_as_one_graph():
    logits, constants, _ = batch(torch.float32, 33, b=2, t=3)

    def gradient(x):
        return torch.autograd.grad(1.5 * logits_ppo_loss(x, **constants).loss, x)[0]

    expected = gradient(logits.clone().requires_grad_())
    compiled = torch.compile(lambda x: logits_ppo_loss(x, **constants).loss, fullgraph=True, backend="aot_eager")
    x = logits.clone().requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(1.5 * compiled(x), x)[0], expected)


@pytest.mark.parametrize(
    ("dtype", "options", "message"),
    [
        (torch.float32, {"ratio_level": "sequence"}, "got ratio_level='sequence', expected a ratio per token"),
        (torch.float32, {"objective": "gmpo"}, "got objective='gmpo', expected a ratio per token"),
        (torch.float32, {"objective": lambda p, q, a: -a * p}, "got a function as objective, expected a name"),
        (torch.float16, {"inplace": True}, "got inplace=True with float16 logits, expected inplace=False"),
    ],
)
def test_an_explicit_backend_is_not_replaced(dtype, options, message):
    logits, constants, _ = batch(dtype)
    with pytest.raises(
        ValueError, match=f"backend: 'cuda' cannot serve this call: {message}.*; use 'triton' or 'auto'"
    ):
        logits_ppo_loss(logits, **constants, **options, backend="cuda")
