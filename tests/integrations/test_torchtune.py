"""torchtune's PPO loss and advantages by hand and in float64; `make test-peers` compares them with the originals.

B sequences, T positions.
"""

import math

import pytest
import torch

from rlhf_kernels.integrations.torchtune import PPOLoss, estimate_advantages

B, T = 5, 8


def batch():
    """Return the six tensors of the loss, and masks of tokens and of values, which have one position more."""
    g = torch.Generator().manual_seed(0)
    old = -3 * torch.rand(B, T, generator=g)
    new, old_values, advantages, returns = (torch.randn(B, T, generator=g) for _ in range(4))
    new, values = old + 0.3 * new, old_values + 0.4 * torch.randn(B, T, generator=g)
    lengths = torch.tensor([[1], [T], [3], [0], [6]])
    masks = torch.arange(T) < lengths, torch.arange(T) < lengths + 1
    return (old, new, advantages, old_values, values, returns), masks


def mean(x, mask):
    return (x * mask).sum() / mask.sum()


@pytest.mark.parametrize("masked", [True, False])
def test_loss_and_gradients(masked):
    inputs, masks = batch()
    given = masks if masked else (None, None)
    mask, value_mask = masks if masked else (torch.ones(B, T), torch.ones(B, T))
    for i in (1, 4):
        inputs[i].requires_grad_()
    loss, policy, value, ratio, clipfrac = PPOLoss(0.15, 0.25, 0.3)(*inputs, *given)
    gradients = torch.autograd.grad(loss, (inputs[1], inputs[4]))

    old, new, a, old_v, v, returns = (x.detach().double() for x in inputs)
    for x in (new, v):
        x.requires_grad_()
    r = (new - old).exp()
    outside = torch.where(a > 0, r > 1.15, r < 0.85)
    policy_loss = mean(torch.maximum(-a * r, -a * r.clamp(0.85, 1.15)), mask)
    near = old_v + (v - old_v).clamp(-0.25, 0.25)
    value_loss = mean(torch.maximum((v - returns) ** 2, (near - returns) ** 2), value_mask) / 2
    total = policy_loss + 0.3 * value_loss
    expected = (total, policy_loss, value_loss, mean(r, mask), mean(outside.double(), mask))
    for ours, theirs in zip((loss, policy, value, ratio, clipfrac), expected, strict=True):
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    for ours, theirs in zip(gradients, torch.autograd.grad(total, (new, v)), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=1e-6 * theirs.abs().max().item())
    assert not any(x.requires_grad for x in (policy, value, ratio, clipfrac))


def test_ratio_of_padding_only_with_faithful():
    """Ratios 2 and 4, of which one counts."""
    zero, new = torch.zeros(1, 2), torch.tensor([[2.0, 4.0]]).log()
    mask = torch.tensor([[True, False]])
    arguments = (zero, new, zero, zero, zero, zero, mask, mask)
    assert PPOLoss()(*arguments)[3].item() == pytest.approx(2)
    assert PPOLoss(faithful=True)(*arguments)[3].item() == pytest.approx(3)


def test_defaults_are_those_of_torchtune():
    assert vars(PPOLoss()).items() >= {"epsilon": 0.1, "value_clip_range": 0.2, "value_coeff": 0.1}.items()


def test_advantages_by_hand():
    """Rewards 1 and 3, values 0, gamma .5, lambda 1: A = 2.5 and 3, with mean 2.75 and deviation .5 / sqrt 2."""
    values, rewards = torch.zeros(1, 3), torch.tensor([[1.0, 3.0, 0.0]])
    masks = torch.tensor([[True, True, False]])
    advantages, returns = estimate_advantages(values, rewards, 0.5, 1.0, masks)
    d = 1 / math.sqrt(2)
    assert advantages[0].tolist() == pytest.approx([2.75 - d, 2.75 + d, 0])
    assert returns[0].tolist() == [2.5, 3, 0]


def test_the_value_after_the_last_action_has_a_return():
    values, rewards = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[0.0, 0.0, 8.0]])
    masks = torch.tensor([[True, True, False]])
    advantages, returns = estimate_advantages(values, rewards, 1.0, 1.0, masks)
    assert returns[0].tolist() == [8, 8, 8] and advantages[0, 2] == 0


def test_without_masks_every_position_counts():
    g = torch.Generator().manual_seed(0)
    values, rewards = torch.randn(B, T, generator=g), torch.randn(B, T, generator=g)
    advantages, returns = estimate_advantages(values, rewards, 0.99, 0.95)
    plain = (returns - values).double()
    expected = (plain - plain.mean()) / plain.std() + plain.mean()
    torch.testing.assert_close(advantages.double(), expected, rtol=0, atol=1e-6 * expected.abs().max().item())


def test_a_single_action():
    zero, rewards, masks = torch.zeros(1, 2), torch.tensor([[3.0, 0.0]]), torch.tensor([[True, False]])
    assert estimate_advantages(zero, rewards, 1.0, 1.0, masks)[0].tolist() == [[3, 0]]
    assert estimate_advantages(zero, rewards, 1.0, 1.0, masks, faithful=True)[0][0, 0].isnan()
    assert not estimate_advantages(zero, rewards, 1.0, 1.0, ~masks & masks, faithful=True)[0].any()


def test_a_mask_of_padding_is_refused():
    """In torchtune the arguments are called padding masks, and are True where a token counts."""
    x, padding = torch.zeros(2, 3), torch.tensor([[False, True, True], [False, False, True]])
    with pytest.raises(ValueError, match=r"^padding_masks: got a padding mask .*: pass its negation"):
        PPOLoss()(x, x, x, x, x, x, padding)
    with pytest.raises(ValueError, match=r"^value_padding_masks: got a padding mask"):
        PPOLoss()(x, x, x, x, x, x, ~padding, padding)
    with pytest.raises(ValueError, match=r"^masks: got a padding mask"):
        estimate_advantages(x, x, 1.0, 1.0, padding)
    with pytest.raises(ValueError, match=r"values: got shape \(3\), expected \[B, T\]"):
        estimate_advantages(x[0], x[0], 1.0, 1.0)
