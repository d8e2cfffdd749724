"""Notices about an evaluation whose prompts or judge its candidate was trained on, read from the config in the model's folder.

Such a win rate says little: the candidate has seen the prompts, or has maximised the judge's own scores.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path

from rlhf_engine.checkpoint import CONFIG
from rlhf_engine.checkpoint_folders import TRAINER
from rlhf_engine.config import RunConfig, load_config
from rlhf_engine.data import PromptRecord, read_demonstrations, read_prompts
from rlhf_engine.data.records import Prompt


def training_use(config: RunConfig, records: Sequence[PromptRecord]) -> Iterator[str]:
    """Yield a notice for each of: prompts in `records` that `eval.candidate` was trained on, and a judge that rewarded it.

    A candidate without a config of ours yields none, nor does one whose training file is not there any more.
    """
    trained = _training_config(config.eval.candidate)
    if trained is None or config.eval.candidate is None:
        return
    seen = {_digest(prompt) for prompt in _trained_prompts(trained, Path(config.eval.candidate))}
    known = sum(_digest(record.prompt) in seen for record in records)
    if known:
        yield (
            f"eval: {known} of {len(records)} prompts were used to train {config.eval.candidate}, so the win rate says little "
            "about new prompts; split the file with `rlhf data clean` before training, and set eval.split=test"
        )
    judge, reward = config.eval.judge, trained.reward.path or trained.reward.function
    if not (Path(config.eval.candidate) / TRAINER).is_file() or judge is None or reward is None:
        return
    if judge == reward or Path(judge).resolve() == Path(reward).resolve():
        yield (
            f"eval: the judge {judge} is the reward that {config.eval.candidate} was trained to maximise, so a win may be "
            "over-optimisation of it; judge with people (eval.judge=file), a function, or a reward model of other rankings"
        )


def _training_config(folder: str | None) -> RunConfig | None:
    path = None if folder is None else Path(folder) / CONFIG
    if path is None or not path.is_file():
        return None
    try:
        return load_config(path)
    except ValueError:  # of a release with other settings
        return None


def _trained_prompts(config: RunConfig, folder: Path) -> Iterator[Prompt]:
    ppo = (folder / TRAINER).is_file()
    path = config.data.prompts if ppo else config.data.demonstrations
    if path is None or not Path(path).exists():
        return
    reading = read_prompts(path, "train") if ppo else read_demonstrations(path)
    try:
        for record in reading:
            yield record.prompt
    except ValueError:  # the file has changed since the training
        return


def _digest(prompt: Prompt) -> bytes:
    return blake2b(repr(prompt).encode("utf-8", "surrogatepass"), digest_size=16).digest()
