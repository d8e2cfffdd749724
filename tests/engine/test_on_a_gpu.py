"""The engine on a GPU: tests with real streams, graphs and pools of what CPU tests check with stand-ins."""

import gc

import pytest
import torch

from rlhf_engine.config import MemoryConfig, RolloutConfig
from rlhf_engine.memory import PoolArena
from rlhf_engine.model import FrozenCopy
from rlhf_engine.model.top_layers import train_top
from rlhf_engine.rollout import Generator, recompute
from tests.engine.helpers.sampling import make_actor, make_prompts
from tests.engine.helpers.tiny_models import FAMILIES, tiny
from tests.engine.helpers.tiny_trainer import make_trainer, weights_of

pytestmark = pytest.mark.gpu
CUDA = "cuda"


def sampled(actor, count=20, slots=16, **settings):
    config = RolloutConfig(max_prompt_tokens=20, max_response_tokens=24, batch_size=slots, **settings)
    generator = Generator(actor, config, eos_token_ids=(2, 7), pad_token_id=0, seed=3)
    return generator, generator.generate(make_prompts(count), torch.arange(count))


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gemma2"])
def test_graphs_sample_what_the_cpu_samples(family):
    """All tokens are equal, and the log-probs equal those of a new forward pass."""
    generator, found = sampled(make_actor(family).to(CUDA))
    assert generator.decoder.captures and generator.decoder._graphed is not None
    _, expected = sampled(make_actor(family))
    assert torch.equal(found.response_ids.cpu(), expected.response_ids)
    check_logprobs(generator, found, atol=2e-5)


def test_graphs_with_a_softcap_in_attention():
    """The samples agree with a new forward pass on the GPU, and their first tokens with the CPU.

    Attention scores reach 50 and have rounding errors of 50 eps, which differ from those of a CPU. A draw near a boundary can
    therefore select a different token, as one did on an H200. Hidden states differed by up to 5.4e-5, which 32 of them and
    weights of 0.3 turn into about 1e-4 of a logit.
    """
    generator, found = sampled(make_actor("gemma2").to(CUDA))
    _, expected = sampled(make_actor("gemma2"))
    assert torch.equal(found.response_ids[:, 0].cpu(), expected.response_ids[:, 0])
    check_logprobs(generator, found, atol=1e-3)


def check_logprobs(generator, found, atol):
    fresh = recompute(generator.policy, found, ("logprobs", "values"), microbatch=20)
    torch.testing.assert_close(found.logprobs, fresh["logprobs"], rtol=0, atol=atol)
    torch.testing.assert_close(found.values, fresh["values"], rtol=1e-4, atol=max(atol, 1e-4))


@pytest.mark.parametrize("settings", [{"top_k": 20, "top_p": 0.9}, {"repetition_penalty": 1.5}, {"min_p": 0.05}])
def test_options_of_sampling(settings):
    _, found = sampled(make_actor("qwen2").to(CUDA), **settings)
    _, expected = sampled(make_actor("qwen2"), **settings)
    assert torch.equal(found.response_ids.cpu(), expected.response_ids)


def test_few_slots():
    """The tokens of a sequence do not depend on its slot or on the time when it gets one."""
    actor = make_actor("llama").to(CUDA)
    _, whole = sampled(actor, count=40, slots=40)
    _, few = sampled(actor, count=40, slots=16)
    assert torch.equal(few.response_ids, whole.response_ids)


@pytest.mark.parametrize("state", ["resident", "host"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_updates(state, dtype):
    """In float32 the updates agree with the CPU; in bfloat16, host state agrees with state on the device."""
    memory = MemoryConfig(optimizer_state=state)
    trainer = make_trainer(device=CUDA, memory=memory, dtype=dtype)
    logs = [trainer.step() for _ in range(2)]
    if dtype == torch.float32:
        other = make_trainer(memory=memory)
        expected = [other.step() for _ in range(2)]
    else:
        other = make_trainer(device=CUDA, dtype=dtype)
        expected = [other.step() for _ in range(2)]
    for log, wanted in zip(logs, expected, strict=True):
        assert log["score_mean"] == pytest.approx(wanted["score_mean"], abs=1e-5)
        assert log["policy_loss"] == pytest.approx(wanted["policy_loss"], abs=1e-4)
    for (name, found), wanted in zip(weights_of(trainer).items(), weights_of(other).values(), strict=True):
        # Four steps of 1e-3: Adam's first steps have that size for any gradient, even one that is mostly rounding error.
        torch.testing.assert_close(found.float().cpu(), wanted.float().cpu(), rtol=1e-3, atol=2e-4, msg=name)


def test_gradient_checkpointing_gives_the_same_gradient():
    logs = [
        make_trainer(device=CUDA, memory=MemoryConfig(gradient_checkpointing=flag)).step() for flag in (False, True)
    ]
    assert logs[0]["grad_norm"] == pytest.approx(logs[1]["grad_norm"], rel=1e-4)


def test_pages_and_gradients_share_memory_that_does_not_grow():
    """Gradients reuse the memory of keys and values, the peak is that of one phase, and reserved memory does not grow."""
    size, rounds = 2**26, []
    arena = PoolArena({"generate": size, "score": 0, "train": 0}, torch.device(CUDA, 0))
    before = torch.cuda.memory_allocated()
    for _ in range(10):
        torch.cuda.reset_peak_memory_stats()
        with arena.phase("generate"):
            pages = arena.take((size // 2,), torch.bfloat16)
            here = pages.data_ptr()
            del pages
        with arena.phase("train"):
            gradient = arena.take((size // 8,), torch.float32)
            assert here <= gradient.data_ptr() < here + size
            with arena.transients():
                x = torch.randn(1024, 1024, device=CUDA, requires_grad=True)
                (x @ x).sum().backward()
                assert here <= x.grad.data_ptr() < here + size
            del gradient, x
        gc.collect()
        assert torch.cuda.max_memory_allocated() - before <= 1.05 * size
        rounds.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    assert rounds[-1] == rounds[1]


def test_a_trainer_continues_after_a_failed_update():
    """An exception of the reward function undoes only its update."""
    calls = []

    def reward(rollout):
        calls.append(len(rollout))
        if len(calls) == 2:
            raise ValueError("no score today")
        return rollout.response_lengths.float()

    trainer = make_trainer(device=CUDA, reward=reward, updates=3)
    trainer.step()
    weights = weights_of(trainer)
    with pytest.raises(ValueError, match="no score today"):
        trainer.step()
    assert all(torch.equal(weights[name], found) for name, found in weights_of(trainer).items())
    trainer.step()
    assert trainer.updates_done == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hydra_runs_the_frozen_layers_once_for_packed_micro_batches_too(dtype):
    """With bfloat16, micro-batches with a budget of tokens are packed. A copy of the starting policy has the same bits."""
    model = tiny(initializer_range=0.1, num_hidden_layers=4).to(CUDA, dtype)
    train_top(model, 2)
    trainer = make_trainer(model=model, reference="hydra", device=CUDA, microbatch_tokens=60)
    assert trainer.policy.packs == (dtype == torch.bfloat16)
    start = FrozenCopy(trainer.policy)
    for _ in "12":
        assert trainer.step()["logprob_deviation"] < (1e-3 if dtype == torch.float32 else 0.3)
    rollout = trainer.collect()
    stored = rollout.starting_from(trainer.reference, 4, 60)
    everyone, packed = torch.arange(len(rollout), device=CUDA), trainer.policy.packs
    for plain, split in zip(*(one.batches(everyone, 4, 60, packed=packed) for one in (rollout, stored)), strict=True):
        expected = start.logprobs(plain, temperature=1.0)
        assert torch.equal(trainer.reference.logprobs(split, temperature=1.0), expected)
