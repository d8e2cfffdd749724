"""Records and files: valid and invalid lines, error messages, and the layout of batches."""

import gzip
import json
from dataclasses import replace
from random import Random

import pytest
import torch

from rlhf_engine.data import (
    Codec,
    Comparison,
    Demonstration,
    Example,
    PromptRecord,
    length_batches,
    pad_sequences,
    parse_ranking,
    rank_batch,
    read_comparisons,
    read_demonstrations,
    read_prompts,
    train_tokenizer,
)
from rlhf_engine.data.records import parse_messages


def write(tmp_path, *lines):
    path = tmp_path / "records.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_ranking_with_ties():
    assert parse_ranking("D > C > A = B", 4) == (2, 2, 1, 0)
    assert parse_ranking("A=B=C", 3) == (0, 0, 0)
    assert parse_ranking([3, 1.5], 2) == (3, 1.5)


@pytest.mark.parametrize(
    "ranking, message",
    [
        ("A > C", "'C'.*expected one of A, B"),
        ("A > A", "A twice"),
        ("A", "B not in 'A'; rank every completion"),
        ("A > ", "''"),
        ("AB > A > B", "'AB'.*expected one of A, B"),
        (None, "None, expected a string"),
    ],
)
def test_bad_rankings_are_refused(ranking, message):
    with pytest.raises(ValueError, match=message):
        parse_ranking(ranking, 2)


def test_tied_completions_form_no_pair():
    comparison = Comparison("p", ("a", "b", "c", "d"), parse_ranking("D > C > A = B", 4))
    assert sorted(comparison.pairs()) == [(2, 0), (2, 1), (3, 0), (3, 1), (3, 2)]


@pytest.mark.parametrize("ranks", [(0.0, float("nan")), (0, True), (0, "1"), (0, 1, 2)])
def test_ranks_that_cannot_be_compared_are_refused(ranks):
    with pytest.raises(ValueError, match="ranking"):
        Comparison("p", ("a", "b"), ranks)


def test_s19_the_error_for_a_number_that_is_too_large_names_the_line(tmp_path):
    line = '{"prompt": "p", "completions": ["a", "b"], "ranking": [0, %s]}'
    with pytest.raises(
        ValueError, match=r"jsonl:2: ranking\[1\]: got an integer of 1333 bits, expected a finite number"
    ):
        list(read_comparisons(write(tmp_path, line % 1, line % ("1" + "0" * 401))))
    with pytest.raises(ValueError, match=r"jsonl:2: not valid JSON: .*digits"):
        list(read_comparisons(write(tmp_path, line % 1, line % ("1" * 5000))))


def test_s2_equal_completions_have_equal_ranks(tmp_path):
    line = '{"prompt": "p", "completions": ["a", "b", "a"], "ranking": "%s"}'
    assert next(read_comparisons(write(tmp_path, line % "B > A = C"))).ranks == (1, 0, 1)
    with pytest.raises(ValueError, match=r"jsonl:1: ranking\[2\]: got 1 for the text of completion 0, whose rank is 0"):
        list(read_comparisons(write(tmp_path, line % "A > C = B")))


def test_a_comparison_needs_two_completions():
    with pytest.raises(ValueError, match="got 1, expected at least 2"):
        Comparison("p", ("a",), (0,))


def test_files_are_read(tmp_path):
    path = write(tmp_path, '{"prompt": "p", "response": "é"}', "", '{"prompt": "q", "response": "s"}')
    assert list(read_demonstrations(path)) == [Demonstration("p", "é"), Demonstration("q", "s")]
    path = write(tmp_path, '{"prompt": "p", "completions": ["a", "b"], "ranking": "B > A"}')
    assert list(read_comparisons(path)) == [Comparison("p", ("a", "b"), (1, 0))]
    path = write(tmp_path, '{"prompt": "p", "user_id": "u", "split": "test"}', '{"prompt": "q", "user_id": "v"}')
    assert list(read_prompts(path, "test")) == [PromptRecord("p", "u", "test")]
    assert [record.split for record in read_prompts(path)] == ["test", "train"]


def test_records_have_their_line_number(tmp_path):
    path = write(tmp_path, "", '{"prompt": "p", "response": "r"}', "", '{"prompt": "q", "response": "\\ud83d\\ude00"}')
    assert [(record.line, record.response) for record in read_demonstrations(path)] == [(2, "r"), (4, "\U0001f600")]
    path = write(tmp_path, "", '{"prompt": "p", "completions": ["a", "b"], "ranking": "B > A"}')
    assert [record.line for record in read_comparisons(path)] == [2]
    path = write(tmp_path, "", "", '{"prompt": "p", "user_id": "u"}')
    assert [record.line for record in read_prompts(path)] == [3]


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"prompt": "p"', r"records\.jsonl:2: not valid JSON: Expecting ',' delimiter; expected one object per line$"),
        ('["p", "r"]', r"records\.jsonl:2: got list, expected an object with prompt, response"),
        ('{"prompt": "p"}', r"records\.jsonl:2: no field 'response'"),
        ('{"prompt": "p", "response": 3}', r"records\.jsonl:2: response: got 3 \(int\), expected a string"),
        ('{"prompt": " ", "response": "r"}', r"records\.jsonl:2: prompt: got an empty string"),
        (
            '{"prompt": "p", "response": "\\ud800"}',
            r"records\.jsonl:2: response: got '\\ud800', half of a surrogate pair",
        ),
        ('{"prompt": "p", "response": "r", "prompt": "q"}', r"records\.jsonl:2: .*the field 'prompt' appears twice"),
    ],
)
def test_the_error_for_an_invalid_line_names_it(tmp_path, line, message):
    path = write(tmp_path, '{"prompt": "p", "response": "r"}', line)
    with pytest.raises(ValueError, match=message):
        list(read_demonstrations(path))


def test_the_error_for_invalid_utf8_names_the_line(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_bytes(b'{"prompt": "\xff", "response": "r"}\n')
    with pytest.raises(ValueError, match=r"records\.jsonl:1: not valid JSON"):
        list(read_demonstrations(path))


def test_a_compressed_file_is_an_error(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_bytes(gzip.compress(b'{"prompt": "p", "response": "r"}\n'))
    with pytest.raises(ValueError, match=r"records\.jsonl:1: the file is compressed with gzip"):
        list(read_demonstrations(path))


@pytest.mark.parametrize(
    "text",
    [
        '[{"prompt": "p", "response": "r"}]',
        '\n\ufeff [\n{"prompt": "p", "response": "r"},\n{"prompt": "p", "response": "r"}\n]',
    ],
)
def test_a_file_with_one_json_array_is_an_error(tmp_path, text):
    with pytest.raises(ValueError, match=r"jsonl:[12]: the file is one JSON array; write one object per line$"):
        list(read_demonstrations(write(tmp_path, text)))


@pytest.mark.parametrize(
    "message, expected",
    [
        ({"role": "user", "content": "a", "name": "bob"}, r"messages\[0\]: has the further field 'name'; remove it$"),
        ({"role": "system", "content": ""}, r"messages\[0\]\.content: .*, expected some text; remove the message$"),
        ({"role": "user", "content": " "}, r"messages\[0\]\.content: got an empty string, expected some text$"),
        ({"role": "user"}, r"messages\[0\]: got {'role': 'user'}, expected an object with role and content$"),
        ({"role": "user", "content": [{"type": "text", "text": "a"}]}, r"\.content: got .*, expected a string$"),
    ],
)
def test_the_error_for_an_invalid_message_says_what_to_do(message, expected):
    with pytest.raises(ValueError, match=expected):
        parse_messages([message, {"role": "user", "content": "b"}])


def test_s3_letters_rank_at_most_26_completions(tmp_path):
    fields = {"prompt": "p", "completions": [str(index) for index in range(27)]}
    ranking = " > ".join("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    path = write(tmp_path, json.dumps({**fields, "ranking": ranking}))
    with pytest.raises(ValueError, match=r":1: ranking: letters name at most 26 completions; give a list of ranks$"):
        list(read_comparisons(path))
    [record] = read_comparisons(write(tmp_path, json.dumps({**fields, "ranking": list(range(27))})))
    assert record.ranks == tuple(range(27))


@pytest.mark.parametrize("completions", ["[]", '["a"]'])
def test_s3_too_few_completions_are_reported_before_the_ranking(tmp_path, completions):
    path = write(tmp_path, f'{{"prompt": "p", "completions": {completions}, "ranking": "A > B"}}')
    with pytest.raises(ValueError, match=r"records\.jsonl:1: completions: got [01], expected at least 2 to compare"):
        list(read_comparisons(path))


def test_a_missing_file_is_reported_by_the_call(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        read_prompts(tmp_path / "none.jsonl")


def test_completions_that_are_not_a_list_are_refused(tmp_path):
    path = write(tmp_path, '{"prompt": "p", "completions": "ab", "ranking": "A > B"}')
    with pytest.raises(ValueError, match=r":1: completions: got str, expected a list"):
        list(read_comparisons(path))


@pytest.fixture(scope="module")
def codec():
    tokenizer = train_tokenizer(["a red fox", "the red box", "zoé"] * 3, 280)
    return Codec(tokenizer, max_prompt_tokens=8, max_response_tokens=8)


def test_prompt_and_response_together_are_limited(codec):
    short = replace(codec, max_tokens=5)
    prompt = short.encode_prompt("a")
    room = 5 - len(prompt)
    texts = ["x" * (room - 1), "x" * room]
    assert len(short.join(prompt, texts[0])) == 5
    with pytest.raises(ValueError, match="got 6 tokens, expected at most 5, the model's positions"):
        short.example(Demonstration("a", texts[1]))


def test_text_survives_the_tokenizer(codec):
    ids = codec.encode_response("red fox")
    assert ids[-1] == codec.eos_id != codec.pad_id
    assert codec.decode_response([*ids, 5, 6, codec.eos_id]) == "red fox"


def test_the_template_is_encoded_with_the_prompt(codec):
    assert codec.encode_prompt("fox") == codec.tokenizer("fox\n")["input_ids"]


def test_too_long_texts_are_refused(codec):
    with pytest.raises(ValueError, match=r"prompt: got .* tokens, expected at most max_prompt_tokens=8"):
        codec.encode_prompt("qwertyuiop")
    with pytest.raises(ValueError, match="response: got 9 tokens, expected at most max_response_tokens=8"):
        codec.encode_response("qwertyui")


def test_a_template_without_a_placeholder_is_refused(codec):
    with pytest.raises(ValueError, match="prompt_template"):
        Codec(codec.tokenizer, "User: ")


def test_a_vocabulary_smaller_than_the_bytes_is_refused():
    with pytest.raises(ValueError, match="vocab_size: got 100, expected at least 258"):
        train_tokenizer(["a"], 100)


def test_rows_are_padded_on_the_right():
    batch = pad_sequences([Example((5, 6), (7,)), Example((5,), (8, 9, 4))], pad_id=1)
    assert batch.ids.tolist() == [[5, 6, 7, 1], [5, 8, 9, 4]]
    assert batch.attention_mask.tolist() == [[True, True, True, False], [True] * 4]
    assert batch.response_mask.tolist() == [[False, False, True, False], [False, True, True, True]]


def test_ranked_batch_has_every_completion_once_and_equal_weights_per_prompt():
    one, two = Example((5,), (6,)), Example((5,), (7, 8))
    batch = rank_batch([([one, two], [(1, 0)]), ([one, two, one], [(0, 1), (0, 2)])], pad_id=1)
    assert batch.batch.ids.shape == (5, 3)
    assert batch.better.tolist() == [1, 2, 2]
    assert batch.worse.tolist() == [0, 3, 4]
    assert torch.equal(batch.weights, torch.tensor([0.5, 0.25, 0.25]))


def test_length_batches_have_every_index_once_and_little_padding():
    lengths = [(7 * i) % 31 + 1 for i in range(200)]
    batches = list(length_batches(lengths, 8, Random(3)))
    assert sorted(index for batch in batches for index in batch) == list(range(200))
    assert batches != list(length_batches(lengths, 8, Random(4)))
    padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    assert padded < 1.25 * sum(lengths)
    in_order = [lengths[i] for batch in length_batches(lengths, 8) for i in batch]
    assert in_order == sorted(lengths)
