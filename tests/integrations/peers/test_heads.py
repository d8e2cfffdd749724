"""OpenRLHF's Actor and verl's engine model from hidden states, against the originals, which compute logits."""

import copy
import types

import torch

from benchmarks.agreement import originals
from rlhf_kernels.integrations import verl
from rlhf_kernels.integrations.openrlhf_actor import ActorMixin
from rlhf_kernels.integrations.verl_model import FusedCausalLM

from . import tiny


def sequences(b: int = 3, t: int = 9):
    ids = torch.randint(0, 40, (b, t), generator=torch.Generator().manual_seed(1))
    attended = torch.ones_like(ids)
    attended[0, :2] = 0
    attended[1, -3:] = 0
    return ids, attended


def gradients(model):
    return [p.grad for p in model.parameters()]


def same(ours, theirs):
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-6 * max(1, y.abs().max().item()))


def test_openrlhf_actor():
    theirs = originals.openrlhf_actor()
    actors = theirs(), type("Fused", (ActorMixin, theirs), {})()
    plain = tiny.language_model()
    ids, attended = sequences()
    actions = attended[:, 1:].clone()
    actions[:, :3] = 0
    results = []
    for actor in actors:
        actor.model, actor.temperature, actor.packing_samples = copy.deepcopy(plain), 0.7, False
        if hasattr(actor, "fuse"):
            actor.fuse()
        log_probs, output = actor(ids, actions, attended, return_output=True, return_entropy=True)
        log_probs.square().sum().backward()
        results.append(([log_probs, output.entropy * actions], gradients(actor.model)))
    (theirs, their_gradients), (ours, our_gradients) = results
    same(ours, theirs)
    same(our_gradients, their_gradients)


def test_verl_model():
    """The original is verl's torch backend, which computes log-probs and entropy from logits in chunks."""
    common = originals.installed("verl.models.transformers.dense_common")
    plain = tiny.language_model()
    plain.forward = types.MethodType(common.forward_with_torch_backend, plain)
    wrapped = FusedCausalLM(tiny.language_model())
    ids, attended = sequences()
    results = []
    for model, inner in ((plain, plain), (wrapped, wrapped.model)):
        output = model(input_ids=ids, attention_mask=attended, temperature=0.7, return_dict=True)
        (output.log_probs.square() + output.entropy).sum().backward()
        results.append(([output.log_probs, output.entropy], gradients(inner)))
    same(results[1][0], results[0][0])
    same(results[1][1], results[0][1])


def test_verl_finds_a_registered_loss():
    verl.register("ours")
    assert originals.verl().get_policy_loss_fn("ours") is verl.compute_policy_loss_vanilla
