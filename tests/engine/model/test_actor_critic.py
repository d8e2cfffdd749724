"""ActorCritic agrees with the Hugging Face model that it wraps, and rejects models that it would compute wrongly."""

import pytest
import torch

from rlhf_engine.model import ActorCritic, FrozenCopy, TokenBatch, ValueHead, token_batch
from tests.engine.helpers.passes import hidden_of, logprobs_of
from tests.engine.helpers.tiny_models import FAMILIES, VOCABULARY, tiny


@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_equal_those_of_the_wrapped_model(family):
    model = tiny(family)
    actor = ActorCritic(model)
    ids = torch.arange(40).reshape(2, 20) % VOCABULARY
    expected = model(input_ids=ids).logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(logprobs_of(actor, ids), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_left_padding_changes_nothing(family):
    actor = ActorCritic(tiny(family))
    ids = torch.arange(3, 18)[None]
    padded = torch.nn.functional.pad(ids, (6, 0))
    mask = torch.nn.functional.pad(torch.ones_like(ids), (6, 0))
    torch.testing.assert_close(hidden_of(actor, padded, mask)[:, 6:], hidden_of(actor, ids), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "family, changes, transform",
    [
        ("gemma2", {}, (5.0, 1.0)),
        ("cohere", {}, (None, 0.25)),
        ("granite", {}, (None, 0.25)),
        ("llama", {}, (None, 1.0)),
    ],
)
def test_head_transform_comes_from_the_config(family, changes, transform):
    head = ActorCritic(tiny(family, **changes)).head
    assert (head.softcap, head.logit_scale) == transform


class ScaledHead(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x) * 3.0


def scale_head(model):
    model.lm_head.__class__ = ScaledHead
    return model


def cap_head(model):
    forward = model.forward

    def capped(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = 2.0 * torch.tanh(output.logits / 2.0)
        return output

    model.forward = capped
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change, words", [(scale_head, "by 3, a logit scale"), (cap_head, "a softcap")])
def test_a_logit_transform_that_the_config_does_not_declare_is_refused(change, words, dtype):
    # With so small an initialisation, unscaled logits would not show a softcap.
    with pytest.raises(ValueError, match=words):
        ActorCritic(change(tiny("llama", initializer_range=0.01).to(dtype)))


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_passes_the_check(family):
    ActorCritic(tiny(family).bfloat16())


def test_trunk_keeps_evaluation_mode():
    actor = ActorCritic(tiny("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)).train()
    ids = torch.arange(12)[None]
    assert torch.equal(hidden_of(actor, ids), hidden_of(actor, ids))


def test_value_head_starts_at_zero_or_as_a_copy():
    actor = ActorCritic(tiny())
    hidden = hidden_of(actor, torch.arange(6)[None])
    assert torch.equal(actor.value(hidden), torch.zeros(1, 6))
    head = ValueHead.from_weights(torch.full((1, 32), 0.5), 1.0)
    expected = 0.5 * hidden.sum(-1) + 1.0
    torch.testing.assert_close(ActorCritic(tiny(), head).value(hidden), expected, rtol=1e-5, atol=1e-5)


def test_value_head_of_a_different_size_is_refused():
    with pytest.raises(ValueError, match=r"value: got a head with a weight of shape \(7,\), expected \(32,\)"):
        ActorCritic(tiny(), ValueHead(7))
    with pytest.raises(ValueError, match=r"weight: got shape \(2, 32\)"):
        ValueHead.from_weights(torch.zeros(2, 32))


def test_value_head_computes_in_float32_on_half_precision_states():
    head = ValueHead.from_weights(torch.full((4096,), 1.0))
    assert head(torch.full((1, 4096), 1.0, dtype=torch.bfloat16)).item() == 4096.0
    assert head(torch.full((1, 4097 - 1), 1.0, dtype=torch.bfloat16)).dtype == torch.float32


def test_frozen_copy_is_unchanged_when_the_policy_changes():
    policy = ActorCritic(tiny())
    reference = FrozenCopy(policy).model
    ids = torch.arange(8)[None]
    before = hidden_of(policy, ids)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1)
    assert torch.equal(hidden_of(reference, ids), before)
    assert not any(parameter.requires_grad for parameter in reference.parameters())


def test_token_batch_shifts_once():
    # Two sequences: prompt 5 6, response 7 8 9; prompt 4, response 3. Prompt width 3, response width 4, pad 0.
    prompts, responses = torch.tensor([[5, 6, 0], [4, 0, 0]]), torch.tensor([[7, 8, 9, 0], [3, 0, 0, 0]])
    batch = token_batch(prompts, torch.tensor([2, 1]), responses, torch.tensor([3, 1]), torch.tensor([1, 0]))
    assert batch.input_ids.tolist() == [[4, 3, 3, 3], [5, 6, 7, 8]]
    assert batch.ids.tolist() == [3, 7, 8, 9]
    # The last tokens of the actions' states: 4; then 6, 7 and 8.
    assert batch.input_ids.flatten()[batch.rows].tolist() == [4, 6, 7, 8]
    assert batch.source.tolist() == [4, 0, 1, 2]
    assert batch.cu_seqlens.tolist() == [0, 1, 4]


def test_ppo_loss_is_the_sum_of_its_parts():
    from rlhf_kernels import ppo_loss

    actor = ActorCritic(tiny("gemma2"), ValueHead.from_weights(torch.linspace(-1, 1, 32), 0.3))
    ids = torch.arange(3, 33).reshape(2, 15)
    states = (torch.arange(2)[:, None] * 15 + torch.arange(14)).flatten()
    batch = TokenBatch(input_ids=ids, rows=states, ids=ids[:, 1:].flatten())
    generator = torch.Generator().manual_seed(0)
    old, advantages, returns = (torch.randn(28, generator=generator) for _ in range(3))
    mask = torch.rand(28, generator=generator) > 0.3
    old = old - 4
    constants = {"old_logprobs": old, "advantages": advantages, "mask": mask}
    targets = {"old_values": returns, "returns": returns + 1}
    outputs = actor(batch, ("logprobs", "values", "loss"), loss=constants | targets)
    logprobs = torch.where(mask, outputs.logprobs, 0)
    whole, fused = ppo_loss(logprobs, **constants, values=outputs.values, **targets).loss, outputs.loss.loss
    torch.testing.assert_close(fused, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "want, options, message",
    [
        ("logprobs", {}, r"want: got the string 'logprobs', expected a collection of names, such as \('logprobs',\)"),
        (("logits", "logprob"), {}, "want: got logprob, expected some of"),
        (("loss",), {}, "loss is not set; pass the arguments"),
        (("values",), {"loss": {}}, r"loss is set for the outputs \['values'\]; pass the arguments"),
        (("entropy",), {}, "batch.ids is not set; give the actions for entropy"),
    ],
)
def test_arguments_that_do_not_match_want_are_refused(want, options, message):
    ids = torch.arange(3, 9)[None]
    batch = TokenBatch(input_ids=ids, ids=None if want == ("entropy",) else ids[0])
    with pytest.raises(ValueError, match=message):
        ActorCritic(tiny("llama"))(batch, want, **options)


def test_a_value_that_is_no_value_function_is_refused():
    with pytest.raises(ValueError, match="value: got Linear, expected a ValueFunction, such as a ValueHead"):
        ActorCritic(tiny("llama"), torch.nn.Linear(32, 1))
