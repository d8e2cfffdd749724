"""What models answer to prompts, as text: for a contest, for people to rank, or for a file.

Legend: M prompts, S samples, answers to one prompt.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from rlhf_engine.config import RunConfig
from rlhf_engine.data import Codec, PromptRecord, read_prompts
from rlhf_engine.data.records import prompt_field
from rlhf_engine.files import with_new_file
from rlhf_engine.metrics import progress
from rlhf_engine.model import LanguageModel
from rlhf_engine.model.pretrained import max_positions
from rlhf_engine.ppo.build import make_generator
from rlhf_engine.recipes.loading import check_room, computing, encode_records, load_model
from rlhf_engine.rollout import STOP_REASONS, Generator


@dataclass(frozen=True)
class Answers:
    """What a model said to one prompt."""

    texts: list[str]
    """S of them, an empty one where the model ended at once."""
    ended: list[bool]
    """Whether each came to its end, by EOS or at a stop text, before its budget did."""
    stop_reason: list[str]
    """Why each ended, one of `STOP_REASONS`."""
    logprobs: list[list[float]]
    """Log-prob of each token under the model's full distribution at the temperature of sampling."""


class Answerer:
    """A model that answers prompts, possibly with a text such as few-shot examples in front of each.

    An answer depends on the model, the prompt, the seed and the prompt's number, not on what it is asked beside it.

    Raises:
        ValueError: a model that does not load, or whose positions do not hold the longest prompt and answer.
    """

    def __init__(
        self, config: RunConfig, folder: str | None, *, seed: int, prefix: str = "", stop: str | None = None
    ) -> None:
        if "{prompt}" in prefix:
            raise ValueError("prefix: got a text with {prompt} in it, expected examples written out")
        if stop is not None:
            config = replace(config, rollout=replace(config.rollout, stop=(*config.rollout.stop, stop)))
        model, codec = load_model(replace(config, model=replace(config.model, path=folder)))
        check_room(config, max_positions(model), f"the positions of {folder}")
        self.prefix = prefix
        self.codec: Codec = replace(codec, prompt_template=prefix + codec.prompt_template)
        self.batch_size = config.rollout.batch_size
        self.actor = LanguageModel(model, backend=config.backend, **computing(config, learns=False))
        self.generator: Generator = make_generator(self.actor, self.codec, config, seed)

    def answer(
        self, source: str | None, records: Sequence[PromptRecord], samples: int, first: int = 0
    ) -> list[Answers]:
        """S answers to each record; `first` is the number of the first one, `source` names their file in an error."""
        prompts = list(encode_records(source, records, self._encode))
        rows = [prompt for prompt in prompts for _ in range(samples)]
        rollout = self.generator.generate(rows, torch.arange(len(rows)) + first * samples)
        lengths = rollout.response_lengths.tolist()

        def of_each(rows: Tensor) -> list[list]:
            return [row[:size] for row, size in zip(rows.tolist(), lengths, strict=True)]

        texts = [self.codec.decode_response(row) for row in of_each(rollout.response_ids)]
        reasons = [STOP_REASONS[number] for number in rollout.stop_reason.tolist()]
        ended, logprobs = rollout.ended.tolist(), of_each(rollout.logprobs)
        parts = [slice(start, start + samples) for start in range(0, len(texts), samples)]
        return [Answers(texts[part], ended[part], reasons[part], logprobs[part]) for part in parts]

    def _encode(self, record: PromptRecord) -> Tensor:
        if self.prefix and not isinstance(record.prompt, str):
            raise ValueError("messages: got a conversation to put a prefix in front of, expected a prompt")
        return torch.tensor(self.codec.encode_prompt(record.prompt))


def answer_all(
    answerer: Answerer, source: str | None, records: Iterable[PromptRecord], samples: int
) -> Iterator[tuple[PromptRecord, Answers]]:
    """Records with their answers, a bounded number of them in memory at a time."""
    records, done = iter(records), 0
    # Several batches at once keep the slots of a batch full while its longest answers end.
    chunk = max(1, 4 * answerer.batch_size // samples)
    while part := list(islice(records, chunk)):
        yield from zip(part, answerer.answer(source, part, samples, done), strict=True)
        done += len(part)


def generate_file(
    config: RunConfig, source: Path, target: Path, samples: int, split: str | None = None
) -> tuple[int, int]:
    """Answers of `model.path` to the prompts of a JSONL file, as lines of prompt, answers, ended, stop_reason and logprobs.

    Returns how many prompts there were and how many of them lost their beginning.

    Prompts are read and answers written as they come; `target` is whole or not there.

    Raises:
        ValueError: a bad line or a prompt that is too long, named as `file:line`; no prompts.
    """
    if samples < 1:
        raise ValueError(f"samples: got {samples}, expected at least 1")
    if target.is_dir():
        raise ValueError(f"output: got {target}, a folder, expected a file to write")
    if target.resolve() == source.resolve():
        raise ValueError(f"output: got {target}, the file of prompts, expected another: they would be lost")
    records = read_prompts(source, split)
    folder = config.model.path
    answerer = Answerer(config, folder, seed=config.seed)
    count = 0

    def write(new: Path) -> None:
        nonlocal count
        with new.open("w", encoding="utf-8") as file, progress(0, "generate", unit="prompt") as bar:
            for record, said in answer_all(answerer, str(source), records, samples):
                line = prompt_field(record.prompt) | {
                    "answers": said.texts,
                    "ended": said.ended,
                    "stop_reason": said.stop_reason,
                    "logprobs": said.logprobs,
                }
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                count += 1
                bar.update()
        if not count:
            raise ValueError(f"{source}: got no prompts{f' of split {split}' if split else ''}, expected at least one")

    with_new_file(target, write)
    return count, answerer.codec.truncated.count
