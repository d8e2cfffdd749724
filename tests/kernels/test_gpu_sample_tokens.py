"""`sample_tokens` in Triton: random numbers bit for bit, the same ids as the C++ kernel, the filters against a full sort."""

import math
import sys

import pytest
import torch
import triton
import triton.language as tl

from rlhf_kernels import _native, reference, sample_tokens
from rlhf_kernels._triton.sample_tokens import look_up, uniform
from rlhf_kernels.reference.sample_tokens import uniform as defined_uniform

from .helpers.gpu import DEVICE, to_device
from .helpers.samples import brute_force, rows

FILTERS = [
    {},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 900},
    {"top_p": 1e-9},
    {"top_p": 0.7123},
    {"top_p": 0.9999},
    {"min_p": 0.0712},
    {"min_p": 1.0},
    {"top_k": 5, "top_p": 0.7},
    {"top_k": 40, "top_p": 0.8123, "min_p": 0.0123},
]


LAUNCHER = sys.modules["rlhf_kernels._triton.sample_tokens"]  # in the package, this name is the function
LARGE = LAUNCHER.LAUNCH["BLOCK"]
BLOCK = 256 if DEVICE.type == "cpu" else LARGE


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Use small blocks in the interpreter, whose time grows with the lanes, so that short rows have several blocks."""
    monkeypatch.setitem(LAUNCHER.LAUNCH, "BLOCK", BLOCK)


@triton.jit
def uniform_kernel(out, sequence, position, seed: tl.int64):
    i = tl.program_id(0)
    tl.store(out + i, uniform(seed, tl.load(sequence + i), tl.load(position + i)))


@pytest.mark.parametrize("seed", [0, 1, -1, 2**31, 2**32 + 7, 2**63 - 1, -(2**63), -12345678901234])
def test_the_random_numbers_equal_the_definition(seed):
    sequence = torch.tensor([0, 1, -1, 2**31, 2**32 - 1, 2**40 + 3, 2**63 - 1, -(2**63)])
    position = sequence.roll(3) ^ 0x1234567
    out = torch.empty(8, dtype=torch.float64, device=DEVICE)
    uniform_kernel[(8,)](out, sequence.to(DEVICE), position.to(DEVICE), seed)
    assert torch.equal(out.cpu(), defined_uniform(seed, sequence, position))
    low = (1 << 32) - 1
    for u, s, p in zip(out.tolist(), sequence.tolist(), position.tolist(), strict=True):
        words = _native.extension().philox4x32(
            seed & low, seed >> 32 & low, p & low, p >> 32 & low, s & low, s >> 32 & low
        )
        assert u == ((words[0] << 32 | words[1]) >> 11) * 2.0**-53


def draw(logits, numbers, **options):
    """Return a sample of the Triton kernel, on the CPU."""
    got = sample_tokens(to_device(logits), **to_device(numbers | options), backend="triton")
    return type(got)(*(x.cpu() for x in got))


def compare(got, expected):
    assert torch.equal(got.ids, expected.ids)
    torch.testing.assert_close(got.logprobs, expected.logprobs, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(got.sampling_logprobs, expected.sampling_logprobs, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_ids_equal_those_of_the_cpu_kernel(dtype, filters):
    """Rows have three blocks, the last one partial; without filters, samples come from the first and the second block."""
    logits, numbers = rows(6 if filters else 20, 2 * BLOCK + 37, dtype=dtype)
    options = filters | {"temperature": torch.linspace(0.3, 4, len(logits))}
    got = draw(logits, numbers, **options)
    compare(got, sample_tokens(logits, **numbers, **options, backend="cpu"))
    if not filters:
        assert {0, 1} <= set((got.ids // BLOCK).tolist())


@pytest.mark.parametrize("filters", [{}, FILTERS[-1]], ids=str)
def test_rows_of_several_whole_blocks(filters, monkeypatch):
    monkeypatch.setitem(LAUNCHER.LAUNCH, "BLOCK", LARGE)
    logits, numbers = rows(3, 2 * LARGE + 37, seed=1, spread=1.0, dtype=torch.bfloat16)
    options = filters | {"temperature": 0.7}
    compare(draw(logits, numbers, **options), sample_tokens(logits, **numbers, **options, backend="cpu"))


@pytest.mark.parametrize("v", [1, 33, 600])
@pytest.mark.parametrize("step", [None, 0.5])
def test_filters_against_a_sort(v, step):
    """The sample is in the kept set, and its log-probs match the mass of that set, with and without equal logits."""
    logits, numbers = rows(2, v, step=step, seed=v)
    for filters in FILTERS[1:]:
        got = draw(logits, numbers, **filters)
        for row in range(len(logits)):
            z, i = logits[row].double(), got.ids[row]
            p = brute_force(z, **filters)
            assert p[i] > 0, (filters, row)
            assert got.sampling_logprobs[row].item() == pytest.approx(p.log()[i].item(), abs=2e-5), (filters, row)
            assert got.logprobs[row].item() == pytest.approx(z.log_softmax(0)[i].item(), abs=2e-5)


def test_many_rows_agree_with_the_definition():
    """The logits have exact ties at the limits."""
    logits, numbers = rows(30, 64, step=0.25)
    for filters in ({}, {"top_k": 9}, {"top_k": 20, "top_p": 0.9, "min_p": 0.01}):
        expected = reference.sample_tokens(logits, **numbers, **filters)
        compare(draw(logits, numbers, **filters), expected)


def test_zeros_of_both_signs_are_equal():
    logits = torch.tensor([[-1.0, -0.0, 0.0, -0.0, -2.0]]).expand(12, 5)
    _, numbers = rows(12, 5)
    for filters in ({"top_k": 1}, {"top_k": 2}, {"top_p": 0.1}, {"min_p": 1.0}):
        got = draw(logits, numbers, **filters)
        assert set(got.ids.tolist()) == {1, 2, 3}, filters
        torch.testing.assert_close(got.sampling_logprobs, torch.full((12,), -math.log(3)))


def test_greedy_takes_the_largest_logit():
    logits, numbers = rows(6, 700, spread=1e-9)  # they differ by less than the resolution of the log-probs
    got = draw(logits, numbers, top_k=1)
    assert got.ids.tolist() == logits.argmax(-1).tolist()
    assert got.sampling_logprobs.tolist() == [0.0] * 6


def test_logits_of_minus_infinity_are_never_sampled_and_rows_without_mass_give_nan():
    logits, numbers = rows(7, 600)
    logits[0, :-2] = -torch.inf
    logits[0, -2:] = 3.0
    logits[1, 5] = torch.nan
    logits[2, 5] = torch.inf
    logits[3] = -torch.inf
    logits[4, :580] = -torch.inf
    logits[5] = torch.nan
    logits[6] = torch.finfo(torch.float32).max  # the next larger float is infinite
    for filters in ({}, FILTERS[-1]):
        got = draw(logits, numbers, **filters)
        compare(
            type(got)(*(x[[0, 4, 6]] for x in got)),
            type(got)(*(x[[0, 4, 6]] for x in sample_tokens(logits, **numbers, **filters, backend="cpu"))),
        )
        assert got.ids[0] >= 598 and got.ids[4] >= 580
        for bad in (1, 2, 3, 5):
            assert got.ids[bad] == 0 and got.logprobs[bad].isnan() and got.sampling_logprobs[bad].isnan()


@triton.jit
def look_up_kernel(out, row, target: tl.float64, limit, vocab, BLOCK: tl.constexpr):
    exact = tl.full((), target, tl.float64)
    tl.store(out, look_up(row, vocab, 2.0, 1.0, limit, exact, BLOCK))


def test_a_target_beyond_the_mass_selects_the_last_kept_token():
    """The product of the mass and a number just below 1 can be rounded up to the total mass."""
    row = torch.zeros(3 * BLOCK)
    row[3], row[BLOCK + 2] = 2.0, 1.0
    for limit, expected in ((-math.inf, 3 * BLOCK - 1), (0.5, BLOCK + 2), (1.5, 3)):
        out = torch.empty((), dtype=torch.int64, device=DEVICE)
        look_up_kernel[(1,)](out, row.to(DEVICE), 1e6, limit, row.numel(), BLOCK)
        assert out.item() == expected


def test_strides():
    logits, numbers = rows(10, 90)
    expected = draw(logits, numbers, top_p=0.9)
    wide = torch.full((10, 200), 50.0)
    wide[:, 20:110] = logits
    every_other = torch.full((20, 90), 50.0)
    every_other[::2] = logits
    for view in (wide[:, 20:110], every_other[::2], logits.t().contiguous().t()):
        assert all(map(torch.equal, draw(view, numbers, top_p=0.9), expected))
    one = torch.zeros(3, 4)[:, ::4]
    assert draw(one, {k: v if k == "seed" else v[:3] for k, v in numbers.items()}).ids.tolist() == [0, 0, 0]


def test_a_sample_does_not_depend_on_its_batch_and_repeats():
    logits, numbers = rows(12, 900)
    options = {"top_k": 300, "top_p": 0.9}
    whole = draw(logits, numbers, **options)
    assert all(map(torch.equal, draw(logits, numbers, **options), whole))
    for part in (slice(0, 1), slice(3, 8), slice(11, 12)):
        some = {k: v if k == "seed" else v[part] for k, v in numbers.items()}
        got = draw(logits[part], some, **options)
        assert all(torch.equal(a, b[part]) for a, b in zip(got, whole, strict=True))


def test_empty_and_registered():
    none = torch.zeros(0, dtype=torch.int64)
    got = draw(torch.zeros(0, 7), {"seed": 1, "sequence": none, "position": none}, top_k=3)
    assert got.ids.shape == got.logprobs.shape == (0,)
    logits, numbers = to_device(rows(3, 20))
    where = (numbers["sequence"], numbers["position"])
    op = torch.ops.rlhf_kernels.sample_tokens.default
    torch.library.opcheck(op, (logits, 0.9, None, 5, 0.9, 0.01, 3, *where, "triton"))
