"""Sampling is independent of the batch and consistent with a forward pass, and finished sequences are not stepped."""

import pytest
import torch

from rlhf_engine.config import RolloutConfig
from rlhf_engine.model import ActorCritic
from rlhf_engine.rollout import Generator, recompute
from rlhf_engine.rollout.decode.protocol import prompt_width
from rlhf_engine.rollout.decode.slots import SlotDecoder
from rlhf_kernels import sample_tokens
from tests.engine.helpers.passes import hidden_of, logits_of
from tests.engine.helpers.rollouts import sequence_of
from tests.engine.helpers.sampling import ENDS, make_actor, make_generator, make_prompts, same_sequence
from tests.engine.helpers.tiny_models import FAMILIES, VOCABULARY, tiny


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sequence_does_not_depend_on_its_batch(family):
    generator, prompts = make_generator(make_actor(family)), make_prompts(24)
    whole = generator.generate(prompts, torch.arange(24))
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    shuffled = generator.generate([prompts[i] for i in order], order)
    assert all(same_sequence(whole, int(i), shuffled, j) for j, i in enumerate(order))
    for i in range(0, 24, 5):
        single = generator.generate([prompts[i]], torch.tensor([i]))
        assert same_sequence(whole, i, single, 0)


@pytest.mark.parametrize(
    "changes",
    [
        {"intermediate_size": 704},  # several threads compute parts of an activation
        {"intermediate_size": 999},  # the parts end in scalar code
        {"intermediate_size": 999, "hidden_act": "gelu"},
        {"intermediate_size": 999, "hidden_act": "gelu_pytorch_tanh"},
    ],
)
def test_wide_layers_do_not_depend_on_the_batch(changes):
    generator, prompts = make_generator(make_actor(**changes), batch_size=64), make_prompts(80)
    whole = generator.generate(prompts, torch.arange(80))
    order = torch.randperm(80, generator=torch.Generator().manual_seed(1))[:71]
    shuffled = generator.generate([prompts[i] for i in order], order)
    assert all(same_sequence(whole, int(i), shuffled, j) for j, i in enumerate(order))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_generating_does_not_change_the_model(family):
    actor = make_actor(family)
    before = [dict(vars(module)) for module in actor.model.modules()], actor.model.config.to_dict()
    make_generator(actor).generate(make_prompts(5), torch.arange(5))
    assert before == ([dict(vars(module)) for module in actor.model.modules()], actor.model.config.to_dict())
    assert actor.model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_and_values_are_those_of_a_forward_pass(family):
    actor, temperature = make_actor(family), 0.7
    rollout = make_generator(actor, temperature=temperature).generate(make_prompts(24), torch.arange(24))
    for i in range(len(rollout)):
        ids = sequence_of(rollout, i)[None]
        n, p = int(rollout.response_lengths[i]), int(rollout.prompt_lengths[i])
        with torch.no_grad():
            hidden = hidden_of(actor, ids)[:, p - 1 : -1]
            logits = actor.model(input_ids=ids).logits[:, p - 1 : -1] / temperature
        expected = logits.log_softmax(-1).gather(-1, ids[:, p:, None])[0, :, 0]
        torch.testing.assert_close(rollout.logprobs[i, :n], expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(rollout.values[i, :n], actor.value(hidden)[0].detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_recomputed_logprobs_and_values_equal_the_sampled_ones(temperature):
    actor = make_actor()
    rollout = make_generator(actor, temperature=temperature).generate(make_prompts(24), torch.arange(24))
    again = recompute(actor, rollout, ("logprobs", "values"), microbatch=5, temperature=temperature)
    torch.testing.assert_close(again["logprobs"], rollout.logprobs, rtol=0, atol=1e-5)
    torch.testing.assert_close(again["values"], rollout.values, rtol=1e-4, atol=1e-4)


def test_layout_of_a_rollout():
    prompts = make_prompts(9)
    rollout = make_generator(make_actor()).generate(prompts, torch.arange(9))
    for i, prompt in enumerate(prompts):
        n = int(rollout.response_lengths[i])
        assert rollout.prompt_lengths[i] == len(prompt)
        assert rollout.mask[i].tolist() == [t < n for t in range(rollout.mask.shape[1])]
        sequence = sequence_of(rollout, i)
        assert sequence.tolist() == prompt.tolist() + rollout.response_ids[i, :n].tolist()
        assert not rollout.logprobs[i, n:].any() and not rollout.values[i, n:].any()
        assert (rollout.response_ids[i, n:] == 0).all()
        assert rollout.prompt_ids[i].tolist() == prompt.tolist() + [0] * (max(map(len, prompts)) - len(prompt))
        assert (
            rollout.prompts()[i] == prompt.tolist() and rollout.responses()[i] == rollout.response_ids[i, :n].tolist()
        )


def test_a_sequence_ends_at_eos_or_at_its_token_limit():
    rollout = make_generator(make_actor(), max_response_tokens=9).generate(make_prompts(64), torch.arange(64))
    assert 0 < int(rollout.ended.sum()) < 64
    for i in range(64):
        n = int(rollout.response_lengths[i])
        tokens = rollout.response_ids[i, :n].tolist()
        assert not set(tokens[:-1]) & set(ENDS)
        assert (tokens[-1] in ENDS) == bool(rollout.ended[i])
        assert bool(rollout.ended[i]) or n == 9


def test_finished_sequences_are_not_stepped(monkeypatch):
    fed = []
    decode = SlotDecoder.decode
    monkeypatch.setattr(
        SlotDecoder, "decode", lambda self, t, p, count, *want: fed.append(count) or decode(self, t, p, count, *want)
    )
    generator = make_generator(make_actor())
    fed.clear()
    rollout = generator.generate(make_prompts(40), torch.arange(40))
    # The first token comes from the prefill. Every further token costs exactly one row of one step.
    assert sum(fed) == int(rollout.mask.sum()) - 40
    assert max(fed) <= 16


def test_the_sample_follows_the_distribution():
    actor = make_actor()
    prompt = torch.tensor([5, 6, 7])
    rollout = make_generator(actor, max_response_tokens=1, batch_size=512).generate([prompt] * 4096, torch.arange(4096))
    p = logits_of(actor, hidden_of(actor, prompt[None])[0, -1:]).softmax(-1)[0].detach()
    counts = torch.bincount(rollout.response_ids[:, 0], minlength=VOCABULARY)
    deviation = (counts - 4096 * p) / (4096 * p * (1 - p)).sqrt().clamp(min=1)
    assert deviation.abs().max() < 4.5


def test_kept_set_and_its_logprobs():
    actor = make_actor()
    rollout = make_generator(actor, top_k=4).generate(make_prompts(8), torch.arange(8))
    assert (rollout.sampling_logprobs >= rollout.logprobs)[rollout.mask].all()
    assert (rollout.sampling_logprobs > rollout.logprobs)[rollout.mask].any()
    for i in range(8):
        ids = sequence_of(rollout, i)
        best = logits_of(actor, hidden_of(actor, ids[None]))[0].topk(4).indices[int(rollout.prompt_lengths[i]) - 1 : -1]
        assert (best == rollout.response_ids[i, : len(best), None]).any(1).all()


def test_the_counter_is_the_response_position():
    actor, prompts = make_actor(), make_prompts(6)
    rollout = make_generator(actor, max_response_tokens=2, ends=(VOCABULARY,)).generate(prompts, torch.arange(6))
    for i in range(6):
        ids = sequence_of(rollout, i)
        logits = logits_of(actor, hidden_of(actor, ids[None])[0, -3:-1])
        drawn = sample_tokens(logits, seed=3, sequence=torch.tensor([i, i]), position=torch.tensor([0, 1])).ids
        assert drawn.tolist() == rollout.response_ids[i].tolist()


def test_seed_and_sequence_number_determine_the_sample():
    actor, prompt = make_actor(), [torch.tensor([5, 6, 7])]
    first = make_generator(actor).generate(prompt * 2, torch.tensor([0, 2**40]))
    assert not same_sequence(first, 0, first, 1)
    assert not same_sequence(first, 0, make_generator(actor, seed=4).generate(prompt, torch.tensor([0])), 0)
    assert same_sequence(first, 1, make_generator(actor).generate(prompt, torch.tensor([2**40])), 0)


def test_a_cache_longer_than_one_block():
    actor = make_actor("llama", max_position_embeddings=1200)
    prompts = [torch.arange(600) % VOCABULARY, torch.arange(505) % VOCABULARY]
    settings = {"max_prompt_tokens": 700, "max_response_tokens": 10, "ends": (VOCABULARY + 1,)}
    rollout = make_generator(actor, **settings).generate(prompts, torch.arange(2))
    logprobs = recompute(actor, rollout, ("logprobs",), microbatch=1)["logprobs"]
    torch.testing.assert_close(logprobs, rollout.logprobs, rtol=0, atol=2e-5)
    single = make_generator(actor, **settings).generate(prompts[1:], torch.tensor([1]))
    assert same_sequence(rollout, 1, single, 0)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_half_precision_sampling_is_close_to_a_forward_pass(family):
    actor = ActorCritic(tiny(family, initializer_range=0.1).bfloat16())
    rollout = make_generator(actor).generate(make_prompts(24), torch.arange(24))
    logprobs = recompute(actor, rollout, ("logprobs",), microbatch=8)["logprobs"]
    assert rollout.logprobs.dtype == torch.float32
    assert (logprobs - rollout.logprobs).abs().max() < 0.1


@pytest.mark.parametrize(
    "prompts, sequence, words",
    [
        ([], torch.arange(0), "0 prompts"),
        ([[1, 2]], torch.arange(2), "2 numbers for 1 prompts"),
        ([[]], torch.arange(1), r"prompts\[0\]: got shape \(0,\)"),
        ([[5], [5] * 21], torch.arange(2), r"prompts\[1\]: got shape \(21,\), expected 1 to 20 ids"),
    ],
)
def test_bad_prompts_are_refused(prompts, sequence, words):
    with pytest.raises(ValueError, match=words):
        make_generator(make_actor()).generate(prompts, sequence)


def test_models_without_a_plain_cache_are_refused():
    from transformers import BloomConfig, BloomForCausalLM, RwkvConfig, RwkvForCausalLM

    bloom = BloomForCausalLM(BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4))
    with pytest.raises(ValueError, match="BloomForCausalLM has ALiBi"):
        make_generator(ActorCritic(bloom))
    rwkv = RwkvConfig(vocab_size=VOCABULARY, hidden_size=32, attention_hidden_size=32, num_hidden_layers=2)
    with pytest.raises(ValueError, match="RwkvForCausalLM has a recurrent state"):
        make_generator(ActorCritic(RwkvForCausalLM(rwkv)))


def test_prompt_width():
    assert [prompt_width(n) for n in (1, 16, 17, 64, 65, 100, 128, 129, 300)] == [
        16,
        16,
        32,
        64,
        96,
        128,
        128,
        192,
        384,
    ]


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_a_prompt_padded_beyond_the_last_position(family):
    """With 20 positions, a prompt of 17 tokens is padded to 32. The responses equal those of a model with 64 positions."""
    prompts = [prompt[:17] for prompt in make_prompts(20, longest=40)]
    assert max(map(len, prompts)) == 17
    names = {"gpt2": "n_positions"}
    rollouts = []
    for positions in (20, 64):
        model = tiny(family, **{names.get(family, "max_position_embeddings"): positions})
        if family == "gpt2":
            model.transformer.wpe.weight.data[:20] = torch.linspace(-1, 1, 20 * 32).view(20, 32)
        source = tiny(family)
        own = model.state_dict()
        model.load_state_dict({**source.state_dict(), **{name: own[name] for name in own if "wpe" in name}})
        actor = ActorCritic(model)
        config = RolloutConfig(max_prompt_tokens=17, max_response_tokens=3)
        generator = Generator(actor, config, eos_token_ids=ENDS, pad_token_id=0, seed=3)
        rollouts.append(generator.generate(prompts, torch.arange(20)))
    assert torch.equal(rollouts[0].response_ids, rollouts[1].response_ids)
    torch.testing.assert_close(rollouts[0].logprobs, rollouts[1].logprobs)
