"""What the rounds of `rlhf iterate` read, read once before anything is made: a late mistake costs the steps before it."""

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
from rlhf_engine.recipes.loading import Item, check_records, check_room, encode_records, given, load_model
from rlhf_engine.recipes.ppo import pretrain_stream
from rlhf_engine.supervised.reward_model import encode_comparison


def check_rounds(config: RunConfig) -> None:
    """Raises ValueError for a setting that is missing or out of place, or a file or judge that a round could not read."""
    _check_given(config)
    if config.ppo.objective == "trpo":
        check_attention(config.model.attention)
    for name in ("iterate", "eval"):
        judge = getattr(config, name).judge
        if judge != BY_HAND:
            _check_judge(config, name, judge)
    for split in ("train", config.eval.split):
        _check_prompts(config, split)
    model, codec = load_model(config)
    # A response that runs out of budget is ranked and scored with an EOS behind it.
    positions = max_positions(model)
    check_room(config, None if positions is None else positions - 1, f"the positions of {config.model.path} but one")
    del model
    path = given(config.data.prompts, "data.prompts")
    _check_all(path, read_prompts(path, "train"), lambda one: codec.encode_prompt(one.prompt))
    _check_contest(config, codec)
    _check_rankings(config, codec)
    pretrain_stream(config, codec)


def _check_given(config: RunConfig) -> None:
    if config.model.path is None:
        raise ValueError("model.path: got nothing, expected the folder of the SFT model")
    if config.data.prompts is None:
        raise ValueError("data.prompts: got nothing, expected a path")
    if config.iterate.judge is None:
        raise ValueError(f"iterate.judge: got nothing, expected a judge, or {BY_HAND!r}")
    if config.eval.judge in (None, BY_HAND):
        raise ValueError(f"eval.judge: got {config.eval.judge!r}, expected a judge that rates a round's policy at once")
    for key, value in (
        ("eval.candidate", config.eval.candidate),
        ("eval.baseline", config.eval.baseline),
        ("reward.path", config.reward.path),
        ("reward.function", config.reward.function),
    ):
        if value is not None:
            raise ValueError(f"{key}: got {value!r}, expected null: the rounds decide it")
    longest, kept = config.rollout.max_response_tokens, config.data.max_response_tokens
    if longest >= kept:
        raise ValueError(
            f"data.max_response_tokens: got {kept}, expected more than rollout.max_response_tokens {longest}: the reward "
            "model learns from what the policy answers, with an EOS behind it"
        )


def _check_judge(config: RunConfig, section: str, name: str) -> None:
    try:
        configured_judge(config, name)
    except ValueError as error:
        raise ValueError(f"{section}.judge: {str(error).removeprefix('judge: ')}") from None


def _check_prompts(config: RunConfig, split: str) -> None:
    if not sum(1 for _ in read_prompts(given(config.data.prompts, "data.prompts"), split)):
        raise ValueError(
            f"data.prompts: got no prompts of split {split} in {config.data.prompts}, expected at least one; `rlhf data clean` "
            "splits a file by user"
        )


def _check_all(path: str | None, records: Iterable[Item], encode: Callable[[Item], object]) -> None:
    for _ in encode_records(path, records, encode):
        pass


def _check_contest(config: RunConfig, codec: Codec) -> None:
    """Both models' tokenizer is that of `model.path`."""
    path = given(config.data.prompts, "data.prompts")
    for role in ("candidate", "baseline"):
        prefix = prefix_of(config, role)
        framed = replace(codec, prompt_template=prefix + codec.prompt_template)

        def asked() -> Iterator[PromptRecord]:
            return islice(read_prompts(path, config.eval.split), config.eval.limit)

        if prefix and not all(isinstance(record.prompt, str) for record in asked()):
            raise ValueError(f"eval.{role}_prefix: got one with conversations in {config.data.prompts}, expected none")
        _check_all(path, asked(), lambda record, framed=framed: framed.encode_prompt(record.prompt))
    if config.eval.text is not None:
        read_documents(config.eval.text, codec, config.output_dir)


def _check_rankings(config: RunConfig, codec: Codec) -> None:
    """The reward model's demonstrations and rankings, of which it needs two prompts: one to train, one to validate on."""
    data = config.data
    demonstrations = given(data.demonstrations, "data.demonstrations")
    check_records(demonstrations, "data.demonstrations", read_demonstrations)
    _check_all(demonstrations, read_demonstrations(demonstrations), codec.example)
    if data.comparisons is not None:
        check_records(data.comparisons, "data.comparisons", read_comparisons)
        _check_all(data.comparisons, read_comparisons(data.comparisons), lambda one: encode_comparison(one, codec))
    elif config.iterate.prompts < 2 or not _two_prompts(config):
        raise ValueError(
            f"iterate.prompts: got {config.iterate.prompts} of the training prompts of {data.prompts} without "
            "data.comparisons, expected at least 2 that differ, for the reward model to train on one and be validated on "
            "another"
        )


def _two_prompts(config: RunConfig) -> bool:
    records = read_prompts(given(config.data.prompts, "data.prompts"), "train")
    first = next(records).prompt
    return any(record.prompt != first for record in records)
