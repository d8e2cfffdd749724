"""A user's own reward: a Python function of prompts and answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rlhf_engine.data import Codec, PlainPrompt
from rlhf_engine.rewards.scaling import RewardFunction
from rlhf_engine.rewards.user_code import SampleError, ask, number
from rlhf_engine.rollout import Rollout

TextReward = Callable[[list[PlainPrompt], list[str]], Sequence[float]]
"""Gives one number for each (prompt, answer)."""


def text_reward(
    function: TextReward, prompt_of: Callable[[Sequence[int]], PlainPrompt], codec: Codec, name: str = ""
) -> RewardFunction:
    """`function` of a rollout's prompts and answers: all of them in one call; `name` is the function's in an error.

    `prompt_of` gives the prompt of some ids, as it was before its frame. Raises SampleError, with the row of the
    rollout, where the function raises on one answer or gives no number for it; ValueError unless there is one number an
    answer. A number that is not finite is told by `score_answers`.
    """
    what = f"reward.function {name}".rstrip()

    def scores(rollout: Rollout) -> Tensor:
        rows = zip(rollout.prompt_ids.tolist(), rollout.prompt_lengths.tolist(), strict=True)
        asked = [prompt_of(ids[len(ids) - length :]) for ids, length in rows]
        rows = zip(rollout.response_ids.tolist(), rollout.response_lengths.tolist(), strict=True)
        answers = [codec.decode_response(ids[:length]) for ids, length in rows]
        try:
            found = _floats(ask(function, [asked, answers], f"{what}: {len(answers)} answers"), len(answers), what)
        except SampleError as error:
            raise SampleError(error.row, f"{what}: {error}") from error.__cause__
        return torch.tensor(found, dtype=torch.float32)

    return scores


def _floats(said: object, count: int, what: str) -> list[float]:
    if not isinstance(said, list):
        raise ValueError(f"{what}: got {said!r}, expected a list of {count} numbers, one an answer")
    if len(said) != count:
        raise ValueError(f"{what}: got {len(said)} scores, expected {count}, one an answer")
    numbers = [number(value) for value in said]
    for row, found in enumerate(numbers):
        if found is None:
            raise SampleError(row, f"got {said[row]!r}, expected a number")
    return numbers
