"""The conventions of each peer by hand: position of the score, holes in masks, clamps, and refused arguments.

`make test-peers` runs the comparisons with the originals, which are in `peers`.
"""

import math
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from rlhf_kernels import reference
from rlhf_kernels.integrations import deepspeed_chat, openrlhf, trl, trl_grpo, verl

T = 8
# An example with five actions in eight positions, score 1, gamma 1, lambda .95, and these values of the states.
VALUES = torch.tensor([[0.1, -0.2, 0.3, 0.05, -0.326, 0.046, 0.0, 0.0]])
ACTIONS = torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0]])
ZERO = torch.zeros(1, T)


def ppo_config(**changes) -> SimpleNamespace:
    config = {
        "kl_coef": 0.05,
        "kl_estimator": "k1",
        "gamma": 1.0,
        "lam": 0.95,
        "whiten_rewards": False,
        "cliprange": 0.2,
        "cliprange_value": 0.2,
        "vf_coef": 0.1,
        "temperature": 0.7,
    }
    return SimpleNamespace(**config | changes)


def test_score_and_value_after_the_end_token():
    """The advantage at the end token is r + V' - V.

    In TRL PPO and DeepSpeed-Chat the next position has the score, so that it adds to the advantage by lambda.
    """
    v_end, v_after = VALUES[0, 4].item(), VALUES[0, 5].item()
    made = trl.PPO(ppo_config()).rollout(ZERO, ZERO, VALUES, torch.ones(1), torch.tensor([4]))
    after = 1 - v_after  # the score, and a value that is trained, are at the position after the end token
    assert made.returns[0, 5].item() == pytest.approx(1)
    assert made.rewards[0].tolist() == [0, 0, 0, 0, 0, 1, 0, 0]
    assert (made.returns - VALUES)[0, 4].item() == pytest.approx(v_after - v_end + 0.95 * after)

    rewards = openrlhf.compute_reward(torch.ones(1), 0.05, ZERO, ACTIONS)
    assert rewards[0].tolist() == [0, 0, 0, 0, 1, 0, 0, 0]
    for advantages in (
        openrlhf.get_advantages_and_returns(VALUES, rewards, ACTIONS, 1.0, 0.95)[0],
        verl.compute_gae_advantage_return(rewards, VALUES, ACTIONS, 1.0, 0.95)[1] - VALUES,
        trl.Classic(ppo_config(), None).compute_advantages(VALUES, rewards, ACTIONS)[2] - VALUES,
    ):
        assert advantages[0, 4].item() == pytest.approx(1 - v_end)

    chat = deepspeed_chat.PPO()
    rewards = chat.compute_rewards(torch.zeros(1, 1), ZERO, ZERO, torch.ones(1), ACTIONS)
    assert rewards[0].tolist() == [0, 0, 0, 0, 0, 1, 0, 0]
    kept = torch.where(torch.arange(T) < 6, VALUES, 0)
    advantages, _ = chat.get_advantages_and_returns(kept, rewards, 0)
    assert advantages[0, 4].item() == pytest.approx(v_after - v_end + 0.95 * after)


def test_deepspeed_chat_scores_the_end_token_if_it_is_pad():
    """The mask is True for ids other than pad. If the end token is pad, it is the first masked position and has the score."""
    without_end = torch.tensor([[1, 1, 1, 1, 0, 0, 0, 0]])
    rewards = deepspeed_chat.PPO().compute_rewards(torch.zeros(1, 1), ZERO, ZERO, torch.tensor([9.0]), without_end)
    assert rewards[0].tolist() == [0, 0, 0, 0, 5, 0, 0, 0]  # clipped at 5


@pytest.mark.parametrize("length", [0, 1, T - 1, T])
def test_trl_score_slot(length):
    """The score is at the position after the last action, or at the last action if the response fills the row."""
    made = trl.PPO(ppo_config()).rollout(ZERO, ZERO, ZERO, torch.ones(1), torch.tensor([length - 1]))
    assert made.rewards[0].nonzero().flatten().tolist() == [min(length, T - 1)]
    assert made.mask.sum() == length and made.value_mask.sum() == min(length + 1, T)


def test_verl_skips_holes_and_the_others_discount_over_them():
    rewards, values = torch.tensor([[0.0, 0.0, 0.0, 1.0]]), torch.zeros(1, 4)
    mask = torch.tensor([[1, 0, 0, 1]])
    _, returns = verl.compute_gae_advantage_return(rewards, values, mask, 1.0, 0.5)
    assert returns[0].tolist() == [0.5, 0, 0, 1]
    advantages, _ = openrlhf.get_advantages_and_returns(values, rewards, mask, 1.0, 0.5)
    assert advantages[0].tolist() == [0.125, 0.25, 0.5, 1]


def test_clamps_of_the_log_ratio():
    """At a log-ratio of 30 the ratio is exp(20) in verl and OpenRLHF 0.11; OpenRLHF 0.7 and DeepSpeed-Chat do not clamp."""
    new, old, a = torch.tensor([[30.0]]), torch.tensor([[0.0]]), torch.tensor([[-1.0]])
    mask = torch.ones(1, 1)
    loss, *_ = verl.compute_policy_loss(old, new, a, mask, 0.2, clip_ratio_c=1e30)
    assert loss.item() == pytest.approx(math.exp(20), rel=1e-6)
    assert openrlhf.PolicyLoss()(new, old, a, mask)[0].item() == pytest.approx(math.exp(20), rel=1e-6)
    for unclamped in (openrlhf.PolicyLoss07(), deepspeed_chat.PPO().actor_loss_fn):
        assert unclamped(new, old, a, mask).item() == pytest.approx(math.exp(30), rel=1e-6)


def test_a_group_of_one_keeps_its_score_in_verl():
    """Scores 1 and 1.00002 have a deviation of 1.41e-5, to which verl adds 1e-6."""
    rewards = torch.tensor([[0.5, 0.5], [1.00002, 9.0], [5.0, 0.0]])
    mask = torch.tensor([[1.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    rewards[1, 1] = 0.0
    index = np.array(["a", "a", "b"])
    advantages, returns = verl.compute_grpo_outcome_advantage(rewards, mask, index)
    apart = (rewards[1, 0] - 1).item()
    first = apart / 2 / (apart / math.sqrt(2) + 1e-6)
    expected = [-first, -first, first, 0.0, 5 / (1 + 1e-6), 5 / (1 + 1e-6)]
    assert advantages.flatten().tolist() == pytest.approx(expected, rel=1e-5) and torch.equal(advantages, returns)
    plain, _ = verl.compute_grpo_outcome_advantage(rewards, mask, index, norm_adv_by_std_in_grpo=False)
    assert plain[:, 0].tolist() == pytest.approx([-apart / 2, apart / 2, 5.0], rel=1e-5)


def test_dual_clip_is_always_on_in_verl():
    new, old, a = torch.tensor([[2.0]]), torch.tensor([[0.0]]), torch.tensor([[-1.0]])
    loss, clipped, kl, lower = verl.compute_policy_loss(old, new, a, torch.ones(1, 1), 0.2)
    assert (loss.item(), clipped.item(), kl.item(), lower.item()) == (3, 0, -2, 1)
    assert openrlhf.PolicyLoss()(new, old, a)[0].item() == pytest.approx(math.exp(2))


def test_aggregations_by_hand():
    """Losses are 1, 2, 3 in the first row and 6 in the second, of four positions. An empty row is not a sequence."""
    a = -torch.tensor([[1.0, 2, 3, 9], [6, 9, 9, 9], [9, 9, 9, 9]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]])
    zero = torch.zeros(3, 4)
    expected = {
        "token-mean": 3.0,
        "token-sum": 12.0,
        "seq-mean-token-sum": 6.0,
        "seq-mean-token-sum-norm": 1.5,
        "seq-mean-token-mean": 4.0,
    }
    for mode, loss in expected.items():
        assert verl.compute_policy_loss(zero, zero, a, mask, 0.2, loss_agg_mode=mode)[0].item() == pytest.approx(
            loss
        ), mode
    assert openrlhf.PolicyLoss(token_level_loss=False)(zero, zero, a, mask)[0].item() == pytest.approx(4)
    counts = {"dp_size": 2, "batch_num_tokens": 8.0, "global_batch_size": 4.0}
    assert openrlhf.PolicyLoss()(zero, zero, a, mask, **counts)[0].item() == pytest.approx(3)
    assert openrlhf.PolicyLoss(token_level_loss=False)(zero, zero, a, mask, **counts)[0].item() == pytest.approx(4)


def test_importance_correction_by_hand():
    """The ratio old / rollout is e^0.5 for one token and 1 for the other; the upper threshold is 1.2."""
    old, rollout = torch.tensor([[-1.0, -1.0]]), torch.tensor([[-1.5, -1.0]])
    a, settings = -torch.ones(1, 2), {"is_correction_level": "token", "is_correction_threshold": (0.5, 1.2)}
    clipped = openrlhf.PolicyLoss(**settings, is_correction_mode="clip")(old, old, a, None, rollout)
    assert clipped[0].item() == pytest.approx(1.1) and clipped[3].item() == pytest.approx(-0.25)
    dropped = openrlhf.PolicyLoss(**settings)(old, old, a, None, rollout)
    assert dropped[0].item() == pytest.approx(0.5) and dropped[4].item() == 0.5
    older = openrlhf.PolicyLoss0110(
        enable_vllm_is_correction=True, vllm_is_truncated_threshold=(0.5, 1.2), vllm_is_correction_type="tis"
    )(old, old, a, None, rollout)
    assert len(older) == 4 and older[0].item() == pytest.approx(1.1)


def test_straight_through_kl():
    new = torch.tensor([1.0], requires_grad=True)
    value = verl.kl_penalty(new, torch.tensor([0.0]), "k3+")
    value.backward()
    assert value.item() == pytest.approx(math.exp(-1)) and new.grad.item() == 1  # k2's gradient d; k3's is 1 - e^-1
    new.grad = None
    value = openrlhf.compute_approx_kl(new, torch.tensor([0.0]), new - 1, "k1", True)
    value.backward()
    assert value.item() == 1 and new.grad.item() == pytest.approx(math.e)


def test_k3_far_away_has_no_nan_in_its_gradient():
    new = torch.tensor([-100.0], requires_grad=True)
    for value in (
        openrlhf.compute_approx_kl(new, ZERO[0, :1], kl_estimator="k3"),
        verl.kl_penalty(new, ZERO[0, :1], "k3"),
    ):
        new.grad = None
        value.backward()
        assert value.item() == 10 and new.grad.item() == 0


def test_normalisation_of_openrlhf_spans_the_step():
    """Advantages 1, 3 and 5 have mean 3 and biased variance 8/3. Constant advantages are divided by the clamp, not by 0."""
    parts, masks = [torch.tensor([[1.0, 99]]), torch.tensor([[3.0, 5]])], [torch.tensor([[1, 0]]), torch.ones(1, 2)]
    first, second = openrlhf.normalize_advantages(parts, masks)
    s = math.sqrt(8 / 3)
    assert [first[0, 0].item(), *second[0].tolist()] == pytest.approx([-2 / s, 0, 2 / s])
    assert openrlhf.normalize_advantages([torch.ones(1, 2)], [torch.ones(1, 2)])[0].tolist() == [[0, 0]]


def test_classic_skips_a_batch_with_a_large_ratio():
    config = ppo_config(ratio_threshold=1.5, kl_penalty="kl")
    new = torch.full((1, 2), 1.0, requires_grad=True)
    zero, one = torch.zeros(1, 2), torch.ones(1, 2)
    trainer = trl.Classic(config, None)
    pg, vf, stats = trainer.loss(zero, zero, torch.zeros(1, 2, 3), one, new, one, one, zero)
    (pg + vf).backward()
    assert pg == 0 and vf == 0 and stats["loss/total"] == 0 and not new.grad.any()
    assert stats["policy/entropy"].item() == pytest.approx(math.log(3))
    trainer.faithful = True
    with pytest.warns(UserWarning, match="exceeds threshold"):
        trainer.loss(zero, zero, torch.zeros(1, 2, 3), one, new, one, one, zero)


def test_trl_loss_equals_the_reference(monkeypatch):
    """The loss equals the float64 reference with and without `faithful`; only `faithful` statistics include padding."""
    g = torch.Generator().manual_seed(0)
    b, v = 3, 11
    logits, ids = torch.randn(b, T, v, generator=g), torch.randint(0, v, (b, T), generator=g)
    old = reference.token_logprobs(logits, ids, temperature=0.7).logprobs + 0.2 * torch.randn(b, T, generator=g)
    values, vpred = torch.randn(b, T, generator=g), torch.randn(b, T, generator=g)
    lengths = torch.tensor([T - 1, 2, -1])
    config = ppo_config()
    made = trl.PPO(config).rollout(old, old - 0.1, values, torch.randn(b, generator=g), lengths)
    wide = reference.logits_ppo_loss(
        logits.double(),
        ids,
        made.logprobs.double(),
        made.advantages.double(),
        made.mask,
        temperature=0.7 + 1e-7,
        softcap=None,
        logit_scale=1.0,
        values=vpred.double(),
        old_values=made.values.double(),
        returns=made.returns.double(),
        value_mask=made.value_mask,
    )
    for faithful in (False, True):
        loss, stats = trl.PPO(config, faithful=faithful).loss(logits, ids, vpred, made)
        assert loss.item() == pytest.approx(wide.loss.item(), abs=1e-7)
        assert stats["loss/value_avg"].item() == pytest.approx(wide.metrics["value_loss"].item(), rel=1e-6)
        share = made.mask.float().mean().item() if faithful else 1
        ratio = stats["val/ratio"].item()
        assert ratio == pytest.approx(share * wide.metrics["ratio_mean"].item() + 1 - share, rel=1e-6)


class Trainer(ModuleType):
    """A stand-in for TRL's module with the names that `fused_helpers` replaces."""

    def __init__(self, path: str, names: tuple[str, ...]):
        super().__init__(path)
        for name in names:
            setattr(self, name, f"their {name}")


@pytest.mark.parametrize("version", ["0.12.2", "0.29.0", "1.12.0"])
def test_helpers_are_replaced_and_restored(monkeypatch, version):
    path = "trl.trainer.ppo_trainer" if version == "0.12.2" else "trl.experimental.ppo.ppo_trainer"
    names = ("masked_mean", "masked_whiten") + (("selective_log_softmax",) if version != "0.12.2" else ())
    module = Trainer(path, names)
    for i in range(1, path.count(".") + 1):
        monkeypatch.setitem(sys.modules, ".".join(path.split(".")[:i]), ModuleType("parent"))
    monkeypatch.setitem(sys.modules, path, module)
    with trl.fused_helpers(version=version) as swapped:
        assert set(swapped) == set(names)
        assert all(getattr(module, name) is getattr(trl, name) for name in names)
    assert all(getattr(module, name) == f"their {name}" for name in names)
    with pytest.raises(KeyError), trl.fused_helpers(version=version):
        raise KeyError
    assert all(getattr(module, name) == f"their {name}" for name in names)
    assert hasattr(module, "selective_log_softmax") == (version != "0.12.2")


def test_the_mixin_refuses_a_trainer_whose_loss_does_not_call_it(monkeypatch):
    monkeypatch.setattr(trl_grpo, "release", lambda *_: "logits")

    class GRPOTrainer:
        use_liger_kernel = True

    with pytest.raises(ValueError, match=r"use_liger_kernel: got True, with which the loss of TRL 1\.12 does not call"):
        type("Fused", (trl.GRPOMixin, GRPOTrainer), {})()


def test_unknown_releases_are_refused_by_name():
    with pytest.raises(ValueError, match=r"version: got trl 1\.13\.0, expected one of 0\.12, .*1\.12"):
        trl.fused_helpers(version="1.13.0").__enter__()
    with pytest.raises(ValueError, match=r"version: got openrlhf 0\.9\.1, expected one of 0\.11\.2"):
        openrlhf.for_version("0.9.1")
    with pytest.raises(ValueError, match=r"version: got verl 0\.8\.0, expected one of 0\.9"):
        verl.register(version="0.8.0")
    assert openrlhf.for_version("0.7.5.post1").PolicyLoss is openrlhf.PolicyLoss07
    assert openrlhf.for_version("0.11.1").PolicyLoss is openrlhf.PolicyLoss0110


def test_invalid_masks_are_refused():
    x = torch.zeros(2, 3)
    padding = torch.tensor([[False, True, True], [False, False, True]])
    with pytest.raises(ValueError, match=r"response_mask: got a padding mask .*: pass its negation"):
        verl.compute_policy_loss(x, x, x, padding, 0.2)
    assert verl.compute_policy_loss(x, x, x, padding, 0.2, faithful=True)[0] == 0
    prompts_first = torch.tensor([[0, 1, 1], [0, 1, 0]])  # one row changes back to False, so this is not a padding mask
    assert verl.compute_policy_loss(x, x, x, prompts_first, 0.2)[0] == 0
    additive = torch.tensor([[0.0, -10000, -10000], [0, 0, -10000]])
    with pytest.raises(ValueError, match=r"action_mask: got -10000\.0 among its values, expected bool"):
        openrlhf.PolicyLoss()(x, x, x, additive)
    with pytest.raises(ValueError, match=r"mask: got shape \(2, 4\), expected \(2, 3\)"):
        deepspeed_chat.PPO().actor_loss_fn(x, x, x, torch.ones(2, 4))


def test_unsupported_arguments_are_refused():
    x = torch.zeros(1, 2)
    with pytest.raises(
        ValueError, match="dist_process_group: got object, which verl supports and this adapter does not"
    ):
        verl.linear_cross_entropy(x, x, torch.zeros(1).long(), dist_process_group=object())
    with pytest.raises(ValueError, match="ring_attn_group: got object, which OpenRLHF supports"):
        openrlhf.GPTLMLoss(object())
    with pytest.raises(ValueError, match="margin: got a tensor, expected None"):
        openrlhf.LogExpLoss()(x, x, x)
    with pytest.raises(ValueError, match=r"config.kl_penalty: got 'full', expected one of"):
        trl.Classic(ppo_config(kl_penalty="full"), None).compute_rewards(torch.zeros(1), x, x, x)
    with pytest.raises(ValueError, match=r"index: got shape \(1, 2, 4\), expected one index per position"):
        trl.selective_log_softmax(torch.zeros(1, 2, 3), torch.zeros(1, 2, 4).long())
    with pytest.raises(ValueError, match="batch_num_tokens is not set, but dp_size=2 needs it"):
        verl.compute_value_loss(x, x, x, x + 1, 0.2, dp_size=2)
    with pytest.raises(ValueError, match="cliprange is not set"):
        verl.compute_policy_loss(x, x, x, x + 1)
    with pytest.raises(ValueError, match="is_correction_mode: got 'clip'"):
        openrlhf.PolicyLoss(is_correction_level="seq", is_correction_mode="clip")
