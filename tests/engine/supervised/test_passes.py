"""A lack of memory in fine-tuning and in the reward model: the batch is begun again with half of the micro-batch."""

import pytest
import torch

from rlhf_engine.config import OptimConfig, RewardConfig, SFTConfig
from rlhf_engine.data import Example
from rlhf_engine.model import ActorCritic
from rlhf_engine.model.reward_model import RewardModel
from rlhf_engine.supervised.reward_model import RankedPrompt, RewardTrainer
from rlhf_engine.supervised.sft import SFTTrainer
from tests.engine.helpers.tiny_models import tiny

EXAMPLES = [Example((5, 6), (*range(7, 7 + length), 2)) for length in (1, 3, 2, 5, 4, 2, 6, 3)]
RANKINGS = [RankedPrompt((EXAMPLES[i], EXAMPLES[i + 1]), ((0, 1),)) for i in range(7)]
RATE = {"batch_size": 4, "epochs": 2, "optim": OptimConfig(lr=1e-3)}


def sft(**size):
    return SFTTrainer(ActorCritic(tiny()), EXAMPLES, EXAMPLES[:2], SFTConfig(**RATE, **size), pad_id=0, seed=1)


def rm(**size):
    model = RewardModel.from_causal_lm(tiny(), seed=1)
    return RewardTrainer(model, RANKINGS, RANKINGS[:2], RewardConfig(**RATE, **size), pad_id=0, seed=1)


def without_memory(trainer, *, rows, after=1):
    """Let every pass with gradients over more than `rows` sequences fail, once `after` such passes have run."""
    trunk, passes = trainer.model.trunk if trainer.stage == "rm" else trainer.model.model, []

    def check(module, inputs, options):
        ids = options.get("input_ids", inputs[0] if inputs else None)
        if torch.is_grad_enabled() and len(ids) > rows:
            passes.append(len(ids))
            if len(passes) > after:
                raise MemoryError("no memory")

    trunk.register_forward_pre_hook(check, with_kwargs=True)


def weights_of(trainer):
    return torch.cat([weight.detach().flatten() for _, weight in trainer.weights()])


# A ranking of two completions is two rows.
CASES = [
    (sft, {"microbatch": 2}, 1, {"microbatch": 1}),
    (rm, {"microbatch": 2}, 2, {"microbatch": 1}),
    (sft, {"microbatch_tokens": 20}, 1, {"microbatch_tokens": 5}),
]


@pytest.mark.parametrize("make, size, rows, smaller", CASES, ids=["sft", "rm", "sft by tokens"])
def test_a_run_without_memory_ends_as_one_with_smaller_passes(make, size, rows, smaller, caplog):
    """Its first batch fails after one pass has ended, and no part of that pass stays in the gradient."""
    trainer = make(**size)
    without_memory(trainer, rows=rows)
    trainer.train()
    name, left = next(iter(smaller.items()))
    assert trainer.passes.size[name] == left
    section = "sft" if make is sft else "reward"
    messages = [one for one in caplog.messages if "out of memory" in one]
    assert f"out of memory in a pass of {section}.{name}={size[name]}: the run continues with" in messages[0]
    assert f"continues with {section}.{name}={left}, which gives the same gradient" in messages[-1]
    small = make(**smaller)
    small.train()
    if size.keys() == {"microbatch"}:  # halved in the first batch
        assert torch.equal(weights_of(trainer), weights_of(small))
    torch.testing.assert_close(weights_of(trainer), weights_of(small), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [sft, rm])
def test_a_resumed_run_keeps_the_smaller_size(make, tmp_path):
    whole, first = make(microbatch=4), make(microbatch=4)
    for trainer in (whole, first):
        without_memory(trainer, rows=2, after=0)
    whole.train()

    def stop():
        if first.done == 1:
            first.write_model(tmp_path / "model", None)
            raise KeyboardInterrupt

    (tmp_path / "model").mkdir()
    with pytest.raises(KeyboardInterrupt):
        first.train(stop)
    again = make(microbatch=4)  # it has the memory
    again.load(tmp_path / "model", first.state(), first.tensors())
    assert again.passes.size == whole.passes.size
    again.train()
    assert torch.equal(weights_of(again), weights_of(whole))


@pytest.mark.parametrize("make", [sft, rm])
def test_a_pass_of_one_record_that_does_not_fit_ends_the_run(make):
    trainer = make(microbatch=2)
    without_memory(trainer, rows=0, after=0)
    with pytest.raises(MemoryError):
        trainer.train()
    assert trainer.whole and trainer.done == 0
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
