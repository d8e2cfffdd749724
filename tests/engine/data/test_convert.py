"""Recognition of a file's format, files whose columns fit two formats, CSV and Parquet, and `rlhf data convert`."""

import csv
import json

import pytest

from rlhf_engine.data import Comparison, Demonstration, Message, read_comparisons, read_demonstrations, read_texts
from rlhf_engine.data.convert import convert
from tests.engine.helpers.cli_run import read_lines, rlhf, write_lines

CHAT = [{"role": "user", "content": "p"}, {"role": "assistant", "content": "c"}]
TWO = {"instruction": "i", "output": "o", "prompt": "p", "completion": "c"}
ROWS = {
    "prompt_completion": ({"prompt": "p", "completion": "c"}, {"prompt": "p", "response": "c"}),
    "messages": ({"messages": CHAT}, {"messages": CHAT[:1], "response": "c"}),
    "alpaca": ({"instruction": "p", "input": "", "output": "c"}, {"prompt": "p", "response": "c"}),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "p"}, {"from": "gpt", "value": "c"}]},
        {"messages": CHAT[:1], "response": "c"},
    ),
    "preference": (
        {"prompt": "p", "chosen": "c", "rejected": "r"},
        {"prompt": "p", "completions": ["c", "r"], "ranking": [0, 1]},
    ),
    "openai_preference": (
        {
            "input": {"messages": CHAT[:1]},
            "preferred_output": CHAT[1:],
            "non_preferred_output": [{"role": "assistant", "content": "r"}],
        },
        {"messages": CHAT[:1], "completions": ["c", "r"], "ranking": [0, 1]},
    ),
}


def write_csv(path, rows, delimiter=","):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows({k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()} for row in rows)
    return path


def write_parquet(path, rows):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


WRITERS = {
    ".jsonl": write_lines,
    ".csv": write_csv,
    ".tsv": lambda path, rows: write_csv(path, rows, "\t"),
    ".parquet": write_parquet,
}


@pytest.mark.parametrize("ending", WRITERS)
@pytest.mark.parametrize("name", ROWS)
def test_every_format_in_every_kind_of_file_is_converted_and_reported(tmp_path, capsys, name, ending):
    row, line = ROWS[name]
    source = WRITERS[ending](tmp_path / f"in{ending}", [row, row])
    code, shown, noted = rlhf(capsys, "data", "convert", source, tmp_path / "out.jsonl")
    kind = "comparisons" if "ranking" in line else "demonstrations"
    assert code == 0 and shown == f"2 {kind}: {tmp_path / 'out.jsonl'}\n"
    assert f"rlhf: {source}: 2 rows in the format {name} (" in noted
    assert read_lines(tmp_path / "out.jsonl") == [line, line]


def test_a_file_that_fits_two_formats_asks_for_one(tmp_path, capsys):
    path, new = write_lines(tmp_path / "two.jsonl", [TWO]), tmp_path / "new.jsonl"
    with pytest.raises(
        ValueError, match=r"two.jsonl:1: the columns fit two formats, prompt_completion .* or alpaca .*"
    ):
        list(read_demonstrations(path))
    code, _, shown = rlhf(capsys, "data", "convert", path, new)
    assert code == 2 and "two.jsonl:1: the columns fit two formats" in shown and not new.exists()
    for name, record in (("alpaca", Demonstration("i", "o")), ("prompt_completion", Demonstration("p", "c"))):
        assert rlhf(capsys, "data", "convert", path, new, "--format", name, "--overwrite")[0] == 0
        assert list(read_demonstrations(new)) == [record]
    assert rlhf(capsys, "data", "check", "demonstrations", path)[0] == 2
    code, _, shown = rlhf(capsys, "data", "check", "demonstrations", path, "--format", "alpaca")
    assert code == 0 and "ignored columns: prompt, completion" in shown


def test_a_file_of_two_kinds_asks_for_a_format(tmp_path):
    path = write_lines(tmp_path / "two.jsonl", [{"messages": CHAT, **ROWS["preference"][0]}])
    new = tmp_path / "new.jsonl"
    with pytest.raises(ValueError, match=r"--format preference \(comparisons\), --format messages \(demonstrations\)"):
        convert(path, new)
    assert convert(path, new, form="messages") == ("demonstrations", 1)
    assert convert(path, new, kind="comparisons") == ("comparisons", 1)
    assert list(read_comparisons(new)) == [Comparison("p", ("c", "r"), (0, 1))]


def test_prompts_texts_and_weights_are_converted(tmp_path):
    new = tmp_path / "new.jsonl"
    rows = [{"instruction": "p", "user_id": "u", "split": "test", "reference": 4}, {"instruction": "q"}]
    assert convert(write_lines(tmp_path / "prompts.jsonl", rows), new) == ("prompts", 2)
    assert read_lines(new) == [{"reference": 4, "prompt": "p", "user_id": "u", "split": "test"}, {"prompt": "q"}]
    (tmp_path / "texts.txt").write_text("one\n\ntwo\n")
    assert convert(tmp_path / "texts.txt", new) == ("pretraining", 2)
    assert [one.text for one in read_texts(write_csv(tmp_path / "texts.csv", [{"text": "a\n\nb"}]))] == ["a\n\nb"]
    turns = [CHAT[0], {**CHAT[1], "weight": 0}, *CHAT]
    convert(write_lines(tmp_path / "weights.jsonl", [{"messages": turns}]), new)
    assert list(read_demonstrations(new)) == [
        Demonstration((Message("user", "p"), Message("assistant", "c", trained=False), Message("user", "p")), "c")
    ]


def test_cells_of_csv_that_look_like_json_are_text_unless_they_are_messages(tmp_path):
    rows = [{"prompt": "[1, 2]", "completions": ["{}", "[3"], "ranking": "B > A"}]
    path = write_csv(tmp_path / "rows.csv", rows)
    assert list(read_comparisons(path)) == [Comparison("[1, 2]", ("{}", "[3"), (1, 0))]
    path = write_csv(tmp_path / "rows.csv", [{"prompt": CHAT[:1], "completion": '{"a": 1}', "label": "true"}])
    assert list(read_demonstrations(path)) == [Demonstration((Message("user", "p"),), '{"a": 1}')]


@pytest.mark.parametrize(
    "content, message",
    [
        ("prompt,response\np,r\np\n", "rows.csv:3: got 1 cells, expected 2, as in the first line: prompt, response"),
        ('prompt,response\n"p\nq",r\n\np,\n', "rows.csv:5: no field 'response'"),
        ("prompt,prompt\np,r\n", "rows.csv:1: the column 'prompt' appears twice"),
        ("messages\n[hello\n", "rows.csv:2: messages: not valid JSON"),
        ('prompt,response\n"p" x,r\n', "rows.csv:2: not valid CSV"),
        (b"prompt,response\np,\xff\n", "rows.csv:.: not valid UTF-8"),
    ],
)
def test_a_broken_csv_is_named_by_its_line(tmp_path, content, message):
    path = tmp_path / "rows.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        list(read_demonstrations(path))


def test_what_cannot_be_converted_is_named_and_nothing_is_written(tmp_path, capsys):
    new = tmp_path / "new.jsonl"
    good = write_lines(tmp_path / "good.jsonl", [{"prompt": "p", "completion": "c"}])
    bad = write_lines(tmp_path / "bad.jsonl", [{"prompt": "p", "completion": "c"}, {"prompt": "p", "completion": 3}])
    (tmp_path / "empty.jsonl").write_text("\n")
    broken = tmp_path / "rows.parquet"
    broken.write_bytes(b"PAR1 and no more")
    for arguments, message in (
        ([bad, new], "bad.jsonl:2: response: got 3 (int)"),
        ([tmp_path / "empty.jsonl", new], "contains no rows"),
        ([tmp_path / "absent.csv", new], "no such file"),
        ([broken, new], "not a complete Parquet file"),
        ([good, new, "--format", "letters"], "--format: got 'letters', expected one of alpaca"),
        ([good, new, "--format", "alpaca", "--kind", "comparisons"], "--format: got 'alpaca' for comparisons"),
        ([good, new, "--kind", "letters"], "--kind: got 'letters'"),
        ([good, tmp_path / "new.csv"], "expected '.jsonl'"),
        ([good, good, "--overwrite"], "is the file that is read"),
        ([good, bad], "exists; replace it with --overwrite"),
        ([write_lines(tmp_path / "odd.jsonl", [{"a": 1}]), new], "odd.jsonl:1: the columns are those of no format: a"),
    ):
        code, _, shown = rlhf(capsys, "data", "convert", *arguments)
        assert code == 2 and message in shown, shown
        assert not new.exists()
