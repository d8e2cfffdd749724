"""A lack of memory in a pass: the minibatch is begun again with half of the size."""

import pytest
import torch

from rlhf_engine.ppo import update as ppo
from rlhf_engine.ppo.callbacks import Callback
from tests.engine.helpers.tiny_trainer import make_trainer, weights_of

CPU = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes. "
    "Error code 12 (Cannot allocate memory)"
)
KINDS = [MemoryError("no memory"), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), CPU]
SETTINGS = {"microbatch": 8, "minibatch": 16, "ppo_epochs": 2, "updates": 3}


def failing(trainer, error, *, above, after=0):
    """Let a forward pass over more than `above` sequences with gradients fail, once `after` such passes have run.

    The module runs within the policy, so a part of the gradient already exists when the second pass fails.
    """
    passes = []

    def check(module, inputs, options):
        ids = options.get("input_ids", inputs[0] if inputs else None)
        if torch.is_grad_enabled() and len(ids) > above:
            passes.append(len(ids))
            if len(passes) > after:
                raise error

    trainer.policy.model.model.register_forward_pre_hook(check, with_kwargs=True)
    return passes


@pytest.fixture(scope="module")
def undisturbed():
    """The weights of runs with the smaller size and with the whole one."""
    trainers = [make_trainer(**{**SETTINGS, "microbatch": size}) for size in (2, 8)]
    for trainer in trainers:
        trainer.train()
    return [weights_of(trainer) for trainer in trainers]


@pytest.mark.parametrize("error", KINDS, ids=["MemoryError", "cuda", "cpu"])
def test_the_run_goes_on_with_the_gradient_of_the_smaller_size(undisturbed, error, caplog):
    trainer = make_trainer(**SETTINGS)
    failing(trainer, error, above=2, after=1)
    trainer.train()
    assert trainer.passes.size == {"microbatch": 2, "microbatch_tokens": None}
    messages = [one for one in caplog.messages if "out of memory" in one]
    assert messages == [
        "out of memory in a pass of ppo.microbatch=8: the run continues with ppo.microbatch=2, which gives the same gradient; "
        "set this size in the config of the next run, to save the failed attempts; a resumed run keeps it"
    ]
    for expected in undisturbed:
        for name, weight in weights_of(trainer).items():
            torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=1e-5)


def test_the_gradient_of_a_minibatch_has_the_bits_of_the_smaller_size():
    """No part of the failed attempt stays in the gradient."""
    seen = []
    for microbatch, fails in ((8, True), (4, False)):
        # Without a KL penalty, the rewards do not depend on the size of the passes that score.
        trainer = make_trainer(**{**SETTINGS, "microbatch": microbatch, "kl_coef": 0.0})
        if fails:
            failing(trainer, KINDS[1], above=4, after=1)
        with pytest.MonkeyPatch.context() as patch:

            def keep(*arguments, policy=trainer.policy, **options):
                seen.append({name: p.grad.clone() for name, p in policy.named_parameters()})
                raise KeyboardInterrupt

            patch.setattr(ppo, "optimizer_step", keep)
            with pytest.raises(KeyboardInterrupt):
                trainer.step()
    assert all(torch.equal(seen[0][name], seen[1][name]) for name in seen[0])


@pytest.mark.parametrize("error", KINDS, ids=["MemoryError", "cuda", "cpu"])
def test_a_pass_of_one_sequence_that_does_not_fit_ends_the_run(error):
    trainer = make_trainer(**SETTINGS)
    failing(trainer, error, above=0)
    with pytest.raises(type(error)):
        trainer.train()
    assert trainer.whole and trainer.updates_done == 0


def test_other_errors_are_not_repeated():
    trainer, error = make_trainer(**SETTINGS), RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    passes = failing(trainer, error, above=0)
    with pytest.raises(RuntimeError, match="mat1"):
        trainer.train()
    assert len(passes) == 1


def test_scoring_is_repeated_without_a_second_call_of_the_reward(caplog):
    calls = []

    def reward(rollout):
        calls.append(len(rollout))
        return rollout.response_lengths.float()

    trainer = make_trainer(**SETTINGS, reward=reward, old_logprobs="rescored")
    real = trainer.reference.logprobs

    def logprobs(batch, *, temperature):
        if len(batch.input_ids) > 4:
            raise KINDS[2]
        return real(batch, temperature=temperature)

    trainer.reference.logprobs = logprobs
    trainer.step()
    assert calls == [16] and trainer.passes.size["microbatch"] == 4


def test_a_token_budget_is_halved():
    trainer = make_trainer(**{**SETTINGS, "microbatch": 16}, microbatch_tokens=128)
    failing(trainer, KINDS[0], above=4)
    trainer.step()
    assert trainer.passes.size["microbatch_tokens"] < 128


class StopAfter(Callback):
    def __init__(self, updates):
        self.updates = updates

    def on_update(self, trainer, log):
        if trainer.updates_done == self.updates:
            trainer.stop()


def test_a_resumed_run_keeps_the_smaller_size_and_ends_with_the_same_bits():
    whole = make_trainer(**SETTINGS)
    failing(whole, KINDS[1], above=4)
    whole.train()
    first = make_trainer(**SETTINGS)
    failing(first, KINDS[1], above=4)
    first.callbacks.append(StopAfter(1))
    first.train()
    again = make_trainer(**SETTINGS)  # it has the memory
    again.policy.load_state_dict(first.policy.state_dict())
    again.update_rule.optimizer.load_state_dict(first.update_rule.optimizer.state_dict())
    again.load_state(first.state())
    assert again.passes.size["microbatch"] == 4
    again.train()
    assert all(torch.equal(weight, weights_of(again)[name]) for name, weight in weights_of(whole).items())
