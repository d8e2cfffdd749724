"""Rewards from a user's Python function of prompts and responses."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rlhf_engine.data import Codec, PlainPrompt
from rlhf_engine.rewards.scaling import RewardFunction
from rlhf_engine.rewards.user_code import SampleError, ask, number
from rlhf_engine.rollout import Rollout

TextReward = Callable[[list[PlainPrompt], list[str]], Sequence[float]]
"""Returns one number for each (prompt, response)."""


def text_reward(
    function: TextReward,
    codec: Codec,
    *,
    prompt_of: Callable[[Sequence[int]], PlainPrompt] | None = None,
    name: str | None = None,
) -> RewardFunction:
    """Return a reward that calls `function(prompts, responses)` once per rollout with decoded texts.

    Args:
        function: returns one number for each (prompt, response).
        codec: decodes the responses.
        prompt_of: returns the prompt without its format for token ids; by default the ids are decoded, format included.
        name: the name of the function in errors; by default its `__qualname__`.

    The returned reward raises SampleError with the row of the rollout if the function raises on a response or returns no number
    for it. It raises ValueError if the function does not return one number per response.
    """
    own = getattr(function, "__qualname__", type(function).__name__)
    what = f"reward function {own}" if name is None else f"reward.function {name}"

    def scores(rollout: Rollout) -> Tensor:
        asked = [(prompt_of or codec.decode_prompt)(ids) for ids in rollout.prompts()]
        answers = response_texts(rollout, codec)
        try:
            found = _floats(ask(function, [asked, answers], f"{what}: {len(answers)} responses"), len(answers), what)
        except SampleError as error:
            raise SampleError(error.row, f"{what}: {error}") from error.__cause__
        return torch.tensor(found, dtype=torch.float32)

    return scores


def response_texts(rollout: Rollout, codec: Codec) -> list[str]:
    """Return the text of every response of a rollout, up to its EOS or stop string."""
    return [codec.decode_response(ids) for ids in rollout.responses()]


def _floats(returned: object, count: int, what: str) -> list[float]:
    if not isinstance(returned, list):
        raise ValueError(f"{what}: got {returned!r}, expected a list of {count} numbers, one per response")
    if len(returned) != count:
        raise ValueError(f"{what}: got {len(returned)} scores, expected {count}, one per response")
    numbers = []
    for row, value in enumerate(returned):
        found = number(value)
        if found is None:
            raise SampleError(row, f"got {value!r}, expected a number")
        numbers.append(found)
    return numbers
