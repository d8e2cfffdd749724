"""Checks of the trainer's arguments, and the batch sizes that follow from the settings."""

from __future__ import annotations

import math
from collections.abc import Sized
from typing import Any

from torch import nn

from rlhf_engine.compat.trl_config import PPOConfig

_BATCH = "per_device_train_batch_size * gradient_accumulation_steps"


def check_arguments(
    args: PPOConfig,
    tokenizer: Any,
    model: nn.Module,
    ref_model: nn.Module | None,
    train_dataset: Any,
    eval_dataset: Any,
) -> None:
    """Raise ValueError for arguments that exclude each other or lack something that every run needs."""
    if not isinstance(args, PPOConfig):
        raise ValueError(
            f"args: got a {type(args).__module__}.{type(args).__name__}, expected rlhf_engine.compat.trl.PPOConfig; import "
            "both classes from there"
        )
    if ref_model is model:
        raise ValueError(
            "ref_model is the same object as model, which is trained; pass a copy, or None for a frozen copy"
        )
    if train_dataset is None or not isinstance(train_dataset, Sized):
        raise ValueError(f"train_dataset: got {type(train_dataset).__name__}, expected a dataset with a length")
    if isinstance(eval_dataset, dict):
        raise ValueError("eval_dataset: got a dict, expected one dataset")
    for name in ("pad_token_id", "eos_token_id"):
        if getattr(tokenizer, name, None) is None:
            token = name.removesuffix("_id")
            raise ValueError(f"processing_class has no {token}; add one with add_special_tokens({{{token!r}: ...}})")
    if args.parallel_mode.value == "distributed":
        raise ValueError("got several processes, expected one; start the script without a launcher")


def count_batches(args: PPOConfig, rows: int) -> None:
    """Set the batch sizes and the number of updates in `args`, as TRL's trainer does, for a dataset of `rows` rows.

    Raises:
        ValueError: a batch is not a multiple of the minibatches or larger than the dataset, `whiten_rewards` has too few
            sequences, or an optimizer step would mix two updates.
    """
    size, parts = args.per_device_train_batch_size * args.gradient_accumulation_steps, args.num_mini_batches
    if size % parts:
        raise ValueError(f"num_mini_batches: got {parts}, expected a divisor of {size} = {_BATCH}")
    if rows < size:
        raise ValueError(f"train_dataset: got {rows} rows, expected at least {size} = {_BATCH}, a batch")
    each = size // parts
    if args.whiten_rewards and each < 8:
        raise ValueError(f"whiten_rewards: got True with minibatches of {each}, expected at least 8 sequences")
    passes = math.ceil(each / args.per_device_train_batch_size)
    found = args.num_ppo_epochs * parts * passes
    if found % args.gradient_accumulation_steps:
        raise ValueError(
            f"gradient_accumulation_steps: got {args.gradient_accumulation_steps} for {found} micro-batches per update "
            f"({args.num_ppo_epochs} epochs of {parts} minibatches of {passes}), so an optimizer step would mix two updates; "
            "change num_mini_batches or num_ppo_epochs"
        )
    args.world_size, args.local_batch_size, args.batch_size = 1, size, size
    args.micro_batch_size, args.mini_batch_size, args.local_mini_batch_size = (
        args.per_device_train_batch_size,
        each,
        each,
    )
    if args.total_episodes is None:
        args.total_episodes = int(args.num_train_epochs * rows)
    args.num_total_batches = math.ceil(args.total_episodes / size)
