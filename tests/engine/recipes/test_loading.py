"""The split of records into training and validation sets, which the stages share."""

import pytest

from rlhf_engine.config import DataConfig, RunConfig
from rlhf_engine.data import Example
from rlhf_engine.data.split import split


def config_of(seed=0, share=0.1):
    return RunConfig(seed=seed, data=DataConfig(validation_share=share))


def examples_of(prompts, answers=3):
    return [Example((prompt,), (answer,)) for answer in range(answers) for prompt in range(prompts)]


def parts(items, config):
    train, validation = split(items, lambda example: example.prompt, config, "x.jsonl", "records")
    assert sorted([*train, *validation], key=items.index) == items
    return [{example.prompt for example in part} for part in (train, validation)]


@pytest.mark.parametrize(("prompts", "share", "held_out"), [(40, 0.1, 4), (2, 0.01, 1), (2, 0.99, 1), (7, 0.5, 4)])
def test_s4_no_prompt_is_trained_and_validated_on(prompts, share, held_out):
    train, validation = parts(examples_of(prompts), config_of(share=share))
    assert not train & validation and len(validation) == held_out


def test_s4_stages_hold_out_the_same_prompts():
    """The base of a reward model must not have been fine-tuned on the reward model's validation prompts."""
    few, many = (parts(examples_of(40, answers), config_of())[1] for answers in (1, 5))
    assert few == many
    assert parts(examples_of(40), config_of(seed=1))[1] != few


def test_one_prompt_cannot_be_split():
    with pytest.raises(ValueError, match=r"x\.jsonl: got 3 records of 1 prompts, expected at least 2 prompts"):
        split(examples_of(1), lambda example: example.prompt, config_of(), "x.jsonl", "records")
