"""Optimizer state in host memory, in 8 bits, and as masters of half-precision weights."""

import sys
from contextlib import nullcontext
from itertools import pairwise

import pytest
import torch
from torch import nn

from rlhf_engine.config import MemoryConfig, OptimConfig, load_config
from rlhf_engine.demo.config import DemoRunConfig
from rlhf_engine.memory import Arena
from rlhf_engine.optim import offload
from rlhf_engine.optim.adamw import optimizer_step
from rlhf_engine.optim.build import build_optimizer
from rlhf_engine.optim.offload import StagedAdamW, buckets
from rlhf_engine.optim.state_dict import load_optimizer_tensors, optimizer_tensors
from tests.engine.helpers.tiny_trainer import make_trainer, weights_of

CONFIG = OptimConfig(lr=0.01, weight_decay=0.1)


def model_of(*sizes, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(sizes))).to(dtype)


def give_gradients(model, step, leave_out=()):
    generator = torch.Generator().manual_seed(step)
    for number, parameter in enumerate(model.parameters()):
        gradient = torch.randn(parameter.shape, generator=generator)
        parameter.grad = None if number in leave_out else gradient


def test_state_in_host_memory_is_bitwise_equal_to_resident_state():
    """Weights larger than a bucket are cut, small ones share one. A parameter without a gradient is unchanged."""
    resident, staged = model_of(300, 257, 3), model_of(300, 257, 3)
    ours = StagedAdamW(
        build_optimizer(staged, CONFIG).param_groups,
        host=True,
        bucket_bytes=2**18,
        lr=0.01,
        betas=CONFIG.betas,
        eps=1e-8,
    )
    theirs = build_optimizer(resident, CONFIG)
    assert [len(bucket) for bucket in ours.buckets] == [1, 1, 4]
    assert ours.transit_bytes <= 2 * 2**18
    for step in range(4):
        leave_out = (2,) if step < 2 else ()
        for model, optimizer in ((resident, theirs), (staged, ours)):
            give_gradients(model, step, leave_out)
            optimizer_step(optimizer, CONFIG, step, 4)
    for a, b in zip(resident.parameters(), staged.parameters(), strict=True):
        assert torch.equal(a, b)
        assert all(
            torch.equal(theirs.state[a][name], ours.state[b][name]) for name in ("step", "exp_avg", "exp_avg_sq")
        )


def test_buckets_are_cut_at_whole_units_and_cover_all_elements():
    sizes = (10_000, 3, 4_096, 20_000, 5_000)
    parameters = [nn.Parameter(torch.zeros(size)) for size in sizes]
    made = buckets([{"params": parameters[:3]}, {"params": parameters[3:]}], 8 * 8192, lambda parameter: 8)
    covered = {id(parameter): 0 for parameter in parameters}
    for bucket in made:
        assert 0 < sum(piece.stop - piece.start for piece in bucket) <= 8192
        for piece in bucket:
            assert piece.start == covered[id(piece.parameter)] and piece.start % 4096 == 0
            covered[id(piece.parameter)] = piece.stop
            assert piece.group == (0 if any(piece.parameter is p for p in parameters[:3]) else 1)
    assert list(covered.values()) == list(sizes)


def test_state_in_transit_reuses_the_memory_of_the_head_s_logits():
    """An update is also bitwise equal to one with resident state."""
    host, resident = make_trainer(memory=MemoryConfig(optimizer_state="host")), make_trainer()
    places, take, arena = [], host.arena.take, host.arena
    optimizer = host.update_rule.optimizer
    optimizer.allocate_from(lambda *asked: places.append(take(*asked).data_ptr()) or take(*asked))
    host.train()
    resident.train()
    theirs = weights_of(resident)
    assert all(torch.equal(weight, theirs[name]) for name, weight in weights_of(host).items())
    with arena.phase("train"):
        start = arena.take((1,), torch.uint8).data_ptr()
    gradients = arena.sizes["train"] - max(arena.head_bytes, optimizer.transit_bytes)
    assert len(places) == 8 and set(places) == {start + gradients}


class StandIn:
    """The streams of torch.cuda, as a log of which stream waits for which."""

    def __init__(self):
        self.log, self.on = [], "main"

    def Stream(self):
        return _Stream(self, "side")

    def current_stream(self):
        return _Stream(self, self.on)

    def stream(self, stream):
        return nullcontext()


class _Stream:
    def __init__(self, cuda, name):
        self.cuda, self.name = cuda, name

    def wait_stream(self, other):
        self.cuda.log.append(f"{self.name} waits for {other.name}")

    def record_event(self):
        self.cuda.log.append(f"{self.name} has copied in")
        return len(self.cuda.log)

    def wait_event(self, event):
        self.cuda.log.append(f"{self.name} waits for event {event}")

    def synchronize(self):
        self.cuda.log.append("the host waits")


@pytest.fixture
def cuda(monkeypatch):
    """Replace the torch.cuda of the optimizer's module by a device with streams; host memory is not pinned."""
    stand_in = StandIn()
    monkeypatch.setattr(offload, "cuda", stand_in)
    monkeypatch.setattr(offload, "has_streams", lambda device: True)
    monkeypatch.setattr(torch, "zeros", lambda *a, zeros=torch.zeros, **k: zeros(*a, **{**k, "pin_memory": False}))
    return stand_in


def test_a_stream_copies_the_next_bucket_while_one_is_stepped(cuda):
    model = model_of(64, 128, 64)
    options = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8}
    groups = [{"params": list(model.parameters()), "weight_decay": 0.0}]
    optimizer = StagedAdamW(groups, host=True, bucket_bytes=2**16, **options)
    assert len(optimizer.buckets) == 3
    optimizer.prefetch()
    assert cuda.log == ["side waits for main", "side has copied in", "side has copied in"]
    give_gradients(model, 0)
    optimizer.step()
    assert cuda.log[3:] == [
        "main waits for event 2",
        "side waits for main",  # before the first bucket is copied back and the third into its vector
        "side has copied in",
        "main waits for event 3",
        "side waits for main",
        "main waits for side",
        "main waits for event 6",
        "side waits for main",
        "main waits for side",
    ]
    optimizer_tensors(optimizer)
    assert cuda.log[-1] == "the host waits"
    expected = model_of(64, 128, 64)
    give_gradients(expected, 0)
    torch.optim.AdamW(expected.parameters(), weight_decay=0.0, fused=True, **options).step()
    assert all(torch.equal(a, b) for a, b in zip(expected.parameters(), model.parameters(), strict=True))


def test_prefetched_state_without_a_step_is_dropped(cuda):
    model = model_of(64, 64)
    groups = [{"params": list(model.parameters()), "weight_decay": 0.0}]
    optimizer = StagedAdamW(groups, host=True, lr=0.01)
    arena = Arena({"train": optimizer.transit_bytes})
    optimizer.allocate_from(arena.take)
    with arena.phase("train"):
        optimizer.prefetch()
        assert optimizer._transit is not None
        optimizer.zero_grad()
    assert optimizer._transit is None and arena.open is None  # a phase with referenced tensors would raise


@pytest.mark.parametrize("state", ["resident", "host"])
def test_masters_keep_updates_that_bfloat16_rounds_away(state):
    """AdamW in float64 from the same start: 40 steps of 1e-3 on weights of 1, whose neighbours are 4e-3 and 8e-3 away."""
    model = model_of(8, 4, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    config = OptimConfig(lr=1e-3, max_grad_norm=None)
    optimizer = build_optimizer(model, config, state)
    expected = model_of(8, 4, dtype=torch.float64)
    with torch.no_grad():
        for parameter in expected.parameters():
            parameter.fill_(1.0)
    reference = torch.optim.AdamW(expected.parameters(), lr=1e-3, betas=config.betas, eps=config.eps, weight_decay=0.0)
    for step in range(40):
        generator = torch.Generator().manual_seed(step)
        for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
            ours.grad = torch.rand(ours.shape, generator=generator)
            theirs.grad = ours.grad.double()
        optimizer_step(optimizer, config, step, 40)
        reference.step()
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        master = optimizer.state[ours]["master"]
        torch.testing.assert_close(master.double(), theirs.detach(), rtol=1e-6, atol=0)
        assert torch.equal(ours, master.to(torch.bfloat16)) and (ours < 0.98).all()


def test_half_precision_weights_sum_their_gradients_in_float32():
    """256 + 1 is 256 in bfloat16, so a bfloat16 sum would stay at 256."""
    model = model_of(1, 1, dtype=torch.bfloat16)
    build_optimizer(model, CONFIG)
    for value in (256.0, *[1.0] * 8):
        model[0](torch.full((1, 1), value, dtype=torch.bfloat16)).sum().backward()
    assert model[0].weight.grad.dtype == torch.float32 and model[0].weight.grad.item() == 264.0


# The step with 8 bits is compiled, which takes seconds for each dtype.
@pytest.mark.parametrize(
    "state, dtype",
    [(state, dtype) for state in ("resident", "host") for dtype in (torch.float32, torch.bfloat16)]
    + [("8bit", torch.bfloat16)],
)
def test_training_from_saved_state_is_bitwise_the_same(state, dtype):
    if state == "8bit":
        pytest.importorskip("torchao", reason="an optional extra: pip install 'rlhf-kernels[8bit]'")
    straight, broken = model_of(64, 64, 3, dtype=dtype), model_of(64, 64, 3, dtype=dtype)
    runs = [(model, build_optimizer(model, CONFIG, state)) for model in (straight, broken)]
    for step in range(2):
        for model, optimizer in runs:
            give_gradients(model, step, leave_out=(3,))
            optimizer_step(optimizer, CONFIG, step, 4)
    saved = {name: tensor.clone() for name, tensor in optimizer_tensors(runs[1][1]).items()}
    assert (state == "8bit") == ("0.exp_avg.codes" in saved) and (dtype == torch.bfloat16) == ("0.master" in saved)
    again = build_optimizer(broken, CONFIG, state)
    load_optimizer_tensors(again, saved, "optimizer.safetensors")
    for step in range(2, 4):
        for model, optimizer in (runs[0], (broken, again)):
            give_gradients(model, step)
            optimizer_step(optimizer, CONFIG, step, 4)
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), broken.parameters(), strict=True))
    ours, theirs = optimizer_tensors(runs[0][1]), optimizer_tensors(again)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    with pytest.raises(ValueError, match=r"optimizer.safetensors: the tensor 0.step is missing"):
        load_optimizer_tensors(
            again, {name: t for name, t in saved.items() if name != "0.step"}, "optimizer.safetensors"
        )


def test_moments_in_8_bits_are_near_those_in_32():
    pytest.importorskip("torchao", reason="an optional extra: pip install 'rlhf-kernels[8bit]'")
    small, whole = model_of(64, 64), model_of(64, 64)
    start = whole[0].weight.detach().clone()
    runs = [(small, build_optimizer(small, CONFIG, "8bit")), (whole, build_optimizer(whole, CONFIG))]
    for step in range(5):
        for model, optimizer in runs:
            give_gradients(model, step)
            optimizer_step(optimizer, CONFIG, step, 5)
    moved, off = (whole[0].weight - start).norm(), (whole[0].weight - small[0].weight).norm()
    assert 0 < off < 0.1 * moved
    tensors = optimizer_tensors(runs[0][1])
    assert tensors["0.exp_avg.codes"].dtype == torch.uint8 and tensors["0.exp_avg.codes"].shape == (64, 64)


def test_8_bit_state_without_torchao_or_with_raw_epsilon_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(ValueError, match=r"memory.optimizer_state: '8bit' needs torchao.*rlhf-kernels\[8bit\]"):
        build_optimizer(model_of(2, 2), CONFIG, "8bit")
    for section in ("sft", "reward", "ppo", "demo.pretrain"):
        sets = ["memory.optimizer_state=8bit", f"{section}.optim.eps_form=raw"]
        with pytest.raises(ValueError, match=rf" {section}\.optim\.eps_form: got 'raw', expected 'corrected' with"):
            load_config(None, sets, kind=DemoRunConfig)
