"""The memory plan against hand-computed sums and actual tensors."""

from dataclasses import fields, replace

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, Qwen3Config

from rlhf_engine.config import AdapterConfig, ModelConfig, OptimConfig, RunConfig
from rlhf_engine.model import ActorCritic, FrozenCopy, ValueHead, upcast
from rlhf_engine.model.adapters import Adapters
from rlhf_engine.model.pretrained import load_pretrained
from rlhf_engine.model.references import Hydra
from rlhf_engine.model.reward_model import RewardModel
from rlhf_engine.model.roles import POLICY, REFERENCE, REWARD, VALUE
from rlhf_engine.model.top_layers import train_top
from rlhf_engine.optim.build import build_optimizer
from rlhf_engine.optim.eight_bit import EightBitAdamW, moment_bytes
from rlhf_engine.optim.offload import StagedAdamW, most_in_transit
from rlhf_engine.planner import MemoryPlan, ModelShape, UnknownMemoryError, Workload
from rlhf_engine.planner.activations import Pass
from rlhf_engine.planner.presets import PRESETS
from rlhf_engine.planner.report import workload_words
from rlhf_engine.planner.strategies import fitting, smallest
from rlhf_engine.ppo.experience import experience_bytes
from rlhf_engine.rollout.decode.paged import PagedDecoder, kv_bytes_of
from rlhf_engine.rollout.decode.slots import SlotDecoder, slot_bytes
from rlhf_engine.rollout.rollout import rollout_bytes
from rlhf_kernels import rollout_advantages
from tests.engine.helpers.passes import hidden_of
from tests.engine.helpers.plans import RUN, SMALL
from tests.engine.helpers.quantised_models import QUANTS
from tests.engine.helpers.rollouts import make_rollout
from tests.engine.helpers.tiny_models import tiny

PUBLISHED = {
    "qwen2.5-0.5b": 494_032_768,
    "llama-3.2-1b": 1_235_814_400,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "llama-3.2-3b": 3_212_749_824,
    "qwen2.5-7b": 7_615_616_512,
    "llama-3.1-8b": 8_030_261_248,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "llama-3.1-70b": 70_553_706_496,
    "qwen2.5-72b": 72_706_203_648,
}
"""Numbers of weights according to the model cards."""
FAMILIES = ("llama", "llama_tied", "qwen2", "qwen3", "gpt2", "gpt2_tied", "mistral", "granite")


def make(family, **changes):
    if family != "qwen3":
        return tiny(family, **changes)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Qwen3Config(**sizes, vocab_size=61, num_key_value_heads=2, head_dim=8, max_position_embeddings=128)
    return AutoModelForCausalLM.from_config(config).eval()


# ---- by hand ----


def test_a_small_run_by_hand():
    """340 weights (40 embedding, 2 x 128, norm 4, head 40) and a value head of 5; sequences of 3 + 2 tokens."""
    plan = MemoryPlan.of(RUN)
    assert plan.persistent == {
        "policy": 4 * 345,
        "reference": 4 * 340,
        "reward_model": 4 * 305,
        "optimizer_state": 8 * 345,
        "context": 28 * 2**20,
    }
    generate, score, train = (plan.phases[name] for name in ("generate", "score", "train"))
    # 2 layers x 4 slots x 2 numbers x 16 columns, keys and values; a reordered copy of the head's 40 weights; a prompt is read
    # as 16 columns, 64 tokens in all, each with 12 numbers of the residual stream and 3 x 6 of the feed-forward product.
    held = {"kv_cache": 2048, "rollout": 328, "reordered_head": 160}
    assert generate.moments["prefill"] == held | {"prefill_workspace": 64 * (4 * 12 + 72)}
    # The mask, and the logits twice.
    assert generate.moments["decode"] == held | {"decode_workspace": 16 * 16 + 16 * 10 * 2 * 4}
    # 40 tokens at a time, in whole rows of 16 columns.
    few = MemoryPlan.of(replace(RUN, prefill_tokens=40)).phases["generate"].moments["prefill"]
    assert few == held | {"prefill_workspace": 48 * (4 * 12 + 72)}
    # The reward model reads 4 sequences of 6 tokens; 16 rows of logits are kept from the reference's head.
    assert score.items == {"rollout": 424, "head_workspace": 640, "score_workspace": 24 * (4 * 12 + 72)}
    # 4 tokens: 2 layers of 256 bytes each (norms 104, attention 48 + 8, feed-forward 96), last norm 36, id 8; the angles.
    saved = 4 * (2 * 256 + 36 + 8) + 64
    assert train.moments["forward"] == {
        "rollout": 424,
        "activations": saved,
        "head_gradients": (40 + 8) * 4 + 8 * 4,
        "head_workspace": 640,
        "gradients": 4 * 345,
    }
    room = 4 * 2 * 6 * 4 + 24 * 4 + 4 * 4 * 4
    assert train.items == {
        "rollout": 424,
        "activations": saved,
        "head_workspace": 640,
        "gradients": 4 * 345,
        "backward_workspace": room,
    }
    assert train["gradients"] == 1380 and train["head_workspace"] == 640
    assert plan.peak == 6720 + 28 * 2**20 + 2048 + 328 + 160 + 7680 and plan.largest == "generate"


@pytest.mark.parametrize(
    "changes, persistent",
    [
        ({"dtype": "bfloat16"}, {"policy": 700, "reference": 680, "reward_model": 620, "master_weights": 1380}),
        ({"optimizer_state": "host", "device": "cuda"}, {"optimizer_state": None}),
        ({"value": "backbone"}, {"policy": 1360, "value_model": 1220, "optimizer_state": 8 * (340 + 305)}),
        ({"average": True}, {"average": 1360}),
        ({"reward": None}, {"reward_model": None}),
    ],
)
def test_what_persists_by_hand(changes, persistent):
    found = MemoryPlan.of(replace(RUN, **changes)).persistent
    assert {name: found.get(name) for name in persistent} == persistent


def test_state_in_host_memory_passes_through_two_buckets():
    train = MemoryPlan.of(replace(RUN, optimizer_state="host", device="cuda")).phases["train"]
    assert all(items["state_in_transit"] == 8 * 345 for items in train.moments.values())
    shape = ModelShape.of("qwen2.5-0.5b")
    large = MemoryPlan.of(replace(RUN, policy=shape, optimizer_state="host", device="cuda", dtype="bfloat16"))
    assert large.phases["train"]["state_in_transit"] == 2 * 64 * 2**20
    assert not {"optimizer_state", "master_weights"} & large.persistent.keys()
    on_cpu = MemoryPlan.of(replace(RUN, optimizer_state="host"))  # host and device memory are the same
    assert on_cpu.persistent["optimizer_state"] == 8 * 345
    assert [name for name, items in on_cpu.phases["train"].moments.items() if "state_in_transit" in items] == [
        "optimizer step"
    ]


def test_gradients_are_reserved_from_the_first_forward_pass_on():
    for microbatch in (1, 2):
        moments = MemoryPlan.of(replace(RUN, microbatch=microbatch)).phases["train"].moments
        assert all(items["gradients"] == 1380 for items in moments.values())
    tied = replace(SMALL, tied=True)  # the head's gradient is kept until the embedding's is added to it
    moments = MemoryPlan.of(replace(RUN, policy=tied, microbatch=2)).phases["train"].moments
    assert moments["backward begins"]["head_gradients"] == moments["backward ends"]["backward_workspace"] == 160
    # In bfloat16 the embedding's gradient has half of the bytes, and exists at the same time as its float32 sum.
    half = MemoryPlan.of(replace(RUN, policy=tied, microbatch=2, dtype="bfloat16")).phases["train"].moments
    assert half["backward ends"]["backward_workspace"] == 160 + 80


def test_8bit_state_is_one_byte_per_number_and_one_scale_per_block():
    wide = replace(SMALL, vocab=512, hidden=64, intermediate=128, head_dim=32)
    # Matrices of 4096 numbers and more: two of 512 x 64, and in each layer 64 x 64 twice and 64 x 128 three times.
    large = 2 * 512 * 64 + 2 * (2 * 64 * 64 + 3 * 64 * 128)
    small = wide.parameters - large
    found = MemoryPlan.of(replace(RUN, policy=wide, optimizer_state="8bit")).persistent["optimizer_state"]
    assert found == 2 * (large + 4 * large // 256) + 8 * small


# ---- against actual tensors ----


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_weights_of_their_models(name):
    with torch.device("meta"):
        fields = {field: value for field, value in PRESETS[name].items() if field != "model_type"}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(PRESETS[name]["model_type"], **fields))
    shape = ModelShape.of(name)
    assert shape.parameters == sum(p.numel() for p in model.parameters()) == PUBLISHED[name]
    assert shape.trunk_parameters == sum(p.numel() for p in model.base_model.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_activations_are_what_autograd_saves(monkeypatch, family, attention, dtype):
    monkeypatch.setattr(upcast, "has_products", lambda dtype, device: True)  # otherwise no rounded weights are kept
    model = make(family)
    model.set_attn_implementation(attention)
    policy = ActorCritic(model, compute_dtype=torch.bfloat16 if dtype == "autocast" else None)
    policy = policy.to(torch.bfloat16) if dtype == "bfloat16" else policy
    shape, found = ModelShape.from_config(model.config), {}
    weights = {p.untyped_storage().data_ptr() for p in policy.parameters()}

    def keep(x):
        if x.untyped_storage().data_ptr() not in weights:
            found[x.untyped_storage().data_ptr()] = x  # referenced, so that no other tensor gets its address
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        hidden_of(policy, torch.randint(3, 61, (3, 20)))
    bytes_ = sum(x.untyped_storage().nbytes() for x in found.values())
    sizes = {"float32": (4, 4), "bfloat16": (2, 2), "autocast": (4, 2)}[dtype]
    rounded = 2 * shape.layer_matrices if dtype == "autocast" else 0
    assert bytes_ - rounded == Pass(shape, 3, 20, attention == "eager", *sizes).saved(checkpointed=False)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_activations_of_adapters_are_what_autograd_saves(monkeypatch, family, dtype):
    monkeypatch.setattr(upcast, "has_products", lambda dtype, device: True)
    model = make(family).to(torch.bfloat16 if dtype == "bfloat16" else torch.float32)
    shape, found = ModelShape.from_config(model.config), {}
    Adapters.start(model, AdapterConfig(rank=4), seed=0)
    policy = ActorCritic(model, compute_dtype=torch.bfloat16 if dtype == "autocast" else None)
    weights = {p.untyped_storage().data_ptr() for p in policy.parameters()}

    def keep(x):
        # Autograd also saves weights that autocast has rounded; they have no dimension of tokens.
        if x.untyped_storage().data_ptr() not in weights and {20, 60} & set(x.shape):
            found[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        hidden_of(policy, torch.randint(3, 61, (3, 20)))
    bytes_ = sum(x.untyped_storage().nbytes() for x in found.values())
    sizes = {"float32": (4, 4), "bfloat16": (2, 2), "autocast": (4, 2)}[dtype]
    assert bytes_ == Pass(shape, 3, 20, False, *sizes, None, 4).saved(checkpointed=False)


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_activations_of_top_layers_are_what_autograd_saves(monkeypatch, family, dtype, rank):
    monkeypatch.setattr(upcast, "has_products", lambda dtype, device: True)
    layers = {"n_layer": 4} if family == "gpt2" else {"num_hidden_layers": 4}
    model = make(family, **layers).to(torch.bfloat16 if dtype == "bfloat16" else torch.float32)
    shape, found = ModelShape.from_config(model.config), {}
    train_top(model, 2)
    if rank:
        Adapters.start(model, AdapterConfig(rank=rank), seed=0)
    policy = ActorCritic(model, compute_dtype=torch.bfloat16 if dtype == "autocast" else None)
    weights = {p.untyped_storage().data_ptr() for p in policy.parameters()}

    def keep(x):
        if x.untyped_storage().data_ptr() not in weights and {20, 60} & set(x.shape):
            found[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        hidden_of(policy, torch.randint(3, 61, (3, 20)))
    bytes_ = sum(x.untyped_storage().nbytes() for x in found.values())
    sizes = {"float32": (4, 4), "bfloat16": (2, 2), "autocast": (4, 2)}[dtype]
    assert bytes_ == Pass(shape, 3, 20, False, *sizes, None, rank, trained=2).saved(checkpointed=False)


def test_checkpointed_layers_save_only_their_inputs():
    model = make("llama", num_hidden_layers=5)
    policy, found = ActorCritic(model, gradient_checkpointing=True), {}
    weights = {p.untyped_storage().data_ptr() for p in policy.parameters()}

    def keep(x):
        if x.untyped_storage().data_ptr() not in weights:
            found[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        hidden_of(policy, torch.randint(3, 61, (3, 20)))
    kept = sum(x.untyped_storage().nbytes() for x in found.values())
    angles = 2 * 20 * 8 * 4  # a layer's other arguments are kept by reference, not by autograd
    assert Pass(ModelShape.from_config(model.config), 3, 20, False, 4, 4).saved(checkpointed=True) == kept + angles


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_state_and_cache_have_the_planned_size(family):
    model = make(family)
    shape = ModelShape.from_config(model.config)
    policy = ActorCritic(model)
    plan = MemoryPlan.of(replace(RUN, policy=shape, reward=shape, prompt=20, response=10, slots=20))
    held = {
        "policy": policy,
        "reference": FrozenCopy(policy).model,
        "reward_model": RewardModel.from_causal_lm(model, 0),
    }
    for name, module in held.items():
        assert plan.persistent[name] == sum(p.numel() * 4 for p in module.parameters()), name
    optimizer = build_optimizer(policy, OptimConfig())
    for parameter in policy.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moments = [x for state in optimizer.state.values() for x in (state["exp_avg"], state["exp_avg_sq"])]
    assert plan.persistent["optimizer_state"] == sum(x.nbytes for x in moments)
    assert plan.phases["train"]["gradients"] == sum(p.grad.nbytes for p in policy.parameters())
    slots = SlotDecoder(policy, 20, 30)
    slots.open(20)
    with torch.no_grad():
        slots.prefill([torch.arange(3, 20)], 0)
    kv_cache = sum(layer.keys.nbytes + layer.values.nbytes for layer in slots.cache.layers)
    assert plan.phases["generate"]["kv_cache"] == slots.cache_bytes == kv_cache
    paged = PagedDecoder(policy, 20, 30)
    paged.open(20)
    pages = MemoryPlan.of(replace(plan.workload, cache="paged")).phases["generate"]
    assert pages["kv_cache"] == paged.cache_bytes == paged.pool.nbytes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_four_roles_with_adapters_have_the_planned_size(family, dtype):
    """Together they take the bytes of one set of weights, and of the adapters and heads."""
    model = make(family).to(getattr(torch, dtype))
    shape, one = ModelShape.from_config(model.config), sum(p.nbytes for p in model.parameters())
    adapters = Adapters.start(model, AdapterConfig(rank=2), seed=0)
    for name in (REFERENCE, VALUE, REWARD):
        adapters.add(name, adapters.tensors(POLICY), trained=name == VALUE)
    head = ValueHead(shape.hidden)
    policy = ActorCritic(model, RewardModel.sharing(adapters, VALUE, head))
    shared = {"adapter": 2, "reward_adapter": True, "reference_adapter": True, "value": "backbone", "dtype": dtype}
    plan = MemoryPlan.of(replace(RUN, policy=shape, reward=shape, **shared))
    small = {name: sum(p.nbytes for p in adapters.tensors(name).values()) for name in adapters.names}
    scalar = sum(p.nbytes for p in head.parameters())
    assert {name: plan.persistent[name] for name in ("policy", "reference", "value_model", "reward_model")} == {
        "policy": one + small[POLICY],
        "reference": small[REFERENCE],
        "value_model": small[VALUE] + scalar,
        "reward_model": small[REWARD] + scalar,
    }
    trained = sum(p.numel() for _, p in policy.stored())
    assert plan.persistent["optimizer_state"] == 8 * trained and plan.phases["train"]["gradients"] == 4 * trained
    assert plan.persistent.get("master_weights", 0) == (4 * trained if dtype == "bfloat16" else 0)


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "llama_tied", "qwen2", "gpt2", "gpt2_tied"])
def test_trained_top_layers_have_the_planned_size(family, dtype, rank):
    layers = {"n_layer": 4} if family.startswith("gpt2") else {"num_hidden_layers": 4}
    model = make(family, **layers).to(getattr(torch, dtype))
    shape = ModelShape.from_config(model.config)
    train_top(model, 1)
    if rank:
        Adapters.start(model, AdapterConfig(rank=rank), seed=0)
    policy = ActorCritic(model)
    reference = Hydra(policy)
    run = replace(
        RUN, policy=shape, reward=None, dtype=dtype, adapter=rank, train_layers=1, average=True, reference="hydra"
    )
    plan = MemoryPlan.of(run)
    stored = list(policy.stored())
    language = sum(p.numel() for name, p in stored if name.startswith("model."))
    assert plan.persistent["policy"] == sum(p.nbytes for p in policy.parameters())
    assert plan.persistent.get("reference", 0) == sum(p.nbytes for p in reference.frozen.values())
    assert rank or plan.persistent["reference"] == language * shape_bytes(dtype)
    assert plan.persistent["average"] == 4 * language
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    assert trained == sum(p.numel() for _, p in stored)
    assert plan.persistent["optimizer_state"] == 8 * trained and plan.phases["train"]["gradients"] == 4 * trained
    rollout = make_rollout().starting_from(reference, 3)
    per_input = rollout.states.nbytes // len(rollout.states)
    inputs = run.rollout_batch * (run.length - 1)
    assert plan.phases["score"]["states"] == plan.phases["train"]["states"] == inputs * per_input
    copied = MemoryPlan.of(replace(run, reference="frozen_copy"))
    assert "states" not in copied.phases["score"].items
    if not rank:
        shared = {p.data_ptr() for p in policy.parameters()}
        own = [p for p in FrozenCopy(policy).model.parameters() if p.data_ptr() not in shared]
        assert copied.persistent["reference"] == sum(p.nbytes for p in own)


def shape_bytes(dtype):
    return getattr(torch, dtype).itemsize


def test_a_plan_names_the_trained_layers():
    assert "float32, the top 1 of 2 layers trained, value" in workload_words(replace(RUN, train_layers=1))
    assert "trained" not in workload_words(RUN)


def test_8_bit_state_of_top_layers_counts_their_matrices_only():
    run = replace(RUN, policy=ModelShape.of("qwen2.5-0.5b"), reward=None, optimizer_state="8bit")
    whole, top = (MemoryPlan.of(replace(run, train_layers=count)).persistent["optimizer_state"] for count in (None, 6))
    layer = run.policy.layer_matrices / run.policy.layers
    assert top == pytest.approx(2 * (6 * layer), rel=0.05) and whole > 3 * top


def test_a_plan_for_the_top_layers_of_what_the_plan_does_not_know():
    config = RunConfig(model=ModelConfig(train_layers=30))
    with pytest.raises(ValueError, match=r"model\.train_layers: got 30, expected at most 24, the number of layers of"):
        Workload.of(config, ModelShape.of("qwen2.5-0.5b"), None)
    shape = ModelShape.from_config(AutoConfig.for_model("mamba", hidden_size=32, num_hidden_layers=2, vocab_size=61))
    with pytest.raises(UnknownMemoryError, match=r"model\.train_layers: got 1 with the recurrent model_type 'mamba'"):
        Workload.of(RunConfig(model=ModelConfig(train_layers=1)), shape, None)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("quant", QUANTS)
def test_quantised_roles_have_the_planned_size(tmp_path, quant, family, dtype):
    make(family).save_pretrained(tmp_path)
    kinds = {"quant": quant, "dtype": getattr(torch, dtype)}
    model = load_pretrained(AutoModelForCausalLM, tmp_path, **kinds)
    shape, one = ModelShape.from_config(model.config), sum(p.nbytes for p in model.parameters())
    adapters = Adapters.start(model, AdapterConfig(rank=2), seed=0)
    reward = load_pretrained(AutoModel, tmp_path, **kinds)  # a reward model with its own trunk
    small, head = sum(p.nbytes for p in adapters.tensors(POLICY).values()), 4 * (shape.hidden + 1)
    settings = {"adapter": 2, "quant": quant, "dtype": dtype, "value": "none"}
    plan = MemoryPlan.of(replace(RUN, policy=shape, reward=shape, **settings))
    assert plan.persistent["policy"] == one + small + head
    assert plan.persistent["reward_model"] == sum(p.nbytes for p in reward.parameters()) + head
    assert "reference" not in plan.persistent


def test_the_memory_of_a_process_on_the_cpu_grows_with_adapters_and_half_precision(monkeypatch):
    """14 matrices have adapters. Without instructions for half precision no kernels are compiled."""
    plain, adapted = RUN, replace(RUN, adapter=2, reward_adapter=True)
    for products in (True, False):
        monkeypatch.setattr(upcast, "has_products", lambda dtype, device, products=products: products)
        half = 46 * 2**20 if products else 0
        for run, more in ((plain, 0), (adapted, 7 * 2**20 + 14 * 64 * 2**10)):
            for dtype, kernels in (("float32", 0), ("bfloat16", half)):
                context = MemoryPlan.of(replace(run, dtype=dtype)).persistent["context"]
                assert context == 28 * 2**20 + more + kernels, (dtype, products)
    assert MemoryPlan.of(replace(adapted, device="cuda")).persistent["context"] == 600 * 2**20


def test_a_quantised_matrix_is_dequantised_in_every_phase_and_no_rounded_copy_is_kept():
    """The largest matrix of a layer has 4 x 6 elements, in the dtype of the product."""
    plain = replace(RUN, adapter=2, reward_adapter=True)
    for dtype, compute, size in (("float32", "float32", 4), ("bfloat16", "float32", 2), ("float32", "bfloat16", 2)):
        kinds = {"dtype": dtype, "compute_dtype": compute, "device": "cuda"}
        before, after = (MemoryPlan.of(replace(plain, quant=one, **kinds)).phases for one in ("none", "int8"))
        rounded = 2 * 240 if compute == "bfloat16" else 0
        for phase, moment, item in (
            ("generate", "decode", "decode_workspace"),
            ("score", "reference", "score_workspace"),
            ("train", "backward begins", "backward_workspace"),
        ):
            ours, theirs = (phases[phase].moments[moment] for phases in (after, before))
            assert ours[item] == theirs[item] + 24 * size, (moment, dtype)
            kept = theirs.get("rounded_weights", 0)
            assert ours.get("rounded_weights", 0) == (kept - rounded if kept else 0), moment


@pytest.mark.parametrize("cache", ["slots", "paged"])
def test_eager_attention_rounds_up_the_number_of_slots_but_not_of_pages(cache):
    model = make("mistral")
    model.set_attn_implementation("eager")
    policy, shape = ActorCritic(model), ModelShape.from_config(model.config)
    run = replace(RUN, policy=shape, reward=shape, prompt=20, response=10, slots=20, eager=True, cache=cache)
    decoder = {"slots": SlotDecoder, "paged": PagedDecoder}[cache](policy, 20, 30)
    expected = {"slots": 32 * slot_bytes(policy, 30), "paged": kv_bytes_of(policy, 20)}[cache]
    assert MemoryPlan.of(run).phases["generate"]["kv_cache"] == decoder.cache_bytes == expected


def test_a_rollout_and_its_experience_have_the_planned_size():
    rollout = make_rollout()
    held = [getattr(rollout, item.name) for item in fields(rollout) if item.name != "states"]
    tokens, actions = rollout.prompt_ids.numel() + rollout.response_ids.numel(), rollout.mask.numel()
    assert rollout_bytes(tokens, actions) == sum(x.nbytes for x in held if x is not None and x.dim() == 2)
    assert rollout_bytes(tokens, actions, sampling=True) == rollout_bytes(tokens, actions) + rollout.response_ids.nbytes
    ref_logprobs = torch.zeros_like(rollout.logprobs)
    result = rollout_advantages(
        torch.zeros(len(rollout)), rollout.logprobs, ref_logprobs, rollout.values, rollout.mask, kl_coef=0.1
    )
    assert experience_bytes(actions) == ref_logprobs.nbytes + sum(x.nbytes for x in result)


@pytest.mark.parametrize("shape", [(32, 64), (64, 64), (64, 65), (40, 128)])
def test_an_8bit_moment_has_the_size_of_torchaos(shape):
    parameter = torch.nn.Parameter(torch.zeros(shape))
    moment = EightBitAdamW([{"params": [parameter]}]).new_moments(parameter)["exp_avg"]
    codes = getattr(moment, "codes", None)
    found = moment.nbytes if codes is None else codes.nbytes + moment.scale.nbytes  # the table of values is shared
    assert moment_bytes(parameter.numel()) == found and (codes is None) == (shape in [(32, 64), (64, 65)])


@pytest.mark.parametrize("sizes", [(4096,), (4096, 8192, 40960), (50_000, 300)])
def test_state_in_transit_is_at_most_as_large_as_planned(sizes):
    parameters = [torch.nn.Parameter(torch.zeros(size)) for size in sizes]
    optimizer = StagedAdamW([{"params": parameters}], host=True, bucket_bytes=2**16)
    bound = most_in_transit(8 * sum(sizes), 2**16)
    assert 0.5 * bound < optimizer.transit_bytes <= bound + 2 * 64  # both buckets are aligned


# ---- slots, micro-batches and strategies ----


def test_larger_settings_need_more_memory_and_memory_options_save_some():
    shape = ModelShape.of("qwen2.5-0.5b")
    base = Workload(shape, shape, 256, 128, 64, 32, 4, 16, device="cuda")
    before = MemoryPlan.of(base)
    for field, value in (("prompt", 512), ("response", 512), ("slots", 64), ("rollout_batch", 128), ("microbatch", 8)):
        after = MemoryPlan.of(replace(base, **{field: value}))
        phases = [(after.phases[name].total, before.phases[name].total) for name in before.phases]
        assert all(more >= less for more, less in phases) and any(more > less for more, less in phases), field
    for field, value in (
        ("gradient_checkpointing", True),
        ("compute_dtype", "bfloat16"),
        ("dtype", "bfloat16"),
        ("optimizer_state", "8bit"),
        ("optimizer_state", "host"),
    ):
        assert MemoryPlan.of(replace(base, **{field: value})).peak < before.peak, field
    eager = MemoryPlan.of(replace(base, eager=True)).phases["train"]
    assert eager["activations"] > before.phases["train"]["activations"]


def test_slots_fill_the_budget():
    shape = ModelShape.of("qwen2.5-0.5b")
    workload = Workload(shape, shape, 512, 512, 256, 64, 1, 256, device="cuda", cache="slots", optimizer_state="host")
    whole = MemoryPlan.of(workload)
    assert whole.slots == 256
    generate = whole.kept + whole.phases["generate"].total
    plan = MemoryPlan.of(replace(workload, budget=generate - 1))
    assert plan.slots == 255
    tight = MemoryPlan.of(replace(workload, budget=(whole.kept + generate) // 2))
    more = MemoryPlan.of(replace(workload, slots=tight.slots + 1))
    assert 16 < tight.slots < 255 and tight.kept + tight.phases["generate"].total <= tight.workload.budget
    assert more.kept + more.phases["generate"].total > tight.workload.budget
    assert MemoryPlan.of(replace(workload, budget=whole.kept)).slots == 0


def test_pages_fill_the_budget_and_all_slots_are_kept():
    shape = ModelShape.of("qwen2.5-0.5b")
    workload = Workload(shape, shape, 512, 512, 256, 64, 1, 256, device="cuda", optimizer_state="host")
    page = 64 * 24 * 128 * 2 * 4  # tokens, layers, key width, keys and values, bytes
    whole = MemoryPlan.of(workload)
    assert whole.kv_bytes == (256 * 16 + 1) * page
    generate = whole.kept + whole.phases["generate"].total
    for missing, pages in ((0, 256 * 16), (1, 256 * 16 - 1), (page, 256 * 16 - 1), (1000 * page, 256 * 16 - 1000)):
        plan = MemoryPlan.of(replace(workload, budget=generate - missing))
        assert plan.slots == 256 and plan.kv_bytes == (pages + 1) * page, missing
        assert plan.kept + plan.phases["generate"].total <= plan.workload.budget
    # Every slot begins with the 8 pages of its prompt and one more; with a smaller budget there are fewer slots.
    least = generate - (256 * 16 - 256 * 9) * page
    assert (
        MemoryPlan.of(replace(workload, budget=least)).slots,
        MemoryPlan.of(replace(workload, budget=least - 1)).slots,
    ) == (
        256,
        255,
    )
    # One slot needs all pages of its longest response, because the oldest sequence must be able to finish without the others.
    alone = MemoryPlan.of(replace(workload, slots=1))
    alone = MemoryPlan.of(replace(workload, budget=alone.kept + alone.phases["generate"].total))
    assert alone.slots == 1 and alone.kv_bytes == (16 + 1) * page
    assert MemoryPlan.of(replace(alone.workload, budget=alone.workload.budget - 1)).slots == 0


def test_the_largest_micro_batch_fits_and_one_more_does_not():
    shape = ModelShape.of("qwen2.5-0.5b")
    plan = MemoryPlan.of(Workload(shape, None, 512, 512, 64, 64, 64, 16, device="cuda", budget=48 * 2**30))
    rows = plan.largest_microbatch()
    assert 1 <= rows < 64
    peaks = [MemoryPlan.of(replace(plan.workload, microbatch=count)).peak for count in (rows, rows + 1)]
    assert peaks[0] <= plan.workload.budget < peaks[1]


def test_strategies_fit_and_the_fastest_is_first():
    shape = ModelShape.of("qwen2.5-1.5b")
    workload = Workload(shape, shape, 512, 512, 64, 64, 16, 64, device="cuda", budget=60 * 2**30)
    assert not MemoryPlan.of(workload).fits
    found = fitting(workload)
    order = [(one.kind, one.cost) for one in found]  # what changes the trained weights comes last
    assert found and order == sorted(order)
    for one in found:
        again = MemoryPlan.of(replace(workload, **one.changes))
        assert again.fits and again.slots and again.peak == one.plan.peak, one.words
        for name in one.changes:
            without = (name, "quant") if name == "adapter" else (name,)  # quantised weights need an adapter
            fewer = {key: value for key, value in one.changes.items() if key not in without}
            assert name in ("dtype", "compute_dtype", "slots") or not MemoryPlan.of(replace(workload, **fewer)).fits, (
                one.words,
                name,
            )
    assert all(one.valid for one in found) and not any("quant" in one.changes for one in found)
    tight = fitting(replace(workload, budget=6 * 2**30))
    by_kind = [[one.words for one in tight if one.kind == kind] for kind in range(3)]
    assert not by_kind[0] and by_kind[1] and all("adapter.rank=16, model.quant=" in words for words in by_kind[1])
    kinds = [one.kind for one in fitting(replace(workload, budget=20 * 2**30))]
    assert kinds == sorted(kinds) and {1, 2} <= set(kinds)
    assert fitting(replace(workload, budget=2**30)) == []
    assert smallest(workload).plan.peak == min(one.plan.peak for one in (smallest(workload), *found))
    assert "model.quant=nf4" in smallest(workload).words


def test_a_micro_batch_of_tokens_is_planned_with_sequences_of_maximum_length():
    whole = MemoryPlan.of(replace(RUN, microbatch_tokens=8)).phases  # two sequences of 4 inputs
    two = MemoryPlan.of(replace(RUN, microbatch=2)).phases
    assert whole["train"] == two["train"]
    # 3 more inputs, from shorter sequences.
    more = MemoryPlan.of(replace(RUN, microbatch_tokens=11, minibatch=4, rollout_batch=4)).phases["train"]
    assert more["activations"] == 11 * (2 * 256 + 36 + 8) + 64
    # All 8 actions of a minibatch's 4 sequences fit in 11 tokens after prompts of one token.
    assert more.moments["forward"]["head_gradients"] == (40 + 8 * 4) * 4 + 8 * 4 * 4
