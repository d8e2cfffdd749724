"""Every adapter against its original: all results, gradients and options, masks with holes, lengths 0, 1 and T.

`make test-peers` runs these tests in an environment that has the originals. The comparisons use `faithful=True`. The tests
below them show how the default differs from the originals on purpose.
"""

import pytest
import torch

from benchmarks.agreement import cases, originals
from benchmarks.agreement.case import LIMIT, batch, compare
from rlhf_kernels.integrations import deepspeed_chat, openrlhf, trl, verl


@pytest.mark.parametrize("peer", cases.PEERS)
def test_results_and_gradients(peer):
    """For each tensor, max |ours - theirs| / max |theirs| is at most 1e-6; theirs is in float64 where it is noisier."""
    if peer == "DeepSpeed-Chat" and not originals.SOURCES.joinpath(peer).exists():
        pytest.skip("DeepSpeed-Chat is in no package index: make test-peers DEEPSPEED_CHAT=its folder")
    compared = 0
    for case in cases.PEERS[peer]():
        for kind in case.batches:
            for found in compare(case, kind):
                assert found.relative <= LIMIT, f"{case.name}, batch {kind}: {found}"
                compared += 1
    assert compared >= 20


def test_masked_entries_are_zero_unlike_in_verl():
    b = batch("holes")
    mask = b.mask.float()
    theirs = originals.verl().compute_gae_advantage_return(b.rewards, b.values, mask, 1.0, 0.95)
    ours = verl.compute_gae_advantage_return(b.rewards, b.values, mask, 1.0, 0.95)
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x[b.mask == 1], y[b.mask == 1], rtol=1e-6, atol=2e-6)
        assert (x[b.mask == 0] == 0).all() and (y[b.mask == 0] != 0).any()


def test_one_action_gives_zero_and_verl_raises():
    b = batch("one")
    mask = b.mask.float()
    with pytest.raises(ValueError, match="sum of the mask is one"):
        originals.verl().compute_gae_advantage_return(b.rewards, b.values, mask, 1.0, 0.95)
    assert not verl.compute_gae_advantage_return(b.rewards, b.values, mask, 1.0, 0.95)[0].any()


def test_losses_of_an_empty_mask_are_zero_and_the_peers_are_nan():
    b = batch("full")
    nothing = torch.zeros_like(b.mask)
    theirs = originals.verl().compute_value_loss(b.values, b.returns, b.old_values, nothing, 0.2)[0]
    assert theirs.isnan() and verl.compute_value_loss(b.values, b.returns, b.old_values, nothing, 0.2)[0] == 0
    loss, _ = originals.openrlhf()
    arguments = (b.logprobs, b.old_logprobs, b.advantages, nothing)
    assert loss.PolicyLoss()(*arguments)[0].isnan() and openrlhf.PolicyLoss()(*arguments)[0] == 0


def test_openrlhf_scores_a_row_without_an_action_and_we_do_not():
    b = batch("lengths")
    _, utils = originals.openrlhf()
    kl = b.logprobs - b.ref_logprobs
    theirs, ours = (f(b.scores, 0.0, kl, b.mask) for f in (utils.compute_reward, openrlhf.compute_reward))
    assert b.lengths[0] == 0 and theirs[0, -1] == b.scores[0] and not ours[0].any()
    torch.testing.assert_close(ours[1:], theirs[1:], rtol=0, atol=0)


def test_ranking_loss_overflows_only_in_openrlhf():
    loss, _ = originals.openrlhf()
    chosen, rejected = torch.tensor([0.0]), torch.tensor([100.0])
    assert loss.LogExpLoss()(chosen, rejected).isinf() and openrlhf.LogExpLoss()(chosen, rejected) == 100


def test_trl_classic_lets_whitened_padding_leak_into_the_response():
    """TRL adds the mean back at positions after the response too, and GAE carries it into the response."""
    b = batch("lengths")
    config = next(c.ours.config for c in cases.trl_cases() if "whitened" in c.note)
    theirs = originals.trl_classic()()
    theirs.config = config
    rewards = b.rewards + 1
    _, leaked, _ = theirs.compute_advantages(b.values, rewards, b.mask)
    _, clean, _ = trl.Classic(config, None).compute_advantages(b.values, rewards, b.mask)
    inside = b.mask == 1
    assert (leaked - clean)[inside].abs().max() > 0.01
    arguments = [torch.nn.functional.pad(x, (0, 5)) for x in (b.values, rewards, b.mask)]
    moved, kept = theirs.compute_advantages(*arguments)[1], trl.Classic(config, None).compute_advantages(*arguments)[1]
    assert (moved[:, :-5] - leaked)[inside].abs().max() > 0.01  # five more pad tokens change the advantages
    torch.testing.assert_close(kept[:, :-5][inside], clean[inside], rtol=1e-6, atol=1e-6)


def test_settings_of_the_object_are_the_trainers_defaults():
    """DeepSpeed-Chat sets its defaults in `__init__`; ours are dataclass fields."""
    path = originals.SOURCES / "DeepSpeed-Chat" / "dschat" / "rlhf" / "ppo_trainer.py"
    if not path.exists():
        pytest.skip("DeepSpeed-Chat is in no package index: make test-peers DEEPSPEED_CHAT=its folder")
    text = path.read_text()
    for name, value in vars(deepspeed_chat.PPO()).items():
        assert name == "faithful" or f"self.{name} = {value:g}\n" in text or f"self.{name} = {value}\n" in text, name
