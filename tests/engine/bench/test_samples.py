"""The statistics of `rlhf bench`, on samples whose distribution is known."""

import math

import numpy as np
import pytest

from rlhf_engine.bench.compare import compare
from rlhf_engine.bench.report import FORMAT
from rlhf_engine.bench.samples import contention, deviation, floor_error, spread

CASES = {f"op {n}": 10.0 ** (n / 4 - 5) for n in range(16)}


def run(seed, *, slower=(), noise=0.05, between=0.01, busy=0.02, rounds=7, cases=CASES):
    """Return the record of a run: floors move by `between`, samples exceed the floor by an exponential with mean `noise`."""
    g = np.random.default_rng(seed)

    def samples(floor, mean, count):
        return [float(x) for x in floor * np.exp(g.exponential(mean, count))]

    found = []
    for name, floor in cases.items():
        floor = floor * math.exp(g.normal(0, between)) * (1.2 if name in slower else 1)
        found.append({"name": name, "shape": "N=1", "samples": samples(floor, noise, rounds)})
    limits = {name: samples(1e-2, busy, 50) for name in ("copy", "product")}
    return {
        "format": FORMAT,
        "device": "cpu",
        "settings": {},
        "machine": {"cores": 2, "load_average": 0.1},
        "finished": "now",
        "limits": limits,
        "suites": {"kernels": {"cases": found}},
    }


def test_the_spread_has_quartiles_and_extremes():
    assert spread([4.0, 1.0, 2.0, 3.0, 5.0]) == (3.0, 2.0, 4.0, 1.0, 5.0, 5)


def test_the_floor_error_is_that_of_exponential_excess():
    """The mean excess of the smallest of 7 samples with mean 0.07 is 0.01."""
    g = np.random.default_rng(0)
    errors = [floor_error(np.exp(g.exponential(0.07, 7))) for _ in range(4000)]
    assert np.mean(errors) == pytest.approx(0.01, rel=0.05)
    assert floor_error([1.0]) == 0.1
    assert floor_error([math.e, 1.0]) == pytest.approx(0.5)


def test_one_outlier_does_not_change_the_deviation():
    values = list(np.random.default_rng(0).normal(0, 0.02, 41))
    assert deviation([*values, 5.0]) == pytest.approx(deviation(values), rel=0.1)


def test_contention_is_the_slowdown_of_the_median():
    assert contention([1.0, math.e, math.e]) == pytest.approx(1.0)
    assert contention([]) == 0


def test_a_slowdown_of_a_fifth_in_one_kernel_is_found():
    found = [compare(run(2 * n), run(2 * n + 1, slower=("op 5",))) for n in range(60)]
    caught = sum("op 5" in [one.name for one in made.slower] for made in found)
    assert caught >= 57
    assert sum(len(made.slower) for made in found) - caught <= 1


@pytest.mark.parametrize("noise, busy", [(0.02, 0.01), (0.05, 0.02), (0.5, 0.6)], ids=["idle", "some work", "busy"])
def test_two_runs_of_the_same_code_have_no_regression(noise, busy):
    wrong = [
        len(compare(run(2 * n, noise=noise, busy=busy), run(2 * n + 1, noise=noise, busy=busy)).slower)
        for n in range(60)
    ]
    assert sum(wrong) <= 1


def test_a_machine_that_became_slower_is_no_regression_and_is_reported():
    slow = run(1, cases={name: 1.3 * floor for name, floor in CASES.items()})
    slow["limits"] = {name: [1.3 * x for x in samples] for name, samples in slow["limits"].items()}
    found = compare(run(0), slow)
    assert not found.slower
    assert any("the machine changed" in note and "+3" in note for note in found.notes)


def test_code_that_became_slower_everywhere_is_a_regression():
    """The copy and the product, which are not our code, are as fast as before."""
    found = compare(run(0), run(1, cases={name: 1.3 * floor for name, floor in CASES.items()}))
    assert len(found.slower) >= 15


def test_a_busy_machine_is_reported_with_what_it_resolves():
    text = compare(run(0, noise=0.5, busy=0.6), run(1, noise=0.5, busy=0.6)).text()
    assert "of 16 cases could not show a slowdown of 20%" in text and "run both again on an idle machine" in text
    assert "0 slower, 0 faster, 16 the same within the spread" in text
    assert "could not show" not in compare(run(0), run(1)).text()


def test_runs_without_a_common_case_are_refused():
    with pytest.raises(ValueError, match="no measured case in common"):
        compare(run(0), run(1, cases={"other": 1.0}))
