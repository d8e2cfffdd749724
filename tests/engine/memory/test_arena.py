"""The memory block that sampling and training use in turn."""

import gc
import mmap
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from rlhf_engine.memory import Arena, PoolArena, gradient_bytes, gradients_in, open_arena, pool
from rlhf_engine.memory.arena import room_for
from rlhf_engine.ppo import trainer as ppo
from rlhf_engine.ppo import update
from rlhf_engine.rollout.decode.protocol import new_memory
from rlhf_kernels._native import WORKSPACE
from tests.engine.helpers.tiny_trainer import make_trainer, weights_of

FLOATS = torch.float32


def test_phases_share_memory_and_a_deleted_tensor_frees_its_bytes():
    arena = Arena({"generate": 4096, "train": 640})
    with arena.phase("generate"):
        keys, values = (arena.take((4, 8), FLOATS).zero_() for _ in range(2))
        assert values.data_ptr() == keys.data_ptr() + 128 and not keys.any()
        start = keys.data_ptr()
        del values
        assert arena.take((16,), torch.bfloat16).data_ptr() == start + 128
        del keys  # all tensors allocated after it are deleted too
        assert arena.take((1000,), FLOATS).data_ptr() == start
    with arena.phase("train"):
        gradient = arena.take((3,), torch.float64)
        assert gradient.data_ptr() == start and gradient.is_contiguous()
        assert arena.take((1,), FLOATS).data_ptr() == start + 64
        del gradient
    assert start % 64 == 0 and arena.bytes == 4096


def test_requests_beyond_the_plan_are_refused():
    arena = Arena({"generate": 128, "train": 1024})
    with arena.phase("generate"):
        held = arena.take((16,), FLOATS)
        with pytest.raises(ValueError, match=r"68 bytes.*\(17,\): 64 of the 128 bytes planned for phase 'generate'"):
            arena.take((17,), FLOATS)
        del held
    with pytest.raises(RuntimeError, match="outside of a phase"):
        arena.take((1,), FLOATS)
    both = pytest.raises(RuntimeError, match="'train' while phase 'generate' is open")
    with arena.phase("generate"), both, arena.phase("train"):
        pass


@pytest.mark.parametrize("hold", [lambda x: x, lambda x: x.view(2, 2)[1], lambda x: x.untyped_storage()])
def test_a_tensor_that_outlives_its_phase_is_named_and_not_overwritten(hold):
    arena = Arena({"generate": 256, "train": 256}, poison=True)
    named = pytest.raises(RuntimeError, match=r"1 tensors of phase 'generate' .* torch.float32 \(4,\)")
    with named, arena.phase("generate"):
        tensor = arena.take((4,), FLOATS).zero_()
        held = hold(tensor)
        del tensor
    with arena.phase("train"):
        assert arena.take((64,), FLOATS).isnan().all()
    kept = held if isinstance(held, torch.Tensor) else torch.tensor([], dtype=torch.uint8).set_(held)
    assert not kept.any()


def test_a_reference_cycle_does_not_keep_a_tensor_alive():
    arena = Arena({"generate": 256})
    gc.disable()
    try:
        with arena.phase("generate"):
            cycle = [arena.take((4,), FLOATS)]
            cycle.append(cycle)
            del cycle
        assert arena.open is None  # the phase ended without an error
    finally:
        gc.enable()


def test_an_exception_ends_a_phase_and_tensors_in_its_traceback_stay_intact():
    arena = Arena({"generate": 256, "train": 256}, poison=True)

    def fails():
        with arena.phase("generate"):
            seen = arena.take((4,), FLOATS).zero_()
            raise KeyboardInterrupt(seen)

    with pytest.raises(KeyboardInterrupt) as caught:
        fails()
    with arena.phase("train"):
        first = arena.take((4,), FLOATS)
        assert first.isnan().all() and first.data_ptr() != caught.value.args[0].data_ptr()
        del first
    assert not caught.value.args[0].any()
    arena.open = "generate"  # as after an interrupt between two lines
    arena.reset()
    with arena.phase("train"):
        pass


def test_a_smaller_phase_returns_the_rest_to_the_system():
    size = 64 * mmap.PAGESIZE
    arena = Arena({"generate": size, "train": size // 2})
    with arena.phase("generate"):
        arena.take((size,), torch.uint8).fill_(7)
    with arena.phase("train"):
        assert (arena.take((size // 2,), torch.uint8) == 7).all()
    with arena.phase("generate"):  # returned pages are zero when they are mapped again
        assert arena.take((size,), torch.uint8).view(2, -1).max(1).values.tolist() == [7, 0]


def test_gradients_are_stored_and_summed_in_the_arena():
    layer = nn.Linear(5, 3)
    unused = nn.Parameter(torch.ones(2))
    parameters = [*layer.parameters(), unused]
    arena = Arena({"train": gradient_bytes(parameters)}, poison=True)
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    assert gradient_bytes(parameters) == 64 * 3 == sum(room_for(tuple(p.shape), FLOATS) for p in parameters)
    with arena.phase("train"), gradients_in(arena, parameters):
        for _ in range(2):
            layer(x).square().sum().backward()
        start = layer.weight.grad.data_ptr()
        assert layer.bias.grad.data_ptr() == start + 64 and unused.grad is None
        summed = [layer.weight.grad.clone(), layer.bias.grad.clone()]
        layer.zero_grad(set_to_none=True)
        layer(x).sum().backward()
        assert layer.weight.grad.data_ptr() == start
        torch.testing.assert_close(layer.weight.grad, x.sum(0).expand(3, 5))
    assert layer.weight.grad is None and layer.bias.grad is None
    for _ in range(2):
        layer(x).square().sum().backward()
    assert torch.equal(layer.weight.grad, summed[0]) and torch.equal(layer.bias.grad, summed[1])


def test_the_gradient_of_a_transposed_weight_has_the_strides_of_the_weight():
    weight = nn.Parameter(torch.randn(3, 5).t())
    arena = Arena({"train": gradient_bytes([weight])})
    with arena.phase("train"), gradients_in(arena, [weight]):
        (weight * torch.arange(3.0)).sum().backward()
        assert weight.grad.stride() == weight.stride() and weight.grad[4].tolist() == [0.0, 1.0, 2.0]


def watch(monkeypatch, trainer):
    """Record the addresses and sizes of keys, values, the head's logits and gradients during an update."""
    seen = {"kv": [], "gradients": [], "logits": []}
    memory, take, workspace = trainer.arena.memory, trainer.arena.take, WORKSPACE.take

    def watched_memory(*args):
        tensor = memory(*args)
        seen["kv"].append((tensor.data_ptr(), tensor.nbytes))
        return tensor

    def watched_workspace(*args):
        tensor = workspace(*args)
        seen["logits"].append((tensor.data_ptr(), tensor.nbytes))
        return tensor

    def watched_step(optimizer, *args, step=update.optimizer_step):
        for group in optimizer.param_groups:
            seen["gradients"] += [(p.grad.data_ptr(), p.grad.nbytes) for p in group["params"]]
        return step(optimizer, *args)

    monkeypatch.setattr(trainer.arena, "memory", watched_memory)
    monkeypatch.setattr(trainer.arena, "take", take)
    monkeypatch.setattr(WORKSPACE, "take", watched_workspace)
    monkeypatch.setattr(update, "optimizer_step", watched_step)
    return seen


def test_keys_and_gradients_of_an_update_share_memory(monkeypatch):
    trainer = make_trainer()
    seen = watch(monkeypatch, trainer)
    trainer.train()
    start = min(address for address, _ in seen["kv"])
    assert len(seen["kv"]) == 2 * 2 * 2  # updates, layers, keys and values
    assert sum(size for _, size in seen["kv"][:4]) == trainer.generator.cache_bytes
    for kind, planned in (("kv", "generate"), ("gradients", "train"), ("logits", "train")):
        assert seen[kind], kind
        for address, size in seen[kind]:
            assert start <= address and address + size <= start + trainer.arena.sizes[planned], kind
    assert min(address for address, _ in seen["gradients"]) == start
    assert trainer.arena.bytes == max(trainer.arena.sizes.values()) < sum(trainer.arena.sizes.values())
    assert WORKSPACE._block is None


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"value_warmup": 1},
        {"baseline": "none", "vf_coef": 0.0},
        {"old_logprobs": "rescored"},
        {"objective": "kl_penalty", "old_kl_coef": 0.1, "old_kl_target": 0.01},
    ],
    ids=str,
)
def test_an_update_is_bitwise_the_same_with_and_without_the_arena(monkeypatch, settings):
    """The previous contents of the memory do not matter either: it is filled with NaN."""
    trainer, plain = make_trainer("qwen2", **settings), make_trainer("qwen2", **settings)
    trainer.arena.poison = True
    trainer.train()
    monkeypatch.setattr(plain.arena, "memory", new_memory)
    monkeypatch.setattr(ppo, "gradients_in", lambda arena, parameters: nullcontext())
    monkeypatch.setattr(Arena, "transients", lambda self: nullcontext())
    plain.train()
    theirs = weights_of(plain)
    assert all(torch.equal(weight, theirs[name]) for name, weight in weights_of(trainer).items())
    assert all(parameter.grad is None for parameter in trainer.policy.parameters())


@pytest.mark.parametrize("where", ["change", "prefill", "decode", "reward", "backward", "step"])
@pytest.mark.parametrize("held", [True, False])
def test_a_trainer_continues_correctly_after_an_interrupted_phase(monkeypatch, where, held):
    settings = {"value_warmup": 1} if where == "backward" else {}
    trainer, straight = make_trainer(**settings), make_trainer(**settings)
    trainer.arena.poison = True
    owner, name = {
        "change": ("rlhf_engine.memory.arena", "_trim"),
        "prefill": ("rlhf_engine.rollout.decode.slots.SlotDecoder", "prefill"),
        "decode": ("rlhf_engine.rollout.decode.slots.SlotDecoder", "decode"),
        "reward": ("rlhf_engine.ppo.experience", "score_answers"),
        "backward": ("rlhf_engine.ppo.update", "keep_value_gradients"),
        "step": ("rlhf_engine.ppo.update", "optimizer_step"),
    }[where]

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(f"{owner}.{name}", interrupt)
        with pytest.raises(KeyboardInterrupt) as caught:
            trainer.step()
    if not held:
        del caught
    assert trainer.arena.open is None and trainer.whole and trainer.updates_done == 0
    trainer.train()
    straight.train()
    theirs = weights_of(straight)
    assert all(torch.equal(weight, theirs[name]) for name, weight in weights_of(trainer).items())


def test_a_device_without_an_arena_is_refused_by_name():
    with pytest.raises(ValueError, match="device: got 'meta', expected cpu or cuda"):
        open_arena(torch.device("meta"), {}, 0)
    assert isinstance(open_arena(torch.device("cpu"), {"train": 64}, 64), Arena)


class StandIn:
    """The part of torch.cuda that the arena uses: a pool with routing on or off, and the bytes allocated in it."""

    def __init__(self):
        self.calls, self.held, self.active = [], 0, None

    def empty_cache(self):
        self.calls.append("empty_cache")

    def MemPool(self):
        return self

    def snapshot(self):
        return [{"allocated_size": self.held}]

    def use_mem_pool(self, pool, device):
        assert pool is self and device == torch.device("cpu")
        return self

    def __enter__(self):
        assert self.active is None, "the allocator refuses a pool that the thread allocates from already"
        self.active = True
        self.calls.append("in")

    def __exit__(self, *_):
        self.active = None
        self.calls.append("out")


@pytest.fixture
def cuda(monkeypatch):
    """Replace the torch.cuda of the arena's module."""
    stand_in = StandIn()
    monkeypatch.setattr(pool, "cuda", stand_in)
    return stand_in


def test_the_gpu_pool_holds_keys_and_values_and_then_the_allocations_of_passes(cuda):
    arena = PoolArena({"generate": 256, "score": 0, "train": 0}, torch.device("cpu"))
    with arena.phase("generate"):
        assert cuda.calls == ["empty_cache", "in", "out"]  # only the block: graphs and samples are not in the pool
        keys, values = (arena.memory((4, 4), FLOATS, torch.device("cpu")) for _ in range(2))
        assert values.data_ptr() == keys.data_ptr() + 64
        with pytest.raises(ValueError, match=r"192 bytes.*: 128 of the 256 bytes planned"):
            arena.take((40,), FLOATS)
        del keys, values
    cuda.calls.clear()
    with arena.phase("train"):
        arena.take((3,), FLOATS)
        assert cuda.calls == ["in", "out"]
        with arena.transients():
            arena.take((3,), FLOATS)
            threads = torch._C._is_multithreading_enabled()
        assert cuda.calls == ["in", "out"] * 2 and threads is False and torch._C._is_multithreading_enabled()
    with pytest.raises(RuntimeError, match="outside of a phase"):
        arena.take((1,), FLOATS)


def test_bytes_left_in_the_pool_are_counted_and_left_keys_are_refused(cuda):
    arena = PoolArena({"generate": 256, "train": 0}, torch.device("cpu"))
    cuda.held = 100
    with arena.phase("train"):
        pass
    assert arena.held_bytes == 100
    cuda.held = 356
    with (
        pytest.raises(RuntimeError, match="356 bytes of phase 'generate' are still allocated"),
        arena.phase("generate"),
    ):
        pass
    with pytest.raises(KeyboardInterrupt), arena.phase("generate"):
        raise KeyboardInterrupt
    assert arena.open is None


def test_an_update_logs_the_bytes_that_a_phase_left_in_the_pool(cuda):
    trainer = make_trainer()
    assert "pool_held_mb" not in trainer.step()
    arena, cuda.held = PoolArena(trainer.arena.sizes, torch.device("cpu")), 96
    assert make_trainer(arena=arena).step()["pool_held_mb"] == 96e-6
