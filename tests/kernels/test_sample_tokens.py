"""`sample_tokens`: published numbers of Philox, exact probabilities, brute-force filters, and invariances."""

import math

import pytest
import torch

from rlhf_kernels import _native, sample_tokens
from rlhf_kernels.reference.sample_tokens import philox, uniform

from .helpers.samples import brute_force, rows

PHILOX = [  # Random123, kat_vectors: key, counter, result
    ((0, 0), (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 2, (0xFFFFFFFF,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0xA4093822, 0x299F31D0),
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("key", "counter", "expected"), PHILOX)
def test_philox_gives_the_published_numbers(key, counter, expected):
    assert tuple(int(w) for w in philox(key, tuple(torch.tensor(c) for c in counter))) == expected
    assert _native.extension().philox4x32(*key, *counter) == expected


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_counter_determines_the_token(isa, backend):
    """The sample is the inverse CDF of the random number, here with the exact probabilities 1/2, 1/4, 1/8, 1/8."""
    logits = torch.tensor([[3.0, 2.0, 1.0, 1.0]]) * math.log(2)
    sequence, position = torch.arange(64), torch.arange(64) * 7 + (1 << 35)
    u = uniform(99, sequence, position)
    expected = torch.searchsorted(torch.tensor([0.5, 0.75, 0.875]).double(), u, right=True)
    got = sample_tokens(logits.expand(64, 4), seed=99, sequence=sequence, position=position, backend=backend)
    assert got.ids.tolist() == expected.tolist()
    exact = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()[expected]
    torch.testing.assert_close(got.logprobs, exact)
    torch.testing.assert_close(got.sampling_logprobs, exact)


def test_large_and_negative_seeds_are_their_low_64_bits():
    logits, numbers = rows(50, 1000)
    a = sample_tokens(logits, **(numbers | {"seed": 2**64 - 3}))
    for backend in ("cpu", "reference"):
        assert torch.equal(sample_tokens(logits, **(numbers | {"seed": -3}), backend=backend).ids, a.ids)
    assert not torch.equal(sample_tokens(logits, **(numbers | {"seed": -4})).ids, a.ids)


@pytest.mark.parametrize(
    "filters", [{}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.1}, {"top_k": 9, "top_p": 0.9, "min_p": 0.05}]
)
def test_frequencies(isa, filters):
    """χ² over 20000 draws is below its 99.99% quantile, and tokens outside the kept set are never sampled."""
    n, v = 20000, 12
    logits = torch.randn(1, v, generator=torch.Generator().manual_seed(3)) * 1.5
    p = brute_force(logits[0].double() / 0.8, **filters)
    draws = sample_tokens(
        logits.expand(n, v),
        temperature=0.8,
        **filters,
        seed=7,
        sequence=torch.arange(n),
        position=torch.zeros(n).long(),
    )
    counts = torch.bincount(draws.ids, minlength=v).double()
    kept = p > 0
    assert counts[~kept].sum() == 0
    chi2 = ((counts - n * p)[kept] ** 2 / (n * p[kept])).sum().item()
    degrees = int(kept.sum()) - 1
    quantile = degrees * (1 - 2 / (9 * degrees) + 3.72 * math.sqrt(2 / (9 * degrees))) ** 3  # Wilson-Hilferty
    assert chi2 < quantile
    torch.testing.assert_close(draws.sampling_logprobs.double(), p.log()[draws.ids], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("v", [1, 2, 15, 16, 33, 1000, 1024, 1031, 5000])
@pytest.mark.parametrize("step", [None, 0.5])
@pytest.mark.parametrize("spread", [0.01, 3.0])
def test_filters_against_a_sort(isa, v, step, spread):
    """The sample is in the kept set and has its probability in that set, with and without equal logits."""
    logits, numbers = rows(6, v, step=step, spread=spread, seed=v)
    for filters in (
        {"top_k": 1},
        {"top_k": 7},
        {"top_k": 900},
        {"top_p": 0.02},
        {"top_p": 0.7123},
        {"top_p": 0.999},
        {"min_p": 0.0712},
        {"min_p": 1.0},
        {"top_k": 40, "top_p": 0.8123, "min_p": 0.0123},
    ):
        got = sample_tokens(logits, **filters, **numbers, backend="cpu")
        for row in range(len(logits)):
            z, i = logits[row].double(), got.ids[row]
            p = brute_force(z, **filters)
            assert p[i] > 0, (filters, row)
            assert got.sampling_logprobs[row].item() == pytest.approx(p.log()[i].item(), abs=2e-5), (filters, row)
            assert got.logprobs[row].item() == pytest.approx(z.log_softmax(0)[i].item(), abs=2e-5)


def test_top_k_of_one_is_argmax(isa):
    logits, numbers = rows(20, 3000, spread=1e-9)  # differences are too small to show in the log-probs
    got = sample_tokens(logits, top_k=1, **numbers)
    assert got.ids.tolist() == logits.argmax(-1).tolist()
    assert got.sampling_logprobs.tolist() == [0.0] * 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("filters", [{}, {"top_k": 20}, {"top_p": 0.9}, {"top_k": 50, "min_p": 0.02}])
def test_against_the_reference(isa, dtype, filters):
    logits, numbers = rows(40, 3001, dtype=dtype)
    temperature = torch.linspace(0.3, 2, 40)
    got = sample_tokens(logits, temperature=temperature, **filters, **numbers, backend="cpu")
    exact = sample_tokens(logits.double(), temperature=temperature.double(), **filters, **numbers, backend="reference")
    assert got.ids.tolist() == exact.ids.tolist()
    for name in ("logprobs", "sampling_logprobs"):
        error = (getattr(got, name).double() - getattr(exact, name)).abs().max().item()
        assert error <= 2e-6, (name, error)
        assert getattr(got, name).dtype == torch.float32


@pytest.mark.parametrize("filters", [{}, {"top_k": 30, "top_p": 0.9}])
def test_a_row_does_not_depend_on_its_batch(isa, filters):
    logits, numbers = rows(64, 2500, dtype=torch.bfloat16)
    temperature = torch.linspace(0.5, 1.5, 64)
    full = sample_tokens(logits, temperature=temperature, **filters, **numbers)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    wide = torch.zeros(64, 5100, dtype=torch.bfloat16)
    wide[:, 77:2577] = logits  # rows with a stride other than V, at an odd address
    for index, source in ((order, logits), (order[:1], logits), (torch.arange(64), wide[:, 77:2577])):
        part = {k: v if k == "seed" else v[index] for k, v in numbers.items()}
        x = source if len(index) == 64 and source is not logits else source[index]
        got = sample_tokens(x, temperature=temperature[index], **filters, **part)
        assert all(torch.equal(a, b[index]) for a, b in zip(got, full, strict=True))
    column_major = logits.T.contiguous().T
    again = sample_tokens(column_major, temperature=temperature, **filters, **numbers)
    assert all(map(torch.equal, again, full))


def test_threads_do_not_matter(isa):
    logits, numbers = rows(40, 4000)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = sample_tokens(logits, top_p=0.9, **numbers)
        torch.set_num_threads(2)
        two = sample_tokens(logits, top_p=0.9, **numbers)
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, one, two))


@pytest.mark.parametrize("filters", [{}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.1}])
def test_non_finite_logits(isa, filters):
    """A logit of -inf excludes a token. NaN, +inf and a row of -inf give NaN log-probs, not wrong ones."""
    logits = torch.zeros(5, 2000)
    logits[0, 1:1999] = -math.inf
    logits[1, 1500] = math.nan
    logits[2, 3] = math.inf
    logits[3] = -math.inf
    logits[4] = torch.linspace(-1000, 1000, 2000)
    got = sample_tokens(logits, **filters, seed=0, sequence=torch.arange(5), position=torch.arange(5))
    assert got.ids[0] in (0, 1999)
    assert got.logprobs[0].item() == pytest.approx(-math.log(2))
    assert got.logprobs[1:4].isnan().all()
    assert got.sampling_logprobs[1:4].isnan().all()
    assert bool((got.ids >= 0).all() & (got.ids < 2000).all())
    assert got.ids[4] >= 1980
    assert got.logprobs[4].isfinite()


def test_empty():
    none = torch.zeros(0, dtype=torch.int64)
    for backend in ("reference", "cpu"):
        got = sample_tokens(torch.zeros(0, 7), seed=1, sequence=none, position=none, top_k=3, backend=backend)
        assert got.ids.shape == got.logprobs.shape == (0,)


BAD = {
    "logits": [torch.zeros(3), torch.zeros(2, 0), torch.zeros(2, 3).long()],
    "temperature": [0.0, -1.0, math.nan, torch.zeros(2), torch.ones(3)],
    "top_k": [0, -1],
    "top_p": [0.0, 1.5],
    "min_p": [-0.1, 1.5],
    "seed": [1.5, None],
    "sequence": [torch.zeros(3).long(), torch.zeros(2), 0],
    "position": [torch.zeros(1).long()],
    "backend": ["gpu"],
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in BAD.items() for v in values])
def test_mistakes_are_named(name, value):
    numbers = torch.zeros(2).long()
    good = {"logits": torch.zeros(2, 3), "seed": 0, "sequence": numbers, "position": numbers}
    with pytest.raises(ValueError, match=f"^{name}: got .*"):
        sample_tokens(**(good | {name: value}))


def test_registered_op():
    logits, numbers = rows(3, 20)
    op = torch.ops.rlhf_kernels.sample_tokens.default
    where = (numbers["sequence"], numbers["position"])
    torch.library.opcheck(op, (logits, 0.9, None, 5, 0.9, 0.01, 3, *where, "cpu"))
    torch.library.opcheck(op, (logits.bfloat16(), 1.0, torch.ones(3), 0, 1.0, 0.0, -3, *where, "cpu"))


def test_compiles_as_one_graph_for_every_seed_and_batch():
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def draw(logits, seed, sequence, position):
        return sample_tokens(logits, seed=seed, sequence=sequence, position=position, top_k=5)

    compiled = torch.compile(draw, fullgraph=True, backend=count)
    for b in (3, 4, 5, 6):
        logits, numbers = rows(b, 50)
        numbers["seed"] = b
        assert all(map(torch.equal, compiled(logits, **numbers), draw(logits, **numbers)))
    assert len(graphs) <= 2
