"""Conversations instead of text prompts in `rlhf generate`, `rlhf eval` and `rlhf iterate`."""

import json

import pytest

from rlhf_engine.config import load_config
from rlhf_engine.data import Message, read_comparisons
from rlhf_engine.model.pretrained import load_tokenizer
from rlhf_engine.recipes.iterate import run_iterate
from tests.engine.helpers.cli_run import new_model, new_run, read_lines, rlhf, write_lines

CHAT = "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
ROOM = "rollout.max_prompt_tokens=40"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = new_model(tmp_path_factory.mktemp("base"))
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def run(tmp_path, base, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "judge_last.py").write_text(
        "def judge(prompts, a, b):\n"
        "    assert all(prompt[-1]['role'] == 'user' for prompt in prompts)\n"
        "    return [len(x) for x in a], [len(x) for x in b]\n"
    )
    new_run(tmp_path, base)
    turns = [
        [("user", f"q{i}"), ("assistant", "no"), ("user", "why")] if i % 2 else [("user", f"q{i}")] for i in range(10)
    ]
    lines = [
        {
            "messages": [{"role": role, "content": content} for role, content in turn],
            "user_id": f"u{i}",
            "split": "train" if i < 6 else "test",
        }
        for i, turn in enumerate(turns)
    ]
    write_lines(tmp_path / "prompts.jsonl", lines)
    return tmp_path


def test_s19_generate_responds_to_conversations(run, capsys):
    files = ("--prompts", run / "prompts.jsonl", "--output", run / "a.jsonl")
    assert rlhf(capsys, "generate", "--config", run / "run.yaml", *files, sets=[ROOM])[0] == 0
    asked = read_lines(run / "prompts.jsonl")
    assert [line["messages"] for line in read_lines(run / "a.jsonl")] == [line["messages"] for line in asked]


def test_s20_conversations_are_judged(run, base, capsys):
    sets = [ROOM, f"eval.candidate={base}", f"eval.baseline={base}"]
    code, shown, _ = rlhf(capsys, "eval", "--config", run / "run.yaml", sets=[*sets, "eval.judge=judge_last.py:judge"])
    assert code == 0 and "| candidate |" in shown
    command = ("eval", "--config", run / "run.yaml")
    assert rlhf(capsys, *command, sets=[*sets, "eval.judge=file"])[0] == 0
    folder = run / "out" / "judging"
    lines = [line | {"preference": "tie"} for line in read_lines(folder / "pairs.jsonl")]
    assert lines[1]["messages"][-1] == {"role": "user", "content": "why"}
    write_lines(folder / "judged.jsonl", lines)
    assert rlhf(capsys, *command, sets=[*sets, "eval.judge=file"])[0] == 0
    assert json.loads((folder / "report.json").read_text())["win_rate"]["rate"] == 0.5


def test_s20_a_prefix_before_a_conversation_is_an_error(run, base, capsys):
    (run / "shots.txt").write_text("q\nyes\n\n")
    sets = [ROOM, f"eval.candidate={base}", f"eval.baseline={base}", "eval.candidate_prefix=shots.txt"]
    code, _, shown = rlhf(capsys, "eval", "--config", run / "run.yaml", sets=[*sets, "eval.judge=judge_last.py:judge"])
    assert code == 2 and "prompts.jsonl:7: messages: got a conversation, expected a text" in shown


def test_s21_iterate_accepts_conversations(run):
    overrides = [ROOM, "iterate.rounds=1", "iterate.prompts=4"]
    judges = [f"{section}.judge=judge_last.py:judge" for section in ("iterate", "eval")]
    run_iterate(load_config(run / "run.yaml", [*overrides, *judges]), lambda text: None)
    found = list(read_comparisons(run / "out" / "round_1" / "comparisons.jsonl"))
    assert len(found) > 6 and all(isinstance(prompt.prompt[-1], Message) for prompt in found[6:])


def test_s19_truncated_prompts_are_counted(run, base, capsys):
    sets = ["rollout.max_prompt_tokens=12", "data.long_prompts=truncate"]
    sets += [f"eval.candidate={base}", f"eval.baseline={base}", "eval.judge=judge_last.py:judge"]
    assert rlhf(capsys, "eval", "--config", run / "run.yaml", sets=sets)[0] == 0
    report = json.loads((run / "out" / "eval" / "report.json").read_text())
    assert report["truncated_prompts"] == {"candidate": 2, "baseline": 2}
