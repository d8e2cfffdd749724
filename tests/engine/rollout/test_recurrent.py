"""Sampling from models with recurrent states: their own forward pass, slots that are reused and moved, memory, refusals."""

from dataclasses import dataclass

import pytest
import torch
from transformers import cache_utils

from benchmarks.families.configs import build
from benchmarks.families.recurrent import DENSE, EXPERTS, WINDOWED
from rlhf_engine.memory.arena import room_for
from rlhf_engine.model import ActorCritic
from rlhf_engine.rollout import Rollout
from rlhf_engine.rollout.decode import protocol
from rlhf_engine.rollout.decode.recurrent import RecurrentDecoder
from tests.engine.helpers.recurrent_models import recurrent, recurrent_actor, reference_of
from tests.engine.helpers.rollouts import sequence_of
from tests.engine.helpers.sampling import make_generator, make_prompts, same_sequence
from tests.engine.helpers.tiny_trainer import make_trainer, weights_of

# Left out, because a different case has the same layers: `python -m benchmarks.families` checks every family.
SAME = [(DENSE, "granitemoehybrid"), (EXPERTS, "lfm2_moe"), (EXPERTS, "qwen3_5_moe_text"), (EXPERTS, "zaya")]
CASES = [
    (kind, family, settings)
    for kind in (DENSE, EXPERTS, WINDOWED)
    for family, settings in kind.items()
    if (kind, family) not in SAME
]
SHORT = {"max_response_tokens": 8}
NAMES = [
    f"{family}-{['dense', 'experts', 'windowed'][[DENSE, EXPERTS, WINDOWED].index(kind)]}" for kind, family, _ in CASES
]


@torch.no_grad()
def own_logprobs(model, rollout, row):
    """Return the log-probs of a response from one forward pass of `model` over the sequence, without a cache."""
    ids, prompt = sequence_of(rollout, row)[None], int(rollout.prompt_lengths[row])
    logits = model(input_ids=ids, use_cache=False).logits[0, prompt - 1 : -1]
    return logits.log_softmax(-1).gather(-1, ids[0, prompt:, None])[:, 0]


@dataclass(frozen=True)
class Sampled:
    family: str
    settings: dict
    actor: ActorCritic
    prompts: list
    rollout: Rollout
    """In the order of `prompts`, from four slots, which were reused and moved."""


@pytest.fixture(scope="module", params=CASES, ids=NAMES)
def sampled(request):
    """Eleven prompts of different lengths, sampled in four slots."""
    moved, move = [], RecurrentDecoder.move
    _, family, settings = request.param
    actor, prompts = recurrent_actor(family, settings), make_prompts(11)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RecurrentDecoder, "move", lambda self, *rest: moved.append(rest) or move(self, *rest))
        rollout = make_generator(actor, batch_size=4, **SHORT).generate(prompts, torch.arange(11))
    assert moved
    return Sampled(family, settings, actor, prompts, rollout)


def test_logprobs_are_those_of_the_models_own_forward_pass(sampled):
    actor, rollout = sampled.actor, sampled.rollout
    double = reference_of(actor.model, sampled.family, sampled.settings)
    for row in range(11):
        n = int(rollout.response_lengths[row])
        exact, single = own_logprobs(double, rollout, row), own_logprobs(actor.model, rollout, row)
        # Twice the error of the model's own pass in float32, plus rounding: a scan and its single steps add in other orders.
        allowed = 2 * float((single - exact).abs().max()) + 64 * torch.finfo(torch.float32).eps * float(
            exact.abs().max()
        )
        error = float((rollout.logprobs[row, :n] - exact).abs().max())
        assert error <= allowed, (row, error, allowed)


def test_a_sequence_does_not_depend_on_its_batch(sampled):
    """The bits of a sequence from four slots are those of a shuffled batch of eleven and of one slot."""
    actor, prompts = sampled.actor, sampled.prompts
    order = torch.randperm(11, generator=torch.Generator().manual_seed(1))
    whole = make_generator(actor, **SHORT).generate([prompts[i] for i in order], order)
    assert all(same_sequence(sampled.rollout, int(i), whole, j) for j, i in enumerate(order))
    single = make_generator(actor, batch_size=1, **SHORT).generate(prompts[:2], torch.arange(2))
    assert all(same_sequence(sampled.rollout, i, single, i) for i in range(2))


WIDE = {
    "lfm2": {"intermediate_size": 999},  # `silu` called as a function, with rows that end in scalar code
    "qwen3_5_text": {
        "linear_num_value_heads": 9,
        "linear_num_key_heads": 3,
        "linear_value_head_dim": 37,
    },  # softplus, sigmoid
    "mamba2": {"hidden_size": 36, "num_heads": 9, "head_dim": 8},
}


@pytest.mark.parametrize("family", WIDE)
def test_wide_layers_do_not_depend_on_the_batch(family):
    actor, prompts = recurrent_actor(family, **WIDE[family]), make_prompts(70, longest=8)
    generator = make_generator(actor, batch_size=64, max_response_tokens=4)
    whole = generator.generate(prompts, torch.arange(70))
    order = torch.randperm(70, generator=torch.Generator().manual_seed(1))[:61]
    shuffled = generator.generate([prompts[i] for i in order], order)
    assert all(same_sequence(whole, int(i), shuffled, j) for j, i in enumerate(order))


@pytest.mark.parametrize("family", ["falcon_h1", "lfm2", "mamba"])
def test_slots_use_the_memory_that_was_announced(family):
    taken = []

    def allocate(shape, dtype, device):
        taken.append(room_for(shape, dtype))
        return torch.full(shape, torch.nan, dtype=dtype, device=device)  # uninitialized memory

    actor, prompts = recurrent_actor(family), make_prompts(9)
    for attention in ("sdpa", "eager") if family != "mamba" else ("eager",):
        actor.model.set_attn_implementation(attention)
        for slots in (2, 40):
            generator = make_generator(actor, batch_size=slots)
            taken.clear()
            found = generator.generate(prompts, torch.arange(9), allocate=allocate)
            assert found.logprobs.isfinite().all() and sum(taken) <= generator.cache_bytes
            assert slots > 9 or sum(taken) == generator.cache_bytes


def test_fewer_slots_fit_into_fewer_bytes():
    actor = recurrent_actor("falcon_h1")
    size = RecurrentDecoder(actor, 40, 32).cache_bytes
    # Three layers, each with keys and values of 2 heads of size 8, 4 steps of 80 channels, and states of 4 x 16 x 8 numbers.
    assert size == 40 * 3 * 4 * (2 * 32 * 2 * 8 + 80 * 4 + 4 * 16 * 8)
    decoder = RecurrentDecoder(actor, 40, 32, kv_bytes=size - 1)
    assert decoder.slots == 39 and decoder.cache_bytes < size
    least = RecurrentDecoder(actor, 1, 32).cache_bytes
    assert RecurrentDecoder(actor, 40, 32, kv_bytes=least).slots == 1
    with pytest.raises(ValueError, match=f"kv_bytes: got {least - 1}, expected at least {least}"):
        RecurrentDecoder(actor, 40, 32, kv_bytes=least - 1)


def test_half_precision_sampling_is_close_to_a_forward_pass():
    for family in ("falcon_h1", "lfm2", "mamba", "falcon_mamba"):
        actor = ActorCritic(recurrent(family, initializer_range=0.1).to(torch.bfloat16))
        rollout = make_generator(actor, batch_size=4, **SHORT).generate(make_prompts(6), torch.arange(6))
        for row in range(6):
            own = own_logprobs(actor.model, rollout, row).float()
            assert (rollout.logprobs[row, : len(own)] - own).abs().max() < 0.15


def test_a_state_per_sequence_has_no_pages():
    with pytest.raises(
        ValueError, match=r"rollout\.cache: got 'paged' for Lfm2ForCausalLM, expected 'auto' or 'slots'"
    ):
        make_generator(recurrent_actor("lfm2"), cache="paged")


def test_kinds_of_layers_that_slots_cannot_hold_are_refused(monkeypatch):
    actor = recurrent_actor("lfm2")
    actor.model.config.layer_types = ["conv", "chunked_attention", "conv"]
    with pytest.raises(ValueError, match="Lfm2ForCausalLM has layers of kind chunked_attention next to recurrent ones"):
        make_generator(actor)

    class Compressed(cache_utils.DynamicLayer):
        pass

    monkeypatch.setitem(cache_utils.DYNAMIC_LAYER_TYPE_MAPPING, "full_attention", Compressed)
    with pytest.raises(ValueError, match="Lfm2ForCausalLM keeps a Compressed, which cannot be sampled"):
        make_generator(recurrent_actor("lfm2"))


def test_a_state_outside_of_the_cache_is_refused(monkeypatch):
    actor = recurrent_actor("lfm2")
    monkeypatch.setattr(cache_utils.LinearAttentionLayer, "lazy_initialization", lambda self, *args, **rest: None)
    monkeypatch.setattr(
        cache_utils.LinearAttentionLayer, "update_conv_state", lambda self, states, *args, **rest: states
    )
    with pytest.raises(ValueError, match="Lfm2ForCausalLM keeps its recurrent state outside of transformers' cache"):
        make_generator(actor)


@pytest.mark.parametrize(
    "family, reason",
    [
        ("minimax", "MiniMaxForCausalLM does not accept transformers' cache"),
        ("recurrent_gemma", "RecurrentGemmaForCausalLM keeps its recurrent state outside of transformers' cache"),
        ("rwkv", "RwkvForCausalLM has a recurrent state"),
        ("xlstm", "xLSTMForCausalLM has a recurrent state"),
    ],
)
def test_states_in_no_cache_of_transformers_are_refused_for_sampling_only(family, reason):
    actor = ActorCritic(build(family))
    with pytest.raises(ValueError, match=reason) as refused:
        make_generator(actor)
    assert "\n" not in str(refused.value) and "it can be scored and" in str(refused.value)


def test_a_dtype_in_which_a_model_cannot_run_is_one_line():
    with pytest.raises(
        ValueError, match=r"xLSTMForCausalLM cannot run in torch\.bfloat16 on cpu; set a different dtype"
    ) as found:
        ActorCritic(build("xlstm").to(torch.bfloat16))
    assert "\n" not in str(found.value)


def test_a_release_of_transformers_without_recurrent_layers_is_refused(monkeypatch):
    actor = recurrent_actor("lfm2")
    monkeypatch.delattr(cache_utils, "LinearAttentionLayer")
    with pytest.raises(ValueError, match="this release of transformers has no LinearAttentionLayer; install"):
        make_generator(actor)


def test_a_model_that_amplifies_rounding_is_not_refused(monkeypatch):
    """One forward pass of this model in float32 has 16 times the usual error, because a norm divides by nearly zero."""
    actor = ActorCritic(build("qwen3_5_moe_text"))
    make_generator(actor)
    monkeypatch.setattr(protocol, "_change_by_rounding", lambda *_: 0.0)
    with pytest.raises(ValueError, match="decoded token by token differ"):
        make_generator(actor)


@pytest.mark.parametrize("family", ["falcon_h1", "lfm2", "qwen3_next"])
def test_one_update_of_ppo(family):
    trainer = make_trainer(model=recurrent(family, initializer_range=0.1), updates=1)
    before = weights_of(trainer)
    log = trainer.step()
    assert log["logprob_deviation"] < 1e-4
    changed = [name for name, weight in weights_of(trainer).items() if not torch.equal(weight, before[name])]
    assert any("conv" in name for name in changed) and any("lm_head" in name for name in changed)
