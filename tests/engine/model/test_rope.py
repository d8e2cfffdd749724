"""Rotary embeddings that depend on the longest position: one set of factors for scoring, sampling and training of a run."""

import copy

import pytest
import torch

from benchmarks.families.checks import LONGEST, PROMPTS, a_rollout, differences, generator_of, in_float64, prompts
from benchmarks.families.configs import ORIGINAL, build
from rlhf_engine.model import ActorCritic, FrozenCopy
from rlhf_engine.model.pretrained import max_positions
from rlhf_engine.model.reward_model import RewardModel
from rlhf_engine.rollout.rollout import recompute, reference_logprobs

SCALED = ("llama_longrope", "phi3_longrope", "phimoe_longrope", "llama_dynamic")


@pytest.mark.parametrize("family", SCALED)
def test_sampling_scoring_and_the_reference_use_the_factors_of_the_longest_sequence(family):
    """Transformers' own forward in float64, extended to the longest sequence of the run, gives the same log-probs."""
    policy, own = ActorCritic(build(family)), in_float64(family)
    reference = FrozenCopy(policy)  # older than the sampler, which knows the longest sequence
    generator = generator_of(policy)
    rollout = generator.generate(prompts(), torch.arange(len(PROMPTS)))
    assert min(PROMPTS) < ORIGINAL < LONGEST
    scored = recompute(policy, rollout, ("logprobs",), microbatch=4)["logprobs"]
    alone = recompute(policy, rollout, ("logprobs",), microbatch=1)["logprobs"]
    again = reference_logprobs(reference, rollout, microbatch=2)
    for found in (rollout.logprobs, scored, alone, again):
        assert differences(own, rollout, found) < 2e-5


@pytest.mark.parametrize("family", SCALED)
def test_a_short_run_uses_the_factors_of_short_sequences(family):
    model, ids = build(family), torch.arange(3, 3 + ORIGINAL - 8)[None]
    with torch.no_grad():
        expected = copy.deepcopy(model)(input_ids=ids).logits
        policy = ActorCritic(model)
        policy.limit_positions(ORIGINAL - 4)
        short = model(input_ids=ids).logits
        policy.limit_positions(LONGEST)
        long = model(input_ids=ids).logits
        policy.limit_positions(ORIGINAL - 4)  # a part of the run that knows only shorter sequences
        assert torch.equal(model(input_ids=ids).logits, long)
    torch.testing.assert_close(short, expected, rtol=0, atol=1e-6)
    assert (long - short).abs().max() > 1e-2


def test_without_a_limit_the_config_decides():
    model, ids = build("llama_longrope"), torch.arange(3, 13)[None]
    trunk = RewardModel.from_causal_lm(model, seed=0).trunk
    with torch.no_grad():
        short = build("llama_longrope").model(ids).last_hidden_state
        assert (trunk(ids).last_hidden_state - short).abs().max() > 1e-2


def test_dynamic_rope_allows_its_factor_more_positions():
    assert max_positions(build("llama_dynamic")) == 4 * ORIGINAL
    assert max_positions(build("llama_yarn")) == 128


def test_other_ropes_stay_as_they_are():
    model = build("llama_llama3")
    before = model(input_ids=torch.arange(3, 13)[None]).logits
    ActorCritic(model).limit_positions(LONGEST)
    assert not any(hasattr(module, "longest_position") for module in model.modules())
    assert torch.equal(model(input_ids=torch.arange(3, 13)[None]).logits, before)


def test_a_batch_seen_while_scoring_does_not_change_a_sequence():
    policy = ActorCritic(build("phi3_longrope"))
    rollout = a_rollout(policy)
    together = recompute(policy, rollout, ("logprobs",), microbatch=4)["logprobs"]
    alone = recompute(policy, rollout, ("logprobs",), microbatch=1)["logprobs"]
    assert (together - alone).abs().max() < 1e-5
