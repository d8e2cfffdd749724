"""`rollout.exact`: the log-probs of scoring and training have the bits of the sampled ones, in every kind of run."""

from dataclasses import replace

import pytest
import torch

from rlhf_engine.config import MemoryConfig
from rlhf_engine.model import ActorCritic, ValueHead
from rlhf_engine.model import exact as layers
from rlhf_engine.model.reward_model import RewardModel
from rlhf_engine.rollout import Generator, recompute
from tests.engine.helpers.adapted_models import adapted
from tests.engine.helpers.recurrent_models import recurrent_actor
from tests.engine.helpers.sampling import make_actor, make_prompts
from tests.engine.helpers.tiny_models import tiny
from tests.engine.helpers.tiny_trainer import ROLLOUT, make_trainer

EXACT = replace(ROLLOUT, exact=True, check_sequences=64, temperature=0.7)
RUNS = {
    "llama": {},
    "gpt2": {"family": "gpt2"},
    "sliding window": {"family": "mistral", "updates": 1},
    "bfloat16": {"dtype": torch.bfloat16},
    "value model": {"value_model": lambda: RewardModel.from_causal_lm(tiny(), 4), "updates": 1},
    "recomputed layers": {"memory": MemoryConfig(gradient_checkpointing=True), "updates": 1},
    "rescored": {"old_logprobs": "rescored", "updates": 1},
    "adapters": {"model": lambda: adapted()[0], "updates": 1},
}


def log_of(run, rollout=EXACT):
    """Return the metrics of every update of a run."""
    options = {name: value() if callable(value) else value for name, value in RUNS[run].items()}
    trainer = make_trainer(rollout=rollout, **options)
    return [trainer.step() for _ in range(trainer.config.updates)]


@pytest.mark.parametrize("run", RUNS)
def test_the_sampled_logprobs_are_those_of_training(run):
    """In the first update the reference is the policy, unless that begins with an adapter, so the KL is 0 too."""
    logs = log_of(run)
    assert [log["logprob_deviation"] for log in logs] == [0.0] * len(logs)
    assert (logs[0]["kl"] == 0.0) == (run != "adapters")


def test_without_exact_they_differ():
    logs = log_of("llama", replace(EXACT, exact=False))
    assert all(0 < log["logprob_deviation"] < 1e-4 for log in logs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama_tied", "qwen2", "cohere", "granite"])
def test_every_micro_batch_has_the_bits_of_the_sampler(family, dtype):
    """Responses of different lengths, in slots that are reused; products in bfloat16 of float32 weights in the second run."""
    half = {} if dtype == torch.float32 else {"compute_dtype": dtype}
    actor = ActorCritic(
        tiny(family, initializer_range=0.2), ValueHead.from_weights(torch.linspace(-1, 1, 32), 0.5), **half
    )
    config = replace(EXACT, max_prompt_tokens=20, max_response_tokens=12, batch_size=4)
    generator = Generator(actor, config, eos_token_ids=(2, 7, 9), pad_token_id=0, seed=3)
    rollout = generator.generate(make_prompts(9), torch.arange(9))
    for size in (1, 4, 9):
        found = recompute(actor, rollout, ("logprobs",), temperature=0.7, microbatch=size)["logprobs"]
        assert torch.equal(found, rollout.logprobs), size


@pytest.mark.parametrize(
    "make, changes, reason",
    [
        (
            make_actor,
            {"cache": "paged"},
            r"LlamaForCausalLM with rollout\.cache 'paged', expected False; it needs slots",
        ),
        (lambda: recurrent_actor("lfm2"), {}, "a recurrent state, expected False; it needs slots"),
        (lambda: make_actor("gemma2"), {}, "with attention 'eager', expected False"),
    ],
    ids=["paged", "recurrent", "eager"],
)
def test_what_cannot_be_exact_is_refused(make, changes, reason):
    with pytest.raises(ValueError, match=f"rollout.exact: got True for .*{reason}"):
        Generator(make(), replace(EXACT, **changes), eos_token_ids=2, pad_token_id=0, seed=0)


def test_a_layer_of_other_bits_is_found_before_anything_is_sampled(monkeypatch):
    """Attention in torch's blocks: right within rounding, so only a comparison of bits finds it."""

    def blocks(module, query, key, value, attention_mask, scaling=None, **unused):
        attend = torch.nn.functional.scaled_dot_product_attention
        out = attend(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2), None

    monkeypatch.setitem(layers.AttentionInterface._global_mapping, layers.ATTENTION, blocks)
    with pytest.raises(
        ValueError, match=r"rollout\.exact: got True for LlamaForCausalLM.*the bits of its log-probs depend"
    ):
        Generator(make_actor(), EXACT, eos_token_ids=2, pad_token_id=0, seed=0)


def test_merged_adapters_are_refused():
    model, _ = adapted()
    with pytest.raises(
        ValueError, match=r"rollout\.merge_adapters: got 'always' with rollout\.exact, expected 'never'"
    ):
        Generator(ActorCritic(model), replace(EXACT, merge_adapters="always"), eos_token_ids=2, pad_token_id=0, seed=0)
