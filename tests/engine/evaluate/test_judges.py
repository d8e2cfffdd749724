"""Judges: their preferences, and the messages of a judge that fails."""

import math
import sys
from fractions import Fraction
from types import ModuleType

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf_engine.data import Comparison
from rlhf_engine.evaluate import FunctionJudge, Pair, load_judge, rank, read_preferences, write_pairs
from rlhf_engine.evaluate.win_rate import preference_rate
from rlhf_engine.model.pretrained import load_tokenizer
from rlhf_engine.model.reward_model import RewardModel
from tests.engine.helpers.cli_run import new_model, read_lines, write_lines


def longer(prompts, a, b):
    """Return preferences for the longer answer."""
    return [0.5 + 0.5 * ((len(x) > len(y)) - (len(x) < len(y))) for x, y in zip(a, b, strict=True)]


def lengths(prompts, a, b):
    return [len(text) for text in a], [len(text) for text in b]


TEXTS = (["p"] * 3, ["aa", "b", "cc"], ["a", "bb", "dd"])


@pytest.mark.parametrize(
    "function",
    [
        longer,
        lengths,
        lambda *texts: torch.tensor(longer(*texts)),
        lambda *texts: np.array(longer(*texts), dtype=np.float32),
        lambda *texts: np.array(lengths(*texts)),
        lambda *texts: tuple(np.array(column) for column in lengths(*texts)),
        lambda *texts: [np.float32(value) for value in longer(*texts)],
        lambda *texts: [torch.tensor(value) for value in longer(*texts)],
        lambda *texts: [Fraction(value) for value in longer(*texts)],
        lambda *texts: tuple(torch.tensor(column) for column in lengths(*texts)),
    ],
)
@pytest.mark.parametrize("batch", [1, 2, 64])
def test_s20_a_function_gives_preferences_or_scores(function, batch):
    assert FunctionJudge(function, batch=batch).compare(*TEXTS).tolist() == [1.0, 0.0, 0.5]


def test_s20_preferences_of_two_pairs_are_not_read_as_two_lists_of_scores():
    assert FunctionJudge(longer).compare(*(column[:2] for column in TEXTS)).tolist() == [1.0, 0.0]
    assert FunctionJudge(lengths).compare(*(column[:2] for column in TEXTS)).tolist() == [1.0, 0.0]


def test_s20_scores_within_the_margin_are_a_tie():
    assert FunctionJudge(lengths, margin=1.0).compare(*TEXTS).tolist() == [0.5, 0.5, 0.5]


def broken(prompts, a, b):
    if "bad" in a:
        raise KeyError("no idea")
    return [0.5] * len(a)


def tired(prompts, a, b):
    if len(a) > 1:
        raise RuntimeError("too many")
    return [0.5]


@pytest.mark.parametrize(
    "function, message",
    [
        (broken, r"judge f: sample 5: it raised KeyError: 'no idea'"),
        (tired, r"judge f: samples 0 to 3: it raised RuntimeError: too many"),
        (
            lambda p, a, b: [math.nan if text == "bad" else 1.0 for text in a],
            r"judge f: sample 5: got nan, expected a finite",
        ),
        (
            lambda p, a, b: [None if text == "bad" else 1.0 for text in a],
            r"sample 5: got None, expected a finite number",
        ),
        (
            lambda p, a, b: [7.0 if text == "bad" else 1.0 for text in a],
            r"sample 5: got the preference 7\.0.*two lists",
        ),
        (lambda p, a, b: ([1.0] * len(a), [math.inf if t == "bad" else 1.0 for t in a]), r"sample 5: got inf"),
        (lambda p, a, b: [[1.0] if text == "bad" else 1.0 for text in a], r"sample 5: got \[1\.0\], expected a finite"),
        (lambda p, a, b: ["1.0"] * len(a), r"sample 0: got '1\.0', expected a finite number"),
        (lambda p, a, b: [10**400] * len(a), r"sample 0: got 10+, expected a finite number"),
        (lambda p, a, b: "good", r"samples 0 to 3: got 1 values, expected 4"),
        (lambda p, a, b: ("good", "evil"), r"samples 0 to 3: got 2 values, expected 4"),
        (lambda p, a, b: np.float64(0.5), r"samples 0 to 3: got 1 values, expected 4"),
        (lambda p, a, b: [1.0], r"samples 0 to 3: got 1 values, expected 4"),
        (lambda p, a, b: None, r"samples 0 to 3: got 1 values, expected 4"),
    ],
)
def test_s20_the_message_of_a_judge_that_fails_names_the_sample(function, message):
    answers = ["ok", "ok", "ok", "ok", "ok", "bad", "ok"]
    with pytest.raises(ValueError, match=message):
        FunctionJudge(function, "f", batch=4).compare(["p"] * 7, answers, ["ok"] * 7)


def test_an_interrupt_passes_through():
    def stop(prompts, a, b):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        FunctionJudge(stop).compare(*TEXTS)


@pytest.mark.parametrize(
    "name, message",
    [
        ("no_such_module:f", "judge: No module named 'no_such_module'; expected a module"),
        ("math:no_such", "judge: 'no_such' in math is not defined, expected a function"),
        ("math:pi", "judge: 'pi' in math is float, expected a function"),
        ("no_such.py:f", r"judge: no_such\.py: no such file"),
        ("nowhere", "judge: nowhere: no such folder"),
    ],
)
def test_a_judge_that_does_not_load_is_named(name, message):
    with pytest.raises(ValueError, match=message):
        load_judge(name, prompt_template="{prompt}\n")


def test_a_function_is_found_by_its_name():
    module = ModuleType("a_users_judge")
    module.longer = longer
    sys.modules["a_users_judge"] = module
    assert load_judge("a_users_judge:longer", prompt_template="{prompt}").compare(*TEXTS).tolist() == [1.0, 0.0, 0.5]


@pytest.fixture(scope="module")
def reward(tmp_path_factory):
    """Folder of a reward model with a smaller backbone than the policies of the other tests."""
    folder = tmp_path_factory.mktemp("models")
    new_model(folder / "lm", hidden_size=16, num_hidden_layers=1, head_dim=4)
    model = RewardModel.from_causal_lm(AutoModelForCausalLM.from_pretrained(folder / "lm"), seed=3)
    model.save(folder / "rm")
    load_tokenizer(folder / "lm").save_pretrained(folder / "rm")
    return folder / "rm"


def test_s4_a_reward_model_prefers_the_higher_score(reward):
    judge = load_judge(str(reward), prompt_template="{prompt}\n")
    prompts, first, second = ["q"] * 4, ["yes", "no", "maybe", "yes"], ["no", "yes", "", "yes"]
    a, b = judge.scores(prompts, first), judge.scores(prompts, second)
    expected = [1.0 if x > y else 0.0 if x < y else 0.5 for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    assert judge.compare(prompts, first, second).tolist() == expected
    assert expected[0] != expected[1] and expected[3] == 0.5
    with pytest.raises(ValueError, match="judge: sample 1: response: got 202 tokens"):
        judge.scores(["q", "q"], ["yes", "no " * 200])
    with torch.no_grad():
        judge.model.head.bias.fill_(math.nan)
    with pytest.raises(ValueError, match="judge: sample 0: got the score nan"):
        judge.scores(["q"], ["yes"])


def test_s21_ranks_count_wins_over_all_pairs():
    judge = FunctionJudge(longer, batch=3)
    ranks = rank(judge, ["p", "q"], [["aa", "a", "bb", "dddd"], ["a", "bb"]])
    assert ranks == [(1.5, 3.0, 1.5, 0.0), (1.0, 0.0)]
    assert Comparison("p", ("aa", "a", "bb", "dddd"), ranks[0]).pairs() == [(0, 1), (2, 1), (3, 0), (3, 1), (3, 2)]


PAIRS = [Pair(f"q{i}", f"first {i}", f"second {i}") for i in range(40)]


def judged(path, prefer):
    """Return the written lines with `prefer(line)` as the preference."""
    return [line | {"preference": prefer(line)} for line in read_lines(path)]


def test_s20_the_order_of_a_and_b_is_shuffled_and_undone(tmp_path):
    path = tmp_path / "pairs.jsonl"
    write_pairs(path, PAIRS, seed=5)
    lines = read_lines(path)
    assert all(line["preference"] is None for line in lines)
    assert 10 < sum(line["A"].startswith("first") for line in lines) < 30

    # Every third pair is a tie; of the rest, the second model wins every fifth pair and the first model all others.
    def prefer(line):
        if line["id"] % 3 == 0:
            return "tie"
        liked = "second" if line["id"] % 5 == 0 else "first"
        return "A" if line["A"].startswith(liked) else "B"

    write_lines(tmp_path / "judged.jsonl", reversed(judged(path, prefer)))
    found = read_preferences(tmp_path / "judged.jsonl", PAIRS, seed=5).tolist()
    assert found == [0.5 if i % 3 == 0 else 0.0 if i % 5 == 0 else 1.0 for i in range(40)]
    write_pairs(tmp_path / "again.jsonl", PAIRS, seed=6)
    assert read_lines(tmp_path / "again.jsonl") != lines


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda lines: lines[:1] + lines[2:], r"judged\.jsonl: id 1 is missing \(1 missing in all\)"),
        (lambda lines: [*lines, lines[0]], r"judged\.jsonl:41: got id 0 a second time"),
        (lambda lines: [lines[0] | {"preference": None}], r"judged\.jsonl:1: preference: got None, expected 'A'"),
        (lambda lines: [lines[0] | {"preference": []}], r"judged\.jsonl:1: preference: got \[\], expected 'A'"),
        (lambda lines: [lines[0] | {"A": lines[0]["B"]}], r"judged\.jsonl:1: A: got .* as it was written for id 0"),
        (lambda lines: [lines[0] | {"id": 99}], r"judged\.jsonl:1: id: got 99, expected one of 0 to 39"),
        (lambda lines: [lines[1] | {"id": True}], r"judged\.jsonl:1: id: got True, expected one of 0 to 39"),
        (lambda lines: [3], r"judged\.jsonl:1: id: got None"),
    ],
)
def test_s20_a_judged_file_that_differs_from_the_written_one_is_refused(tmp_path, change, message):
    write_pairs(tmp_path / "pairs.jsonl", PAIRS, seed=5)
    write_lines(tmp_path / "judged.jsonl", change(judged(tmp_path / "pairs.jsonl", lambda line: "A")))
    with pytest.raises(ValueError, match=message):
        read_preferences(tmp_path / "judged.jsonl", PAIRS, seed=5)


def test_s20_a_tie_counts_half_in_the_rate():
    found = preference_rate(torch.tensor([[1.0, 0.5], [0.0, 1.0]]))
    assert (found.rate, found.ties, found.prompts) == (pytest.approx(0.625), 0.25, 2)
    with pytest.raises(ValueError, match=r"outside \[0, 1\]"):
        preference_rate(torch.tensor([[1.5]]))
    with pytest.raises(ValueError, match="shape"):
        preference_rate(torch.zeros(3))
