"""Servers of rewards and judges: time limit, retries, rate limit, cache, and answers that cannot be read."""

import socket
import time

import pytest

from rlhf_engine.config.http import HttpConfig
from rlhf_engine.evaluate.judges import load_judge
from rlhf_engine.rewards.served import Server, ServerError
from tests.engine.helpers.cli_run import new_run, read_lines, rlhf
from tests.engine.helpers.http_server import serving

FAST = HttpConfig(timeout=5.0, retries=2, wait=0.01)


def doubled(body, number):
    return 200, {"value": 2 * body["value"]}, {}


def value(answer):
    if "value" not in answer:
        raise ValueError(f"got {answer}, expected a value")
    return answer["value"]


def ask(url, settings=FAST, cache=None, count=3):
    return Server(url, settings, cache).ask_all([{"value": number} for number in range(count)], value)


def test_answers_are_in_the_order_of_the_requests_and_at_most_so_many_are_open():
    opened, most = [0], [0]

    def answer(body, number):
        opened[0] += 1
        most[0] = max(most[0], opened[0])
        time.sleep(0.01 * (5 - body["value"]))
        opened[0] -= 1
        return doubled(body, number)

    with serving(answer) as served:
        assert ask(served.url, HttpConfig(concurrency=2), count=5) == [0, 2, 4, 6, 8]
    assert most[0] == 2


def test_a_request_that_was_answered_is_not_sent_again(tmp_path):
    with serving(doubled) as served:
        for _ in range(2):
            assert ask(served.url, cache=tmp_path / "cache.sqlite") == [0, 2, 4]
        assert len(served.requests) == 3
        assert ask(served.url) == [0, 2, 4] and len(served.requests) == 6
    (tmp_path / "bad.sqlite").write_text("no database, but a text that is long enough to be read as one" * 20)
    with pytest.raises(ValueError, match=r"bad.sqlite: not a cache of answers"):
        ask(served.url, cache=tmp_path / "bad.sqlite")


def test_a_request_is_repeated_after_failures_that_may_pass():
    def answer(body, number):
        bad = {1: (503, b"busy", {"Retry-After": "0"}), 2: (200, b"<html>", {})}
        return bad.get(number) or doubled(body, number)

    with serving(answer) as served:
        assert ask(served.url, count=1) == [0] and len(served.requests) == 3


def test_a_slow_server_is_reported_after_its_time_in_each_attempt():
    def answer(body, number):
        time.sleep(0.5)
        return doubled(body, number)

    with serving(answer) as served, pytest.raises(ServerError, match=r"no answer in 0.05 s; .* in each of 2 attempts"):
        ask(served.url, HttpConfig(timeout=0.05, retries=1, wait=0.01), count=1)


def test_a_server_that_is_down_is_reported():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(ServerError, match=rf"127.0.0.1:{port}: no connection \(.*start the server"):
        ask(f"http://127.0.0.1:{port}", HttpConfig(retries=1, wait=0.01))


@pytest.mark.parametrize(
    "status, content, attempts, message",
    [
        (200, b"\xff\x00rubbish", 3, "the answer is not JSON: .*in each of 3 attempts"),
        (200, {"other": 1}, 3, r"got \{'other': 1\}, expected a value, in each of 3 attempts"),
        (401, {"error": "no key"}, 1, "status 401: .*no key"),
        (500, b"x" * 1000, 3, r"status 500: x+ ?\.\.\.|status 500: x+"),
    ],
)
def test_rubbish_is_shown(status, content, attempts, message):
    with serving(lambda body, number: (status, content, {})) as served:
        with pytest.raises(ServerError, match=message) as found:
            ask(served.url, count=1)
        assert len(served.requests) == attempts and len(str(found.value)) < 500


def test_the_rate_is_limited_and_the_key_is_sent(monkeypatch):
    monkeypatch.setenv("SOME_KEY", "secret")
    settings = HttpConfig(requests_per_second=40.0, key_variable="SOME_KEY")
    with serving(doubled) as served:
        start = time.monotonic()
        ask(served.url, settings, count=5)
        assert time.monotonic() - start >= 4 / 40
    assert {headers["Authorization"] for headers in served.headers} == {"Bearer secret"}


# ---- the judge ----


def longer(body, number):
    """Prefer the longer response, by the text of the question."""
    first, second = body["messages"][1]["content"].split("Response A:\n")[1].split("\n\nResponse B:\n")
    mark = "C" if len(first) == len(second) else "A" if len(first) > len(second) else "B"
    return 200, {"choices": [{"message": {"content": f"I think of [[A]] first. [[{mark}]]"}}]}, {}


def judge(url, settings=FAST):
    return load_judge(f"openai:{url}/v1#tiny", prompt_template="{prompt}", http=settings)


def test_a_served_judge_is_asked_in_both_orders():
    with serving(longer) as served:
        found = judge(served.url).compare(["p", "q", "r"], ["long answer", "b", "c"], ["a", "long", "d"])
    assert found.tolist() == [1.0, 0.0, 0.5]
    assert len(served.requests) == 6 and {body["model"] for body in served.requests} == {"tiny"}


def test_a_judge_that_prefers_a_place_gives_a_tie():
    with serving(lambda body, number: (200, {"choices": [{"message": {"content": "[[A]]"}}]}, {})) as served:
        assert judge(served.url).compare(["p"], ["x"], ["y"]).tolist() == [0.5]


@pytest.mark.parametrize(
    "content, message",
    [
        (
            {"choices": [{"message": {"content": "Both are nice."}}]},
            "got the reply 'Both are nice.', expected one that",
        ),
        ({"choices": []}, r"expected an answer with choices\[0\].message.content"),
        ([], r"expected an answer with choices\[0\].message.content"),
    ],
)
def test_a_judge_without_a_verdict_is_shown_with_its_sample(content, message):
    def answer(body, number):
        return longer(body, number) if "Request:\np\n" in body["messages"][1]["content"] else (200, content, {})

    with serving(answer) as served, pytest.raises(ValueError, match=rf"judge tiny: sample 1: .*{message}"):
        judge(served.url).compare(["p", "q"], ["x", "x"], ["y", "y"])


@pytest.mark.parametrize("name", ["openai:http://localhost", "openai:#m", "openai:localhost/v1#m", "openai:ftp://a#m"])
def test_the_name_of_a_served_judge_is_checked(name):
    with pytest.raises(ValueError, match=r"judge: got .*, expected"):
        load_judge(name, prompt_template="{prompt}")


# ---- the reward ----


def test_ppo_trains_on_the_scores_of_a_server(tmp_path, base, capsys):
    run = new_run(tmp_path, base)
    sets = ["ppo.value_init=zero", "http.batch=3", "http.retries=0"]
    with serving(lambda body, number: (200, {"scores": [len(text) for text in body["responses"]]}, {})) as served:
        code, _, shown = rlhf(
            capsys, "ppo", "--config", run / "run.yaml", sets=[*sets, f"reward.url={served.url}/score"]
        )
        assert code == 0, shown
        assert max(len(body["prompts"]) for body in served.requests) == 3
        assert all(body.keys() == {"prompts", "responses", "columns"} for body in served.requests)
    rows = read_lines(run / "out" / "samples.jsonl")
    assert [row["score"] for row in rows] == [float(len(row["response"])) for row in rows]
    for scores, message in (([1.0], "got 1 scores, expected 2"), ([1.0, "x"], "got the score 'x'")):
        with serving(lambda body, number, scores=scores: (200, {"scores": scores}, {})) as served:
            arguments = [*sets, f"reward.url={served.url}", "http.cache=false"]
            code, _, shown = rlhf(capsys, "ppo", "--config", run / "run.yaml", "--overwrite", sets=arguments)
            assert code == 2 and "reward.url: responses 0 to 1: " in shown and message in shown, shown
