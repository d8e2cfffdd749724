"""Prompt hygiene: each step against hand-computed results, the report, memory, and the command."""

import builtins
import json
import re
import sqlite3
import tracemalloc
from collections import Counter
from itertools import islice

import pytest

from rlhf_engine.cli import main
from rlhf_engine.config import HygieneConfig, load_config
from rlhf_engine.data import Codec, Message, read_prompts, train_tokenizer
from rlhf_engine.data.hygiene import KeptIndex, clean_prompts, prefix_key, split_of


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def users_of(split, count):
    """Return the first `count` of user0, user1, ... that the hash assigns to `split`."""
    names = (name for name in map("user{}".format, range(10_000)) if split_of(name, HygieneConfig()) == split)
    return list(islice(names, count))


ANN, BOB = users_of("train", 2)


def clean(tmp_path, rows, codec=None, **settings):
    """Return the report and the kept records, in order."""
    source = jsonl(tmp_path / "prompts.jsonl", rows)
    report = clean_prompts(source, tmp_path / "clean", HygieneConfig(**settings), codec)
    return report, list(read_prompts(tmp_path / "clean" / "prompts.jsonl"))


def counts(report):
    return {step.name: (step.seen, step.dropped, step.changed) for step in report.steps}


def test_s19_prompts_with_a_long_common_prefix_count_as_one(tmp_path):
    texts = [
        "abcdefgh one",
        "abcdefgh two",  # the same first 8 characters
        "abcdefg",  # shorter, so a duplicate only of an equal prompt
        "ABC DEFGH",
        "abc \n defgh and more",  # differs in case and white space only
        "abcdefg",
        "ｆｉｖｅ six",
        "five six",  # equal after NFKC
        "Straße",
        "STRASSE",
    ]
    report, left = clean(tmp_path, [{"prompt": text, "user_id": ANN} for text in texts], prefix_chars=8)
    assert [record.prompt for record in left] == [texts[index] for index in (0, 2, 3, 6, 8)]
    assert counts(report)["deduplicate"] == (10, 5, 0)


def test_s19_the_key_depends_only_on_the_prefix():
    talk = (Message("user", "abc"), Message("assistant", "defgh"), Message("user", "x"))
    assert prefix_key("abcd" * 32 + "x", 128) == prefix_key("abcd" * 32 + "y", 128)
    assert prefix_key("abcd" * 32 + "x", 129) != prefix_key("abcd" * 32 + "y", 129)
    assert prefix_key("abc", 128) != prefix_key("abcd", 128)
    assert prefix_key(talk, 9) == prefix_key("abc defgh y", 9) and prefix_key(talk, 11) != prefix_key("abc defgh y", 11)
    assert len(prefix_key("abc", 128)) == 16


def test_s19_duplicates_of_other_users_are_dropped_across_splits(tmp_path):
    (tested,) = users_of("test", 1)
    _, left = clean(tmp_path, [{"prompt": "same", "user_id": tested}, {"prompt": "Same", "user_id": ANN}])
    assert [(record.user_id, record.split) for record in left] == [(tested, "test")]


def test_s19_at_most_two_hundred_prompts_of_a_user(tmp_path):
    rows = [{"prompt": f"{name} {number}", "user_id": name} for number in range(250) for name in (ANN, BOB)]
    rows += [{"prompt": "Same", "user_id": ANN}] * 3  # duplicates are dropped before the count
    report, left = clean(tmp_path, rows[:399] + rows[500:])
    assert Counter(record.user_id for record in left) == {ANN: 200, BOB: 199}
    assert counts(report)["user_limit"] == (400, 1, 0)
    report, left = clean(tmp_path, rows, user_limit=3)
    assert [record.prompt for record in left] == [f"{name} {number}" for number in range(3) for name in (ANN, BOB)]
    assert report.users == 2


def test_s19_splits_are_by_user_and_the_same_in_every_run(tmp_path):
    rows = [{"prompt": f"p {number}", "user_id": f"user{number % 2000}", "split": "test"} for number in range(4000)]
    report, left = clean(tmp_path, rows, validation_share=0.2, test_share=0.1)
    splits = {}
    for record in left:
        assert splits.setdefault(record.user_id, record.split) == record.split
    shares = {split: n / 4000 for split, n in report.splits.items()}
    # Five standard deviations of 2,000 draws.
    assert abs(shares["test"] - 0.1) < 0.034 and abs(shares["validation"] - 0.2) < 0.045
    first = (tmp_path / "clean" / "prompts.jsonl").read_bytes()
    clean(tmp_path, rows, validation_share=0.2, test_share=0.1)
    assert (tmp_path / "clean" / "prompts.jsonl").read_bytes() == first
    _, reversed_left = clean(tmp_path, rows[::-1], validation_share=0.2, test_share=0.1)
    assert {record.user_id: record.split for record in reversed_left} == splits
    _, other = clean(tmp_path, rows, validation_share=0.2, test_share=0.1, split_seed=1)
    assert {record.user_id: record.split for record in other} != splits


def test_s19_users_keep_their_split_from_release_to_release():
    # Fixed results: a different hash would move users between training and test.
    splits = {number: split_of(f"user{number}", HygieneConfig()) for number in range(12)}
    assert splits == {**dict.fromkeys(range(12), "train"), 0: "test", 6: "validation"}
    # A larger validation share takes users from train only.
    for user in users_of("test", 20):
        assert split_of(user, HygieneConfig(validation_share=0.3)) == "test"


def test_s19_a_split_with_a_share_of_zero_has_no_prompts():
    settings = HygieneConfig(validation_share=0.0, test_share=0.0)
    assert {split_of(f"user{number}", settings) for number in range(200)} == {"train"}
    with pytest.raises(ValueError, match=r"test_share: got 0.5 with validation_share 0.5"):
        HygieneConfig(validation_share=0.5, test_share=0.5)


SYSTEM = (
    "You are the assistant of a library. Answer in three sentences, name the shelf of the book, and never invent a title. "
    * 2
)
QUESTIONS = [f"Where are books about topic {number}?" for number in range(40)]


def in_frame(kind, question):
    """Return a prompt with a long frame before the question, as the field of a line."""
    if kind == "text":
        return {"prompt": SYSTEM + question}
    if kind == "system message":
        roles = [("system", SYSTEM), ("user", question)]
    else:
        roles = [("user", SYSTEM + "Ready?"), ("assistant", "Ready."), ("user", question)]
    return {"messages": [{"role": role, "content": content} for role, content in roles]}


@pytest.mark.parametrize("kind", ["text", "system message", "first turns"])
def test_s19_a_shared_frame_is_no_reason_to_drop_a_prompt(tmp_path, kind):
    rows = [in_frame(kind, question) | {"user_id": ANN} for question in QUESTIONS]
    others = [{"prompt": f"{number} is a number", "user_id": ANN} for number in range(40)]
    report, left = clean(tmp_path, [*rows, *others, rows[3], rows[7]])
    assert counts(report)["deduplicate"] == (82, 2, 0) and len(left) == 80
    assert not any("dropped" in warning for warning in report.warnings)


def test_s19_nested_frames_are_left_out_one_after_the_other(tmp_path):
    """Half of the prompts have a second long frame; only the text after both is compared."""
    second = "Now think about this step by step, and then give the answer in one line. " * 3
    texts = [SYSTEM + second + question for question in QUESTIONS] + [SYSTEM + f"{n}: done?" for n in range(40)]
    _, left = clean(tmp_path, [{"prompt": text, "user_id": ANN} for text in [*texts, texts[0]]])
    assert [record.prompt for record in left] == texts


def test_s19_a_frame_of_few_prompts_is_a_prefix_of_duplicates(tmp_path):
    """Nine prompts of 109 begin alike: 8% are below the share, and 9 below the fewest prompts of a frame."""
    others = [f"{number} is a number" for number in range(100)]
    rows = [{"prompt": text, "user_id": ANN} for text in [SYSTEM + one for one in QUESTIONS[:9]] + others]
    assert counts(clean(tmp_path, rows)[0])["deduplicate"] == (109, 8, 0)
    assert counts(clean(tmp_path, rows[:9])[0])["deduplicate"] == (9, 8, 0)
    report, _ = clean(tmp_path, [*rows[:9], {"prompt": SYSTEM + "x", "user_id": ANN}], frame_share=None)
    assert counts(report)["deduplicate"] == (10, 9, 0)
    assert (
        "deduplicate dropped 9 of 10 prompts (90%); prompts with the same first data.hygiene.prefix_chars"
        in report.table()
    )


def test_s19_equal_questions_under_different_system_messages_are_not_duplicates(tmp_path):
    rows = [
        {
            "messages": [{"role": "system", "content": f"Translate to {x}"}, {"role": "user", "content": "Hi"}],
            "user_id": ANN,
        }
        for x in ("French", "German", "french")
    ]
    assert counts(clean(tmp_path, rows)[0])["deduplicate"] == (3, 1, 0)


def test_s19_prompts_without_user_id_are_split_by_prompt(tmp_path):
    rows = [{"prompt": f"p {number}", "id": number} for number in range(400)] + [{"prompt": "P 3"}]
    report, left = clean(tmp_path, rows, user_limit=1, test_share=0.3)
    assert counts(report)["user_limit"] == (400, 0, 0) and report.users == 0
    assert 80 < report.splits["test"] < 160 and [record.columns["id"] for record in left] == list(range(400))
    first, second, *_ = report.warnings
    assert first.startswith("401 of 401 prompts have no user_id: the step user_limit is left out")
    assert second == "the columns id were copied without a search for personal information"
    assert "user_id" not in (tmp_path / "clean" / "prompts.jsonl").read_text()


@pytest.mark.parametrize(
    "settings, dropped",
    [
        ({"user_limit": 2}, "user_limit dropped 8 of 10"),
        ({"bad_lines": "skip"}, "2 of 12 lines are invalid and were skipped"),
    ],
)
def test_s19_a_step_that_drops_more_than_a_tenth_is_a_warning(tmp_path, settings, dropped):
    bad = [{"prompt": ""}, {"user_id": BOB}] if "bad_lines" in settings else []
    report, _ = clean(tmp_path, [{"prompt": f"p {number}", "user_id": ANN} for number in range(10)] + bad, **settings)
    assert f"warning: {dropped}" in report.table()


PERSONAL = "Write to joe@example.com for Dr. Smith"


def test_s19_personal_information_is_dropped_from_the_training_split_only(tmp_path):
    held_out = users_of("validation", 1) + users_of("test", 1)
    rows = [{"prompt": f"{user}: {PERSONAL}", "user_id": user} for user in [ANN, *held_out]]
    rows.append({"prompt": "Nothing personal", "user_id": ANN})
    report, left = clean(tmp_path, rows)
    assert [record.user_id for record in left] == [*held_out, ANN]
    assert counts(report)["pii"] == (4, 1, 0) and report.pii == {"email": 1, "name": 1}
    report, left = clean(tmp_path, rows, pii="redact")
    redacted = f"{ANN}: Write to [EMAIL] for [NAME]"
    assert [record.prompt for record in left] == [redacted, *(row["prompt"] for row in rows[1:])]
    assert counts(report)["pii"] == (4, 0, 1)
    report, left = clean(tmp_path, rows, pii="keep")
    assert [record.prompt for record in left] == [row["prompt"] for row in rows] and "pii" not in counts(report)


def test_s19_every_turn_of_a_conversation_is_searched(tmp_path):
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "?"},
        {"role": "user", "content": PERSONAL},
    ]
    _, left = clean(tmp_path, [{"messages": turns, "user_id": ANN}], pii="redact")
    clean_turn = Message("user", "Write to [EMAIL] for [NAME]")
    assert left[0].prompt == (Message("user", "Hi"), Message("assistant", "?"), clean_turn)


def test_s19_phone_regions_reach_the_filter(tmp_path):
    rows = [{"prompt": "030 901820", "user_id": ANN}]
    assert len(clean(tmp_path, rows)[1]) == 1
    assert len(clean(tmp_path, rows, phone_regions=("DE",))[1]) == 0


def test_s19_honorifics_reach_the_filter(tmp_path):
    rows = [{"prompt": "Pan Novák", "user_id": ANN}]
    assert len(clean(tmp_path, rows)[1]) == 1
    assert len(clean(tmp_path, rows, honorifics=("Pan",))[1]) == 0
    for word in ("Mr ", "", "Mr!", "."):
        with pytest.raises(
            ValueError, match=rf"honorifics: got {re.escape(repr(word))}, expected a text without surrounding blanks"
        ):
            HygieneConfig(honorifics=("Mr", word))


def test_s19_a_split_without_prompts_is_a_warning(tmp_path):
    rows = [{"prompt": "p", "user_id": ANN}, {"prompt": "q", "user_id": users_of("test", 1)[0]}]
    report, _ = clean(tmp_path, rows)
    (warning,) = report.warnings
    assert warning.startswith("no prompt is left in validation, with 2 users in total; change data.hygiene.")
    assert f"warning: {warning}" in report.table()
    assert json.loads((tmp_path / "clean" / "report.json").read_text())["warnings"] == [warning]
    assert clean(tmp_path, rows, validation_share=0.0)[0].warnings == []  # a split with a share of zero


def test_s19_long_prompts_are_truncated_with_a_count(tmp_path):
    codec = Codec(train_tokenizer(["a"], 280), "{prompt}\n", max_prompt_tokens=6)
    report, left = clean(tmp_path, [{"prompt": p, "user_id": ANN} for p in ("vwxyz", "uvwxyz")], codec)
    assert [record.prompt for record in left] == ["vwxyz", "vwxyz"]
    assert counts(report)["truncate"] == (2, 0, 1)


def test_s19_the_report_adds_up(tmp_path):
    rows = [{"prompt": f"p {n % 40}", "user_id": f"user{n % 7}"} for n in range(60)]
    report, left = clean(tmp_path, [*rows, {"prompt": PERSONAL, "user_id": ANN}], user_limit=5)
    seen = report.read
    for step in report.steps:
        assert step.seen == seen
        seen -= step.dropped
    assert seen == len(left) == sum(report.splits.values())
    written = json.loads((tmp_path / "clean" / "report.json").read_text())
    assert {key: written[key] for key in report.to_dict()} == report.to_dict()
    assert written["settings"]["user_limit"] == 5 and sum(written["splits"].values()) == len(left)
    rows_of_table = report.table().splitlines()
    assert [row.split()[0] for row in rows_of_table[1 : 2 + len(report.steps)]] == ["read", *counts(report)]
    assert rows_of_table[2].split()[1:] == ["61", "20", "0", "41"]
    assert {item.name for item in (tmp_path / "clean").iterdir()} == {"prompts.jsonl", "report.json"}


def test_s19_bad_lines_are_refused_or_skipped_and_counted(tmp_path):
    rows = [
        {"prompt": "p", "user_id": ANN},
        {"user_id": ANN},
        {"prompt": "", "user_id": ANN},
        {"prompt": "r", "user_id": BOB},
    ]
    with pytest.raises(ValueError, match=r"prompts.jsonl:2: no field 'prompt'"):
        clean(tmp_path, rows)
    assert [item.name for item in tmp_path.iterdir()] == ["prompts.jsonl"]  # no partial output remains
    report, left = clean(tmp_path, rows, bad_lines="skip")
    assert [record.prompt for record in left] == ["p", "r"]
    assert (report.read, report.bad_lines) == (2, 2)
    assert [example.split(":")[1] for example in report.bad_examples] == ["2", "3"]
    assert "prompts.jsonl:3" in report.table()
    with pytest.raises(ValueError, match="contains no valid prompt"):
        clean(tmp_path, rows[1:3], bad_lines="skip")


def test_s19_other_files_are_not_replaced(tmp_path):
    source = jsonl(tmp_path / "prompts.jsonl", [{"prompt": "p", "user_id": ANN}])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match=r"out: contains files other than prompts.jsonl and report.json"):
        clean_prompts(source, tmp_path / "out", HygieneConfig())
    assert (tmp_path / "out" / "thesis.txt").exists()
    with pytest.raises(ValueError, match="contains the prompts to read"):
        clean_prompts(source, tmp_path, HygieneConfig())


def test_s19_a_full_disk_is_an_error_and_leaves_no_files(tmp_path, monkeypatch):
    def full(self, key):
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(KeptIndex, "add_key", full)
    with pytest.raises(OSError, match="disk is full"):
        clean(tmp_path, [{"prompt": "p", "user_id": ANN}])
    assert [item.name for item in tmp_path.iterdir()] == ["prompts.jsonl"]


def test_s19_memory_does_not_grow_with_the_file(tmp_path):
    peaks = []
    for count in (1000, 5000):
        rows = [{"prompt": f"{n} " + "x" * 100, "user_id": f"user{n}"} for n in range(count)]
        source = jsonl(tmp_path / "prompts.jsonl", rows)
        del rows
        clean_prompts(source, tmp_path / "warm", HygieneConfig(pii="keep"))
        tracemalloc.start()
        clean_prompts(source, tmp_path / "clean", HygieneConfig(pii="keep"))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 40_000, peaks  # 10 bytes per additional prompt; a list would need 400


def test_s19_a_data_set_on_disk_is_cleaned_like_a_file(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [{"prompt": f"p {n % 9}", "user_id": f"user{n}"} for n in range(20)]
    report, left = clean(tmp_path, rows)
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "rows")
    again = clean_prompts(tmp_path / "rows", tmp_path / "again", HygieneConfig())
    assert again.to_dict() == report.to_dict()
    assert list(read_prompts(tmp_path / "again" / "prompts.jsonl")) == left


def test_s19_the_error_without_the_libraries_names_what_to_install(tmp_path, monkeypatch):
    original = builtins.__import__

    def without(name, *arguments, **options):
        if name == "rlhf_engine.data.pii":
            raise ImportError("No module named 'phonenumbers'")
        return original(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match="pip install phonenumbers python-stdnum"):
        clean(tmp_path, [{"prompt": "p", "user_id": ANN}])
    assert len(clean(tmp_path, [{"prompt": "p", "user_id": ANN}], pii="keep")[1]) == 1


def run(*arguments):
    with pytest.raises(SystemExit) as stopped:
        main(["data", "clean", *map(str, arguments)])
    return stopped.value.code or 0


def test_s19_the_command_cleans_prompts(tmp_path, capsys):
    source = jsonl(tmp_path / "prompts.jsonl", [{"prompt": text, "user_id": ANN} for text in ("a", "A", "b", "uvwxyz")])
    tokenizer = train_tokenizer(["a"], 280)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    config = tmp_path / "config.yaml"
    config.write_text("data: {hygiene: {user_limit: 9}}\n")
    options = ["--config", config, "--set", "rollout.max_prompt_tokens=6", "--tokenizer", tmp_path / "tokenizer"]
    assert run("--in", source, "--out", tmp_path / "clean", *options) == 0
    table = capsys.readouterr().out
    assert "\npersonal information found: none\n" in table
    assert re.search(r"deduplicate +4 +1 +0 +3\n", table) and re.search(r"truncate +3 +0 +1 +3\n", table)
    assert [record.prompt for record in read_prompts(tmp_path / "clean" / "prompts.jsonl")] == ["a", "b", "vwxyz"]
    assert json.loads((tmp_path / "clean" / "report.json").read_text())["settings"]["user_limit"] == 9


def test_s19_mistakes_of_the_command_are_one_line_and_exit_code_two(tmp_path, capsys):
    bad = jsonl(tmp_path / "bad.jsonl", [{"prompt": ""}])
    assert run("--in", bad, "--out", tmp_path / "clean") == 2
    assert capsys.readouterr().err == f"rlhf: {bad}:1: prompt: got an empty string, expected some text\n"
    assert run("--in", tmp_path / "none", "--out", tmp_path / "clean") == 2
    assert "no such file" in capsys.readouterr().err
    assert run("--in", bad, "--out", tmp_path / "clean", "--set", "data.hygiene.user_limt=3") == 2
    assert "did you mean 'data.hygiene.user_limit'" in capsys.readouterr().err
    assert load_config(None).data.hygiene == HygieneConfig()
