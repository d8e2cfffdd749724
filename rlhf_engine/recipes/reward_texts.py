"""The reward of a PPO run that reads texts: a Python function or a server."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlhf_engine.config import RunConfig
from rlhf_engine.data import Codec, PromptTexts
from rlhf_engine.rewards.functions import text_reward
from rlhf_engine.rewards.scaling import RewardFunction
from rlhf_engine.rewards.served import CACHE, Server, served_reward


def reward_of_texts(
    config: RunConfig,
    function: Callable[..., Any] | None,
    codec: Codec,
    texts: PromptTexts,
    columns: tuple[str, ...],
) -> RewardFunction:
    """Return the reward that calls `function`, that of `reward.function`, or the server of `reward.url` if it is None.

    Raises:
        ValueError: the address or a setting of the server is wrong.
    """
    if function is None:
        return served_reward(_server(config), codec, prompt_of=texts, columns_of=texts.columns, columns=columns)
    return text_reward(
        function,
        codec,
        prompt_of=texts,
        columns_of=texts.columns,
        columns=columns,
        name=config.reward.function,
        batched=config.reward.batched,
        concurrency=config.reward.concurrency,
        timeout=config.reward.timeout,
        retries=config.reward.retries,
    )


def _server(config: RunConfig) -> Server:
    """Return the server of `reward.url`, whose answers are kept in `output_dir`."""
    cache = Path(config.output_dir) / CACHE if config.http.cache else None
    try:
        return Server(config.reward.url or "", config.http, cache)
    except ValueError as error:
        raise ValueError(f"reward.url: {error}") from None
