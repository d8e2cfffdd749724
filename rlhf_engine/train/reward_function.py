"""A user's own reward: a Python function of prompts and answers."""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType, TracebackType

import torch
from torch import Tensor

from rlhf_engine.data import Codec
from rlhf_engine.rollout import Rollout
from rlhf_engine.train.scores import RewardFunction

PlainPrompt = str | list[dict[str, str]]
"""A prompt as `plain` gives it: its text, or a conversation's messages with role and content."""

TextReward = Callable[[list[PlainPrompt], list[str]], Sequence[float]]
"""Gives one number for each (prompt, answer)."""


def import_function(name: str, key: str) -> TextReward:
    """What `module:function` or `path/to/file.py:function` names; ValueError, naming `key`, if it names nothing callable."""
    place, colon, attribute = name.rpartition(":")
    if not colon or not place or not attribute:
        raise ValueError(f"{key}: got {name!r}, expected module:function or file.py:function")
    function = getattr(_module(place, key), attribute, None)
    if not callable(function):
        got = "nothing" if function is None else type(function).__name__
        raise ValueError(f"{key}: got {got} under the name {attribute!r} in {place}, expected a function")
    return function


def text_reward(function: TextReward, prompts: Mapping[tuple[int, ...], PlainPrompt], codec: Codec) -> RewardFunction:
    """`function` of a rollout's prompts and answers: all of them in one call.

    `prompts` are the prompts by their ids, as they were before the prompt's frame. Raises ValueError unless there is
    one number an answer; one that is not finite is told by `score_answers`, which knows where in the run the sample is.
    """

    def scores(rollout: Rollout) -> Tensor:
        rows = zip(rollout.prompt_ids.tolist(), rollout.prompt_lengths.tolist(), strict=True)
        asked = [prompts[tuple(ids[len(ids) - length :])] for ids, length in rows]
        rows = zip(rollout.response_ids.tolist(), rollout.response_lengths.tolist(), strict=True)
        answers = [codec.decode_response(ids[:length]) for ids, length in rows]
        with _Note(f"while the reward function scored {len(answers)} answers"):
            found = list(function(asked, answers))
        if len(found) != len(answers):
            raise ValueError(f"reward.function: got {len(found)} scores, expected {len(answers)}, one an answer")
        return torch.tensor([_number(value, row) for row, value in enumerate(found)], dtype=torch.float32)

    return scores


def _number(value: object, row: int) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"reward.function: got {value!r} for answer {row} of the rollout, expected a number") from None
    except OverflowError:
        return math.inf


class _Note:
    """Adds a line to whatever is raised inside, and lets it pass: an error of the user's code keeps its own traceback."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            error.add_note(self.text)


def _module(place: str, key: str) -> ModuleType:
    if not place.endswith(".py"):
        try:
            return importlib.import_module(place)
        except ModuleNotFoundError as error:
            raise ValueError(
                f"{key}: {error}; expected a module that Python finds, or a path that ends in .py"
            ) from None
    path = Path(place)
    if not path.is_file():
        raise ValueError(f"{key}: {path}: no such file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
