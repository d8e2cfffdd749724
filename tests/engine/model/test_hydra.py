"""Training of the top layers, passes that begin above the frozen ones, and the reference that shares those."""

import copy
from dataclasses import replace

import pytest
import torch

from benchmarks.families.configs import build
from rlhf_engine.config import AdapterConfig
from rlhf_engine.model import ActorCritic, FrozenCopy, LanguageModel, TokenBatch, frozen_copy
from rlhf_engine.model.adapters import Adapters
from rlhf_engine.model.layout import input_places
from rlhf_engine.model.references import Hydra
from rlhf_engine.model.roles import POLICY
from rlhf_engine.model.saving import copy_weights, save_policy
from rlhf_engine.model.top_layers import train_top
from rlhf_engine.model.trunk import top_of
from rlhf_engine.optim.ema import WeightAverage
from tests.engine.helpers.adapted_models import moved
from tests.engine.helpers.rollouts import gradients, make_rollout
from tests.engine.helpers.tiny_models import FAMILIES, VOCABULARY, tiny

RANK = AdapterConfig(rank=4, alpha=8.0)


def deep(family="llama", **changes):
    """Return a tiny model with four layers."""
    layers = {"n_layer": 4} if family.startswith("gpt2") else {"num_hidden_layers": 4}
    return tiny(family, initializer_range=0.1, **layers, **changes)


def top_policy(family="llama", count=2, *, rank=0, dtype=torch.float32, attention=None, changes=None, **settings):
    """Return a policy with `count` trained layers, all of them or with adapters that change the model."""
    model = deep(family, **(changes or {})).to(dtype)
    if attention is not None:
        model.set_attn_implementation(attention)
    train_top(model, count)
    if rank:
        moved(Adapters.start(model, RANK, seed=0))
    return ActorCritic(model, **settings)


def perturb(policy, seed=3):
    """Change what a policy trains, as an update does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, tensor in policy.stored():
            tensor.add_(0.05 * torch.randn(tensor.shape, generator=generator).to(tensor))


def whole_and_split(policy, rollout=None):
    """Yield each micro-batch of a rollout and the same one with the states of the frozen layers."""
    for batch in (rollout or make_rollout()).batches(torch.arange(7), 3):
        yield batch, replace(batch, states=policy.states_below(batch))


def gradient_of(policy, batch):
    policy.zero_grad()
    outputs = policy(batch, ("logprobs", "values"))
    (outputs.logprobs.sum() + outputs.values.square().sum()).backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


def equal(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# ---- what is trained ----


@pytest.mark.parametrize(
    ("family", "last"),
    [
        ("llama", ("model.norm.weight", "lm_head.weight")),
        ("llama_tied", ("model.norm.weight",)),
        ("gpt2", ("transformer.ln_f.weight", "transformer.ln_f.bias", "lm_head.weight")),
        ("gpt2_tied", ("transformer.ln_f.weight", "transformer.ln_f.bias")),
    ],
)
def test_the_top_layers_the_norm_and_an_untied_output_layer_are_trained(family, last):
    model = deep(family)
    train_top(model, 1)
    layer = {"llama": "model.layers.3.", "gpt2": "transformer.h.3."}[family.removesuffix("_tied")]
    found = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert found == [name for name, _ in model.named_parameters() if name.startswith(layer)] + list(last)
    policy = ActorCritic(model)
    stored = [name for name, _ in policy.stored()]
    assert stored == [f"model.{name}" for name in found] + ["value.weight", "value.bias"]
    assert [name for name, _ in frozen_copy(policy).stored()] == stored


def test_adapters_are_in_the_top_layers_only():
    policy = top_policy(rank=4)
    names = policy.adapters.places[POLICY]
    assert len(names) == 14 and all(name.startswith(("model.layers.2.", "model.layers.3.")) for name in names)
    assert all("lora_" in name for name, p in policy.model.named_parameters() if p.requires_grad)


def test_a_target_below_the_top_layers_is_refused():
    model = deep()
    train_top(model, 2)
    with pytest.raises(
        ValueError, match=r"adapter\.targets: got 'layers\.0\.mlp\.up_proj', which matches no layer that"
    ):
        Adapters.start(model, AdapterConfig(rank=2, targets=("q_proj", "layers.0.mlp.up_proj")), seed=0)


def test_copies_share_the_frozen_weights_and_averages_keep_their_dtype():
    policy = top_policy(dtype=torch.bfloat16)
    trained = {name for name, _ in policy.stored()}
    for theirs in (FrozenCopy(policy).model, frozen_copy(policy), WeightAverage(policy, 0.5).model):
        found = dict(theirs.named_parameters())
        for name, weight in policy.model.named_parameters(prefix="model"):
            assert (found[name] is weight) == (name not in trained), name
    average = WeightAverage(policy, 0.5)
    assert {p.dtype for _, p in average.model.stored()} == {torch.float32}
    assert {p.dtype for p in policy.model.parameters()} == {torch.bfloat16}


def test_more_layers_than_the_model_has_and_a_second_call_are_refused():
    with pytest.raises(
        ValueError, match=r"model\.train_layers: got 5, expected at most 4, the number of layers of Llama"
    ):
        train_top(deep(), 5)
    model = deep()
    train_top(model, 4)
    with pytest.raises(ValueError, match="of which only the top layers are trained already"):
        train_top(model, 2)


def test_layers_that_share_weights_with_those_below_are_refused():
    model = deep()
    model.model.layers[3].mlp = model.model.layers[0].mlp
    with pytest.raises(ValueError, match=r"share the weight layers\.0\.mlp\.gate_proj\.weight with those below"):
        train_top(model, 1)


# ---- passes that begin above the frozen layers ----


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_values_and_gradients_have_the_bits_of_a_whole_pass(family, rank):
    policy = top_policy(family, rank=rank)
    with torch.no_grad():
        policy.value.weight.normal_(generator=torch.Generator().manual_seed(2))
    for whole, split in whole_and_split(policy):
        assert equal(gradient_of(policy, whole), gradient_of(policy, split))
        ours, theirs = (policy(batch, ("logprobs", "values", "hidden")) for batch in (split, whole))
        assert torch.equal(ours.logprobs, theirs.logprobs) and torch.equal(ours.values, theirs.values)
        assert torch.equal(ours.hidden, theirs.hidden)


@pytest.mark.parametrize("count", [1, 3, 4])
def test_any_number_of_layers(count):
    policy = top_policy(count=count)
    for whole, split in whole_and_split(policy):
        assert equal(gradient_of(policy, whole), gradient_of(policy, split))


@pytest.mark.parametrize(
    "settings",
    [
        {"dtype": torch.bfloat16},
        {"compute_dtype": torch.bfloat16},
        {"gradient_checkpointing": True},
        {"attention": "eager"},
        {"gradient_checkpointing": True, "compute_dtype": torch.bfloat16, "rank": 4},
    ],
    ids=str,
)
def test_the_bits_are_the_same_with_every_way_to_compute(settings):
    policy = top_policy(**settings)
    for whole, split in whole_and_split(policy):
        assert equal(gradient_of(policy, whole), gradient_of(policy, split))


def test_a_pass_begins_at_the_states():
    """Other states give other log-probs, and the tokens have no effect."""
    policy = top_policy()
    whole, split = next(whole_and_split(policy))
    expected = policy(whole, ("logprobs",)).logprobs
    assert not torch.equal(policy(replace(split, states=2 * split.states), ("logprobs",)).logprobs, expected)
    other = replace(split, input_ids=split.input_ids.flip(0))
    assert torch.equal(policy(other, ("logprobs",)).logprobs, expected)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_left_padding_and_packed_sequences(family):
    policy, rollout = top_policy(family), make_rollout()
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (3, 12), generator=generator)
    mask = (torch.arange(12) >= torch.tensor([5, 0, 2])[:, None]).long()
    left = TokenBatch(input_ids=ids, attention_mask=mask)
    found = policy(replace(left, states=policy.states_below(left)), ("hidden",)).hidden
    assert torch.equal(found, policy(left, ("hidden",)).hidden)
    if family == "gemma2":  # torch's attention of packed sequences has no softcap
        return
    packed = rollout.batch(torch.tensor([4, 0, 3]), packed=True)
    assert packed.cu_inputs is not None
    found = policy(replace(packed, states=policy.states_below(packed)), ("logprobs",)).logprobs
    assert torch.equal(found, policy(packed, ("logprobs",)).logprobs)


def test_the_layers_of_the_model_are_put_back_after_an_error():
    policy = top_policy()
    whole, split = next(whole_and_split(policy))
    before = list(policy.trunk.layers)
    with pytest.raises(RuntimeError):
        policy(replace(split, states=split.states[..., :3]), ("hidden",))
    assert list(policy.trunk.layers) == before
    policy(whole, ("hidden",))


# ---- states of a rollout ----


@pytest.mark.parametrize("packed", [False, True])
def test_inputs_are_numbered_sequence_after_sequence(packed):
    lengths, sequences = torch.tensor([2, 4, 1]), torch.tensor([2, 1])
    places, real = input_places(lengths, sequences, packed=packed)
    if packed:
        assert places.tolist() == [[6, 2, 3, 4, 5]] and real.all()
    else:
        assert places.tolist() == [[6, 6, 6, 6], [2, 3, 4, 5]]
        assert real.tolist() == [[True, False, False, False], [True, True, True, True]]


class Packing(Hydra):
    packs = True


@pytest.mark.parametrize("kind", [Hydra, Packing])
def test_a_rollout_gathers_its_states_for_every_micro_batch(kind):
    """The states of a token depend on the padding of its micro-batch by rounding only."""
    policy = top_policy()
    rollout = make_rollout().starting_from(kind(policy), 3, 24)
    assert rollout.states.shape == (int(rollout.input_lengths.sum()), 32)
    for sequences in (torch.tensor([3]), torch.tensor([5, 1, 6]), torch.arange(7)):
        for part in (rollout.batch(sequences), rollout.take(sequences).batch(torch.arange(len(sequences)))):
            expected = policy.states_below(replace(part, states=None))
            torch.testing.assert_close(part.states[part.real], expected[part.real], rtol=0, atol=2e-6)
            assert part.states.isfinite().all()
        packed = rollout.batch(sequences, packed=True)
        assert torch.equal(packed.states[0], rollout.batch(sequences).states[part.real])
    alone = make_rollout().starting_from(FrozenCopy(policy), 3)
    assert alone.states is None


def test_the_gradient_of_an_update_differs_by_rounding_only():
    """Micro-batches of training are padded otherwise than those of scoring."""
    policy = top_policy()
    plain = make_rollout()
    stored = plain.starting_from(Hydra(policy), 3)
    ours, theirs = (gradients(policy, rollout, microbatch=2) for rollout in (stored, plain))
    assert ours.keys() == theirs.keys() == {name for name, _ in policy.stored()}
    for name, gradient in theirs.items():
        assert (ours[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name
    same = plain.starting_from(Hydra(policy), 2)
    assert equal(gradients(policy, same, microbatch=2), theirs)


# ---- the reference ----


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("family", ["llama", "llama_tied", "gpt2_tied", "gemma2", "cohere"])
def test_hydra_has_the_bits_of_a_frozen_copy_before_and_after_the_policy_changes(family, rank):
    policy = top_policy(family, rank=rank)
    if rank:  # the starting policy is the model without an adapter
        policy.adapters.copy(
            POLICY, {k: torch.zeros_like(t) for k, t in policy.adapters.tensors(POLICY).items()}, "test"
        )
    reference, expected = Hydra(policy), FrozenCopy(policy)
    rollout = make_rollout().starting_from(reference, 3)
    for _ in "12":
        for batch in rollout.batches(torch.arange(7), 3):
            ours = reference.logprobs(batch, temperature=0.7)
            plain = replace(batch, states=None)
            assert torch.equal(ours, expected.logprobs(plain, temperature=0.7))
            assert torch.equal(ours, reference.logprobs(plain, temperature=0.7))
        perturb(policy)
    assert not torch.equal(policy(batch, ("logprobs",), temperature=0.7).logprobs, ours)
    assert not ours.requires_grad


def test_hydra_excludes_the_ids_that_no_tokenizer_has():
    policy = top_policy()
    reference = Hydra(policy)
    policy.restrict(range(VOCABULARY - 9))
    batch = next(make_rollout().batches(torch.arange(7), 7))
    batch = replace(batch, ids=batch.ids.clamp(max=VOCABULARY - 10))
    ours = reference.logprobs(batch, temperature=1.0)
    assert torch.equal(ours, FrozenCopy(policy).logprobs(batch, temperature=1.0))


def test_hydra_copies_what_is_trained_and_nothing_else():
    policy = top_policy()
    reference = Hydra(policy)
    trained = {name for name, _ in policy.stored() if name.startswith("model.")}
    assert reference.frozen.keys() == trained
    expected = dict(FrozenCopy(policy).weights())
    found = dict(reference.weights())
    assert equal(found, expected)
    perturb(policy)
    assert equal(dict(reference.weights()), expected)
    assert not Hydra(top_policy(rank=4)).frozen


def test_hydra_without_lower_layers_stores_no_states():
    policy = top_policy(count=4)
    assert make_rollout().starting_from(Hydra(policy), 3).states is None


# ---- refused ----


def test_hydra_needs_frozen_layers():
    with pytest.raises(ValueError, match=r"ppo\.reference: got 'hydra' for a policy that trains all layers, expected"):
        Hydra(ActorCritic(deep()))


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("gemma3n", "whose top layers read more than one vector per token from those below"),
        ("gemma4_shared", "whose top layers cannot run without those below"),
    ],
)
def test_models_whose_layers_read_more_than_the_output_of_the_last_are_refused(family, message):
    model = build(family)
    train_top(model, model.config.get_text_config().num_hidden_layers // 2)
    with pytest.raises(
        ValueError, match=f"ppo.reference: got 'hydra', or 'auto' .*{message}.*set ppo.reference to frozen_copy"
    ):
        Hydra(LanguageModel(model))


def test_layers_that_depend_on_more_than_their_input_are_refused():
    """The last layer adds the embedding of the tokens, which the frozen layers keep for it."""
    model = deep()
    train_top(model, 2)
    kept, first, last = {}, model.model.layers[0], model.model.layers[3]
    first.register_forward_hook(lambda module, inputs, output: kept.update(own=output))
    last.register_forward_hook(lambda module, inputs, output: output + kept.pop("own", 0.0))
    with pytest.raises(ValueError, match="whose top layers read more than one vector per token from those below"):
        top_of(model.model).check_split(model.model, None)


def test_the_balancing_loss_of_experts_is_refused():
    model = build("mixtral", output_router_logits=True)
    train_top(model, 1)
    policy = ActorCritic(model)
    assert policy.balance is not None
    with pytest.raises(ValueError, match=r"ppo\.reference: got 'hydra', .* for a model with the balancing loss"):
        Hydra(policy)
    policy.balance = None
    Hydra(policy)


def test_a_copy_of_a_policy_runs_by_itself():
    policy = top_policy()
    other = copy.deepcopy(policy)
    assert top_of(other.trunk) == top_of(policy.trunk)
    perturb(other)
    batch = next(make_rollout().batches(torch.arange(7), 7))
    states = policy.states_below(batch)
    assert torch.equal(other.states_below(batch), states)
    assert not torch.equal(other(batch, ("logprobs",)).logprobs, policy(batch, ("logprobs",)).logprobs)


def test_adapters_below_the_top_layers_are_refused():
    """Their output would be part of the states that policy and reference share."""
    model = tiny("llama", num_hidden_layers=3)
    Adapters.start(model, AdapterConfig(rank=2), seed=0)
    train_top(model, 1)
    with pytest.raises(
        ValueError, match="got the adapter 'policy' in layers below the trained ones, expected it in the top"
    ):
        Hydra(ActorCritic(model))


def test_an_average_of_top_layers_is_loaded_from_a_complete_folder_with_its_bits(tmp_path):
    """The frozen weights that it shares with the policy are in half precision, the average is not."""
    model = tiny("llama", num_hidden_layers=3).to(torch.bfloat16)
    train_top(model, 1)
    average = WeightAverage(ActorCritic(model), 0.5).model
    with torch.no_grad():
        for _, tensor in average.stored():
            tensor.add_(1e-4)  # below the rounding of bfloat16
    expected = {name: tensor.clone() for name, tensor in average.stored()}
    save_policy(tmp_path, average, None)
    copy_weights(tmp_path, average)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in average.stored())
