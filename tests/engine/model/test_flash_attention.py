"""`model.attention: flash_attention_2` with a stand-in in plain torch that has the signature of flash-attn 2.8.

flash-attn itself needs a GPU and has not run here. These tests check the arguments that it gets, not its results.
"""

import sys
import types

import pytest
import torch
from transformers import modeling_flash_attention_utils

from rlhf_engine.config import load_config
from tests.engine.helpers.passes import hidden_of
from tests.engine.helpers.sampling import make_actor, make_generator, make_prompts

CALLS = []


def flash_attn_func(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False,
):  # fmt: skip
    """Compute attention, (B, S, heads, D) in and out. The window is (left, right) columns around a query; -1: all."""
    assert dropout_p == 0.0 and softcap == 0.0 and alibi_slopes is None and not return_attn_probs
    CALLS.append((causal, tuple(window_size)))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    distance = torch.arange(q.shape[2])[:, None] - torch.arange(k.shape[2])
    seen = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    if window_size[0] >= 0:
        seen &= distance <= window_size[0]
    scores = (q @ k.transpose(-1, -2)) * softmax_scale
    return (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v).transpose(1, 2)


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False, block_table=None,
):  # fmt: skip
    raise AssertionError("rows are padded on the right and need no mask")


@pytest.fixture
def stand_in(monkeypatch):
    package, padding = types.ModuleType("flash_attn"), types.ModuleType("flash_attn.bert_padding")
    package.flash_attn_func, package.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func
    package.flash_attn_with_kvcache = padding.pad_input = padding.unpad_input = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.bert_padding", padding)
    monkeypatch.setattr(modeling_flash_attention_utils, "is_flash_attn_2_available", lambda: True)
    monkeypatch.setattr(modeling_flash_attention_utils, "_loaded_implementation", None)
    CALLS.clear()


@pytest.mark.parametrize(("family", "window"), [("llama", (-1, -1)), ("mistral", (6, 6))])
def test_the_trunk_and_the_sampler_through_flash_attention(stand_in, family, window):
    actor, prompts = make_actor(family), make_prompts(12)
    ids = torch.arange(40)[None].expand(2, -1).contiguous()
    plain = hidden_of(actor, ids), make_generator(actor).generate(prompts, torch.arange(12))
    # Set directly, because set_attn_implementation requires the package and a GPU.
    actor.model.config._attn_implementation = "flash_attention_2"
    torch.testing.assert_close(hidden_of(actor, ids), plain[0], rtol=0, atol=1e-4)
    assert len(CALLS) == 2 and all(causal for causal, _ in CALLS) and {w[0] for _, w in CALLS} == {window[0]}
    rollout = make_generator(actor).generate(prompts, torch.arange(12))
    assert len(CALLS) > 2 and actor.model.config._attn_implementation == "flash_attention_2"
    assert torch.equal(rollout.response_ids, plain[1].response_ids)
    torch.testing.assert_close(rollout.logprobs, plain[1].logprobs, rtol=0, atol=1e-5)


def test_flash_attention_is_refused_on_a_cpu():
    wanted = "model.attention: got 'flash_attention_2' with device 'cpu', expected 'sdpa' or 'eager'"
    with pytest.raises(ValueError, match=wanted):
        load_config(None, ["model.attention=flash_attention_2"])
    config = load_config(None, ["model.attention=flash_attention_2", "device=cuda:0"])
    assert config.model.attention == "flash_attention_2"
