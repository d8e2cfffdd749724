"""Rewards from a user's Python function of prompts and responses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf_engine.data import Codec, PlainPrompt
from rlhf_engine.rewards.calls import Parameters, ask, number, shown_prompt
from rlhf_engine.rewards.limits import Limits
from rlhf_engine.rewards.scaling import RewardFunction
from rlhf_engine.rewards.user_code import SampleError
from rlhf_engine.rollout import Rollout

TextReward = Callable[..., Any]
"""Returns one number for each (prompt, response): `function(prompts, responses, **columns)`."""


def text_reward(
    function: TextReward,
    codec: Codec,
    *,
    prompt_of: Callable[[Sequence[int]], PlainPrompt] | None = None,
    columns_of: Callable[[Sequence[int]], Mapping[str, Any]] | None = None,
    columns: Sequence[str] = (),
    name: str | None = None,
    batched: bool = True,
    concurrency: int = 32,
    timeout: float = 0.0,
    retries: int = 0,
) -> RewardFunction:
    """Return a reward that calls `function(prompts, responses, **columns)` once per rollout with decoded texts.

    Args:
        function: returns one number for each (prompt, response); it may be async. A function whose first parameter is named
            `responses` or `completions` receives no prompts, or receives them second.
        codec: decodes the responses.
        prompt_of: returns the prompt without its format for token ids; by default the ids are decoded, format included.
        columns_of: returns the columns of the record for the token ids of its prompt.
        columns: names of the columns that `columns_of` returns. The function receives those that it has parameters for.
        name: the name of the function in errors; by default its `__qualname__`.
        batched: whether the function receives lists and returns one; otherwise it is called once per response.
        concurrency: maximum number of calls of an async function at once, without `batched`.
        timeout: maximum seconds of a call; 0 is no limit. With one, a plain function is called in the main thread only (see
            `limits`).
        retries: maximum number of repeated calls after one that raises or takes too long.

    The returned reward raises SampleError with the row of the rollout if the function raises on a response, takes too long, or
    returns no number for it. It raises ValueError if the function does not return one number per response.

    Raises:
        ValueError: the function has a parameter that is none of the `columns` and has no default.
    """
    default = getattr(function, "__qualname__", type(function).__name__)
    what = f"reward function {default}" if name is None else f"reward.function {name}"
    parameters, limits = Parameters.of(function), Limits(timeout, retries, what)
    try:
        names = parameters.columns(columns)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None

    def scores(rollout: Rollout) -> Tensor:
        prompts, count = rollout.prompts(), len(rollout)
        asked: list[Any] = [(prompt_of or codec.decode_prompt)(ids) for ids in prompts]
        data = {"prompts": asked, "responses": response_texts(rollout, codec)}
        rows = [columns_of(ids) for ids in prompts] if columns_of is not None and names else []
        named = {column: [row.get(column) for row in rows] for column in names}
        given = [data[part] for part in parameters.data]
        how: dict[str, Any] = {"batched": batched, "concurrency": concurrency, "limits": limits}
        try:
            found = _floats(ask(function, given, f"{what}: {count} responses", named, **how), count, what)
        except SampleError as error:
            shown = shown_prompt(asked[error.row])
            raise SampleError(error.row, f"{what}: {error}; prompt: {shown}") from error.__cause__
        return torch.tensor(found, dtype=torch.float32)

    return scores


def response_texts(rollout: Rollout, codec: Codec) -> list[str]:
    """Return the text of every response of a rollout, up to its EOS or stop string."""
    return [codec.decode_response(ids) for ids in rollout.responses()]


def _floats(returned: object, count: int, what: str) -> list[float]:
    if not isinstance(returned, list):
        hint = "" if number(returned) is None else "; for a function of one response, set reward.batched=false"
        raise ValueError(f"{what}: got {returned!r}, expected a list of {count} numbers, one per response{hint}")
    if len(returned) != count:
        raise ValueError(f"{what}: got {len(returned)} scores, expected {count}, one per response")
    numbers = []
    for row, value in enumerate(returned):
        found = number(value)
        if found is None:
            raise SampleError(row, f"got {value!r}, expected a number")
        numbers.append(found)
    return numbers
