"""A frozen copy with its layers in host memory: what it computes, where its weights are, and the order of copies."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from rlhf_engine.config import MemoryConfig, load_config
from rlhf_engine.model import ActorCritic, FrozenCopy, streamed
from rlhf_engine.model.adapters import Adapters
from rlhf_engine.model.layout import TokenBatch
from rlhf_engine.model.streamed import LayerStream, StreamedCopy, to_host
from rlhf_engine.model.top_layers import train_top
from rlhf_engine.model.trunk import outermost_layers
from rlhf_engine.planner import MemoryPlan, ModelShape, Workload
from rlhf_engine.planner.strategies import fitting
from rlhf_engine.ppo.build import make_reference
from rlhf_engine.recipes.planning import check_reference
from tests.engine.helpers.adapted_models import SETTINGS
from tests.engine.helpers.tiny_models import VOCABULARY, tiny
from tests.engine.helpers.tiny_trainer import make_trainer, weights_of

FAMILIES = ("llama", "llama_tied", "gpt2", "qwen2")


def policy_of(family: str = "llama", layers: int = 3, dtype: torch.dtype = torch.float32) -> ActorCritic:
    name = "n_layer" if family.startswith("gpt2") else "num_hidden_layers"
    return ActorCritic(tiny(family, initializer_range=0.1, **{name: layers}).to(dtype))


def make_batch(seed: int) -> TokenBatch:
    ids = torch.randint(1, VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(seed))
    return TokenBatch(input_ids=ids[:, :-1], ids=ids[:, 1:].flatten())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_have_the_bits_of_a_copy_on_the_device(family: str, layers: int, dtype: torch.dtype) -> None:
    policy = policy_of(family, layers, dtype)
    host, device = StreamedCopy(policy), FrozenCopy(policy)
    with torch.no_grad():
        for weight in policy.parameters():
            weight.add_(1)
    for seed in range(3):
        batch = make_batch(seed)
        found, expected = (one.logprobs(batch, temperature=0.7) for one in (host, device))
        assert torch.equal(found, expected) and found.isfinite().all()
    theirs = dict(device.weights())
    assert all(torch.equal(weight, theirs[name]) for name, weight in host.weights())


def test_weights_are_in_the_device_vectors_during_a_call_only() -> None:
    copied = StreamedCopy(policy_of())
    stream, layers = copied.stream, list(outermost_layers(copied.model.trunk))
    places: list[int] = []

    def storage(layer: torch.nn.Module) -> set[int]:
        return {weight.untyped_storage().data_ptr() for weight in layer.parameters()}

    for layer in layers:
        layer.self_attn.register_forward_pre_hook(lambda module, inputs: places.extend(storage(module)))
    before = [storage(layer) for layer in layers]
    copied.logprobs(make_batch(0), temperature=1.0)
    copied.logprobs(make_batch(1), temperature=1.0)
    first, second = (vector.data_ptr() for vector in stream.device_vectors)
    assert places == [first, second, first, second, first, second]
    assert [storage(layer) for layer in layers] == before and all(len(one) == 1 for one in before)
    assert not {first, second} & set.union(*before)


class StandIn:
    """The streams of torch.cuda, as a log of copies, calls and waits."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.on = "main"

    def Stream(self) -> Queue:
        return Queue(self, "side")

    def current_stream(self) -> Queue:
        return Queue(self, "main")

    def stream(self, stream: Queue) -> nullcontext[None]:
        return nullcontext()


class Queue:
    def __init__(self, cuda: StandIn, name: str) -> None:
        self.cuda, self.name = cuda, name

    def wait_stream(self, other: Queue) -> None:
        self.cuda.log.append(f"{self.name} waits for {other.name}")

    def record_event(self) -> str:
        event = f"event {sum('records' in line for line in self.cuda.log)}"
        self.cuda.log.append(f"{self.name} records {event}")
        return event

    def wait_event(self, event: str) -> None:
        self.cuda.log.append(f"{self.name} waits for {event}")


def test_the_next_layer_is_copied_before_a_layer_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer waits for its copy, and a copy into a vector waits for the layer that read that vector last."""
    cuda = StandIn()
    monkeypatch.setattr(streamed, "cuda", cuda)
    monkeypatch.setattr(streamed, "has_streams", lambda device: True)
    layers = [torch.nn.Linear(2, 2) for _ in range(3)]
    parts = [to_host(layer, pinned=False) for layer in layers]
    LayerStream(layers, [vector for vector, _ in parts], torch.device("cpu"))
    for number, layer in enumerate(layers):
        layer.register_forward_pre_hook(lambda module, inputs, number=number: cuda.log.append(f"layer {number}"))
    for layer in [*layers, *layers]:
        layer(torch.zeros(1, 2))
    assert cuda.log[:15] == [
        "side waits for main",
        "side records event 0",  # the copy of layer 0
        "main waits for event 0",
        "side records event 1",  # of layer 1, before layer 0 computes
        "layer 0",
        "main records event 2",
        "main waits for event 1",
        "side waits for event 2",  # layer 0 has read the vector
        "side records event 3",  # of layer 2
        "layer 1",
        "main records event 4",
        "main waits for event 3",
        "side waits for event 4",
        "side records event 5",  # of layer 0, for the next pass
        "layer 2",
    ]
    assert cuda.log[15:19] == [
        "main records event 6",
        "main waits for event 5",
        "side waits for event 6",
        "side records event 7",
    ]


def test_any_order_of_calls_and_a_failed_call_leave_the_right_weights() -> None:
    layers = [torch.nn.Linear(2, 2) for _ in range(4)]
    originals = [layer.weight.detach().clone() for layer in layers]
    parts = [to_host(layer, pinned=False) for layer in layers]
    LayerStream(layers, [vector for vector, _ in parts], torch.device("cpu"))
    x = torch.eye(2)
    with torch.no_grad():
        for number in (2, 0, 0, 3, 1, 2, 3, 0):
            expected = originals[number].t() + layers[number].bias
            assert torch.equal(layers[number](x), expected), number
            with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
                layers[number](torch.zeros(1, 5))
            assert torch.equal(layers[number].weight, originals[number])


def test_updates_have_the_bits_of_those_with_a_copy_on_the_device() -> None:
    host, device = (make_trainer(memory=MemoryConfig(reference=place)) for place in ("host", "device"))
    logs = [[trainer.step() for _ in range(2)] for trainer in (host, device)]
    assert type(host.reference) is StreamedCopy
    for ours, theirs in zip(*logs, strict=True):
        assert all(ours[key] == theirs[key] for key in ("kl", "reward", "policy_loss") if key in theirs)
    theirs = weights_of(device)
    assert all(torch.equal(weight, theirs[name]) for name, weight in weights_of(host).items())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_plan_counts_its_bytes(family: str, dtype: str) -> None:
    policy = policy_of(family, 3, getattr(torch, dtype))
    shape = ModelShape.from_config(policy.model.config)
    run = Workload(shape, None, 4, 4, 4, 4, 2, 4, dtype=dtype, reference_memory="host", device="cuda")
    copied = StreamedCopy(policy)
    layers = [weight for layer in outermost_layers(copied.model.trunk) for weight in layer.parameters()]
    inside = {id(weight) for weight in layers}
    rest = sum(weight.nbytes for _, weight in copied.weights() if id(weight) not in inside)
    host = sum(vector.nbytes for vector in copied.stream.hosts)
    plan = MemoryPlan.of(run)
    assert plan.persistent["reference"] == rest
    assert plan.persistent["layers_in_transit"] == copied.stream.device_bytes
    on_cpu = MemoryPlan.of(replace(run, device="cpu"))
    assert on_cpu.persistent["reference"] == rest + host


def test_the_planner_streams_the_reference_where_nothing_faster_fits() -> None:
    shape = ModelShape.of("llama-3.1-8b")
    run = Workload(shape, None, 1024, 1024, 64, 64, 4, 64, device="cuda", budget=64 * 2**30)
    found = [one for one in fitting(run) if one.kind == 0]
    assert found and all("memory.reference=host" in one.words for one in found)
    assert all(one.valid for one in found)


@pytest.mark.parametrize("change", ["adapters", "top"])
def test_a_reference_that_shares_layers_is_refused(change: str) -> None:
    model = tiny(num_hidden_layers=3)
    if change == "adapters":
        Adapters.start(model, SETTINGS, 0)
    else:
        train_top(model, 1)
    with pytest.raises(
        ValueError, match=r"memory\.reference: got 'host' with ppo\.reference 'hydra', which has no copy"
    ):
        make_reference(ActorCritic(model), "hydra", host=True)
    for kind in ("auto", "frozen_copy"):
        with pytest.raises(ValueError, match=r"memory\.reference: got 'host' for a policy with frozen layers"):
            make_reference(ActorCritic(model), kind, host=True)
    setting = {"adapters": "adapter.rank=4", "top": "model.train_layers=1"}[change]
    with pytest.raises(ValueError, match=rf"memory\.reference: got 'host' with {setting.partition('=')[0]}"):
        check_reference(load_config(None, ["memory.reference=host", setting]))


def test_a_model_without_layers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed, "outermost_layers", lambda trunk: [])
    with pytest.raises(
        ValueError, match=r"memory\.reference: got 'host', expected 'device': LlamaForCausalLM has no layers"
    ):
        StreamedCopy(policy_of())
