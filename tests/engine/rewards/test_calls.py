"""How a reward function is called: columns of the records, lists or single values, plain or async, and where it failed."""

import asyncio
import inspect
import time

import pytest

from rlhf_engine.config import RewardConfig
from rlhf_engine.data import PromptRecord, PromptTexts
from rlhf_engine.rewards.calls import Parameters, ask
from rlhf_engine.rewards.functions import text_reward
from rlhf_engine.rewards.user_code import SampleError, import_function
from tests.engine.helpers.cli_run import new_model, new_run, read_lines, rlhf, write_lines


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return new_model(tmp_path_factory.mktemp("base"))


def ppo(run, capsys, code, *, prompts=None, sets=(), name="score"):
    """Run `rlhf ppo` with the function `name` of a file with this code; return exit code, stdout and stderr."""
    (run / "rewards.py").write_text(code)
    if prompts is not None:
        write_lines(run / "prompts.jsonl", prompts)
    function = [f"reward.function={run / 'rewards.py'}:{name}", "ppo.value_init=zero"]
    return rlhf(capsys, "ppo", "--config", run / "run.yaml", sets=[*function, *sets])


# ---- parameters ----


def two(prompts, responses): ...
def answered(prompts, responses, answer): ...
def maybe(prompts, responses, answer=None, *, level=1): ...
def every(prompts, responses, **columns): ...
def trl(completions, ground_truth, **kwargs): ...
def swapped(responses, prompts): ...


@pytest.mark.parametrize(
    "function, data, columns",
    [
        (two, ("prompts", "responses"), ()),
        (answered, ("prompts", "responses"), ("answer",)),
        (maybe, ("prompts", "responses"), ("answer", "level")),
        (every, ("prompts", "responses"), ("level", "ground_truth", "answer")),
        (trl, ("responses",), ("level", "ground_truth", "answer")),
        (swapped, ("responses", "prompts"), ()),
        (max, ("prompts", "responses"), ()),
    ],
)
def test_a_function_receives_the_columns_of_its_parameters(function, data, columns):
    found = Parameters.of(function)
    assert (found.data, found.columns(["level", "ground_truth", "answer"])) == (data, columns)


def test_a_parameter_without_a_column_is_an_error():
    with pytest.raises(ValueError, match=r"it has the parameter 'answer', but .* the further columns are id, date"):
        Parameters.of(answered).columns(["id", "date"])
    assert Parameters.of(maybe).columns(["id"]) == ()
    with pytest.raises(
        ValueError, match=r"reward function answered: it has the parameter 'answer', but .* are no further col"
    ):
        text_reward(answered, None)


COLUMNS = """
import json

def score(prompts, responses, answer, level=None):
    with open({path!r}, "a") as file:
        file.writelines(json.dumps(row) + "\\n" for row in zip(prompts, answer, level))
    return [0.0] * len(responses)

def one(prompt, response, answer, level=None):
    return score([prompt], [response], [answer], [level])[0]
"""


@pytest.mark.parametrize("how", [{"name": "score"}, {"name": "one", "sets": ["reward.batched=false"]}])
def test_columns_of_the_prompts_reach_the_function(tmp_path, base, capsys, how):
    run = new_run(tmp_path, base)
    rows = [{"prompt": f"q{i}", "answer": {"value": i}, "other": 1} | ({"level": i} if i else {}) for i in range(4)]
    code, _, shown = ppo(run, capsys, COLUMNS.format(path=str(run / "seen.jsonl")), prompts=rows, **how)
    assert code == 0 and f"{run / 'prompts.jsonl'}: ignored columns: other\n" in shown
    seen = {prompt: (answer, level) for prompt, answer, level in read_lines(run / "seen.jsonl")}
    assert seen == {f"q{i}": ({"value": i}, i or None) for i in range(4)}


def test_a_missing_column_is_reported_before_anything_is_loaded(tmp_path, base, capsys):
    run = new_run(tmp_path, base)
    code, _, shown = ppo(run, capsys, "def score(prompts, responses, answer): ...", sets=["model.path=nowhere"])
    assert code == 2 and "rewards.py:score: it has the parameter 'answer', but the prompts have no such column" in shown
    strict = ["data.unknown_columns=refuse"]
    rows = [{"prompt": f"q{i}", "answer": "a", "date": "today"} for i in range(4)]
    code, _, shown = ppo(run, capsys, "def score(prompts, responses, answer): ...", prompts=rows, sets=strict)
    assert code == 2 and "prompts.jsonl:1: unknown field 'date'" in shown


def test_equal_prompts_with_different_columns_are_an_error():
    texts = PromptTexts(["answer"])
    texts.add([1, 2], PromptRecord("q", columns={"answer": "4", "id": 1}, line=1))
    texts.add([1, 2], PromptRecord("q", columns={"answer": "4", "id": 2}, line=2))
    assert texts([1, 2]) == "q" and texts.columns([1, 2]) == {"answer": "4"}
    with pytest.raises(ValueError, match="answer: differs from that of line 1, whose prompt is the same"):
        texts.add([1, 2], PromptRecord("q", columns={"answer": "5"}, line=3))
    with pytest.raises(ValueError, match=r"answer: got b'x' \(bytes\), expected a value that JSON can hold"):
        texts.add([3], PromptRecord("r", columns={"answer": b"x"}))


# ---- lists or single values, plain or async ----


async def later(prompts, responses, answer):
    await asyncio.sleep(0)
    return [float(len(response)) + number for response, number in zip(responses, answer, strict=True)]


async def later_each(prompt, response, answer):
    return (await later([prompt], [response], [answer]))[0]


@pytest.mark.parametrize(
    "function, batched",
    [
        (lambda prompts, responses, answer: [len(r) + a for r, a in zip(responses, answer, strict=True)], True),
        (lambda prompt, response, answer: len(response) + answer, False),
        (later, True),
        (later_each, False),
        (lambda prompt, response, answer: later_each(prompt, response, answer), False),
    ],
)
def test_every_way_of_calling_gives_the_same_scores(function, batched):
    columns, named = [["p", "q", "r"], ["a", "bb", ""]], {"answer": [10, 20, 30]}
    assert ask(function, columns, "3 responses", named, batched=batched, concurrency=2) == [11, 22, 30]
    assert ask(function, [["p"], ["a"]], "1 response", {"answer": [10]}, batched=batched) == [11]


@pytest.mark.parametrize("concurrency, most", [(1, 1), (3, 3), (99, 8)])
def test_async_calls_run_at_once_up_to_the_limit(concurrency, most):
    running, seen = 0, []

    async def score(prompt, response):
        nonlocal running
        running += 1
        seen.append(running)
        await asyncio.sleep(0.01)
        running -= 1
        return 0.0

    assert ask(score, [["p"] * 8, ["r"] * 8], "8", batched=False, concurrency=concurrency) == [0.0] * 8
    assert max(seen) == most


def test_async_functions_share_a_loop_and_work_in_a_running_loop():
    loops = []

    async def score(prompts, responses):
        loops.append(asyncio.get_running_loop())
        return [1.0]

    async def notebook():
        return ask(score, [["p"], ["r"]], "1")

    assert asyncio.run(notebook()) == ask(score, [["p"], ["r"]], "1") == [1.0]
    assert loops[0] is loops[1]


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("is_async", [True, False])
@pytest.mark.parametrize("error", [KeyError, SystemExit])
def test_an_error_names_sample_file_line_and_function(batched, is_async, error):
    def fails(response):
        if "bad" in response:
            raise error("why")
        return [0.0] if batched else 0.0

    async def fails_later(response):
        time.sleep(0)
        return fails(response)

    function = fails_later if is_async else fails
    line = inspect.getsourcelines(fails)[1] + 2
    with pytest.raises(
        SampleError, match=rf"^it raised {error.__name__}: .*why.* \({__file__}:{line}, in fails\)$"
    ) as caught:
        ask((lambda p, r: function(r)), [["p"] * 3, ["a", "bad", "bad"]], "3 responses", batched=batched)
    assert caught.value.row == 1


def test_the_line_is_that_of_the_users_code(tmp_path):
    """Frames of the standard library and of installed packages are skipped."""
    (tmp_path / "lines.py").write_text("import json\n\n\ndef score(prompts, responses):\n    return json.loads('{')\n")
    function = import_function(f"{tmp_path / 'lines.py'}:score", "reward.function")
    with pytest.raises(SampleError, match=rf"JSONDecodeError: .* \({tmp_path / 'lines.py'}:5, in score\)$"):
        ask(function, [["p"], ["r"]], "1")


def test_a_failing_function_names_the_prompt(tmp_path, base, capsys):
    run = new_run(tmp_path, base)
    helper = "def part(response):\n    return {}[response]\n"
    code, _, shown = ppo(
        run, capsys, helper + "def score(prompts, responses):\n    return [part(r) for r in responses]\n"
    )
    assert code == 2 and "rewards.py:score: it raised KeyError: " in shown and shown.count("\n") == 1
    assert f"({run / 'rewards.py'}:2, in part); prompt: 'q" in shown
    code, _, shown = ppo(run, capsys, "def score(prompts, responses):\n    return ['1'] * len(responses)\n")
    assert code == 2 and "got '1', expected a number; prompt: 'q" in shown
    code, _, shown = ppo(run, capsys, "def score(prompt, response):\n    return 1.0\n")
    assert (
        code == 2
        and "expected a list of 2 numbers, one per response; for a function of one response, set reward." in shown
    )


def test_settings_that_nothing_reads_are_refused():
    with pytest.raises(ValueError, match="batched: got False, expected True; only function reads it"):
        RewardConfig(batched=False)
    with pytest.raises(ValueError, match="concurrency: got 3, expected 32; only batched false reads it"):
        RewardConfig(function="a:b", concurrency=3)


# ---- neighbours ----


def test_a_file_imports_its_neighbours(tmp_path, base, capsys):
    run = new_run(tmp_path, base)
    (run / "near_by.py").write_text("def length(text):\n    return float(len(text))\n")
    (run / "pack").mkdir()
    (run / "pack" / "__init__.py").write_text("from near_by import length as size\n")
    late = "def score(prompts, responses):\n    from pack import size\n    return [size(r) for r in responses]\n"
    assert ppo(run, capsys, "from near_by import length\n\n\n" + late)[0] == 0


def test_a_module_of_the_working_folder_is_found(tmp_path, monkeypatch):
    (tmp_path / "in_the_working_folder.py").write_text("def score(prompts, responses): ...\n")
    monkeypatch.chdir(tmp_path)
    assert import_function("in_the_working_folder:score", "reward.function").__name__ == "score"
    with pytest.raises(ValueError, match="No module named 'nowhere'; expected a module in the working folder or on"):
        import_function("nowhere:score", "reward.function")


def test_neighbours_with_one_name_in_two_folders_are_an_error(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same_name.py").write_text(f"def where(*columns):\n    return {folder!r}\n")
        (tmp_path / folder / "function.py").write_text("from same_name import where\n")
    assert import_function(f"{tmp_path / 'one' / 'function.py'}:where", "reward.function")() == "one"
    with pytest.raises(
        ValueError, match=r"eval.judge: .*two/same_name.py has the name of .*one/same_name.py, which is already"
    ):
        import_function(f"{tmp_path / 'two' / 'function.py'}:where", "eval.judge")
