"""Sampling of answers as text: for an evaluation, for rankings, or for a file.

Legend: S samples, the answers to one prompt.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from rlhf_engine import files
from rlhf_engine.checkpoint import fingerprint
from rlhf_engine.config import RunConfig, flat_settings
from rlhf_engine.data import Codec, PromptRecord, read_prompts
from rlhf_engine.data.records import prompt_field
from rlhf_engine.files import read_json_lines
from rlhf_engine.model import LanguageModel
from rlhf_engine.model.pretrained import max_positions
from rlhf_engine.notices import notice
from rlhf_engine.ppo.build import make_generator
from rlhf_engine.progress import progress
from rlhf_engine.recipes.loading import check_room, computing, encode_records, load_model
from rlhf_engine.recipes.partial import PartialFile
from rlhf_engine.rollout import STOP_REASONS, Generator

_NOT_READ = (
    *(
        "output_dir",
        "model.path",
        "model.train_layers",
        "adapter",
        "sft",
        "reward",
        "ppo",
        "eval",
        "iterate",
        "checkpoint",
        "tracking",
        "http",
    ),
    *(f"data.{name}" for name in ("demonstrations", "comparisons", "prompts", "pretrain", "hygiene")),
)
"""Keys and sections of the config on which the answers to a file of prompts do not depend."""


@dataclass(frozen=True)
class Answers:
    """A model's answers to one prompt."""

    texts: list[str]
    """S texts. A text is empty if the model ended the answer immediately."""
    ended: list[bool]
    """Whether each answer ended by EOS, a stop token or a stop string, and not at the token limit."""
    stop_reason: list[str]
    """Why each answer ended, one of `STOP_REASONS`."""
    logprobs: list[list[float]]
    """Log-prob of each token under the model's full distribution at the sampling temperature."""


class Answerer:
    """A model that answers prompts, each optionally preceded by a prefix such as few-shot examples.

    An answer depends on the model, the prompt, the seed and the index of the prompt, not on the other prompts of its batch.

    Raises:
        ValueError: the model cannot be loaded, its positions do not hold the longest prompt and response, or the prefix
            contains `{prompt}`.
    """

    def __init__(
        self, config: RunConfig, folder: str | None, *, seed: int, prefix: str = "", stop: str | None = None
    ) -> None:
        if "{prompt}" in prefix:
            raise ValueError("prefix: got a text with {prompt} in it, expected examples with their prompts")
        if stop is not None:
            config = replace(config, rollout=replace(config.rollout, stop=(*config.rollout.stop, stop)))
        # The settings of the chat template are those of `model.path`; a model to compare with may have a different template.
        strict = folder == config.model.path
        model, codec = load_model(replace(config, model=replace(config.model, path=folder)), strict=strict)
        check_room(config, max_positions(model), f"the positions of {folder}")
        self.prefix = prefix
        self.codec: Codec = replace(codec, prompt_template=prefix + codec.prompt_template)
        self.batch_size = config.rollout.batch_size
        self.actor = LanguageModel(model, backend=config.backend, **computing(config, learns=False))
        if self.actor.adapters is None:  # the other model of a comparison may have some
            config = replace(config, rollout=replace(config.rollout, merge_adapters="never"))
        self.generator: Generator = make_generator(self.actor, self.codec, config, seed)

    def answer(
        self, source: str | None, records: Sequence[PromptRecord], samples: int, first: int = 0
    ) -> list[Answers]:
        """Return S = `samples` answers to each record.

        Args:
            source: file of the records, which errors name.
            records: prompts.
            samples: answers per prompt.
            first: index of the first record, on which the random numbers depend.
        """
        prompts = list(encode_records(source, records, self.encode))
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

    def encode(self, record: PromptRecord) -> Tensor:
        """Return the token ids of a prompt, preceded by the prefix."""
        if self.prefix and not isinstance(record.prompt, str):
            raise ValueError("messages: got a conversation, expected a text: a prefix cannot precede a conversation")
        return torch.tensor(self.codec.encode_prompt(record.prompt))


def chunk_size(answerer: Answerer, samples: int) -> int:
    """Return the number of prompts that are answered together.

    A chunk has several batches, so that other prompts can use the free slots while the longest answers finish.
    """
    return max(1, 4 * answerer.batch_size // samples)


def answer_all(
    answerer: Answerer, source: str | None, records: Iterable[PromptRecord], samples: int, done: int = 0
) -> Iterator[tuple[PromptRecord, Answers]]:
    """Yield records with their answers; the number of records in memory is bounded. The first record has the number `done`."""
    records = iter(records)
    while part := list(islice(records, chunk_size(answerer, samples))):
        yield from zip(part, answerer.answer(source, part, samples, done), strict=True)
        done += len(part)


def generate_file(
    config: RunConfig,
    source: Path,
    target: Path,
    samples: int,
    split: str | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
) -> tuple[int, int]:
    """Write the answers of `model.path` to the prompts of a JSONL file, one line per prompt.

    A line has the prompt, `answers`, `ended`, `stop_reason` and `logprobs`. Prompts are read and lines written while the
    model samples. `target` is complete or absent; until then the lines are in `target.partial`. A repeated call with the same
    settings, model and prompts continues from there and writes the same file. With `resume`, a complete `target` is left as it
    is. Return the number of prompts and how many of them were cut on the left.

    Raises:
        ValueError: a line is bad or a prompt is too long, named as `file:line`; there are no prompts; `samples` is less
            than 1; `target` is a folder, the file of prompts, or, without `overwrite`, a file that exists and is not a
            complete one to `resume`; or `resume` is set and a setting differs from that of the interrupted call.
    """
    _check_arguments(source, target, samples, replaces=overwrite or resume)
    total = sum(1 for _ in read_prompts(source, split))
    if not total:
        raise ValueError(f"{source}: got no prompts{f' of split {split}' if split else ''}, expected at least one")
    records = iter(read_prompts(source, split))
    answerer = Answerer(config, config.model.path, seed=config.seed)
    if resume and not overwrite and target.exists():
        _check_complete(target, total, samples)
        for _ in encode_records(str(source), records, answerer.encode):
            pass  # counts the prompts that are cut
        return total, answerer.codec.truncated.count
    settings = {
        "samples": samples,
        "split": split,
        "prompts": _digest(source),
        "model.path": fingerprint(answerer.actor.named_parameters()),
        **dict(flat_settings(config.to_dict(), _NOT_READ)),
    }
    with (
        PartialFile(target, settings, chunk=chunk_size(answerer, samples), resume=resume) as file,
        progress(total, "generate", unit="prompt", done=file.kept) as bar,
    ):
        for _ in encode_records(str(source), islice(records, file.kept), answerer.encode):
            pass  # counts the prompts that are cut
        for record, sampled in answer_all(answerer, str(source), records, samples, file.kept):
            line = prompt_field(record.prompt) | {
                "answers": sampled.texts,
                "ended": sampled.ended,
                "stop_reason": sampled.stop_reason,
                "logprobs": sampled.logprobs,
            }
            file.write(line)
            bar.advance(tokens=sum(map(len, sampled.logprobs)))
        file.finish()
    return file.count, answerer.codec.truncated.count


def _check_arguments(source: Path, target: Path, samples: int, *, replaces: bool) -> None:
    if samples < 1:
        raise ValueError(f"samples: got {samples}, expected at least 1")
    if target.is_dir():
        raise ValueError(f"output: got {target}, a folder, expected a file to write")
    if target.resolve() == source.resolve():
        raise ValueError(
            f"output: got {target}, the file of prompts, expected a different file: it would be overwritten"
        )
    if target.exists() and not replaces:
        raise ValueError(_EXISTS.format(target))


_EXISTS = "output: {} exists; replace it with --overwrite, or give a different file"


def _check_complete(target: Path, total: int, samples: int) -> None:
    """Log a notice if `target` is the complete file of an earlier call; raise ValueError if it is not.

    A process that is killed after it has written the file may leave the partial one, which is deleted.
    """
    try:
        lines = read_json_lines(target)
        whole = len(lines) == total and all(len(line["answers"]) == samples for line in lines)
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole or not PartialFile.finished(target):
        raise ValueError(_EXISTS.format(target))
    notice(f"{target} is complete, so nothing is sampled; its settings are not known and were not compared")


def _digest(source: Path) -> str:
    """Return the SHA-256 of a file, or of the files in a folder of `save_to_disk`."""
    paths = sorted(path for path in source.rglob("*") if path.is_file()) if source.is_dir() else [source]
    return sha256("".join(files.disk.digest(path) for path in paths).encode()).hexdigest()
