"""`paged_attention`: hand-computed numbers, a softmax over whole sequences without a cache, and data that must be ignored.

The tests run the reference and the Triton kernel, which runs on a GPU if there is one and else in the interpreter.
"""

import inspect
import math
import sys

import pytest
import torch
from torch.nn.attention.varlen import varlen_attn

from rlhf_kernels import _varlen, backend, paged_attention, reference
from rlhf_kernels._triton.paged_attention import SPLIT_TOKENS, SPLITS, splits_of, tile_of
from rlhf_kernels.backend import choose, why_no_varlen

from .helpers.bounds import check_error
from .helpers.gpu import DEVICE, to_device

NAN = math.nan
BACKENDS = ["reference", "triton"]
# The packages export functions with the names of these modules, so that an import gives the function.
LAUNCHER, PUBLIC = (sys.modules[f"rlhf_kernels.{layer}.paged_attention"] for layer in ("_triton", "ops"))


def scene(lengths, *, heads=4, groups=2, size=16, page_size=4, dtype=torch.float32, seed=0):
    """Return the arguments of the op, and the keys and values (tokens, groups, D) of each sequence.

    The pages of a sequence are in random order. Unused table entries, pages and tokens are garbage.
    """
    g = torch.Generator().manual_seed(seed)
    needed = [-(-n // page_size) for n in lengths]
    pages, places = sum(needed) + 3, max(1, *needed) + 2
    free = torch.randperm(pages, generator=g).tolist()
    table = torch.full((len(lengths), places), 10**9, dtype=torch.int32)
    k_pages, v_pages = (torch.full((pages, page_size, groups, size), NAN).to(dtype) for _ in range(2))
    sequences = []
    for row, n in enumerate(lengths):
        k, v = (torch.randn(n, groups, size, generator=g).to(dtype) for _ in range(2))
        sequences.append((k, v))
        for place in range(needed[row]):
            table[row, place] = free.pop()
            part = slice(place * page_size, min(n, (place + 1) * page_size))
            k_pages[table[row, place], : part.stop - part.start] = k[part]
            v_pages[table[row, place], : part.stop - part.start] = v[part]
    q = torch.randn(len(lengths), heads, size, generator=g).to(dtype)
    return (q, k_pages, v_pages, table, torch.tensor(lengths, dtype=torch.int32)), sequences


def run(arguments, backend, **options):
    return paged_attention(*to_device(arguments), backend=backend, **options).cpu()


def by_loops(q, sequences, *, scale=None, window=None, softcap=None, dtype=torch.float64):
    """Return the attention, computed one sequence and one head at a time from the contiguous keys and values."""
    out = torch.zeros_like(q, dtype=dtype)
    for row, (k, v) in enumerate(sequences):
        k, v = (x[-window:] if window else x for x in (k, v))
        for head in range(q.shape[1] if len(k) else 0):
            group = head // (q.shape[1] // k.shape[1])
            scores = k[:, group].to(dtype) @ q[row, head].to(dtype) * (scale or q.shape[2] ** -0.5)
            scores = softcap * torch.tanh(scores / softcap) if softcap else scores
            out[row, head] = scores.softmax(0) @ v[:, group].to(dtype)
    return out


@pytest.mark.parametrize("backend", BACKENDS)
def test_by_hand(backend):
    """Two tokens with logits log 3 and 0 have weights 3/4 and 1/4. The second sequence has one token, the third none."""
    q = torch.zeros(3, 1, 16)
    q[:2, 0, 0] = math.log(3)
    k, v = torch.zeros(2, 2, 1, 16), torch.full((2, 2, 1, 16), NAN)
    k[0, 0, 0, 0] = 1.0
    v[0, 0], v[0, 1], v[1, 0] = 8.0, 4.0, 5.0
    table = torch.tensor([[0, -1], [1, 77], [-5, 9]], dtype=torch.int32)
    arguments = q, k, v, table, torch.tensor([2, 1, 0], dtype=torch.int32)
    out = run(arguments, backend, scale=1.0)
    torch.testing.assert_close(out[:, 0], torch.tensor([7.0, 5.0, 0.0])[:, None].expand(3, 16))
    # A window of the last token, and a softcap of log(3) / 2, which gives the logits log(3) / 2 * tanh(2) and 0.
    assert run(arguments, backend, scale=1.0, window=1)[0].unique().item() == 4.0
    odds = math.exp(math.log(3) / 2 * math.tanh(2))
    capped = run(arguments, backend, scale=1.0, softcap=math.log(3) / 2)[0, 0, 0].item()
    assert capped == pytest.approx((8 * odds + 4) / (odds + 1), rel=1e-6)


LENGTHS = [1, 3, 4, 5, 0, 129, 64, 2 * SPLIT_TOKENS + 7]


@pytest.mark.parametrize("options", [{}, {"window": 5}, {"softcap": 1.5, "window": 300, "scale": 0.5}], ids=str)
@pytest.mark.parametrize(
    ("dtype", "shape"),
    [(torch.float32, (4, 2, 16, 4)), (torch.bfloat16, (5, 1, 24, 32)), (torch.float16, (3, 3, 32, 5)),
     (torch.float32, (20, 1, 16, 16))],
    ids=str,
)  # fmt: skip
def test_against_loops_over_whole_sequences(dtype, options, shape):
    """The last shape has more heads per group than one program computes."""
    heads, groups, size, page_size = shape
    arguments, sequences = scene(LENGTHS, heads=heads, groups=groups, size=size, page_size=page_size, dtype=dtype)
    exact = by_loops(arguments[0], sequences, **options)
    eager = by_loops(arguments[0], sequences, **options, dtype=dtype)
    for name in BACKENDS:
        got = run(arguments, name, **options)
        assert got.dtype == dtype
        check_error(name, got, eager, exact)


def test_float64():
    arguments, sequences = scene([9, 2], dtype=torch.float64)
    out = paged_attention(*arguments, softcap=2.0)
    torch.testing.assert_close(out, by_loops(arguments[0], sequences, softcap=2.0), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("window", [None, 4, 6])
@pytest.mark.parametrize("backend", BACKENDS)
def test_unused_pages_and_tokens_do_not_matter(backend, window):
    """Table entries of pages before the window are garbage too, because such pages may be freed and reused."""
    arguments, sequences = scene([11, 8, 1])
    q, k, v, table, lengths = arguments
    for row, n in enumerate(lengths.tolist()) if window else ():
        table[row, : max(0, n - window) // 4] = -(10**9)
        for token in range(max(0, n - window) % 4 if n > window else 0):
            k[table[row, (n - window) // 4], token] = v[table[row, (n - window) // 4], token] = NAN
    exact = by_loops(q, sequences, window=window)
    torch.testing.assert_close(run(arguments, backend, window=window).double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("place", "bad"), [((0, 0), -1), ((0, 2), 10**9), ((1, 0), 10**9)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_page_that_does_not_exist_gives_a_nan_row(backend, place, bad, monkeypatch):
    """The public function checks the table on CPU only. The test disables that check to run the kernel."""
    arguments, _ = scene([11, 3, 6])
    whole = run(arguments, backend)
    arguments[3][place] = bad
    with pytest.raises(ValueError, match=f"block_table: got page {bad} for tokens to read, expected 0 to"):
        paged_attention(*arguments)
    monkeypatch.setattr("rlhf_kernels.ops.checks.values_visible", lambda x: False)
    out = run(arguments, backend)
    assert out[place[0]].isnan().all()
    rest = [row for row in range(3) if row != place[0]]
    assert torch.equal(out[rest], whole[rest])


@pytest.mark.parametrize("length", [-1, 25])
@pytest.mark.parametrize("backend", BACKENDS)
def test_length_beyond_the_table_gives_a_nan_row(backend, length, monkeypatch):
    arguments, _ = scene([11, 3])
    whole = run(arguments, backend)
    arguments[4][0] = length
    with pytest.raises(ValueError, match=f"lengths: got {length} among its values, expected 0 to 20"):
        paged_attention(*arguments)
    monkeypatch.setattr("rlhf_kernels.ops.checks.values_visible", lambda x: False)
    out = run(arguments, backend)
    assert out[0].isnan().all() and torch.equal(out[1], whole[1])


@pytest.mark.parametrize("options", [{}, {"window": 290}], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_bits_do_not_depend_on_the_batch(backend, options):
    """The bits do not depend on the pages of a sequence either, nor, in Triton, on the width of the table."""
    lengths = [5, 2 * SPLIT_TOKENS + 70, 33, 300]
    arguments, _ = scene(lengths, page_size=16)
    q, k, v, table, lengths = arguments
    whole = run(arguments, backend, **options)
    order = torch.tensor([3, 1, 0])
    assert torch.equal(run((q[order], k, v, table[order], lengths[order]), backend, **options), whole[order])
    renamed = torch.randperm(len(k), generator=torch.Generator().manual_seed(1))
    moved = torch.where(
        (table >= 0) & (table < len(k)), renamed.argsort()[table.long().clamp(0, len(k) - 1)].int(), table
    )
    assert torch.equal(run((q, k[renamed], v[renamed], moved, lengths), backend, **options), whole)
    if backend == "triton":
        narrow, rows = table[[0, 3], :19].contiguous(), torch.tensor([0, 3])
        assert torch.equal(run((q[rows], k, v, narrow, lengths[rows]), backend, **options), whole[rows])


def test_pages_and_queries_with_strides():
    """Keys and values are slices of one pool, and the query is a slice of a wider tensor."""
    (q, k, v, table, lengths), _ = scene([9, 6])
    whole = run((q, k, v, table, lengths), "triton")
    pool = torch.stack([k, v, torch.full_like(k, NAN)], 1)
    wide = torch.full((2, 3, 4, 16), NAN)
    wide[:, 1] = q
    assert torch.equal(run((wide[:, 1], pool[:, 0], pool[:, 1], table, lengths), "triton"), whole)


def test_splits():
    """A tile has 16 KiB, or 32 KiB for wide heads in half precision.

    A split has at least 512 tokens, and a sequence at most 64 splits.
    """
    sizes = [(128, 2), (256, 2), (64, 2), (80, 2), (128, 4), (256, 4)]
    assert [tile_of(*size) for size in sizes] == [(128, 4), (64, 4), (128, 8), (128, 4), (32, 8), (16, 8)]
    assert [splits_of(n, 64) for n in (1, 512, 513, 2048, 10**6)] == [1, 1, 2, 4, SPLITS]


def test_splits_grow_for_long_sequences(monkeypatch):
    """Splits grow beyond SPLIT_TOKENS if there are SPLITS of them: here for more than 16 * 16 tokens."""
    monkeypatch.setattr(LAUNCHER, "SPLITS", 16)
    monkeypatch.setattr(LAUNCHER, "SPLIT_TOKENS", 16)
    monkeypatch.setattr(LAUNCHER, "TILE_BYTES", 1024)
    arguments, sequences = scene([257, 256, 40, 600], heads=2, groups=1)
    exact = by_loops(arguments[0], sequences)
    check_error("triton", run(arguments, "triton"), by_loops(arguments[0], sequences, dtype=torch.float32), exact)


def test_non_finite_values():
    """A NaN or an infinite logit changes only the rows that read it."""
    arguments, _ = scene([4, 4])
    arguments[0][0, :2, 3] = 1.0
    for bad in (NAN, math.inf):
        arguments[1][arguments[3][0, 0], 1, 0, 3] = bad
        out = run(arguments, "triton")
        assert out[0, :2].isnan().all() and out[1].isfinite().all()
        assert out[0].isnan().equal(run(arguments, "reference")[0].isnan())


def test_empty():
    for name in BACKENDS:
        arguments, _ = scene([3])
        q, k, v, table, lengths = arguments
        assert run((q[:0], k, v, table[:0], lengths[:0]), name).shape == (0, 4, 16)


BAD = {
    "q": [torch.zeros(2, 16), torch.zeros(2, 4, 16, dtype=torch.int32)],
    "k_pages": [torch.zeros(3, 4, 16), torch.zeros(3, 4, 3, 16), torch.zeros(3, 4, 2, 8), torch.zeros(0, 4, 2, 16),
                torch.zeros(3, 4, 2, 16).bfloat16(), torch.zeros(3, 4, 0, 16)],
    "v_pages": [torch.zeros(3, 4, 2, 8), torch.zeros(2, 4, 2, 16), None],
    "block_table": [torch.zeros(2, 2), torch.zeros(3, 2).int(), torch.zeros(2, 0).int(), [[0, 1]]],
    "lengths": [torch.ones(2), torch.ones(3).int(), torch.tensor([9, 1]).int(), torch.tensor([-1, 1]).int()],
    "scale": [0.0, NAN],
    "window": [0, 1.5],
    "softcap": [0.0, -1.0],
    "backend": ["gpu", "cpu", "cuda", "varlen"],
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in BAD.items() for v in values])
def test_mistakes_are_named(name, value):
    k, v = torch.zeros(2, 3, 4, 2, 16)
    good = {"q": torch.zeros(2, 4, 16), "k_pages": k, "v_pages": v}
    good |= {"block_table": torch.zeros(2, 2).int(), "lengths": torch.ones(2).int()}
    with pytest.raises(ValueError, match=f"^{name}: (got|'\\w+' cannot serve) .*"):
        paged_attention(**(good | {name: value}))


def test_registered_op():
    arguments, _ = scene([5, 2])
    op = torch.ops.rlhf_kernels.paged_attention.default
    torch.library.opcheck(op, (*to_device(arguments), 0.25, 3, 0.0, "triton"))


def test_no_gradient():
    arguments, _ = scene([5, 2])
    for name in BACKENDS:
        q = arguments[0].to(DEVICE).requires_grad_()
        assert not paged_attention(q, *to_device(arguments[1:]), backend=name).requires_grad


# ---- torch's varlen attention, which reads pages only with FlashAttention-3 and -4: never run on a device ----


def stand_in(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, **options):
    """Check the arguments against torch's documentation, and return the attention with one query per sequence."""
    bound = inspect.signature(varlen_attn).bind(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, **options).arguments
    assert bound["cu_seq_q"].tolist() == list(range(len(q) + 1)) and bound["cu_seq_k"] is None
    assert bound["num_splits"] == 1 and bound["max_q"] == 1 and bound["max_k"] >= bound["seqused_k"].max()
    assert bound["enable_gqa"] == (q.shape[1] != k.shape[2])
    left, right = bound["window_size"]
    assert right == 0
    table = bound["block_table"]
    assert table.dtype == bound["seqused_k"].dtype == torch.int32
    assert ((table >= 0) & (table < len(k))).all(), "it would read out of bounds"
    window = None if left < 0 else left + 1
    return reference.paged_attention(q, k, v, table, bound["seqused_k"], scale=bound["scale"], window=window)


READS_PAGES = {"block_table", "seqused_k", "num_splits", "enable_gqa"} <= set(inspect.signature(varlen_attn).parameters)
needs_block_table = pytest.mark.skipif(
    not READS_PAGES, reason=f"varlen_attn of torch {torch.__version__} reads no pages"
)


@needs_block_table
@pytest.mark.parametrize("window", [None, 1, 6])
def test_varlen_is_called_as_torch_declares_it(monkeypatch, window):
    monkeypatch.setattr(_varlen, "varlen_attn", stand_in)
    arguments, sequences = scene([11, 8, 0, 1])
    got = _varlen.paged_attention(*arguments, 0.3, window or 0, 0.0)
    exact = by_loops(arguments[0], sequences, window=window, scale=0.3)
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-6)
    arguments[3][0, 2], arguments[4][3] = -1, 1000
    got = _varlen.paged_attention(*arguments, 0.3, window or 0, 0.0)
    assert got[0].isnan().all() and got[3].isnan().all() and not got[1:3].isnan().any()


@needs_block_table
def test_when_varlen_is_chosen(monkeypatch):
    device, half = torch.device("cuda"), torch.bfloat16
    assert why_no_varlen(torch.device("cpu"), half) == "it takes CUDA tensors, not cpu ones"
    assert "reads pages with FA3 or FA4 only" in why_no_varlen(device, half)
    assert choose("paged_attention", device, half).backend == "triton"
    monkeypatch.setattr(torch.nn.attention, "current_flash_attention_impl", lambda: "FA3")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert why_no_varlen(device, half) == "" and choose("paged_attention", device, half).backend == "varlen"
    assert why_no_varlen(device, torch.float32) == "it takes bfloat16 and float16, not torch.float32"
    assert choose("paged_attention", device, torch.float32).backend == "triton"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert why_no_varlen(device, half) == "FA3 reads pages on sm_90 only"
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", lambda query, key, value: None)
    assert "takes no block table" in why_no_varlen(device, half)


def test_varlen_does_not_support_a_softcap(monkeypatch):
    arguments = to_device(scene([5, 2])[0])
    expected, asked = run(arguments, "triton", softcap=3.0), []
    monkeypatch.setattr(PUBLIC, "resolve", lambda *_: "varlen")
    monkeypatch.setattr(PUBLIC, "kernels", lambda name: asked.append(name) or backend.kernels("triton"))
    capped = paged_attention(*arguments, softcap=3.0).cpu()
    assert asked == ["triton"] and torch.equal(capped, expected)
    with pytest.raises(ValueError, match=r"softcap: got 3\.0 with backend='varlen'"):
        paged_attention(*arguments, softcap=3.0, backend="varlen")
