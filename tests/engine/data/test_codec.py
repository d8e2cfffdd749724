"""One policy for BOS, EOS, special tokens and white space, and chat templates with arguments, dates and several turns."""

from dataclasses import replace
from datetime import date, datetime

import pytest
import torch
from transformers.utils import chat_template_utils

from rlhf_engine.config import RunConfig
from rlhf_engine.data import EXAMPLES, Codec, Demonstration, Message, pad_sequences, token_rows
from rlhf_engine.data.chat import ChatTemplate
from rlhf_engine.evaluate import read_documents
from rlhf_engine.recipes import loading
from rlhf_engine.recipes.loading import dated, template_settings
from tests.engine.helpers.tokenizers import CHATML, DATED, KINDS, byte_level, sentencepiece_like

THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content.split('</think>')[-1] if not loop.last and m.role == 'assistant' else m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}(no thinking)\n{% endif %}{% endif %}"
)
LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} </s>{% endif %}{% endfor %}"
)


def with_template(tokenizer, template):
    tokenizer.chat_template = template
    return tokenizer


def chat(*turns):
    return tuple(Message("user" if number % 2 == 0 else "assistant", text) for number, text in enumerate(turns))


def names(codec, ids):
    return codec.tokenizer.convert_ids_to_tokens(list(ids))


@pytest.mark.parametrize(
    "tokenizer",
    [byte_level("[INST]", "[/INST]", bos="<s>", prepend=True), sentencepiece_like("[INST]", "[/INST]")],
    ids=["byte_level", "sentencepiece"],
)
def test_a_template_that_begins_with_bos_gives_one(tokenizer):
    codec = Codec(tokenizer, "<s>[INST] {prompt} [/INST]")
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}"
    expected = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], return_dict=False)
    assert codec.encode_prompt("hello") == expected and expected.count(tokenizer.bos_token_id) == 1
    # A template without BOS gets the tokenizer's.
    assert (
        replace(codec, prompt_template="[INST] {prompt} [/INST]").encode_prompt("hello").count(tokenizer.bos_token_id)
        == 1
    )
    # The text "<s>" of a user is no BOS.
    plain = replace(codec, prompt_template="{prompt}\n").encode_prompt("<s>hello")
    assert plain.count(tokenizer.bos_token_id) == 1 and "<s>" in tokenizer.decode(plain[1:])


def test_documents_begin_as_prompts_do(tmp_path):
    codec = Codec(byte_level(bos="<s>", prepend=True), max_tokens=8)
    texts = ["the dog has four legs and the sky is blue", " hello, good people "]
    (tmp_path / "t.txt").write_text("\n\n".join(texts))
    bos, eos = codec.tokenizer.bos_token_id, codec.eos_id
    for row in token_rows(tmp_path / "t.txt", codec, 6, tmp_path).tolist():
        assert row[0] == bos and len(row) == 6
    pieces = read_documents(tmp_path / "t.txt", codec, tmp_path)
    assert all(piece.response[0] == bos and len(piece) <= 8 for piece in pieces)
    ids = [token for piece in pieces for token in piece.response if token not in (bos, eos)]
    assert codec.tokenizer.decode(ids) == "".join(texts)  # white space is kept
    whole = read_documents(tmp_path / "t.txt", replace(codec, max_tokens=None), tmp_path)
    assert list(whole[0].response) == [*codec.tokenizer(texts[0])["input_ids"], eos]


@pytest.mark.parametrize("text", ["<think>yes</think> no", "  two\n", "yes<|endoftext|>no <think>", "\t<|pad|>"])
def test_special_tokens_and_white_space_of_responses_are_kept(text):
    codec = Codec(byte_level("<think>", "</think>"))
    ids = codec.encode_response(text)
    assert codec.decode_response(ids) == text and not codec.text_differs(ids)
    special = [token for token in names(codec, ids) if token in codec.special_tokens]
    assert special == [part for part in ("<think>", "</think>") if part in text] + ["<|endoftext|>"]
    without = replace(codec, keep_special_tokens=False)
    assert without.decode_response(ids) == text.replace("<think>", "").replace("</think>", "")
    assert names(without, without.encode_response(text)).count("<think>") == 0


@pytest.mark.parametrize(
    "template, end",
    [
        (CHATML, ["<|im_end|>"]),
        (LLAMA2, ["Ġ", "</s>"]),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", ["</s>"]),
    ],
    ids=["chatml", "llama2", "no_token"],
)
def test_a_demonstration_ends_as_the_template_ends_a_turn(template, end):
    codec = Codec(
        with_template(byte_level("[INST]", "[/INST]", "<|im_start|>", "<|im_end|>", bos="<s>", eos="</s>"), template)
    )
    example = codec.example(Demonstration(chat("hello"), "the dog"))
    assert names(codec, example.response)[-len(end) :] == end
    assert list(example.prompt) == codec.encode_prompt(chat("hello"))
    assert codec.decode_response(example.response) == "the dog" + " " * (len(end) - 1)
    assert codec.join([3], "the dog").response[-1] == codec.eos_id  # a reward model reads EOS


def test_every_turn_of_a_conversation_is_trained_once():
    codec = Codec(with_template(byte_level("<|im_start|>", "<|im_end|>"), CHATML))
    turns = chat("a", "the dog", "b", "the sky", "c")
    (row,) = codec.examples(Demonstration(turns, "the people"))
    ids, mask = [*row.prompt, *row.response], pad_sequences([row], codec.pad_id).response_mask[0].tolist()
    trained = codec.tokenizer.decode([token for token, taken in zip(ids, mask, strict=True) if taken])
    assert trained == "the dog<|im_end|>the sky<|im_end|>the people<|im_end|>"
    whole = codec.chat.render((*turns, Message("assistant", "the people")), respond=False)
    assert codec.tokenizer.decode(ids) == whole.removesuffix("\n")
    assert EXAMPLES.decode(torch.tensor(EXAMPLES.encode(row), dtype=torch.int32).numpy()) == row


def test_a_template_that_rewrites_earlier_turns_gets_a_row_per_turn():
    codec = Codec(with_template(byte_level("<|im_start|>", "<|im_end|>"), THINKING))
    rows = codec.examples(Demonstration(chat("a", "hm</think>the dog", "b"), "hm</think>the sky"))
    assert [codec.decode_response(row.response) for row in rows] == ["hm</think>the dog", "hm</think>the sky"]
    assert list(rows[1].prompt) == codec.encode_prompt(chat("a", "hm</think>the dog", "b"))
    assert "hm" not in codec.tokenizer.decode(rows[1].prompt)
    assert rows[1].origin == rows[0].prompt and not rows[0].origin
    assert EXAMPLES.decode(torch.tensor(EXAMPLES.encode(rows[1]), dtype=torch.int32).numpy()) == rows[1]


def test_the_template_gets_its_arguments():
    tokenizer = with_template(byte_level("<|im_start|>", "<|im_end|>"), THINKING)
    quiet = Codec(tokenizer, template_arguments={"enable_thinking": False})
    assert quiet.decode_prompt(quiet.encode_prompt(chat("a"))).endswith("assistant\n(no thinking)\n")
    assert "no thinking" not in Codec(tokenizer).decode_prompt(Codec(tokenizer).encode_prompt(chat("a")))
    config = RunConfig.from_dict({"data": {"chat_template_kwargs": {"enable_thinkin": False}}})
    with pytest.raises(ValueError, match=r"data.chat_template_kwargs: .* does not read 'enable_thinkin'"):
        template_settings(config, tokenizer, strict=True)
    assert template_settings(config, tokenizer, strict=False)["template_arguments"] == {}
    for name in ("tokenize", "strftime_now"):
        with pytest.raises(ValueError, match=f"chat_template_kwargs: the engine sets '{name}'"):
            RunConfig.from_dict({"data": {"chat_template_kwargs": {name: True}}})


def test_the_date_of_a_template_is_that_of_the_first_command(tmp_path):
    tokenizer = KINDS["dated_template"]()
    old, new = (Codec(tokenizer, today=day) for day in ("2026-01-31", "2026-02-01"))
    assert "31 Jan 2026" in old.decode_prompt(old.encode_prompt(chat("a")))
    assert old.encode_prompt(chat("a")) != new.encode_prompt(chat("a"))
    tokenizer.save_pretrained(tmp_path / "model")
    config = RunConfig.from_dict({"model": {"path": str(tmp_path / "model")}, "output_dir": str(tmp_path / "run")})
    first = dated(config)
    assert first.data.chat_template_date is not None
    (tmp_path / "run" / "chat_template.json").write_text('{"date": "2025-05-05"}')
    assert dated(config).data.chat_template_date == "2025-05-05"
    assert template_settings(config, tokenizer, strict=True)["today"] == "2025-05-05"
    byte_level().save_pretrained(tmp_path / "plain")
    plain = RunConfig.from_dict({"model": {"path": str(tmp_path / "plain")}, "output_dir": str(tmp_path / "other")})
    assert dated(plain) is plain and not (tmp_path / "other").exists()


TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"a": "int"}}}]


@pytest.fixture
def day(monkeypatch):
    """Set the date that Python has, in the engine and in transformers' chat templates."""

    def set_to(text):
        class Today(date):
            @classmethod
            def today(cls):
                return cls.fromisoformat(text)

        class Now(datetime):
            @classmethod
            def now(cls, tz=None):
                return cls.fromisoformat(text)

        monkeypatch.setattr(loading, "date", Today)
        monkeypatch.setattr(chat_template_utils, "datetime", Now)

    return set_to


def test_a_template_with_tools_and_a_date_is_the_same_when_resumed_on_a_later_day(tmp_path, day):
    """`tools` reach the template as transformers passes them, next to the date of the first command."""
    tokenizer = KINDS["dated_template"]()
    tokenizer.save_pretrained(tmp_path / "model")
    settings = {
        "model": {"path": str(tmp_path / "model")},
        "output_dir": str(tmp_path / "run"),
        "data": {"chat_template_kwargs": {"tools": TOOLS}},
    }

    def text_of_a_run():
        config = dated(RunConfig.from_dict(settings))
        codec = Codec(tokenizer, **template_settings(config, tokenizer, strict=True))
        return codec.decode_prompt(codec.encode_prompt(chat("a")))

    day("2026-01-31")
    messages = [{"role": "user", "content": "a"}]
    expected = tokenizer.apply_chat_template(messages, tools=TOOLS, tokenize=False, add_generation_prompt=True)
    first = text_of_a_run()
    assert first == expected and '[TOOLS][{"type": "function"' in first and "Today is 31 Jan 2026." in first
    day("2026-02-01")
    assert text_of_a_run() == first
    assert "01 Feb 2026" in tokenizer.apply_chat_template(messages, tools=TOOLS, tokenize=False)
    settings["output_dir"] = str(tmp_path / "new")
    assert "Today is 01 Feb 2026." in text_of_a_run()


def test_the_template_for_tools_is_used_with_tools_and_gets_the_date(day):
    """A tokenizer may have two templates, of which transformers selects one by `tools`."""
    tokenizer = KINDS["dated_template"]()
    tokenizer.chat_template = {"default": CHATML, "tool_use": DATED}
    arguments = {"tools": TOOLS}
    day("2026-02-01")
    with_tools = ChatTemplate(tokenizer, arguments, "2026-01-31").render(chat("a"))
    assert "Today is 31 Jan 2026." in with_tools and '"name": "add"' in with_tools
    without = ChatTemplate(tokenizer, {}, "2026-01-31").render(chat("a"))
    assert without == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"


def test_special_tokens_in_messages_are_refused_except_those_of_responses():
    codec = Codec(with_template(byte_level("<think>", "<|im_start|>", "<|im_end|>"), CHATML))
    assert "<think>" in names(codec, codec.encode_prompt(chat("a", "<think>b", "c")))
    for turns in (chat("<think>"), chat("a", "b<|im_end|>", "c"), chat("a", "b<|endoftext|>", "c")):
        with pytest.raises(ValueError, match=r"messages\[\d\]: contains the special token"):
            codec.encode_prompt(turns)
