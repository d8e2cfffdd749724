"""Notices about what a model was trained on, read from the config in its folder.

A win rate is no evidence if the candidate has seen the prompts, or has maximised the judge's own scores.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path

from rlhf_engine.checkpoint import CONFIG
from rlhf_engine.checkpoint_folders import TRAINER
from rlhf_engine.config import RunConfig, load_config
from rlhf_engine.data import read_demonstrations, read_prompts
from rlhf_engine.data.records import Prompt


def training_use(config: RunConfig, prompts: Sequence[Prompt]) -> Iterator[str]:
    """Yield notices: prompts that are in the training file of `eval.candidate`, and a judge that was its reward.

    What cannot be compared is a notice too. A candidate without a config of ours yields none.
    """
    candidate = Path(config.eval.candidate or "")
    if not (candidate / CONFIG).is_file():
        return
    try:
        trained = load_config(candidate / CONFIG)
    except ValueError as error:
        yield f"eval: the config of {candidate} is of another release, so its training data was not compared ({error})"
        return
    ppo = (candidate / TRAINER).is_file()
    yield from _seen_prompts(candidate, trained.data.prompts if ppo else trained.data.demonstrations, prompts, ppo=ppo)
    if ppo and config.eval.judge is not None:
        yield from _same_judge(candidate, config.eval.judge, trained)


def skipped_sft(config: RunConfig) -> Iterator[str]:
    """Yield a notice if PPO starts from the base of an SFT model that the reward model was trained from."""
    if config.reward.path is None or config.model.path is None or not (Path(config.reward.path) / CONFIG).is_file():
        return
    tuned = _start_of(Path(config.reward.path))
    base = None if tuned is None else _start_of(Path(tuned))
    if base is not None and Path(base).resolve() == Path(config.model.path).resolve():
        yield (
            f"ppo: model.path is {config.model.path}, but the reward model was trained from {tuned}, which was fine-tuned from "
            f"it; set model.path={tuned} to train that one"
        )


def _start_of(folder: Path) -> str | None:
    """Return the model that the one in `folder` was trained from; None if there is no config of this release."""
    try:
        return load_config(folder / CONFIG).model.path
    except (OSError, ValueError):
        return None


def _seen_prompts(candidate: Path, file: str | None, prompts: Sequence[Prompt], *, ppo: bool) -> Iterator[str]:
    if file is None:
        return
    try:
        seen = {
            _digest(record.prompt) for record in (read_prompts(file, "train") if ppo else read_demonstrations(file))
        }
    except (OSError, ValueError) as error:
        yield f"eval: the training file of {candidate} cannot be read from here, so its prompts were not compared ({error})"
        return
    known = sum(_digest(prompt) in seen for prompt in prompts)
    if known:
        yield (
            f"eval: {known} of {len(prompts)} prompts are in the training file of {candidate}, so the win rate is no "
            "evidence for new prompts; split the file with `rlhf data clean` before training, and set eval.split=test"
        )


def _same_judge(candidate: Path, judge: str, trained: RunConfig) -> Iterator[str]:
    reward = trained.reward.path or trained.reward.function or trained.reward.url
    if reward is None:
        return
    if judge == reward or Path(judge).resolve() == Path(reward).resolve():
        yield (
            f"eval: the judge {judge} is the reward that {candidate} was trained to maximise, so a win may be "
            "over-optimisation of it; judge with people (eval.judge=file), a function, or a reward model of other rankings"
        )
    elif trained.reward.path is not None and not Path(reward).exists():
        yield f"eval: the reward {reward} of {candidate} is not there from here, so it was not compared with the judge"


def _digest(prompt: Prompt) -> bytes:
    return blake2b(repr(prompt).encode("utf-8", "surrogatepass"), digest_size=16).digest()
