"""`head_arguments` of models of several families, against the log-probs of their logits."""

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    RecurrentGemmaConfig,
)

from rlhf_kernels import head_arguments, linear_ppo_loss, linear_token_logprobs

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.5,
}
FAMILIES = {
    "llama": LlamaConfig(**SIZES),
    "softcap": Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=5.0),
    "softcap of RecurrentGemma": RecurrentGemmaConfig(
        **{**SIZES, "num_hidden_layers": 3}, logits_soft_cap=5.0, attention_window_size=8
    ),
    "divided": GraniteConfig(**SIZES, logits_scaling=8.0),
    "multiplied": CohereConfig(**SIZES),
    "bias": PhiConfig(**SIZES),
    "no attribute `model`": GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_and_loss_are_those_of_the_logits(family):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family]).train()
    if family == "bias":
        nn.init.normal_(model.lm_head.bias)
    head = head_arguments(model)
    assert model.training
    model.eval()
    ids, attended = torch.randint(3, 64, (2, 12)), torch.ones(2, 12, dtype=torch.long)
    hidden = model.base_model(input_ids=ids, attention_mask=attended).last_hidden_state[:, :-1]
    logits = model(input_ids=ids, attention_mask=attended).logits[:, :-1].double()
    expected = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    got = linear_token_logprobs(hidden, ids=ids[:, 1:], **head).logprobs
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    old, mask = expected.detach().float() + 0.1, attended[:, 1:].bool()
    loss = linear_ppo_loss(hidden, ids=ids[:, 1:], old_logprobs=old, advantages=old, mask=mask, **head).loss
    (gradient,) = torch.autograd.grad(loss, model.get_output_embeddings().weight, retain_graph=True)
    ratio = (expected - old).exp()
    surrogate = -torch.minimum(ratio * old, ratio.clamp(0.8, 1.2) * old).mean()
    (exact,) = torch.autograd.grad(surrogate, model.get_output_embeddings().weight)
    torch.testing.assert_close(gradient, exact.float(), rtol=1e-4, atol=1e-5)


class Doubled(LlamaForCausalLM):
    """A model whose transform of the logits is not in its config."""

    def forward(self, **inputs):
        output = super().forward(**inputs)
        output.logits = output.logits * 2
        return output


def test_other_logits_and_adapters_are_refused():
    with pytest.raises(ValueError, match="a different transform of the logits is not supported"):
        head_arguments(Doubled(FAMILIES["llama"]))
    model = LlamaForCausalLM(FAMILIES["llama"])
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.raises(
        ValueError, match=r"its output layer is Sequential.*use FusedHead.of\(model\), which applies adapters"
    ):
        head_arguments(model)
