"""A fused head as a model's output layer: against the logits, under FSDP2, with an adapter, and unsupported models."""

import copy
import multiprocessing
import socket
from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from rlhf_kernels import FusedHead, reference
from rlhf_kernels.integrations import deepspeed_chat, openrlhf_actor, verl_model
from rlhf_kernels.integrations.head import fuse_head, token_logprobs_of

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def model(seed: int = 0, **changes) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SIZES | changes))


def tokens(b: int = 3, t: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and an attention mask with padding on both sides."""
    ids = torch.randint(0, 40, (b, t), generator=torch.Generator().manual_seed(1))
    attended = torch.ones_like(ids)
    attended[0, :2] = 0
    attended[1, -2:] = 0
    return ids, attended


def from_logits(plain, ids, attended, keep, temperature, mask, **inputs):
    """Return log-probs and entropies by the reference, from the logits of `plain`."""
    logits = plain(input_ids=ids, attention_mask=attended, **inputs).logits[:, -keep - 1 : -1]
    return reference.token_logprobs(logits, ids[:, -keep:], temperature=temperature, mask=mask, entropy=True)


def check(got, expected, fused, plain):
    torch.testing.assert_close(got[0], expected[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got[1], expected[1], rtol=1e-6, atol=1e-6)
    (got[0].square().sum() + got[1].sum()).backward()
    (expected[0].square().sum() + expected[1].sum()).backward()
    theirs = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
    ours = {n.replace("lm_head.layer.", "lm_head."): p.grad for n, p in fused.named_parameters() if p.grad is not None}
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(
            ours[name], gradient, rtol=0, atol=2e-6 * max(1, gradient.abs().max().item()), msg=name
        )


@pytest.mark.parametrize("tied", [False, True])
def test_log_probs_entropies_and_gradients_are_those_of_the_logits(tied):
    plain = model(tie_word_embeddings=tied)
    fused = copy.deepcopy(plain)
    names = fused.state_dict().keys()
    head = fuse_head(fused)
    assert fuse_head(fused) is head and fused.state_dict().keys() == names
    ids, attended = tokens()
    mask = attended[:, -4:].bool()
    got = token_logprobs_of(fused, ids, attended, 4, head=head, temperature=0.7, mask=mask)
    check(got, from_logits(plain, ids, attended, 4, 0.7, mask), fused, plain)


def test_outside_taking_the_head_equals_the_layer():
    plain = model()
    fused = copy.deepcopy(plain)
    head = fuse_head(fused)
    ids, attended = tokens()
    assert torch.equal(fused(ids, attention_mask=attended).logits, plain(ids, attention_mask=attended).logits)
    with pytest.raises(KeyError), head.taking(ids):
        raise KeyError
    assert torch.equal(fused(ids).logits, plain(ids).logits)
    with head.taking(ids[:, 1:]), pytest.raises(RuntimeError, match="already scores other tokens"), head.taking(ids):
        pass
    with head.taking(ids), pytest.raises(ValueError, match="ids: got 7 tokens for 7 positions, expected fewer"):
        fused(ids)


FAMILIES = {
    "softcap": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=0.5)),
    "multiplied": lambda: CohereForCausalLM(CohereConfig(**SIZES, logit_scale=3.0)),
    "divided": lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=0.25)),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_transforms_its_logits(family):
    """With softcap and scale from the config, log-probs, entropies and gradients are those of the model's logits."""
    torch.manual_seed(0)
    plain = FAMILIES[family]().eval()
    fused = copy.deepcopy(plain)
    with torch.no_grad():
        for each in (plain, fused):
            each.lm_head.weight.mul_(20)
    head = fuse_head(fused)
    assert (head.softcap, head.logit_scale) == {"softcap": (0.5, 1), "multiplied": (None, 3), "divided": (None, 4)}[
        family
    ]
    ids, attended = tokens()
    assert torch.equal(fused(ids, attention_mask=attended).logits, plain(ids, attention_mask=attended).logits)
    mask = attended[:, -4:].bool()
    got = token_logprobs_of(fused, ids, attended, 4, head=head, temperature=0.7, mask=mask)
    check(got, from_logits(plain, ids, attended, 4, 0.7, mask), fused, plain)


class Lora(nn.Module):
    """A layer with the attributes of peft's LoRA layer that the head reads; `peers` tests peft's layer."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base_layer, self.merged, self.disable_adapters, self.active_adapters = base, False, False, ["a"]
        self.scaling = {"a": 1.5}
        self.lora_A = nn.ModuleDict({"a": nn.Linear(16, 3, bias=False)})
        self.lora_B = nn.ModuleDict({"a": nn.Linear(3, 40, bias=False)})
        self.lora_dropout = nn.ModuleDict({"a": nn.Identity()})

    def forward(self, x):
        wide = self.base_layer(x)
        if self.disable_adapters or self.merged:
            return wide
        return wide + self.lora_B["a"](self.lora_A["a"](x)) * self.scaling["a"]


@pytest.mark.parametrize("state", ["active", "disabled"])
def test_an_adapter_on_the_head_counts_while_it_is_active(state):
    plain = model()
    plain.lm_head = Lora(plain.lm_head)
    plain.lm_head.disable_adapters = state == "disabled"
    fused = copy.deepcopy(plain)
    head = fuse_head(fused)
    assert fused.state_dict().keys() == plain.state_dict().keys()
    fused.load_state_dict(plain.state_dict())
    ids, attended = tokens()
    got = token_logprobs_of(fused, ids, attended, 4, head=head)
    check(got, from_logits(plain, ids, attended, 4, 1.0, None), fused, plain)
    assert (fused.lm_head.layer.lora_B["a"].weight.grad is not None) == (state == "active")


WRAPPED = {
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "trainable tokens": {"trainable_token_indices": {"lm_head": [3, 5]}},
    "trainable tokens of a tied head": {"trainable_token_indices": [3, 5]},
}


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("kind", WRAPPED)
def test_a_head_in_a_wrapper_of_peft(kind, enabled, tmp_path):
    """Log-probs and gradients are those of the logits, and peft saves the same tensors under the same names."""
    config = LoraConfig(r=2, target_modules=["q_proj"], **WRAPPED[kind])
    plain = get_peft_model(model(tie_word_embeddings="tied" in kind), config)
    with torch.no_grad():
        for name, p in plain.named_parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))))
    fused = copy.deepcopy(plain)
    head = fuse_head(fused.get_base_model())
    assert fuse_head(fused.get_base_model()) is head
    assert list(fused.state_dict()) == list(plain.state_dict())
    ids, attended = tokens()
    with nullcontext() if enabled else fused.disable_adapter(), nullcontext() if enabled else plain.disable_adapter():
        assert torch.equal(fused(ids).logits, plain(ids).logits)
        got = token_logprobs_of(fused, ids, attended, 4, head=head, temperature=0.7)
        expected = from_logits(plain, ids, attended, 4, 0.7, None)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    if enabled:
        check(got, expected, fused, plain)
        assert [n for n, p in fused.named_parameters() if p.grad is not None and ("lm_head" in n or "token" in n)]
    fused.save_pretrained(tmp_path / "fused")
    plain.save_pretrained(tmp_path / "plain")
    saved, expected = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("fused", "plain"))
    assert saved.keys() == expected.keys() and all(torch.equal(saved[k], expected[k]) for k in saved)
    copied = copy.deepcopy(fused)
    assert fuse_head(copied.get_base_model()).layer is copied.get_base_model().lm_head


def test_a_product_in_float32():
    """With `float32=True` a bfloat16 model gets the log-probs of a float32 product, also under autocast."""
    plain = model().bfloat16()
    fused = copy.deepcopy(plain)
    head = fuse_head(fused, float32=True)
    ids, attended = tokens()
    hidden = plain.model(input_ids=ids, attention_mask=attended).last_hidden_state[:, :-1].float()
    expected = reference.token_logprobs(hidden @ plain.lm_head.weight.float().T, ids[:, 1:], mask=None, entropy=True)
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            got = token_logprobs_of(fused, ids, attended, 6, head=head)
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    assert fused(ids).logits.dtype == torch.float32


class Doubled(LlamaForCausalLM):
    """A model whose transform of the logits is not in its config."""

    def forward(self, **inputs):
        output = super().forward(**inputs)
        output.logits = output.logits * 2
        return output


def test_unsupported_models_are_refused():
    doubled = Doubled(LlamaConfig(**SIZES))
    layer = doubled.lm_head
    with pytest.raises(
        ValueError, match=r"model: the logits are not those of the output layer with softcap=None and logit_scale=1.0"
    ):
        fuse_head(doubled)
    assert doubled.lm_head is layer
    with pytest.raises(
        ValueError, match=r"model: the logits are not those of the output layer with softcap=None and logit_scale=3.0"
    ):
        fuse_head(model(logit_scale=3.0))  # Llama ignores a logit scale in its config
    with pytest.raises(ValueError, match="softcap: got 0, expected a number above 0"):
        FusedHead(layer, softcap=0)
    with pytest.raises(ValueError, match=r"layer: got Embedding, expected torch.nn.Linear or peft's layer around one"):
        FusedHead(nn.Embedding(3, 4))
    lora = Lora(nn.Linear(16, 40))
    lora.lora_variant = {"a": object()}
    head = FusedHead(lora)
    with (
        head.taking(torch.zeros(1, 1).long()),
        pytest.raises(ValueError, match="head: got a variant of LoRA in adapter 'a'"),
    ):
        head(torch.zeros(1, 2, 16))
    sharded = FusedHead.replacing(nn.Linear(16, 40))
    sharded.weight = nn.Parameter(torch.empty(0))  # a parameter under ZeRO-3 outside the forward
    with sharded.taking(torch.zeros(1, 1).long()), pytest.raises(ValueError, match="head: got a sharded weight"):
        sharded(torch.zeros(1, 2, 16))


class Actor(openrlhf_actor.ActorMixin, nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.model, self.temperature, self.packing_samples = inner, 0.7, False


def test_openrlhf_actor():
    plain = model()
    fused = copy.deepcopy(plain)
    actor = Actor(fused)
    ids, attended = tokens()
    with pytest.raises(ValueError, match="the actor's head is not fused"):
        actor(ids, attended[:, 1:], attended)
    actions = attended[:, 1:].clone()
    actions[:, :2] = 0
    got, output = actor.fuse()(ids, actions, attended, return_output=True, return_entropy=True)
    position = (attended.cumsum(-1) - 1).masked_fill(attended == 0, 1)
    expected = from_logits(plain, ids, attended, 6, 0.7, actions.bool(), position_ids=position)
    check((got, output.entropy), expected, fused, plain)
    with pytest.raises(
        ValueError, match="packed_seq_lens: got list, which OpenRLHF supports and this adapter does not"
    ):
        actor(ids, actions, attended, packed_seq_lens=[1])
    with pytest.raises(ValueError, match="action_mask is not set; pass it, or return_logprobs=True"):
        actor(ids, attention_mask=attended)


def test_verl_model():
    plain = model()
    wrapped = verl_model.FusedCausalLM(copy.deepcopy(plain))
    ids, _ = tokens()
    got = wrapped(ids, temperature=0.7)
    logits = plain(ids).logits
    check(got, reference.token_logprobs(logits, ids.roll(-1, 1), temperature=0.7, entropy=True), wrapped.model, plain)


def test_deepspeed_chat_log_probs():
    plain = model()
    fused = copy.deepcopy(plain)
    ids, attended = tokens()
    got = deepspeed_chat.fused_log_probs(fused, ids, attended)
    logits = plain(ids, attention_mask=attended).logits
    torch.testing.assert_close(got, deepspeed_chat.gather_log_probs(logits[:, :-1], ids[:, 1:]), rtol=1e-6, atol=1e-6)


def _sharded(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    from torch.distributed.fsdp import fully_shard

    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    fused = model()
    head = fuse_head(fused)
    for layer in fused.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(fused, mesh=mesh)
    ids, attended = tokens()
    got = token_logprobs_of(fused, ids, attended, 4, head=head)
    (got.logprobs.square().sum() + got.entropy.sum()).backward()
    gradient = head.weight.grad
    assert tuple(gradient.to_local().shape) == (20, 16)
    try:
        with head.taking(ids[:, 1:]):
            head(torch.zeros(3, 7, 16))
        refused = ""
    except ValueError as error:
        refused = str(error)
    whole = gradient.full_tensor()
    if rank == 0:
        torch.save((got.logprobs.detach(), whole, refused), folder)
    torch.distributed.destroy_process_group()


def test_fsdp_gathers_the_head_for_its_forward(tmp_path):
    """Two processes with half of the head each give the same log-probs and gradient.

    Outside the forward, the sharded weight raises ValueError.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # The fork server imports this module once for both processes; `spawn` would import it in each.
    multiprocessing.set_forkserver_preload([__name__])
    torch.multiprocessing.start_processes(
        _sharded, args=(port, str(tmp_path / "out")), nprocs=2, start_method="forkserver"
    )
    logprobs, gradient, refused = torch.load(tmp_path / "out")
    plain = model()
    ids, attended = tokens()
    expected = from_logits(plain, ids, attended, 4, 1.0, None)
    (expected.logprobs.square().sum() + expected.entropy.sum()).backward()
    torch.testing.assert_close(logprobs, expected.logprobs.detach(), rtol=1e-6, atol=1e-6)
    whole = plain.lm_head.weight.grad
    torch.testing.assert_close(gradient, whole, rtol=0, atol=2e-6 * whole.abs().max().item())
    assert refused.startswith("head: got a sharded weight")
