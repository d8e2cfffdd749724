"""A user's functions: import by name, and errors of one line."""

import sys

import pytest
import torch

from rlhf_engine.config import PPOConfig
from rlhf_engine.evaluate import load_judge
from rlhf_engine.rewards.calls import ask
from rlhf_engine.rewards.functions import text_reward
from rlhf_engine.rewards.scaling import ScoreScale, score_answers
from rlhf_engine.rewards.user_code import forget, import_function
from tests.engine.helpers.cli_run import new_model, new_run, rlhf
from tests.engine.helpers.tiny_trainer import SETTINGS, make_trainer

REWARD = """
def many_raise(prompts, answers):
    if len(prompts) > 1:
        raise KeyError("too many")
    return [0.0]

def short(prompts, answers):
    return [0.0]

def words(prompts, answers):
    return ["1.0"] * len(answers)

def none(prompts, answers):
    return None

def scalar(prompts, answers):
    return 1.0

def breaks_off(prompts, answers):
    yield 0.0
    raise KeyError("half way")

number = 3
"""
DATACLASS = """
from __future__ import annotations
from dataclasses import dataclass

@dataclass
class Marks:
    weight: float = 2.0
    words: list[str] | None = None

def reward(prompts, answers):
    return (Marks().weight * len(answer) for answer in answers)

def judge(prompts, a, b):
    return [Marks().weight / 2] * len(a)
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return new_model(tmp_path_factory.mktemp("base"))


def reward(run, capsys, name, text):
    """Run `rlhf ppo` on the prompts q0 to q5 with function `name` of a file with this text."""
    (run / "rewards.py").write_text(text)
    sets = [f"reward.function={run / 'rewards.py'}:{name}", "ppo.value_init=zero"]
    return rlhf(capsys, "ppo", "--config", run / "run.yaml", sets=sets)


@pytest.mark.parametrize(
    "name, message",
    [
        ("many_raise", "2 responses: it raised KeyError: 'too many'"),
        ("short", "got 1 scores, expected 2, one per response"),
        ("words", "got '1.0', expected a number"),
        ("none", "got None, expected a list of 2 numbers, one per response"),
        ("scalar", "got 1.0, expected a list of 2 numbers, one per response"),
        ("breaks_off", "it raised KeyError: 'half way'"),
        ("number", "rewards.py is int, expected a function"),
        ("nothing", "rewards.py is not defined, expected a function"),
    ],
)
def test_s6_a_failing_reward_function_prints_one_line(tmp_path, base, capsys, name, message):
    """The trial before training calls the function with two samples."""
    code, _, shown = reward(new_run(tmp_path, base), capsys, name, REWARD)
    assert code == 2 and shown.startswith("rlhf: ") and shown.count("\n") == 1
    assert message in shown and "reward.function" in shown and str(tmp_path / "rewards.py") in shown


@pytest.mark.parametrize(
    "text, message",
    [
        ("def f(:\n", "it raised SyntaxError: "),
        ("import no_such_module\n", "it raised ModuleNotFoundError: No module named 'no_such_module'"),
        ("1 / 0\n", "it raised ZeroDivisionError: division by zero"),
        ("import sys\nsys.exit(0)\n", "it raised SystemExit: 0"),
    ],
)
def test_s6_a_file_that_does_not_load_prints_one_line(tmp_path, base, capsys, text, message):
    code, _, shown = reward(new_run(tmp_path, base), capsys, "f", text)
    assert (
        code == 2 and f"rlhf: reward.function: {tmp_path / 'rewards.py'}: {message}" in shown and shown.count("\n") == 1
    )
    with pytest.raises(ValueError, match=r"eval\.judge: .*rewards\.py: it raised"):
        import_function(f"{tmp_path / 'rewards.py'}:f", "eval.judge")


def test_s6_errors_number_samples_by_run():
    """A sample's number counts from the start of the run, and includes responses that the function does not score."""
    trainer = make_trainer()
    rollout = trainer.generator.generate(trainer.prompts(0, 16), torch.arange(16))
    rows = rollout.ended.nonzero()[:, 0].tolist()
    assert len(rows) > 3 and rows[2] != 2
    prompts = {tuple(ids.tolist()): "q" for ids in trainer.prompts(0, 16)}

    class Codec:
        @staticmethod
        def decode_response(ids):
            return " ".join(map(str, ids))

    wrong = " ".join(map(str, rollout.response_ids[rows[2], : int(rollout.response_lengths[rows[2]])].tolist()))

    def raises(prompts, answers):
        if wrong in answers:
            raise KeyError("no\nidea")
        return [0.0] * len(answers)

    def spells(prompts, answers):
        return ["0" if answer == wrong else 0.0 for answer in answers]

    config = PPOConfig(**SETTINGS, missing_eos_score=-1.0)
    for function, message in ((raises, r"it raised KeyError: 'no\\nidea'"), (spells, "got '0', expected a number")):
        score = text_reward(function, Codec, prompt_of=lambda ids: prompts[tuple(ids)], name="f.py:f")
        with pytest.raises(ValueError, match=rf"^sample {100 + rows[2]} of the run: reward.function f.py:f: {message}"):
            score_answers(rollout, score, config, ScoreScale("none"), 100)


def test_s6_an_error_of_many_lines_becomes_one_line():
    def raises(column):
        raise ValueError("first\n  second")

    with pytest.raises(
        ValueError, match=r"^it raised ValueError: first second \(\S+test_user_code.py:\d+, in raises\)$"
    ):
        ask(raises, [["a"]], "sample 0")


def test_s6_s20_a_file_with_dataclasses_loads(tmp_path, base, capsys):
    assert reward(new_run(tmp_path, base), capsys, "reward", DATACLASS)[0] == 0
    judge = load_judge(f"{tmp_path / 'rewards.py'}:judge", prompt_template="{prompt}")
    assert judge.compare(["p"], ["a"], ["b"]).tolist() == [1.0]


def test_two_files_with_the_same_name_are_two_modules(tmp_path):
    functions = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "rewards.py").write_text(f"def name():\n    return {folder!r}, __name__\n")
        functions.append(import_function(f"{tmp_path / folder / 'rewards.py'}:name", "reward.function"))
    (one, first), (two, second) = (function() for function in functions)
    assert (one, two) == ("a", "b") and first != second


def test_forgotten_code_is_imported_again(tmp_path):
    """The file imports a module of its folder, which Python would not read twice."""
    (tmp_path / "mine_reward.py").write_text("from mine_helper import number\n\ndef score():\n    return number\n")
    for number in (1, 22):
        (tmp_path / "mine_helper.py").write_text(f"number = {number}\n")
        assert import_function(f"{tmp_path / 'mine_reward.py'}:score", "reward.function")() == number
        assert str(tmp_path) in sys.path and "mine_helper" in sys.modules
        forget()
        assert str(tmp_path) not in sys.path and "mine_helper" not in sys.modules
