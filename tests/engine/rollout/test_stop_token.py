"""Responses that end at a stop token of the config, such as a period: OpenAI's token truncation of 2019."""

import pytest
import torch

from rlhf_engine.config import RolloutConfig, load_config
from rlhf_engine.model import ActorCritic
from rlhf_engine.ppo.build import make_generator
from rlhf_engine.recipes import load_model, rollout_examples
from rlhf_engine.rollout import EOS, STOP_TOKEN, Generator, Rollout
from tests.engine.helpers.cli_run import new_model, new_run, rlhf
from tests.engine.helpers.sampling import ENDS, make_actor, make_prompts

STOP = 11


def answers(stop, **settings):
    config = RolloutConfig(max_prompt_tokens=20, max_response_tokens=24, batch_size=16, **settings)
    marks = {"eos_token_ids": ENDS, "pad_token_id": 0, "stop_token_id": stop}
    return Generator(make_actor(), config, seed=3, **marks).generate(make_prompts(40), torch.arange(40))


def rows(rollout):
    lengths = rollout.response_lengths.tolist()
    return [row[:length] for row, length in zip(rollout.response_ids.tolist(), lengths, strict=True)]


@pytest.mark.parametrize("after", [0, 6])
def test_s6_a_response_ends_at_the_first_stop_token_that_counts(after):
    """The tokens before the stop token equal those of a run without a stop token."""
    whole, cut = answers(None), answers(STOP, stop_token=".", stop_after=after)
    shorter = early = 0
    for before, found, ended in zip(rows(whole), rows(cut), cut.ended.tolist(), strict=True):
        place = next((i for i, token in enumerate(before) if token == STOP and i >= after), None)
        assert found == (before if place is None else before[: place + 1])
        assert ended == (found[-1] in (*ENDS, STOP) and (found[-1] != STOP or len(found) > after))
        shorter += place is not None
        early += any(token == STOP for token in before[:after])
    assert shorter > 3 and (early > 1) == (after > 0)


def test_s6_the_reward_model_gets_eos_after_the_stop_token(tmp_path):
    config = load_config(new_run(tmp_path, new_model(tmp_path / "model")) / "run.yaml", ["rollout.stop_token=o"])
    model, codec = load_model(config)
    stop = codec.encode_texts(["o"])[0]
    assert make_generator(ActorCritic(model), codec, config, 0).stop_token_id == stop[0]
    prompts, responses = torch.tensor([[5, 6], [5, 6]]), torch.tensor([[7, *stop], [7, 0]])
    mask, zeros = torch.ones(2, 2, dtype=torch.bool), torch.zeros(2, 2)
    reasons = torch.tensor([STOP_TOKEN, EOS])
    rollout = Rollout(prompts, torch.tensor([2, 2]), responses, mask, zeros, zeros, zeros, stop_reason=reasons)
    assert [one.response for one in rollout_examples(rollout, codec)] == [(7, *stop, 0), (7, 0)]


@pytest.mark.parametrize(
    "sets, message",
    [
        (["rollout.stop_token=xyz"], "rollout.stop_token: got 'xyz', which is 3 tokens, expected the text of one"),
        (["rollout.stop_after=2"], "rollout: stop_after: got 2, expected 0; only stop_token reads it"),
        (
            ["rollout.stop_token=o", "rollout.stop_after=6"],
            "stop_after: got 6, expected fewer than max_response_tokens 6",
        ),
    ],
)
def test_an_invalid_stop_token_is_refused(tmp_path, capsys, sets, message):
    run = new_run(tmp_path, new_model(tmp_path / "model"))
    options = ("--prompts", run / "prompts.jsonl", "--output", run / "answers.jsonl")
    code, _, shown = rlhf(capsys, "generate", "--config", run / "run.yaml", *options, sets=sets)
    assert code == 2 and message in shown and not (run / "answers.jsonl").exists()
