"""Records stored on disk equal the records of a list, and memory does not grow with the source file."""

import gc
import json
import tracemalloc
from hashlib import blake2b
from random import Random

import pytest
import torch

from rlhf_engine.checkpoint import fingerprint_rows
from rlhf_engine.config import load_config
from rlhf_engine.data import (
    EXAMPLES,
    Codec,
    Comparison,
    Demonstration,
    Example,
    PromptRecord,
    PromptTexts,
    length_batches,
    lengths_of,
    read_comparisons,
    read_demonstrations,
    stored,
    train_tokenizer,
)
from rlhf_engine.data.split import split
from rlhf_engine.data.summary import summarise
from rlhf_engine.evaluate import read_documents
from rlhf_engine.recipes.iterate import _prompts_of
from rlhf_engine.recipes.loading import encode_records
from rlhf_engine.recipes.ppo import encode_prompts, pretrain_stream
from rlhf_engine.supervised.reward_model import RANKED_PROMPTS, encode_comparison

WORDS = ["yes", "no", "maybe", "so", "I", "do", "not", "know", "what", "that", "is", "called", "in", "the", "north"]


@pytest.fixture(scope="module")
def codec():
    return Codec(train_tokenizer(WORDS, 300))


def text(rng, longest=12):
    return " ".join(rng.choices(WORDS, k=rng.randint(1, longest)))


def test_s1_stored_examples_equal_those_of_a_list(codec, tmp_path):
    rng = Random(0)
    examples = [codec.example(Demonstration(text(rng), text(rng))) for _ in range(50)] + [Example((), (3, 4))]
    found = stored(iter(examples), EXAMPLES, tmp_path / "not" / "there" / "yet")
    assert list(found) == examples and len(found) == 51
    assert found[-1] == examples[-1] and found[3:20:4] == examples[3:20:4]
    with pytest.raises(IndexError):
        found[51]
    assert not list(tmp_path.iterdir())
    assert list(stored([], EXAMPLES, tmp_path)) == []


def test_s3_stored_rankings_equal_those_of_a_list(codec, tmp_path):
    rng = Random(1)
    ranked = [
        encode_comparison(Comparison(text(rng), tuple(f"{text(rng)} {i}" for i in range(k)), (0, *range(k - 1))), codec)
        for k in (2, 3, 4, 9, 5)
        if k > 2
    ]
    assert list(stored(ranked, RANKED_PROMPTS, tmp_path)) == ranked
    assert list(lengths_of(ranked)) == [max(len(one.prompt + one.response) for one in r.completions) for r in ranked]


def test_s6_stored_prompts_have_the_fingerprint_of_a_list(codec, tmp_path):
    """A checkpoint identifies its prompts by this fingerprint."""
    lines = [{"prompt": f"{word} {i}", "user_id": "u"} for i, word in enumerate(WORDS)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = load_config(None, [f"data.prompts={tmp_path / 'prompts.jsonl'}", f"output_dir={tmp_path / 'out'}"])
    expected = [torch.tensor(codec.encode_prompt(line["prompt"])) for line in lines]
    found = encode_prompts(config, codec)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert fingerprint_rows(found) == fingerprint_rows(expected)
    assert all(ids.dtype == torch.int64 for ids in found)
    assert fingerprint_rows(torch.stack(expected[:1]).int()) == fingerprint_rows(expected[:1])


def slow_split(items, config):
    """Reference: hold out prompts in the order of their hash while that brings the share closer to its target."""
    groups = {}
    for item in items:
        groups.setdefault(item.prompt, []).append(item)
    first, *order = sorted(groups, key=lambda ids: blake2b(repr((config.seed, ids)).encode()).digest())
    train, validation = [], list(groups[first])
    for ids in order:
        full = len(validation) + len(groups[ids]) / 2 > config.data.validation_share * len(items)
        full = full or (ids == order[-1] and not train)
        (train if full else validation).extend(groups[ids])
    return train, validation


@pytest.mark.parametrize("share", ["0.01", "0.1", "0.6", "0.99"])
def test_s4_the_split_equals_the_reference_in_the_same_order(tmp_path, share):
    for seed in range(8):
        rng = Random(seed)
        config = load_config(None, [f"seed={seed}", f"data.validation_share={share}"])
        items = [Example((rng.randrange(12), 5), (row,)) for row in range(80)]
        found = split(stored(items, EXAMPLES, tmp_path), lambda example: example.prompt, config, "a file", "records")
        assert tuple(map(list, found)) == slow_split(items, config)


@pytest.mark.parametrize("seed", [None, 3])
def test_batches_equal_those_of_python_lists(seed):
    lengths = [Random(5).randint(1, 9) for _ in range(1)] + [Random(i).randint(1, 9) for i in range(1000)]
    order = list(range(len(lengths)))
    rng = None if seed is None else Random(seed)
    if rng:
        rng.shuffle(order)
    span, batches = 16 * 8 if rng else len(order), []
    for start in range(0, len(order), span):
        chunk = sorted(order[start : start + span], key=lambda index: lengths[index])
        batches += [chunk[at : at + 8] for at in range(0, len(chunk), 8)]
    if rng:
        rng.shuffle(batches)
    assert list(length_batches(lengths, 8, None if seed is None else Random(seed))) == batches


def test_s6_prompt_texts_are_found_by_ids():
    texts = PromptTexts()
    texts.add([1, 2], PromptRecord("é 你", "u", line=1))
    texts.add([1, 2], PromptRecord("é 你", "v", line=2))
    texts.add([1, 2, 0], PromptRecord("other", "v", line=3))
    assert [texts([1, 2]), texts([1, 2, 0])] == ["é 你", "other"]
    with pytest.raises(ValueError, match="prompt: has the same tokens as the prompt of line 1"):
        texts.add([1, 2], PromptRecord("else", "u", line=4))


def write(folder, records):
    """Write files of `records` records of about a quarter of a kilobyte each."""
    rng, folder = Random(0), folder / str(records)
    folder.mkdir()
    lines = {
        "demonstrations": lambda i: {"prompt": f"{i} {text(rng, 40)}", "response": text(rng, 40)},
        "comparisons": lambda i: {
            "prompt": f"{i} {text(rng, 9)}",
            "completions": [f"{text(rng)} {k}" for k in range(4)],
            "ranking": "A > B = C > D",
        },
        "prompts": lambda i: {"prompt": f"{i} {text(rng, 60)}", "user_id": f"u{i}"},
    }
    for name, line in lines.items():
        with (folder / f"{name}.jsonl").open("w") as file:
            file.writelines(json.dumps(line(number)) + "\n" for number in range(records))
    for name, documents, longest in (("few.txt", records, 40), ("many.txt", 16 * records, 3)):
        with (folder / name).open("w") as file:
            file.writelines(f"{text(rng, longest)}\n\n" for _ in range(documents))
    return folder


def demonstrations(config, codec):
    path = config.data.demonstrations
    examples = stored(encode_records(path, read_demonstrations(path), codec.example), EXAMPLES, config.output_dir)
    train, _ = split(examples, lambda example: example.prompt, config, "a file", "records")
    for batch in length_batches(lengths_of(train), 32, Random(0)):
        assert [train[number] for number in batch]


def comparisons(config, codec):
    path = config.data.comparisons
    ranked = encode_records(path, read_comparisons(path), lambda one: encode_comparison(one, codec))
    train, _ = split(
        stored(ranked, RANKED_PROMPTS, config.output_dir),
        lambda one: one.completions[0].prompt,
        config,
        "a file",
        "records",
    )
    for batch in length_batches(lengths_of(train), 8, Random(0)):
        assert [train[number] for number in batch]


def prompts(config, codec):
    texts = PromptTexts()
    for ids in encode_prompts(config, codec, texts):
        assert texts(ids.tolist())


def pretraining(config, codec):
    """Read documents that need several batches of the tokenizer."""
    stream = pretrain_stream(config, codec)
    for _ in range(len(stream.sequences)):
        stream.take(1)


def documents(config, codec):
    pieces = read_documents(config.eval.text, codec, config.output_dir)
    for batch in length_batches(lengths_of(pieces), 32):
        assert [pieces[number] for number in batch]


def rounds(config, codec):
    assert len(_prompts_of(config, 3)) == 64


def users(config, codec):
    assert summarise("prompts", config.data.prompts)["users"] in (100, 1000)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return [write(tmp_path_factory.mktemp("files"), records) for records in (100, 1000)]


@pytest.mark.parametrize("work", [demonstrations, comparisons, prompts, pretraining, documents, rounds, users])
def test_s19_memory_does_not_grow_with_the_file(work, codec, files):
    """A record needs a few numbers of eight bytes in memory; as Python objects it would need at least 400 bytes."""
    small, large = (configure(folder) for folder in files)
    # Python keeps hundreds of kilobytes of freed tuples until a full collection. The first run allocates them before the
    # measurement, and without collections they remain.
    gc.collect()
    gc.disable()
    try:
        work(large, codec)
        peaks = [peak(work, config, codec) for config in (small, large)]
    finally:
        gc.enable()
    assert (peaks[1] - peaks[0]) / (1000 - 100) < 256, peaks


def configure(folder):
    data = [f"data.{name}={folder / name}.jsonl" for name in ("demonstrations", "comparisons", "prompts")]
    texts = [f"data.pretrain={folder / 'many.txt'}", f"eval.text={folder / 'few.txt'}"]
    return load_config(None, [*data, *texts, f"output_dir={folder}", "ppo.ptx_coef=1"])


def peak(work, config, codec):
    tracemalloc.start()
    try:
        work(config, codec)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
