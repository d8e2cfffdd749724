"""Data formats of other tools, recognized by their columns; further columns; what cannot be read is named."""

import json

import pytest

from rlhf_engine.data import (
    Comparison,
    Demonstration,
    Message,
    PromptRecord,
    read_comparisons,
    read_demonstrations,
    read_prompts,
    read_texts,
)
from tests.engine.helpers.cli_run import new_model, new_run, rlhf, write_lines

ASKED, ANSWERED, BAD = Message("user", "p"), Message("assistant", "c"), Message("assistant", "r")
CHAT = [{"role": "user", "content": "p"}, {"role": "assistant", "content": "c"}]
WORSE = [CHAT[0], {"role": "assistant", "content": "r"}]
SHAREGPT = [{"from": "human", "value": "p"}, {"from": "gpt", "value": "c"}]
OPENAI_PAIR = {"preferred_output": CHAT[1:], "non_preferred_output": WORSE[1:]}
HH = "\n\nHuman: o\n\nAssistant: n\n\nHuman: p\n\nAssistant:"


def rows(tmp_path, *lines):
    return write_lines(tmp_path / "rows.jsonl", lines)


@pytest.mark.parametrize(
    "row, record",
    [
        ({"prompt": "p", "completion": " c"}, Demonstration("p", " c")),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, Demonstration((ASKED,), "c")),
        ({"prompt": CHAT[:1], "response": "c"}, Demonstration((ASKED,), "c")),
        ({"messages": CHAT}, Demonstration((ASKED,), "c")),
        ({"prompt": "p", "prompt_id": "1", "messages": CHAT}, Demonstration((ASKED,), "c")),
        ({"instruction": "p", "input": "", "output": "c"}, Demonstration("p", "c")),
        ({"instruction": "p", "input": "x", "output": "c"}, Demonstration("p\n\nx", "c")),
        (
            {"instruction": "p", "output": "c", "system": "s", "history": [["o", "n"]]},
            Demonstration((Message("system", "s"), Message("user", "o"), Message("assistant", "n"), ASKED), "c"),
        ),
        ({"conversations": SHAREGPT}, Demonstration((ASKED,), "c")),
        ({"conversations": SHAREGPT, "system": "s"}, Demonstration((Message("system", "s"), ASKED), "c")),
        ({"conversations": CHAT}, Demonstration((ASKED,), "c")),
        ({"prompt": "p", "completion": "c", "label": True}, Demonstration("p", "c")),
        # Some data sets in Alpaca's format have the whole text as `prompt` too.
        ({"instruction": "p", "input": "x", "output": "c", "prompt": "all"}, Demonstration("p\n\nx", "c")),
        (
            {"messages": [CHAT[0], {**CHAT[1], "weight": 0}, CHAT[0], {**CHAT[1], "weight": 1}], "tools": []},
            Demonstration((ASKED, Message("assistant", "c", trained=False), ASKED), "c"),
        ),
    ],
)
def test_demonstrations_of_other_tools(tmp_path, row, record):
    assert list(read_demonstrations(rows(tmp_path, row))) == [record]


@pytest.mark.parametrize(
    "row, record",
    [
        ({"prompt": "p", "chosen": "c", "rejected": "r"}, Comparison("p", ("c", "r"), (0, 1))),
        ({"prompt": "p", "chosen": "c", "rejected": "c"}, Comparison("p", ("c", "c"), (0, 0))),
        ({"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": WORSE[1:]}, Comparison((ASKED,), ("c", "r"), (0, 1))),
        ({"chosen": CHAT, "rejected": WORSE}, Comparison((ASKED,), ("c", "r"), (0, 1))),
        (
            {"prompt": "p", "chosen": CHAT, "rejected": WORSE, "score_chosen": 8},
            Comparison((ASKED,), ("c", "r"), (0, 1)),
        ),
        ({"chosen": HH + " c", "rejected": HH + " r"}, Comparison(HH, ("c", "r"), (0, 1))),
        ({"instruction": "p", "input": "x", "chosen": "c", "rejected": "r"}, Comparison("p\n\nx", ("c", "r"), (0, 1))),
        (
            {"conversations": SHAREGPT[:1], "chosen": SHAREGPT[1], "rejected": {"from": "gpt", "value": "r"}},
            Comparison((ASKED,), ("c", "r"), (0, 1)),
        ),
        (
            {"input": {"messages": CHAT[:1]}, "preferred_output": CHAT[1:], "non_preferred_output": WORSE[1:]},
            Comparison((ASKED,), ("c", "r"), (0, 1)),
        ),
    ],
)
def test_pairs_of_other_tools(tmp_path, row, record):
    assert list(read_comparisons(rows(tmp_path, row))) == [record]


@pytest.mark.parametrize(
    "row, record",
    [
        ({"prompt": "p"}, PromptRecord("p")),
        ({"prompt": CHAT[:1], "user_id": 7}, PromptRecord((ASKED,), "7")),
        ({"prompt": "p", "answer": 4, "split": "test"}, PromptRecord("p", split="test", columns={"answer": 4})),
        ({"prompt": "p", "completion": "c"}, PromptRecord("p", columns={"completion": "c"})),
        ({"instruction": "p", "input": "x", "output": "c"}, PromptRecord("p\n\nx", columns={"output": "c"})),
        ({"chosen": CHAT, "rejected": WORSE}, PromptRecord((ASKED,), columns={"chosen": CHAT, "rejected": WORSE})),
        ({"input": {"messages": CHAT[:1]}, **OPENAI_PAIR}, PromptRecord((ASKED,), columns=OPENAI_PAIR)),
    ],
)
def test_prompts_of_other_tools(tmp_path, row, record):
    assert list(read_prompts(rows(tmp_path, row))) == [record]


@pytest.mark.parametrize(
    "reader, row, message",
    [
        (read_demonstrations, {"text": "t"}, "no field 'prompt', or one of 'messages', 'conversations', 'instruction'"),
        (read_demonstrations, {"prompt": "p", "answer": "a"}, "no field 'response', or one of 'completion', 'output'"),
        (read_demonstrations, {"messages": CHAT[:1]}, "messages: got 'user' as the last role, expected 'assistant'"),
        (read_demonstrations, {"prompt": CHAT[:1], "completion": CHAT}, "completion: got 2 messages, expected one"),
        (read_demonstrations, {"prompt": "q", "messages": CHAT}, "the fields prompt and messages exclude each other"),
        (read_demonstrations, {"conversations": [{"from": "human"}]}, r"conversations\[0\]: got {'from': 'human'}"),
        (read_demonstrations, {"instruction": "p", "input": 3, "output": "c"}, "instruction and input: got 'p' and 3"),
        (
            read_demonstrations,
            {"messages": [CHAT[0], {**CHAT[1], "weight": 0}]},
            "messages: the last message has weight 0, expected a response to train on",
        ),
        (
            read_demonstrations,
            {"messages": [{**CHAT[0], "weight": 0}]},
            r"messages\[0\].weight: got 0, expected 1, or 0",
        ),
        (read_comparisons, {"input": "p", **OPENAI_PAIR}, "input: got 'p', expected an object with messages"),
        (
            read_comparisons,
            {"input": {"messages": CHAT[:1]}, **OPENAI_PAIR, "preferred_output": CHAT},
            "preferred_output: got 2 messages, expected one",
        ),
        (
            read_demonstrations,
            {"instruction": "p", "output": "c", "history": ["o"]},
            "history: got .*, expected a list of pairs",
        ),
        (
            read_comparisons,
            {"chosen": "c", "rejected": "r"},
            "no field 'prompt'; without it, chosen must be a list of messages",
        ),
        (
            read_comparisons,
            {"chosen": HH + " c", "rejected": "\n\nHuman: q\n\nAssistant: r"},
            "chosen and rejected: they differ before their last",
        ),
        (read_comparisons, {"chosen": CHAT, "rejected": CHAT[:1]}, "rejected: got 'user' as the last role"),
        (read_comparisons, {"prompt": "q", "chosen": CHAT, "rejected": WORSE}, "prompt: differs from the conversation"),
        (read_comparisons, {"prompt": "p", "chosen": 3, "rejected": "r"}, r"chosen: got 3 \(int\), expected a text"),
        (
            read_comparisons,
            {"prompt": "p", "completion": "c", "label": True},
            r"label: got a judgment of one response \(KTO",
        ),
        (
            read_comparisons,
            {"prompt": "p", "completion": "c"},
            "no field 'completions', expected completions and ranking, or ch",
        ),
    ],
)
def test_what_a_row_lacks_is_named(tmp_path, reader, row, message):
    with pytest.raises(ValueError, match=rf"rows.jsonl:1: {message}"):
        list(reader(rows(tmp_path, row)))


def test_responses_with_a_bad_label_are_left_out_and_counted(tmp_path):
    reading = read_demonstrations(
        rows(tmp_path, *({"prompt": "p", "completion": x, "label": x == "good"} for x in ("good", "bad", "worse")))
    )
    assert [record.response for record in reading] == ["good"]
    assert reading.notes()[1:] == [f"{tmp_path / 'rows.jsonl'}: left out 2 responses with label false"]


@pytest.mark.parametrize(
    "reader, row",
    [
        (read_demonstrations, {"prompt": "p", "response": "r"}),
        (read_comparisons, {"prompt": "p", "completions": ["c", "r"], "ranking": [0, 1]}),
        (read_prompts, {"prompt": "p"}),
        (read_texts, {"text": "t"}),
    ],
)
def test_further_columns_are_listed_or_refused(tmp_path, reader, row):
    path = rows(tmp_path, row | {"date": "2026-10-03"}, row | {"id": 3, "date": None})
    reading = reader(path)
    assert len(list(reading)) == 2
    assert reading.notes() == [f"{path}: ignored columns: date, id"] and reading.notes(read=["date", "id"]) == []
    assert len(list(reader(path, allow=["id", "date"]))) == 2
    with pytest.raises(ValueError, match=r"rows.jsonl:2: unknown field 'id'; remove it, or set data.unknown_columns"):
        list(reader(path, allow=["date"]))


def test_the_commands_list_ignored_columns_in_one_line(tmp_path, capsys):
    run = new_run(tmp_path, new_model(tmp_path / "base"))
    path = run / "demonstrations.jsonl"
    write_lines(path, [json.loads(line) | {"date": "today", "id": 1} for line in path.read_text().splitlines()])
    code, _, shown = rlhf(capsys, "sft", "--config", run / "run.yaml")
    assert code == 0 and f"rlhf: {path}: ignored columns: date, id\n" in shown
    code, out, shown = rlhf(capsys, "data", "check", "demonstrations", path)
    assert code == 0 and out == "records: 8\n" and shown == f"rlhf: {path}: ignored columns: date, id\n"
    assert rlhf(capsys, "data", "check", "demonstrations", path, "--strict")[0] == 2
    sets = ["data.unknown_columns=refuse"]
    code, _, shown = rlhf(capsys, "sft", "--config", run / "run.yaml", "--overwrite", sets=sets)
    assert code == 2 and f"{path}:1: unknown field 'date'" in shown
    (run / "prompts.jsonl").write_text('{"prompt": "q"}\n{"prompt": "r", "user_id": "u"}\n')
    code, out, shown = rlhf(capsys, "data", "check", "prompts", run / "prompts.jsonl")
    assert code == 0 and "without user_id: 1\n" in out and "prompts without a user_id" in shown
