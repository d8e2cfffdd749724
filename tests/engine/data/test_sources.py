"""Reading of rankings, demonstrations, prompts and text from JSONL and data sets on disk; conversations; truncation."""

import builtins
import json
import tracemalloc
from dataclasses import replace

import pytest
import torch

from rlhf_engine.cli import main
from rlhf_engine.data import (
    Codec,
    Comparison,
    Demonstration,
    Message,
    PretrainingText,
    PromptRecord,
    read_comparisons,
    read_demonstrations,
    read_prompts,
    read_texts,
    token_rows,
    train_tokenizer,
)
from tests.engine.helpers.conversations import CHAT

TALK = (Message("system", "be kind"), Message("user", "one"), Message("assistant", "two"), Message("user", "three"))


def dicts(messages):
    return [{"role": message.role, "content": message.content} for message in messages]


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def on_disk(path, rows):
    datasets = pytest.importorskip("datasets")
    columns = {name: None for row in rows for name in row}
    datasets.Dataset.from_list([{**columns, **row} for row in rows]).save_to_disk(path)
    return path


WRITERS = pytest.mark.parametrize("write", [jsonl, on_disk], ids=["jsonl", "datasets"])


@WRITERS
def test_s3_rankings_of_four_to_nine_with_ties_are_read(tmp_path, write):
    letters = "ABCDEFGHI"
    rows = [
        {"prompt": f"p{k}", "completions": [f"c{i}" for i in range(k)], "ranking": " > ".join(letters[:k])}
        for k in range(4, 10)
    ]
    rows.append({"prompt": "ties", "completions": ["a", "b", "c", "d"], "ranking": "D > C > A = B"})
    read = list(read_comparisons(write(tmp_path / "data", rows)))
    assert [len(record.pairs()) for record in read] == [6, 10, 15, 21, 28, 36, 5]
    assert read[-1] == Comparison("ties", ("a", "b", "c", "d"), (2, 2, 1, 0))
    assert [record.line for record in read] == [1, 2, 3, 4, 5, 6, 7]


@WRITERS
def test_s3_numeric_ranks_and_conversations_are_read(tmp_path, write):
    rows = [{"messages": dicts(TALK), "completions": ["a", "b", "c"], "ranking": [2.0, 1.0, 2.0]}]
    (record,) = read_comparisons(write(tmp_path / "data", rows))
    assert record == Comparison(TALK, ("a", "b", "c"), (2, 1, 2))
    assert record.pairs() == [(1, 0), (1, 2)]


@WRITERS
@pytest.mark.parametrize(
    "change, message",
    [
        ({"completions": ["a"], "ranking": "A"}, "completions: got 1, expected at least 2"),
        ({"ranking": "A > B"}, "ranking: C not in 'A > B'; rank every completion"),
        ({"ranking": "A > B > D"}, "ranking: got 'D'"),
        ({"completions": ["a", "", "c"]}, r"completions\[1\]: got an empty string"),
    ],
)
def test_s3_the_error_for_an_invalid_ranking_names_the_line(tmp_path, write, change, message):
    good = {"prompt": "p", "completions": ["a", "b", "c"], "ranking": "A > B = C"}
    path = write(tmp_path / "data", [good, {**good, **change}])
    with pytest.raises(ValueError, match=rf"data:2: {message}"):
        list(read_comparisons(path))


@pytest.mark.parametrize("ranks", [[1, "2"], [1, None], [1, float("nan")], [1, True], [1]])
def test_s3_the_error_for_ranks_that_are_not_numbers_names_the_line(tmp_path, ranks):
    path = jsonl(tmp_path / "data", [{"prompt": "p", "completions": ["a", "b"], "ranking": ranks}])
    with pytest.raises(ValueError, match=r"data:1: ranking"):
        list(read_comparisons(path))


@WRITERS
def test_s19_demonstrations_and_prompts_are_read(tmp_path, write):
    demonstrations = write(
        tmp_path / "demonstrations", [{"prompt": "p", "response": "é"}, {"prompt": "q", "response": "s"}]
    )
    assert list(read_demonstrations(demonstrations)) == [Demonstration("p", "é"), Demonstration("q", "s")]
    rows = [{"prompt": "p", "user_id": "u", "split": "test"}, {"prompt": "q", "user_id": "v"}]
    prompts = write(tmp_path / "prompts", rows)
    assert list(read_prompts(prompts)) == [PromptRecord("p", "u", "test"), PromptRecord("q", "v")]
    assert [record.line for record in read_prompts(prompts)] == [1, 2]


@WRITERS
def test_s19_conversations_are_read(tmp_path, write):
    rows = [{"messages": dicts((*TALK, Message("assistant", "four")))}, {"messages": dicts(TALK), "response": "4"}]
    demonstrations = write(tmp_path / "demonstrations", rows)
    assert list(read_demonstrations(demonstrations)) == [Demonstration(TALK, "four"), Demonstration(TALK, "4")]
    prompts = write(tmp_path / "prompts", [{"messages": dicts(TALK), "user_id": "u"}])
    assert list(read_prompts(prompts)) == [PromptRecord(TALK, "u")]


def test_s19_null_fields_of_a_data_set_are_dropped(tmp_path):
    turns = [{"role": "user", "content": "Hi", "name": None}]
    path = on_disk(tmp_path / "data", [{"messages": turns, "user_id": "u", "split": None}])
    assert list(read_prompts(path)) == [PromptRecord((Message("user", "Hi"),), "u")]


@pytest.mark.parametrize(
    "row, message",
    [
        ({"user_id": "u"}, "no field 'prompt'"),
        ({"prompt": None, "text": "p"}, "no field 'prompt', or one of .*; the fields are text"),
        ({"prompt": "p", "user_id": " "}, "user_id: got an empty string"),
        ({"prompt": "p", "user_id": 7.5}, r"user_id: got 7.5 \(float\)"),
        (
            {"prompt": "p", "messages": [{"role": "user", "content": "q"}], "user_id": "u"},
            "the fields prompt and messages exclude each other",
        ),
        ({"messages": [], "user_id": "u"}, r"messages: got \[\]"),
        ({"messages": ["hi"], "user_id": "u"}, r"messages\[0\]: got 'hi'"),
        ({"messages": [{"role": "user"}], "user_id": "u"}, r"messages\[0\]: got {'role': 'user'}"),
        (
            {"messages": [{"role": "user", "content": ""}], "user_id": "u"},
            r"messages\[0\].content: got an empty string",
        ),
        (
            {"messages": [{"role": "assistant", "content": "a"}], "user_id": "u"},
            "messages: there is no message to respond to",
        ),
    ],
)
def test_s19_the_error_for_an_invalid_prompt_names_the_line(tmp_path, row, message):
    path = jsonl(tmp_path / "data", [{"prompt": "p", "user_id": "u"}, row])
    with pytest.raises(ValueError, match=rf"data:2: {message}"):
        list(read_prompts(path))


def test_s19_the_error_for_deep_nesting_names_the_line(tmp_path):
    path = tmp_path / "data"
    path.write_text('{"prompt": ' * 200_000 + "0" + "}" * 200_000)
    with pytest.raises(ValueError, match="data:1: not valid JSON: nested too deeply"):
        list(read_prompts(path))


def test_s19_the_error_for_an_empty_response_names_the_line(tmp_path):
    path = jsonl(tmp_path / "data", [{"prompt": "p", "response": "\n"}])
    with pytest.raises(ValueError, match="data:1: response: got an empty string"):
        list(read_demonstrations(path))
    path = jsonl(tmp_path / "data", [{"messages": dicts(TALK)}])
    with pytest.raises(ValueError, match="data:1: messages: got 'user' as the last role, expected 'assistant'"):
        list(read_demonstrations(path))


def test_s19_a_folder_must_contain_exactly_one_data_set(tmp_path):
    datasets = pytest.importorskip("datasets")
    part = datasets.Dataset.from_list([{"prompt": "p", "user_id": "u"}])
    datasets.DatasetDict({"train": part, "test": part}).save_to_disk(tmp_path / "both")
    with pytest.raises(ValueError, match=r"both: contains several data sets; give one of .*both/test, .*both/train"):
        read_prompts(tmp_path / "both")
    assert len(list(read_prompts(tmp_path / "both" / "train"))) == 1
    with pytest.raises(ValueError, match=r"a folder without state\.json"):
        read_prompts(tmp_path)
    next((tmp_path / "both" / "test").glob("*.arrow")).write_bytes(b"no arrow")
    with pytest.raises(ValueError, match="both/test: not a complete data set"):
        list(read_prompts(tmp_path / "both" / "test"))


def test_s19_the_error_without_datasets_names_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "state.json").write_text("{}")
    original = builtins.__import__

    def without(name, *arguments, **options):
        if name == "datasets":
            raise ImportError(name)
        return original(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match="pip install datasets"):
        read_prompts(tmp_path)


@pytest.fixture(scope="module")
def codec():
    tokenizer = train_tokenizer(["<user> <assistant> be kind", "one two three"] * 3, 280)
    tokenizer.chat_template = CHAT
    return Codec(tokenizer, "Q: {prompt}\nA:", max_prompt_tokens=60, max_response_tokens=20)


def text_of(codec, ids):
    return codec.tokenizer.decode(ids)


def test_s19_messages_use_the_chat_template(codec):
    ids = codec.encode_prompt(TALK)
    assert text_of(codec, ids) == "<system>be kind\n<user>one\n<assistant>two\n<user>three\n<assistant>"
    example = codec.example(Demonstration(TALK, "four"))
    assert example.prompt == tuple(ids) and text_of(codec, example.response[:-1]) == "four"


def test_s19_messages_need_a_chat_template_that_accepts_them(codec):
    tokenizer = train_tokenizer(["a"], 280)
    with pytest.raises(
        ValueError, match=r"no chat template; set one and save the tokenizer \(tokenizer.chat_template = "
    ):
        replace(codec, tokenizer=tokenizer).encode_prompt(TALK)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match="chat template rejects them: TemplateError: roles must alternate"):
        replace(codec, tokenizer=tokenizer).encode_prompt(TALK)


def test_s19_long_prompts_are_truncated_on_the_left_and_counted(codec):
    cutting = Codec(codec.tokenizer, codec.prompt_template, 12, long_prompts="truncate")
    text = text_of(cutting, cutting.encode_prompt("abcdefghijklmnopqrstuvwxyz"))
    start, rest, end = text[:3], text[3:-3], text[-3:]
    assert (start, end) == ("Q: ", "\nA:") and "abcdefghijklmnopqrstuvwxyz".endswith(rest) and "xyz" in rest
    refusing = replace(cutting, long_prompts="refuse")
    for length in range(14, 27):
        long = "abcdefghijklmnopqrstuvwxyz"[:length]
        part = cutting.fit_prompt(long)
        assert long.endswith(part) and len(refusing.encode_prompt(part)) <= 12
        with pytest.raises(ValueError, match="expected at most max_prompt_tokens=12"):
            refusing.encode_prompt(long[-len(part) - 1 :])  # longer by one character
    assert cutting.truncated.count == 1
    cutting.encode_prompt("xyz")
    assert cutting.truncated.count == 1
    with pytest.raises(ValueError, match="the template leaves no tokens for it in max_prompt_tokens=3"):
        replace(cutting, max_prompt_tokens=3).encode_prompt("abc")


def test_s19_long_conversations_lose_their_oldest_turns_first(codec):
    def cut(room):
        return text_of(codec, replace(codec, max_prompt_tokens=room, long_prompts="truncate").encode_prompt(TALK))

    whole = len(codec.encode_prompt(TALK))
    assert cut(whole) == "<system>be kind\n<user>one\n<assistant>two\n<user>three\n<assistant>"
    assert cut(whole - 1) == "<system>be kind\n<user>three\n<assistant>"
    last = len(codec.encode_prompt((TALK[0], TALK[3])))
    shorter = cut(last - 1)
    assert (
        shorter.startswith("<system>be kind\n<user>") and shorter.endswith("e\n<assistant>") and "three" not in shorter
    )


@WRITERS
def test_s19_pretraining_text_is_read(tmp_path, write):
    path = write(tmp_path / ("data.jsonl" if write is jsonl else "data"), [{"text": "one\n\ntwo"}, {"text": "three"}])
    assert list(read_texts(path)) == [PretrainingText("one\n\ntwo"), PretrainingText("three")]


def test_s19_pretraining_documents_of_a_text_file_end_at_blank_lines(tmp_path):
    path = tmp_path / "pretrain.txt"
    path.write_text("\n\none\ntwo\n \n\nthree\n", encoding="utf-8")
    assert [(record.line, record.text) for record in read_texts(path)] == [(3, "one\ntwo"), (7, "three")]
    path.write_bytes("\ufeffone\r\n\r\n\ufefftwo".encode())
    assert [(record.line, record.text) for record in read_texts(path)] == [(1, "one"), (3, "\ufefftwo")]
    path.write_bytes(b"one\n\xff\n")
    with pytest.raises(ValueError, match=r"pretrain.txt:2: not valid UTF-8"):
        list(read_texts(path))


def test_s19_a_text_file_without_blank_lines_is_read_in_parts(tmp_path):
    """Long documents are split at the end of a line, very long lines within it, but never within a character."""
    path, part = tmp_path / "pretrain.txt", 2**20
    line = "é" * 99 + "\n"
    path.write_text(line * 50_000, encoding="utf-8")
    found = list(read_texts(path))
    lines = -(-part // 100)
    assert [record.line for record in found] == list(range(1, 50_001, lines))
    assert [len(record.text) for record in found[:-1]] == [100 * lines - 1] * (len(found) - 1)
    assert "\n".join(record.text for record in found) + "\n" == line * 50_000
    path.write_text("x" + "é" * 2 * part + "\nlast\n", encoding="utf-8")
    found = list(read_texts(path))
    assert "".join(record.text for record in found) == "x" + "é" * 2 * part + "\nlast"
    assert max(len(record.text) for record in found) < 2 * part and {record.line for record in found} == {1}
    # The rest of a long line is not a blank line, even if it has only a line break or spaces.
    path.write_text("é" * (part // 2) + "\nnext\n", encoding="utf-8")
    assert [record.text for record in read_texts(path)] == ["é" * (part // 2) + "\nnext"]
    path.write_text("a\n" + " " * part + "b\n", encoding="utf-8")
    assert "".join(record.text for record in read_texts(path)) == "a\n" + " " * part + "b"
    path.write_bytes(b"x" * 3 * part + b"\n\nfine\nhalf \xc3")
    with pytest.raises(ValueError, match=r"pretrain.txt:4: not valid UTF-8"):
        list(read_texts(path))


def test_s19_memory_does_not_grow_with_the_text_file(tmp_path):
    path, peaks = tmp_path / "pretrain.txt", []
    for size in (6, 18):
        path.write_text(("x" * 99 + "\n") * size * 10_000, encoding="utf-8")
        tracemalloc.start()
        for _ in read_texts(path):
            pass
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.05 * peaks[0], peaks


def test_s19_pretraining_rows_are_full_and_documents_end_with_eos(tmp_path, codec):
    path = tmp_path / "pretrain.txt"
    path.write_text("one two\n\nthree\n\n" * 9, encoding="utf-8")
    one, three = (codec.tokenizer(text)["input_ids"] + [codec.eos_id] for text in ("one two", "three"))
    stream = (one + three) * 9
    rows = list(token_rows(path, codec, 7, tmp_path))
    assert [token for row in rows for token in row] == stream[: len(stream) // 7 * 7] and {
        len(row) for row in rows
    } == {7}


def test_s19_pretraining_documents_are_tokenized_in_batches(tmp_path, codec):
    """A tokenizer processes a batch in parallel. Rows are a tensor, without a Python object per token."""

    class Counting:
        eos_token_id = codec.eos_id

        def __call__(self, texts, **options):
            batches.append(len(texts))
            return codec.tokenizer(texts, **options)

    batches, path = [], tmp_path / "pretrain.txt"
    path.write_text("one two\n\nthree\n\n" * 1250, encoding="utf-8")
    rows = token_rows(path, replace(codec, tokenizer=Counting()), 7, tmp_path)
    assert batches[-3:] == [1024, 1024, 452]
    assert torch.is_tensor(rows) and rows.dtype == torch.int32
    stream = [token for text in ("one two", "three") for token in [*codec.tokenizer(text)["input_ids"], codec.eos_id]]
    stream *= 1250
    assert rows.flatten().tolist() == stream[: len(stream) // 7 * 7]


def test_s19_a_pretraining_file_shorter_than_one_sequence_is_refused(tmp_path, codec):
    path = tmp_path / "pretrain.txt"
    path.write_text("one", encoding="utf-8")
    tokens = len(codec.tokenizer("one")["input_ids"]) + 1
    assert len(list(token_rows(path, codec, tokens, tmp_path))) == 1
    with pytest.raises(ValueError, match=rf"pretrain.txt: got {tokens} tokens, expected at least {tokens + 1}"):
        list(token_rows(path, codec, tokens + 1, tmp_path))


def check(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        main(["data", "check", *map(str, arguments)])
    shown = capsys.readouterr()
    return stopped.value.code or 0, shown.out + shown.err


def test_s3_rankings_are_counted_after_a_check(tmp_path, capsys):
    rows = [("A > B > C", 3), ("A = B", 2), ("B > A", 2)]
    given = [{"prompt": "p", "completions": list("xyz")[:k], "ranking": ranking} for ranking, k in rows]
    code, shown = check(capsys, "comparisons", jsonl(tmp_path / "data", given))
    ties = ["without pairs (all tied): 1"]
    sizes = ["with 2 completions: 2", "with 3 completions: 1"]
    assert code == 0
    assert sorted(shown.splitlines()) == ["completions: 7", "pairs: 4", "records: 3", *sizes, *ties]


def test_s19_files_are_counted_after_a_check(tmp_path, capsys):
    rows = [{"prompt": "p", "user_id": "u"}, {"prompt": "q", "user_id": "v", "split": "test"}]
    path = jsonl(tmp_path / "data", rows)
    assert check(capsys, "prompts", path) == (0, "records: 2\ntrain: 1\ntest: 1\nusers: 2\n")
    jsonl(path, [*rows, {"prompt": "r", "user_id": "v"}])
    code, shown = check(capsys, "prompts", path)
    assert code == 2 and "data:3: split: got 'train' for user_id 'v', whose prompts above are in 'test'" in shown
    assert check(capsys, "demonstrations", jsonl(path, [{"prompt": "p", "response": "r"}])) == (0, "records: 1\n")
    (tmp_path / "text").write_text("one\n\nthree\n")
    assert check(capsys, "pretraining", tmp_path / "text") == (0, "records: 2\ncharacters: 8\n")
    assert check(capsys, "letters", path)[0] == 2
    path.write_text("\n")
    assert check(capsys, "prompts", path) == (
        2,
        f"rlhf: {path}: contains no prompts; give a file with at least one record\n",
    )
