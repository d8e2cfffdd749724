"""Micro-batches with a token budget: how they are cut, and that neither cutting nor packing changes the gradient."""

import inspect
from dataclasses import fields

import pytest
import torch
from torch.nn.attention.varlen import varlen_attn
from transformers import LlamaModel

from rlhf_engine.config import OptimConfig, PPOConfig, SFTConfig
from rlhf_engine.data import Example
from rlhf_engine.memory.passes import MicrobatchSize
from rlhf_engine.model import ActorCritic, ValueHead
from rlhf_engine.model.layout import token_cuts
from rlhf_engine.model.reward_model import RewardModel
from rlhf_engine.model.trunk import check_packing, packed_attention, packs, positions, varlen_attention
from rlhf_engine.rollout import Rollout, recompute
from rlhf_engine.supervised.sft import _parts, fit_language_model
from tests.engine.helpers.rollouts import RESPONSES, gradients, make_rollout, sequence_of
from tests.engine.helpers.tiny_models import tiny
from tests.engine.helpers.tiny_trainer import make_trainer, weights_of

BUDGETS = (1, 13, 17, 30, 1000)


def make_policy(family="llama", *, value_model=False, **settings) -> ActorCritic:
    """Return a policy that computes in float64, so that rounding does not hide mistakes."""
    model = tiny(family, initializer_range=0.2)
    if value_model:
        policy = ActorCritic(model, RewardModel.from_causal_lm(model, 4), backend="reference", **settings)
    else:
        head = ValueHead.from_weights(torch.linspace(-0.3, 0.4, 32), 0.1)
        policy = ActorCritic(model, head, backend="reference", **settings)
    return policy.double()


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Compare up to the rounding of the loss, which is float32 for models of any dtype."""
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        worst = float((found[name] - gradient).abs().max())
        assert worst <= 2e-6 * float(gradient.abs().max()) + 1e-9, f"{name}: {worst} of {float(gradient.abs().max())}"


def test_cuts_by_hand():
    lengths = [9, 7, 4, 4, 2, 1]
    assert token_cuts(lengths, 14) == [1, 2, 3]  # 9 | 7 7 | 4 4 4: padding counts
    assert token_cuts(lengths, 14, packed=True) == [1, 2, 3]  # 9 | 7 4 | 4 2 1
    assert token_cuts(lengths, 16) == [1, 2, 3]
    assert token_cuts(lengths, 16, packed=True) == [2, 4]  # 9 7 | 4 4 2 1
    assert token_cuts(lengths, 8) == [1, 1, 2, 2]  # 9, which exceeds the budget; 7; 4 4; 2 2
    assert token_cuts(lengths, 1) == [1] * 6
    assert token_cuts([3], 100) == [1]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("budget", BUDGETS)
def test_no_batch_exceeds_its_budget_and_no_sequence_is_split(budget, packed):
    rollout = make_rollout()
    batches = list(rollout.batches(torch.arange(7), 16, budget, packed=packed))
    for batch in batches:
        assert batch.input_ids.numel() <= budget or len(batch.cu_seqlens) == 2
    assert sum(len(batch.ids) for batch in batches) == sum(RESPONSES)
    assert (
        sorted(torch.cat([batch.source for batch in batches]).tolist())
        == rollout.mask.view(-1).nonzero()[:, 0].tolist()
    )


def test_packed_layout_by_hand():
    rollout = make_rollout()
    batch = rollout.batch(torch.tensor([1, 3]), packed=True)
    row3, row1 = sequence_of(rollout, 3), sequence_of(rollout, 1)
    assert batch.input_ids.tolist() == [[int(row1[0]), *row3[:-1].tolist()]]  # prompts 1 and 3, responses 1 and 5
    assert batch.cu_inputs.tolist() == [0, 1, 8]
    assert batch.rows.tolist() == [0, 3, 4, 5, 6, 7]
    assert batch.ids.tolist() == [int(row1[1]), *row3[3:].tolist()]
    assert batch.cu_seqlens.tolist() == [0, 1, 6]
    assert positions(batch.cu_inputs, 8).tolist() == [0, 0, 1, 2, 3, 4, 5, 6]


AGGREGATIONS = ("token_mean", "seq_mean_token_sum", "seq_mean_token_mean", "token_sum")


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("packed", [False, True])
def test_any_cut_gives_the_gradient_of_the_whole_minibatch(packed, aggregation, level):
    rollout, policy = make_rollout(), make_policy()
    settings = {"aggregation": aggregation, "ratio_level": level, "entropy_coef": 0.01}
    whole = gradients(policy, rollout, microbatch=7, **settings)
    policy.packs = packed
    for budget in BUDGETS:
        assert_same(gradients(policy, rollout, microbatch_tokens=budget, **settings), whole)


@pytest.mark.parametrize("family", ["llama", "gpt2_tied", "mistral", "qwen2_tied", "cohere", "granite"])
def test_packed_gives_the_padded_gradient(family):
    """Cover positions that restart, grouped keys, windows of 7 that end within a sequence, and tied heads."""
    rollout, policy = make_rollout(), make_policy(family)
    whole = gradients(policy, rollout, microbatch=7)
    policy.packs = True
    assert_same(gradients(policy, rollout, microbatch_tokens=30), whole)


def test_packed_value_model_and_scores():
    rollout, policy = make_rollout(torch.float64), make_policy(value_model=True)
    whole = gradients(policy, rollout, microbatch=7)
    both = ("logprobs", "values")
    padded = recompute(policy, rollout, both, microbatch=2)
    policy.packs = True
    assert_same(gradients(policy, rollout, microbatch_tokens=30), whole)
    budget = {"microbatch": 16, "microbatch_tokens": 30}
    torch.testing.assert_close(recompute(policy, rollout, both, **budget), padded, rtol=1e-6, atol=1e-6)
    alone = recompute(policy, rollout, ("values",), **budget)
    torch.testing.assert_close(alone["values"], padded["values"], rtol=1e-6, atol=1e-6)


def test_training_with_a_token_budget_equals_training_without():
    one, other = make_trainer(microbatch=8), make_trainer(microbatch=16, microbatch_tokens=40)
    first, second = one.step(), other.step()
    assert first["policy_loss"] == pytest.approx(second["policy_loss"], abs=1e-5)
    for name, weight in weights_of(one).items():
        torch.testing.assert_close(weights_of(other)[name], weight, rtol=1e-3, atol=1e-4)


def test_the_varlen_kernel_gets_the_right_arguments():
    """In a stand-in for the CUDA kernel, arguments bind to its signature and the result equals `packed_attention`."""
    torch.manual_seed(0)
    query, (key, value) = torch.randn(1, 4, 9, 8), torch.randn(2, 1, 2, 9, 8)
    cu_inputs, seen = torch.tensor([0, 5, 9], dtype=torch.int32), {}

    def kernel(*args, **options):
        bound = inspect.signature(varlen_attn).bind(*args, **options).arguments
        seen.update(bound)
        mask = cu_inputs[None, None, None]
        window = bound["window_size"][0] + 1 or None
        q, k, v = (bound[name].transpose(0, 1)[None] for name in ("query", "key", "value"))
        return packed_attention(None, q, k, v, mask, bound["scale"], window)[0][0]

    for window in (None, 3):
        found = varlen_attention(query, key, value, cu_inputs, 5, 0.3, window, kernel)
        expected, _ = packed_attention(None, query, key, value, cu_inputs[None, None, None], 0.3, window)
        torch.testing.assert_close(found, expected)
        assert seen["query"].shape == (9, 4, 8) and seen["key"].shape == (9, 2, 8) and seen["enable_gqa"]
        assert (seen["max_q"], seen["max_k"], seen["window_size"]) == (5, 5, (-1 if window is None else 2, 0))


def test_demonstrations_are_cut_by_tokens():
    """Inputs of 1, 2, 4, 4, 7 and 9 tokens with a budget of 14; see `test_cuts_by_hand`."""
    lengths = [2, 3, 5, 5, 8, 10]
    size = MicrobatchSize(microbatch=6, microbatch_tokens=14)
    assert _parts([0, 1, 2, 3, 4, 5], lengths, size) == [[5], [4, 3], [2, 1, 0]]
    with pytest.raises(ValueError, match="microbatch is 2 and microbatch_tokens is 14; set only one of the two"):
        SFTConfig(microbatch=2, microbatch_tokens=14)


def test_supervised_learning_by_tokens_is_the_same():
    examples, results = [Example((4, 5), (6,) * n + (2,)) for n in (1, 6, 3, 2)], []
    for size in ({}, {"microbatch_tokens": 9}):
        model, config = tiny(), SFTConfig(epochs=1, batch_size=4, optim=OptimConfig(lr=1e-3), **size)
        fit_language_model(ActorCritic(model), examples, examples, config, pad_id=0, seed=1)
        results.append(torch.cat([parameter.flatten() for parameter in model.parameters()]))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=2e-5)


class Leaky(LlamaModel):
    """A trunk in which every state depends on all states before it, across sequences, as in a recurrent layer."""

    def forward(self, *args, **options):
        output = super().forward(*args, **options)
        output.last_hidden_state = output.last_hidden_state.cumsum(1)
        return output


def test_a_trunk_whose_packed_sequences_affect_each_other_is_refused():
    model = tiny()
    check_packing(model.model, None)
    with pytest.raises(ValueError, match=r"ppo\.microbatch_tokens: Leaky cannot use a token budget"):
        check_packing(Leaky(model.config).eval(), None)


@pytest.mark.parametrize("value_model", [False, True])
def test_the_check_of_packing_includes_the_value_model(value_model):
    leaky = RewardModel(Leaky(tiny().config), ValueHead(32))
    policy = ActorCritic(tiny(), leaky) if value_model else ActorCritic(tiny())
    policy.check_packing()  # passes, because a CPU does not pack
    policy.packs = True
    if value_model:
        with pytest.raises(ValueError, match="Leaky cannot use a token budget"):
            policy.check_packing()
    else:
        policy.check_packing()


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "gpt2_tied", "mistral"])
def test_packed_on_a_gpu_is_near_the_padded_gradient(family):
    """Both are in bfloat16, with torch's kernels for packed and for padded sequences."""
    rollout = make_rollout()
    held = {item.name: getattr(rollout, item.name) for item in fields(rollout)}
    rollout = Rollout(**{name: None if tensor is None else tensor.cuda() for name, tensor in held.items()})
    policy = ActorCritic(tiny(family, initializer_range=0.2).cuda(), compute_dtype=torch.bfloat16)
    assert policy.packs
    policy.check_packing()
    whole = gradients(policy, rollout, microbatch=7)
    found = gradients(policy, rollout, microbatch_tokens=30)
    for name, gradient in whole.items():
        assert float((found[name] - gradient).norm()) <= 0.05 * float(gradient.norm()), name


def test_only_a_gpu_in_half_precision_packs():
    model = tiny()
    assert not packs(model, None) and not packs(model, torch.bfloat16)


def test_a_softcap_in_attention_is_refused():
    x = torch.randn(1, 2, 4, 8)
    with pytest.raises(ValueError, match=r"softcap: got 50\.0, expected None"):
        packed_attention(None, x, x, x, torch.tensor([[[[0, 4]]]]), softcap=50.0)


def test_microbatch_together_with_microbatch_tokens_is_refused():
    with pytest.raises(ValueError, match="microbatch: got 8, expected 16; only microbatch_tokens None reads it"):
        PPOConfig(microbatch=8, microbatch_tokens=100)
    assert PPOConfig(rollout_batch=4, minibatch=4, microbatch_tokens=100).microbatch == 16
