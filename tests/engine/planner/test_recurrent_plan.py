"""The memory plan of models with recurrent states, against the models themselves."""

from dataclasses import replace

import pytest
import torch

from benchmarks.families.recurrent import DENSE, EXPERTS
from rlhf_engine.config import OptimConfig
from rlhf_engine.model import ActorCritic
from rlhf_engine.model.trunk import last_hidden
from rlhf_engine.optim.build import build_optimizer
from rlhf_engine.planner import MemoryPlan, ModelShape, UnknownMemoryError
from rlhf_engine.planner.activations import pass_through
from rlhf_engine.planner.skeleton import LiveBytes
from rlhf_engine.rollout.decode.recurrent import RecurrentDecoder
from tests.engine.helpers.plans import RUN
from tests.engine.helpers.recurrent_models import config_of, recurrent, recurrent_actor

FAMILIES = ("falcon_h1", "lfm2", "mamba2")


def plan_of(family, **changes):
    shape = ModelShape.from_config(config_of(family, DENSE[family]))
    return MemoryPlan.of(replace(RUN, policy=shape, reward=shape, prompt=20, response=10, slots=20, **changes))


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_state_and_slots_have_the_planned_size(family):
    plan, policy = plan_of(family), recurrent_actor(family)
    assert plan.persistent["policy"] == sum(p.nbytes for p in policy.parameters())
    assert plan.persistent["reference"] == sum(p.nbytes for p in policy.model.parameters())
    optimizer = build_optimizer(policy, OptimConfig())
    for parameter in policy.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moments = [x for state in optimizer.state.values() for x in (state["exp_avg"], state["exp_avg_sq"])]
    assert plan.persistent["optimizer_state"] == sum(x.nbytes for x in moments)
    assert plan.phases["train"]["gradients"] == sum(p.nbytes for p in policy.parameters())
    assert plan.kv_bytes == RecurrentDecoder(policy, 20, 30).cache_bytes


@pytest.mark.parametrize("family", FAMILIES)
def test_passes_take_the_planned_bytes(family):
    """A forward pass takes the bytes that are live at its peak, and a training pass keeps what autograd saves."""
    policy = ActorCritic(recurrent(family))
    counted = pass_through(ModelShape.from_config(policy.model.config), 3, 20, False, 4, 4)
    ids, live, found = torch.randint(3, 61, (3, 20)), LiveBytes(), {}
    weights = {p.untyped_storage().data_ptr() for p in policy.parameters()}
    for tensor in (ids, *policy.parameters(), *policy.model.buffers()):
        live.ignore(tensor)
    with torch.no_grad(), live:
        last_hidden(policy.trunk, ids, compute_dtype=None, use_cache=False)
    assert live.peak <= counted.forward_room() <= 1.6 * live.peak

    def keep(x):
        if x.untyped_storage().data_ptr() not in weights:
            found[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        hidden = last_hidden(policy.trunk, ids, compute_dtype=None, use_cache=False)
    saved = sum(x.untyped_storage().nbytes() for x in found.values())
    assert 0.95 * saved <= counted.saved(checkpointed=False) <= 1.2 * (saved + hidden.nbytes)
    assert counted.saved(checkpointed=True) < 0.5 * saved


def test_a_budget_limits_the_slots_and_the_decoder_keeps_it():
    whole = plan_of("falcon_h1")
    assert whole.slots == 20
    fewer = [plan_of("falcon_h1", budget=whole.kept + whole.phases["generate"].total - cut) for cut in (0, 1)]
    assert [plan.slots for plan in fewer] == [20, 19]
    for plan in fewer:
        decoder = RecurrentDecoder(recurrent_actor("falcon_h1"), plan.slots, 30, kv_bytes=plan.kv_bytes)
        assert decoder.slots == plan.slots and decoder.cache_bytes <= plan.kv_bytes


def test_experts_have_no_plan():
    with pytest.raises(UnknownMemoryError, match=r"model_type 'jamba' with experts.*unset memory\.budget"):
        ModelShape.from_config(config_of("jamba", EXPERTS["jamba"]))


def test_pages_are_never_planned():
    assert plan_of("lfm2", device="cuda").kv_bytes == plan_of("lfm2").kv_bytes
