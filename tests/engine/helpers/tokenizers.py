"""Small tokenizers of the eight kinds that checkpoints of today have, trained on a few sentences."""

from __future__ import annotations

import random

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = (
    "How many legs has a dog? A dog has four legs.",
    "Name a colour of the sky. The sky is blue and white.\n\n\tTwo  spaces,   three.",
    "def f(x):\n    return x + 1  # naïve café, 東京, Ünïcödé",
    "Say hello to the people of the town. Hello, good people!",
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DATED = (
    "{{ bos_token }}{% if tools %}[TOOLS]{{ tools | tojson }}[/TOOLS]{% endif %}<|start_header_id|>system<|end_header_id|>\n\n"
    "Today is {{ strftime_now('%d %b %Y') }}.<|eot_id|>{% for m in messages %}<|start_header_id|>{{ m.role }}"
    "<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


def byte_level(*special, bos=None, eos="<|endoftext|>", pad="<|pad|>", prepend=False, **settings):
    """Return byte-level BPE as of GPT-2, Llama 3 and Qwen; with `prepend`, BOS precedes every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = list(dict.fromkeys(name for name in (bos, eos, pad, *special) if name))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=380, special_tokens=names, initial_alphabet=alphabet, show_progress=False),
    )
    if prepend:
        place = [(bos, tokenizer.token_to_id(bos))]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=place)
    marks = {"bos_token": bos, "eos_token": eos, "pad_token": pad}
    marks = {name: token for name, token in marks.items() if token}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, additional_special_tokens=list(special), **marks, **settings
    )


def sentencepiece_like(*special, prepend=True):
    """Return BPE with metaspace, byte fallback and `▁` before the first word, as of Llama 2, Mistral and Gemma."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    names = ["<unk>", "<s>", "</s>", *special, *(f"<0x{byte:02X}>" for byte in range(256))]
    trained.train_from_iterator(
        ["▁" + text for text in CORPUS], trainers.BpeTrainer(vocab_size=420, special_tokens=names, show_progress=False)
    )
    content = trained.to_str()
    plain = Tokenizer.from_str(content)
    vocabulary = plain.get_vocab()
    import json

    model = json.loads(content)["model"]
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in model["merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in ("<unk>", "<s>", "</s>", *special)])
    if prepend:
        place = [("<s>", tokenizer.token_to_id("<s>"))]
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=place)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=list(special),
    )


def added_tokens():
    """Return a tokenizer with special tokens, one of which deletes the white space after it, and an added plain token."""
    tokenizer = byte_level("<think>", "</think>", clean_up_tokenization_spaces=True)
    tokenizer.add_tokens([AddedToken("<|end|>", special=True, rstrip=True)], special_tokens=True)
    tokenizer.add_tokens([AddedToken("<tool_call>", special=False)])
    return tokenizer


def several_eos():
    """Return a tokenizer with ChatML, whose turns do not end with EOS."""
    tokenizer = byte_level("<|im_start|>", "<|im_end|>")
    tokenizer.chat_template = CHATML
    return tokenizer


def dated_template():
    """Return a tokenizer whose chat template has the date and tools."""
    specials = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    tokenizer = byte_level(*specials, bos="<|begin_of_text|>", eos="<|end_of_text|>", prepend=True)
    tokenizer.chat_template = DATED
    return tokenizer


KINDS = {
    "byte_level": byte_level,
    "sentencepiece": lambda: sentencepiece_like("[INST]", "[/INST]"),
    "bos": lambda: byte_level("<think>", bos="<s>", prepend=True),
    "pad_is_eos": lambda: byte_level("<think>", pad="<|endoftext|>"),
    "added_tokens": added_tokens,
    "several_eos": several_eos,
    "padded_vocabulary": lambda: byte_level("<|reserved_0|>", "<|reserved_1|>"),
    "dated_template": dated_template,
}
"""Functions that return a tokenizer, by kind. Models of `padded_vocabulary` have more ids than it."""

_WORDS = (
    *(
        "dog",
        "sky",
        "Hello",
        "the",
        "a",
        ".",
        "?",
        "!",
        " ",
        "  ",
        "\n",
        "\n\n",
        "\t",
        " ,",
        "n't",
        "東京",
        "é",
        "🐄",
        "🏳️‍🌈",
    ),
    *("x = 1\n", "\u200b", "\u00a0", "\r\n", "İ", "e\u0301", "ﬁ", "<", "|", ">", "▁", "Ġ", "\ufffd", "0x0A", "<0x0A>"),
)


def text_of(rng: random.Random, tokenizer) -> str:
    """Return a random text of words, white space, rare characters and the tokenizer's special tokens."""
    special = [token.content for token in tokenizer.added_tokens_decoder.values()]
    words = [*_WORDS, *rng.sample(special, min(3, len(special)))]
    return "".join(rng.choice(words) for _ in range(rng.randint(1, 24)))
