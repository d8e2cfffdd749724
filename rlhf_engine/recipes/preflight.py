"""Checks of everything that the rounds of `rlhf iterate` read, before the first step: a late error would waste the steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import islice

from rlhf_engine.config import RunConfig
from rlhf_engine.data import Codec, PromptRecord, read_comparisons, read_demonstrations, read_prompts
from rlhf_engine.evaluate import read_documents
from rlhf_engine.model.pretrained import max_positions
from rlhf_engine.ppo.trpo import check_attention
from rlhf_engine.recipes.evaluate import BY_HAND, configured_judge, prefix_of
from rlhf_engine.recipes.loading import (
    Item,
    check_packages,
    check_room,
    check_start_model,
    check_trained_records,
    encode_records,
    given,
    load_model,
)
from rlhf_engine.recipes.planning import check_reference
from rlhf_engine.recipes.ppo import pretrain_stream
from rlhf_engine.recipes.trial import try_model
from rlhf_engine.supervised.reward_model import encode_comparison

_TRIED = ("Yes.", "I do not know.")
"""Answers that a judge is tried on."""


def check_rounds(config: RunConfig) -> None:
    """Raise ValueError for a missing or misplaced setting, or for a file or a judge that a round could not read."""
    _check_given(config)
    check_reference(config)
    check_start_model(config)
    check_packages(config)
    if config.ppo.objective == "trpo":
        check_attention(config.model.attention)
    for split in ("train", config.eval.split):
        _check_prompts(config, split)
    for name in ("iterate", "eval"):
        judge = getattr(config, name).judge
        if judge != BY_HAND:
            _check_judge(config, name, judge)
    model, codec = load_model(config)
    # A response that reaches the token limit is ranked and scored with an additional EOS.
    positions = max_positions(model)
    check_room(
        config, None if positions is None else positions - 1, f"the positions of {config.model.path} less one for EOS"
    )
    if config.model.quant == "none":  # otherwise the stages write adapters, and try that themselves
        try_model(model, codec.tokenizer, config)
    del model
    path = given(config.data.prompts, "data.prompts")
    _check_all(path, read_prompts(path, "train"), lambda one: codec.encode_prompt(one.prompt))
    _check_contest(config, codec)
    _check_rankings(config, codec)
    pretrain_stream(config, codec)


def _check_given(config: RunConfig) -> None:
    if config.model.path is None:
        raise ValueError("model.path is not set; give the folder of the SFT model")
    given(config.data.prompts, "data.prompts")
    if config.iterate.judge is None:
        raise ValueError(f"iterate.judge is not set; give a judge, or {BY_HAND!r} to rank by hand")
    if config.eval.judge in (None, BY_HAND):
        raise ValueError(
            f"eval.judge: got {config.eval.judge!r}, expected a function or a reward model: rounds are not judged by hand"
        )
    for key, value in (
        ("eval.candidate", config.eval.candidate),
        ("eval.baseline", config.eval.baseline),
        ("reward.path", config.reward.path),
        ("reward.function", config.reward.function),
        ("reward.url", config.reward.url),
    ):
        if value is not None:
            raise ValueError(f"{key}: got {value!r}, expected null: every round sets it")
    longest, kept = config.rollout.max_response_tokens, config.data.max_response_tokens
    if longest >= kept:
        raise ValueError(
            f"data.max_response_tokens: got {kept}, expected more than rollout.max_response_tokens {longest}: the reward "
            "model is trained on the policy's responses followed by EOS"
        )


def _check_judge(config: RunConfig, section: str, name: str) -> None:
    """Load a judge, and let it compare two pairs of answers to the first prompts."""
    records = islice(read_prompts(given(config.data.prompts, "data.prompts"), "train"), len(_TRIED))
    prompts = [record.prompt for record in records]
    answers = _TRIED[: len(prompts)]
    try:
        configured_judge(config, name).compare(prompts, answers, answers[::-1])
    except ValueError as error:
        raise ValueError(f"{section}.judge: {str(error).removeprefix('judge: ')}") from None


def _check_prompts(config: RunConfig, split: str) -> None:
    allow = config.data.allowed_columns()
    if not sum(1 for _ in read_prompts(given(config.data.prompts, "data.prompts"), split, allow=allow)):
        raise ValueError(
            f"data.prompts: got no prompts of split {split} in {config.data.prompts}, expected at least one; `rlhf data clean` "
            "splits a file by user"
        )


def _check_all(path: str | None, records: Iterable[Item], encode: Callable[[Item], object]) -> None:
    for _ in encode_records(path, records, encode):
        pass


def _check_contest(config: RunConfig, codec: Codec) -> None:
    """Check the prefixes, prompts and text of the evaluation with the tokenizer of `model.path`, which both models have."""
    path = given(config.data.prompts, "data.prompts")
    for role in ("candidate", "baseline"):
        prefix = prefix_of(config, role)
        framed = replace(codec, prompt_template=prefix + codec.prompt_template)

        def asked() -> Iterator[PromptRecord]:
            return islice(read_prompts(path, config.eval.split), config.eval.limit)

        if prefix and not all(isinstance(record.prompt, str) for record in asked()):
            raise ValueError(
                f"eval.{role}_prefix: got a prefix, expected null: {config.data.prompts} contains conversations"
            )
        _check_all(path, asked(), lambda record, framed=framed: framed.encode_prompt(record.prompt))
    if config.eval.text is not None:
        read_documents(config.eval.text, codec, config.output_dir)


def _check_rankings(config: RunConfig, codec: Codec) -> None:
    """Check the reward model's demonstrations and rankings: it needs one prompt for training and one for validation."""
    data = config.data
    demonstrations = given(data.demonstrations, "data.demonstrations")
    check_trained_records(config, "demonstrations", read_demonstrations)
    _check_all(
        demonstrations,
        read_demonstrations(demonstrations),
        lambda one: codec.join(codec.encode_prompt(one.prompt), one.response),
    )
    if data.comparisons is not None:
        check_trained_records(config, "comparisons", read_comparisons)
        _check_all(data.comparisons, read_comparisons(data.comparisons), lambda one: encode_comparison(one, codec))
    elif config.iterate.prompts < 2 or not _two_prompts(config):
        raise ValueError(
            f"iterate.prompts: got {config.iterate.prompts} of the training prompts of {data.prompts} without "
            "data.comparisons, expected at least 2 that differ: the reward model needs one for training and one for "
            "validation"
        )


def _two_prompts(config: RunConfig) -> bool:
    records = read_prompts(given(config.data.prompts, "data.prompts"), "train")
    first = next(records).prompt
    return any(record.prompt != first for record in records)
