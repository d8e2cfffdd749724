"""The time limit of a reward function, and calls that are repeated after a failure."""

import asyncio
import contextlib
import re
import signal
import threading
import time
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from rlhf_engine.config import RewardConfig
from rlhf_engine.rewards import awaiting, limits
from rlhf_engine.rewards.calls import ask
from rlhf_engine.rewards.limits import Limits
from rlhf_engine.rewards.user_code import SampleError
from tests.engine.helpers.cli_run import new_model, new_run, read_lines, rlhf

SAMPLES = (["q0", "q1", "q2"], ["a", "hang", "c"])


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(limits, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(awaiting, "_BLOCKED", 0.2)
    monkeypatch.setattr(awaiting, "_LOOK", 0.05)


def sleep():
    time.sleep(60)


def loop():
    while True:
        pass


def expression():
    re.match(r"(a+)+$", "a" * 40 + "b")


def lock():
    threading.Semaphore(0).acquire()


def caught():
    """Catch every exception but those that end a process."""
    while True:
        with contextlib.suppress(Exception):
            time.sleep(60)


def hanging(how):
    def score(prompts, responses):
        if "hang" in responses:
            how()
        return [0.0] * len(responses)

    return score


def one(function):
    """Return a function of single samples."""
    return lambda prompt, response: function([prompt], [response])[0]


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("how", [sleep, loop, expression, lock, caught])
def test_a_plain_function_that_hangs_is_ended_and_the_sample_is_named(how, batched):
    function = hanging(how) if batched else one(hanging(how))
    begun, before = time.monotonic(), signal.getsignal(signal.SIGALRM)
    with pytest.raises(
        SampleError,
        match=rf"^it took longer than 0.2 s \(reward.timeout\) \(.*test_limits.py:\d+, in {how.__name__}\)$",
    ) as error:
        ask(function, SAMPLES, "f: 3 responses", batched=batched, limits=Limits(0.2))
    assert error.value.row == 1 and time.monotonic() - begun < 5
    assert signal.getsignal(signal.SIGALRM) is before and signal.getitimer(signal.ITIMER_REAL)[0] == 0


async def waits():
    await asyncio.sleep(60)


async def blocks():
    time.sleep(1.5)


async def ignores():
    for _ in range(2):
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(1.5)


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("how", [waits, blocks, ignores])
def test_an_async_function_that_hangs_is_ended_and_the_sample_is_named(how, batched):
    async def score(prompts, responses):
        if "hang" in responses:
            await how()
        return [0.0] * len(responses)

    async def single(prompt, response):
        return (await score([prompt], [response]))[0]

    begun = time.monotonic()
    with pytest.raises(SampleError, match=r"^it took longer than 0.2 s \(reward.timeout\)") as error:
        function = score if batched else single
        ask(function, SAMPLES, "f: 3 responses", batched=batched, concurrency=2, limits=Limits(0.2))
    assert error.value.row == 1 and time.monotonic() - begun < 5
    assert f"in {how.__name__})" in str(error.value) or how is not waits
    assert ask(single, (["q"], ["a"]), "f", batched=False, limits=Limits(5.0)) == [0.0]  # the loop is usable


def test_a_call_that_is_slow_on_all_samples_together_names_all():
    def score(prompts, responses):
        time.sleep(0.15 * len(responses))
        return [0.0] * len(responses)

    message = r"^f: 3 responses together took longer than 0.25 s; raise reward.timeout$"
    with pytest.raises(ValueError, match=message) as error:  # the single calls together have one time limit as well
        ask(score, SAMPLES, "f: 3 responses", limits=Limits(0.25))
    assert not isinstance(error.value, SampleError)

    def together(prompts, responses):
        time.sleep(60 * (len(responses) > 1))
        return [0.0] * len(responses)

    with pytest.raises(ValueError, match=r"^f: 3 responses: it took longer than 0.2 s") as error:
        ask(together, SAMPLES, "f: 3 responses", limits=Limits(0.2))
    assert not isinstance(error.value, SampleError)


def test_an_interruption_while_the_alarm_is_set_leaves_no_alarm(monkeypatch):
    real, calls, before = signal.setitimer, [], signal.getsignal(signal.SIGALRM)

    def interrupted(*arguments):
        real(*arguments)
        calls.append(arguments)
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(signal, "setitimer", interrupted)
    with pytest.raises(KeyboardInterrupt), Limits(0.1).time_limit():
        pass
    assert signal.getsignal(signal.SIGALRM) is before and signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_a_handler_that_python_does_not_know_is_no_error(monkeypatch):
    """`signal.signal` returns None for a handler of native code, and refuses it."""
    real, before = signal.signal, signal.getsignal(signal.SIGALRM)
    monkeypatch.setattr(signal, "signal", lambda *arguments: (real(*arguments), None)[1])
    try:
        assert ask(hanging(sleep), (["q"], ["a"]), "f", limits=Limits(5.0)) == [0.0]
        signal.raise_signal(signal.SIGALRM)  # it has no effect
    finally:
        real(signal.SIGALRM, before)


def in_a_thread(call):
    """Return the result of `call()` in a second thread, or its exception."""
    found = []

    def start():
        try:
            found.append(call())
        except ValueError as error:
            found.append(error)

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    return found[0]


@pytest.mark.parametrize("batched", [True, False])
def test_a_limit_needs_the_main_thread(batched, caplog):
    """It is the caller's mistake, so no call is repeated and no sample is named."""
    function = hanging(sleep) if batched else one(hanging(sleep))
    error = in_a_thread(lambda: ask(function, SAMPLES, "f", batched=batched, limits=Limits(5.0, 3)))
    assert str(error).startswith("reward.timeout: got 5 in the thread")
    assert str(error).endswith("expected 0; outside the main thread, only an async function can have a limit")
    assert not isinstance(error, SampleError) and not caplog.records


class Later:
    async def __call__(self, prompts, responses):
        await asyncio.sleep(60 * ("hang" in responses))
        return [0.0] * len(responses)


@pytest.mark.parametrize("function", [Later(), Later().__call__, partial(Later().__call__)])
def test_an_async_function_has_its_limit_in_every_thread(function):
    limits = Limits(0.2)
    assert in_a_thread(lambda: ask(function, (["q"], ["a"]), "f", limits=limits)) == [0.0]
    error = in_a_thread(lambda: ask(function, SAMPLES, "f", limits=limits))
    assert isinstance(error, SampleError) and error.row == 1


# ---- retries ----


class Flaky:
    """A function that changes its arguments and fails in its first calls."""

    def __init__(self, failures, error=ConnectionError):
        self.failures, self.error, self.calls = failures, error, 0

    def __call__(self, prompts, responses, *, notes):
        self.calls += 1
        seen = [f"{p} {r} {n['key']}" for p, r, n in zip(prompts, responses, notes, strict=True)]
        notes[0]["key"] = "changed"
        del prompts[:]
        if self.calls <= self.failures:
            raise self.error("server is down")
        return [float(len(text)) for text in seen]

    def one(self, prompt, response, *, notes):
        return self([prompt], [response], notes=[notes])[0]

    async def later(self, prompts, responses, *, notes):
        return self(prompts, responses, notes=notes)

    async def later_one(self, prompt, response, *, notes):
        return self.one(prompt, response, notes=notes)


def named():
    return {"notes": [{"key": key * 3} for key in "xyz"]}


WAYS = {"plain": "__call__", "one": "one", "async": "later", "async_one": "later_one"}


@pytest.mark.parametrize("error", [ConnectionError, SystemExit, TimeoutError])
@pytest.mark.parametrize("way", WAYS)
def test_a_failed_call_is_repeated_with_the_same_samples(way, error, caplog):
    def scores(failures, retries):
        flaky = Flaky(failures, error)
        settings = {"batched": "one" not in way, "concurrency": 2, "limits": Limits(0.0, retries, "reward.function f")}
        return ask(getattr(flaky, WAYS[way]), SAMPLES, "f", named(), **settings), flaky.calls

    expected, calls = scores(0, 0)
    assert expected == [8.0, 11.0, 8.0] and not caplog.records
    assert scores(2, 2) == (expected, calls + 2)
    assert caplog.messages[0] == (
        f"reward.function f: it raised {error.__name__}: server is down; it is called again in 0.01 s (reward.retries)"
    )


@pytest.mark.parametrize("way", WAYS)
def test_the_last_failure_ends_the_run_and_has_the_number_of_calls(way):
    flaky = Flaky(99)
    with pytest.raises(SampleError, match=r"it raised ConnectionError: server is down \(.*") as error:
        settings = {"batched": "one" not in way, "concurrency": 2}
        ask(getattr(flaky, WAYS[way]), SAMPLES, "f", named(), **settings, limits=Limits(0.0, 2))
    assert error.value.row == 0
    if "one" in way:
        assert str(error.value).endswith(", in each of 3 calls")


def test_a_call_that_hangs_once_is_repeated():
    calls = []

    def score(prompts, responses):
        calls.append(1)
        if len(calls) == 1:
            time.sleep(60)
        return [1.0] * len(responses)

    assert ask(score, SAMPLES, "f", limits=Limits(0.2, 1)) == [1.0] * 3


def test_the_waits_double_up_to_a_minute(monkeypatch):
    monkeypatch.setattr(limits, "FIRST_WAIT", 1.0)
    assert list(Limits(0.0, 8).waits()) == [1, 2, 4, 8, 16, 32, 60, 60]


def test_only_a_function_reads_the_limits():
    for name in ("timeout", "retries"):
        with pytest.raises(ValueError, match=rf"{name}: got 3.*only function reads it"):
            RewardConfig(path="rm", **{name: 3})
    assert RewardConfig(function="a:b", timeout=3, retries=3).timeout == 3.0


# ---- the command ----

REWARD = """
import time
from pathlib import Path

def reward(prompts, responses):
    calls = Path("calls.txt")
    calls.write_text(calls.read_text() + "x" if calls.exists() else "x")
    if len(calls.read_text()) {when} and not Path("repaired").exists():
        {fail}
    return [float(len(response)) for response in responses]
"""
SETS = ["reward.function=rewards.py:reward", "ppo.value_init=zero", "ppo.updates=4", "ppo.score_scale=running"]


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return new_run(tmp_path, new_model(tmp_path / "base"))


def start(capsys, *flags, sets=()):
    return rlhf(capsys, "ppo", "--config", "run.yaml", *flags, sets=[*SETS, *sets])


def weights(out):
    return load_file(out / "ppo" / "model.safetensors")


def same(first, second):
    scores = [[row["score_mean"] for row in read_lines(out / "metrics.jsonl")] for out in (first, second)]
    both = weights(first), weights(second)
    return scores[0] == scores[1] and all(torch.equal(both[0][name], both[1][name]) for name in both[0])


def test_a_hang_ends_the_command_in_one_line_and_the_updates_before_are_saved(run, capsys):
    (run / "rewards.py").write_text(REWARD.format(when=">= 4", fail="time.sleep(60)"))
    code, _, shown = start(capsys, sets=["reward.timeout=0.3"])
    assert code == 2 and shown.count("\n") == 1
    assert re.search(
        r"rlhf: sample 8 of the run: reward.function rewards.py:reward: it took longer than 0.3 s \(reward.timeout\) "
        r"\(\S*rewards.py:9, in reward\); prompt: 'q\d'; the checkpoint \S*out/ppo holds 2 updates",
        shown,
    )
    (run / "repaired").touch()
    assert start(capsys, "--resume", sets=["reward.timeout=60"])[0] == 0  # the limit may change
    assert start(capsys, sets=["output_dir=whole"])[0] == 0
    assert same(run / "out", run / "whole")


def test_results_do_not_depend_on_retries(run, capsys):
    (run / "rewards.py").write_text(REWARD.format(when="in (3, 4, 6)", fail="raise OSError('no answer')"))
    code, _, shown = start(capsys, sets=["reward.retries=2"])
    assert code == 0 and shown.count("rewards.py:reward: it raised OSError: no answer; it is called again in") == 3
    (run / "repaired").touch()
    assert start(capsys, sets=["output_dir=whole"])[0] == 0
    assert same(run / "out", run / "whole")
