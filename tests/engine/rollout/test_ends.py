"""Tokens that end a response, and ids that are no token of the tokenizer."""

import pytest
import torch
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, PhiConfig

from rlhf_engine.config import RolloutConfig, RunConfig
from rlhf_engine.data import Codec
from rlhf_engine.model import ActorCritic, FrozenCopy, TokenBatch
from rlhf_engine.ppo.build import make_generator
from rlhf_engine.rollout import EOS, STOP_STRING, STOP_TOKEN, logprob_deviation
from tests.engine.helpers.tokenizers import CHATML, byte_level

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
MARKS = ("<|im_start|>", "<|im_end|>", "<end>")


def policy(tokenizer, kind=PhiConfig, rows=None, favour=(), **changes):
    """Return a random policy that prefers the tokens `favour` and avoids EOS."""
    torch.manual_seed(0)
    marks = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    settings = {"initializer_range": 0.3, "tie_word_embeddings": False} | marks | changes
    model = AutoModelForCausalLM.from_config(kind(vocab_size=rows or len(tokenizer), **SIZES, **settings)).eval()
    if model.lm_head.bias is not None:
        with torch.no_grad():
            model.lm_head.bias.zero_()
            model.lm_head.bias[tokenizer.eos_token_id] = -20.0
            for name in favour:
                model.lm_head.bias[tokenizer.convert_tokens_to_ids(name)] = 5.0
    return ActorCritic(model)


def sample(actor, codec, count=16, **rollout):
    config = RunConfig(rollout=RolloutConfig(max_prompt_tokens=40, max_response_tokens=12, **rollout))
    generator = make_generator(actor, codec, config, 0)
    return generator, generator.generate([codec.encode_prompt("hello")] * count, torch.arange(count))


@pytest.mark.parametrize("source", ["generation_config", "config", "template"])
def test_every_eos_of_the_model_ends_a_response(source):
    tokenizer = byte_level(*MARKS)
    name = "<|im_end|>" if source == "template" else "<end>"
    end, actor = tokenizer.convert_tokens_to_ids(name), policy(tokenizer, favour=[name])
    if source == "template":
        tokenizer.chat_template = CHATML
    else:
        getattr(actor.model, source).eos_token_id = [tokenizer.eos_token_id, end]
    codec = Codec(tokenizer)
    _, rollout = sample(actor, codec)
    ended = rollout.ended.nonzero()[:, 0].tolist()
    assert len(ended) > 8 and set(rollout.stop_reason[ended].tolist()) == {EOS}
    for row, ids in enumerate(rollout.responses()):
        assert (end in ids) == (row in ended) and ids.count(end) <= 1
        assert name not in codec.decode_response(ids)
    # Only the tokenizer's EOS ends a response if the setting is empty; a list replaces the model's.
    assert not sample(actor, Codec(tokenizer), eos_tokens=())[1].ended.any()
    assert sample(actor, Codec(tokenizer), eos_tokens=(name,))[1].responses() == rollout.responses()


def test_an_eos_token_that_is_no_token_is_refused():
    tokenizer = byte_level(*MARKS)
    with pytest.raises(ValueError, match=r"rollout.eos_tokens\[1\]: got 'zyx', which is 3 tokens"):
        sample(policy(tokenizer), Codec(tokenizer), eos_tokens=("<end>", "zyx"))


@pytest.mark.parametrize("ids", [[[]], [None], [0, "2"], {"a": 1}, "</s>", True])
def test_an_id_of_the_models_config_that_is_no_integer_is_refused(ids):
    tokenizer = byte_level(*MARKS)
    actor = policy(tokenizer)
    actor.model.generation_config.eos_token_id = ids
    with pytest.raises(
        ValueError, match=r"model: PhiForCausalLM: got eos_token_id .* in its config\.json or generation_"
    ):
        make_generator(actor, Codec(tokenizer), RunConfig(), 0)


@pytest.mark.parametrize(
    "setting, reason",
    [({"stop": ("<end>",)}, STOP_STRING), ({"stop_token": "<end>"}, STOP_TOKEN)],
    ids=["stop", "token"],
)
def test_a_special_token_can_be_a_stop(setting, reason):
    tokenizer = byte_level(*MARKS)
    actor, end = policy(tokenizer, favour=["<end>"]), tokenizer.convert_tokens_to_ids("<end>")
    codec = Codec(tokenizer, stop=setting.get("stop", ()))
    _, rollout = sample(actor, codec, **setting)
    stopped = [row for row, ids in enumerate(rollout.responses()) if end in ids]
    assert len(stopped) > 8 and set(rollout.stop_reason[stopped].tolist()) == {reason}
    assert all(ids.index(end) == len(ids) - 1 for ids in map(rollout.responses().__getitem__, stopped))
    if reason == STOP_STRING:
        assert not any("<end>" in codec.decode_response(ids) for ids in rollout.responses())


def test_a_stop_string_may_contain_a_special_token():
    tokenizer = byte_level(*MARKS)
    actor, codec = policy(tokenizer, favour=["<end>", "a"]), Codec(tokenizer, stop=("a<end>",))
    _, rollout = sample(actor, codec, 32, stop=("a<end>",))
    texts = [tokenizer.decode(ids) for ids in rollout.responses()]
    assert [text.endswith("a<end>") for text in texts] == rollout.ended.tolist() and rollout.ended.any()
    assert not any("a<end>" in codec.decode_response(ids) for ids in rollout.responses())


@pytest.mark.parametrize("kind", [PhiConfig, CohereConfig, Gemma2Config], ids=["bias", "scale", "softcap"])
@pytest.mark.parametrize("filters", [{}, {"top_k": 1000}, {"top_p": 0.99, "repetition_penalty": 1.2}], ids=str)
def test_ids_without_a_token_are_never_sampled_and_have_no_probability(kind, filters):
    tokenizer = byte_level(*MARKS)
    known, rows = len(tokenizer), len(tokenizer) + 64
    codec = Codec(tokenizer)
    changes = {"final_logit_softcapping": 5.0} if kind is Gemma2Config else {}
    whole = policy(tokenizer, kind, rows, **changes)
    ids = torch.tensor([codec.encode_prompt("hello the sky")])
    logits = whole.model.double()(input_ids=ids).logits[0, :-1]
    expected = logits[:, :known].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]

    actor = policy(tokenizer, kind, rows, **changes)
    generator, rollout = sample(actor, codec, 32, **filters)
    assert generator.metrics()["unknown_ids"] == 64
    assert int(rollout.response_ids[rollout.mask].max()) < known
    assert logprob_deviation(actor, rollout, sequences=32, microbatch=8) < 1e-4
    batch = TokenBatch(input_ids=ids[:, :-1], ids=ids[0, 1:])
    for found in (actor(batch, ("logprobs",)).logprobs, FrozenCopy(actor).logprobs(batch, temperature=1.0)):
        torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-4)
    options = {"old_logprobs": torch.zeros(len(expected)), "advantages": torch.ones(len(expected))}
    options |= {"mask": torch.ones(len(expected), dtype=torch.bool), "objective": "policy_gradient"}
    actor(batch, ("loss",), loss=options | {"num_tokens": 1}).loss.loss.backward()
    gradient = actor.lm_weight.grad
    if kind is PhiConfig:  # the others tie the output layer to the embeddings or train it through them
        assert not gradient[known:].any() and gradient[:known].any()
    with actor.head.whole():
        every = actor(batch, ("logprobs",)).logprobs
    torch.testing.assert_close(
        every.double(), logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0], atol=1e-4, rtol=1e-4
    )
