"""Responses to evaluation prompts as a table: sampled, scored, printed. B sequences."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from rlhf_engine.compat.trl_rollout import Sampler, scores_of, truncated, unpadded
from rlhf_engine.model.reward_model import RewardModel

_SHOWN = 5


def completions(
    sampler: Sampler,
    reward: RewardModel,
    batches: Iterable[Any],
    tokenizer: Any,
    *,
    chunk: int,
    first_batch_only: bool,
) -> dict[str, list[Any]]:
    """Return the columns `query`, `model response` and `score` of TRL's table; `chunk` responses are scored together."""
    table: dict[str, list[Any]] = {"query": [], "model response": [], "score": []}
    for batch in batches:
        queries = batch["input_ids"].to(sampler.policy.device)
        prompts, first = unpadded(queries, sampler.pad_id), len(table["query"])
        sampler.fit(prompts)
        ids = sampler(prompts, torch.arange(first, first + len(prompts))).ids
        ids = truncated(ids, sampler.stop_id, sampler.pad_id)
        table["query"] += tokenizer.batch_decode(queries, skip_special_tokens=True)
        table["model response"] += tokenizer.batch_decode(ids)
        table["score"] += scores_of(reward, prompts, ids, sampler.pad_id, chunk).tolist()
        if first_batch_only:
            break
    return table


def report(table: dict[str, list[Any]], trackers: Collection[str]) -> None:
    """Print the first rows, and log all of them to the current run of wandb if `trackers` has it."""
    shown = Table(*table, show_lines=True)
    rows = list(zip(*table.values(), strict=True))
    for row in rows[:_SHOWN]:
        shown.add_row(*map(str, row))
    Console().print(shown)
    if "wandb" in trackers:
        import wandb  # pyright: ignore[reportMissingImports]

        if wandb.run is not None:
            wandb.log({"completions": wandb.Table(columns=list(table), data=[list(row) for row in rows])})
