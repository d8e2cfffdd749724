"""What a model caches, seen in a pass: head sizes that differ by layer, latent attention, attention of the model itself."""

import logging

import pytest
import torch

from benchmarks.families.checks import generator_of, prompts, sampled
from benchmarks.families.configs import build
from rlhf_engine.config import RolloutConfig
from rlhf_engine.model import ActorCritic
from rlhf_engine.rollout import Generator
from rlhf_engine.rollout.decode import make_decoder, takes_pages
from rlhf_engine.rollout.decode.paged import pool_shape
from rlhf_engine.rollout.decode.probe import LayerShape, probe


@pytest.mark.parametrize(
    ("family", "layers", "routed", "direct"),
    [
        ("llama", [(2, 8, 2, 8)] * 2, True, True),
        ("gemma4", [(2, 8, 2, 8), (2, 16, 2, 16)], True, True),
        ("gemma4_shared", [(2, 8, 2, 8), (2, 16, 2, 16), (0, 0, 0, 0), (0, 0, 0, 0)], True, True),
        ("deepseek_v3", [(1, 16, 1, 8)] * 2, True, False),  # the latent vector and the rotated part of the keys
        ("mimo_v2_flash", [(4, 8, 4, 6), (2, 8, 2, 6)], False, False),  # sinks
        ("gptj", [(4, 8, 4, 8)] * 2, False, False),
        ("falcon_multi_query", [(1, 8, 1, 8)] * 2, False, False),
        ("doge", [(2, 8, 2, 8)] * 2, False, False),  # a mask computed from the values
    ],
)
def test_layers_are_seen_in_a_pass(family, layers, routed, direct):
    found = probe(ActorCritic(build(family)))
    assert list(found.layers) == [LayerShape(*layer) for layer in layers]
    assert (found.routed, found.direct) == (routed, direct)


@pytest.mark.parametrize("cache", ["slots", "paged"])
@pytest.mark.parametrize("family", ["gemma4_shared", "deepseek_v2", "mimo_v2_flash", "falcon", "jetmoe", "gpt_oss"])
def test_sampled_logprobs_are_the_models_own(family, cache):
    assert sampled(family, cache) < 2e-5


@pytest.mark.parametrize("cache", ["slots", "paged"])
@pytest.mark.parametrize("family", ["gemma4", "gemma4_shared", "deepseek_v3", "mimo_v2_flash", "llama"])
def test_the_cache_allocates_the_bytes_that_it_reports(family, cache):
    generator, asked = generator_of(ActorCritic(build(family)), cache), []

    def allocate(shape, dtype, device):
        asked.append(torch.Size(shape).numel() * dtype.itemsize)
        return torch.full(shape, torch.nan, dtype=dtype)

    rollout = generator.generate(prompts(), torch.arange(4), allocate=allocate)
    assert sum(asked) == generator.cache_bytes
    assert rollout.logprobs.isfinite().all()


def test_layers_of_one_shape_share_one_pool_and_others_are_parts_of_a_flat_one():
    assert pool_shape(ActorCritic(build("llama")), 3, 4) == (2, 2, 3, 4, 2, 8)
    numbers = 2 * 2 * 8 + 2 * 2 * 16
    assert pool_shape(ActorCritic(build("gemma4")), 3, 4) == (numbers * 3 * 4,)


@pytest.mark.parametrize("family", ["deepseek_v2", "gptj", "llama4_text"])
def test_auto_takes_slots_where_attention_does_not_read_pages_and_logs_it(family, caplog):
    policy = ActorCritic(build(family))
    with caplog.at_level(logging.WARNING):
        assert not takes_pages(policy, "auto", "cuda")
    assert "rollout.cache: auto is slots" in caplog.text and type(policy.model).__name__ in caplog.text
    assert takes_pages(policy, "paged", "cuda")
    assert not takes_pages(policy, "auto", "cpu") and not takes_pages(policy, "slots", "cuda")


def test_auto_takes_pages_where_attention_reads_them(caplog):
    assert takes_pages(ActorCritic(build("gemma4")), "auto", "cuda") and not caplog.text


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("openai-gpt", "keeps no keys and values in transformers' cache"),
        ("bloom", "ALiBi biases"),
        ("gpt_neo", "local attention layers that count from the end of the cache"),
        ("llama4_text_tuned", r"position 16 \(floor_scale\).*set rollout.max_prompt_tokens"),
    ],
)
@pytest.mark.parametrize("cache", ["slots", "paged"])
def test_a_family_that_cannot_be_sampled_is_refused_with_its_reason(family, words, cache):
    with pytest.raises(ValueError, match=words) as refused:
        generator_of(ActorCritic(build(family)), cache)
    assert "\n" not in str(refused.value)


def test_a_mismatch_of_pages_names_slots(monkeypatch):
    policy = ActorCritic(build("gpt_neo_global"))
    policy.model.config.attention_layers = []
    for layer in policy.trunk.h:
        monkeypatch.setattr(layer.attn.attention, "attention_type", "local", raising=False)
        layer.attn.attention.bias = layer.attn.attention.bias.tril().triu(-2)
    config = RolloutConfig(max_prompt_tokens=8, max_response_tokens=8, cache="paged")
    with pytest.raises(ValueError, match=r"decoded token by token differ.*set rollout\.cache=slots"):
        make_decoder(policy, config, 16).check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_causal_lm_is_expected(dtype):
    for seed in (0, 4):  # with seed 4 the difference is as small as that of rounding in bfloat16
        with pytest.raises(ValueError, match="depend on later tokens or on other sequences"):
            ActorCritic(build("doge_moe", seed).to(dtype))
    model = build("doge_moe", 0)
    model.base_model.name_or_path = "a/folder"
    with pytest.raises(ValueError, match="model: the hidden states of DogeModel of a/folder depend on later tokens"):
        ActorCritic(model)


def test_the_head_of_a_model_with_two_matrices_is_refused():
    with pytest.raises(ValueError, match="the head may have more than one matrix"):
        ActorCritic(build("modernbert-decoder"))


@pytest.mark.parametrize("family", ["gpt_neox_japanese", "falcon"])
def test_more_columns_than_a_block_of_attention(family):
    """Some models call `view` on the keys, which are a part of a wider slot."""
    policy = ActorCritic(build(family, max_position_embeddings=2048))
    for cache in ("slots", "paged"):
        config = RolloutConfig(max_prompt_tokens=1020, max_response_tokens=8, batch_size=2, cache=cache)
        generator = Generator(policy, config, eos_token_ids=97, pad_token_id=0, seed=0)
        assert generator.generate([torch.arange(3, 9)], torch.tensor([0])).logprobs.isfinite().all()
