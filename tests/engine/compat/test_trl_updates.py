"""Three updates of TRL 1.12.0's PPOTrainer and of ours, from the same weights, data and sampled responses.

Sampling is replaced on both sides by the same responses, because the random numbers of two samplers differ. All else is the
code of both trainers.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rlhf_engine.compat.trl import PPOConfig, PPOTrainer
from rlhf_engine.compat.trl_rollout import Responses, training_rollout
from rlhf_engine.rollout import recompute
from tests.engine.helpers.trl_scripts import EOS, PAD, SETTINGS, STOP, parts, prompts, weights

theirs = pytest.importorskip(
    "trl.experimental.ppo.ppo_trainer", reason="needs trl 1.12, the last release with PPOTrainer"
)
TheirConfig = pytest.importorskip("trl.experimental.ppo").PPOConfig

TOLERANCE = 1e-4


def responses(update, rows, length, stops):
    """Return the ids of an update's responses (rows, length); with `stops`, all but the first end with a stop id."""
    random = torch.Generator().manual_seed(100 + update)
    ids = torch.randint(4, PAD, (rows, length), generator=random)
    ids[rows // 2, -1] = EOS
    if stops:
        ends = torch.randint(0, length, (rows,), generator=random)
        ids[torch.arange(1, rows), ends[1:]] = STOP
        ids[torch.arange(length) > ends[:, None]] = PAD
        ids[0] = 5
    return ids


class TheirTrainer(theirs.PPOTrainer):
    """TRL's trainer, which records the weights and the metrics of every update."""

    def log(self, logs, *args, **kwargs):
        self.seen = [*getattr(self, "seen", []), (weights(self), dict(logs))]
        return super().log(logs, *args, **kwargs)


class OurTrainer(PPOTrainer):
    """Our trainer with given responses, which records the same."""

    def sample(self, prompts, number):
        ids = responses(number, len(prompts), self.args.response_length, self.stop_token_id is not None)
        given = Responses(prompts, ids, torch.zeros(ids.shape))
        rollout, _ = training_rollout(given, ids, self.pad_id)
        found = recompute(self.policy, rollout, ("logprobs",), temperature=self.args.sampling_temperature, microbatch=8)
        return Responses(prompts, ids, found["logprobs"])

    def _log(self, metrics):
        self.seen = [*getattr(self, "seen", []), (weights(self), dict(metrics))]
        super()._log(metrics)


def run(monkeypatch, folder, settings, changes):
    """Return the trainers after training: TRL's and ours."""
    updates = iter(range(100))

    def batch_generation(model, queries, local_rollout_forward_batch_size, pad_token_id, generation_config):
        ids = responses(next(updates), len(queries), generation_config.max_new_tokens, "stop_token_id" in settings)
        both = torch.cat([queries, ids], 1)
        with torch.no_grad():
            logits = theirs.forward(model, both, pad_token_id).logits[:, queries.shape[1] - 1 : -1]
        return both, logits / generation_config.temperature

    monkeypatch.setattr(theirs, "batch_generation", batch_generation)
    monkeypatch.setattr(theirs, "gc", SimpleNamespace(collect=int))  # two thirds of the time of this test
    trainers = []
    for kind, config in ((TheirTrainer, TheirConfig), (OurTrainer, PPOConfig)):
        trainer = kind(args=config(output_dir=str(folder), **SETTINGS | settings), **parts(**changes()))
        np.random.seed(0)
        trainer.train()
        trainers.append(trainer)
    return trainers


def lora():
    peft = pytest.importorskip("peft", reason="needs peft")
    adapter = peft.LoraConfig(
        r=2, lora_alpha=8, target_modules=["q_proj", "down_proj", "lm_head"], init_lora_weights=False
    )
    torch.manual_seed(5)
    return {"peft_config": adapter, "ref_model": None}


STOPS = {"stop_token_id": STOP}
PADDED = ("policy/entropy_avg",)
"""TRL also averages the entropy of positions after a response, for which we run no pass. We average that of the actions."""
SPLIT = {"gradient_accumulation_steps": 1, "per_device_train_batch_size": 8, "num_mini_batches": 2}
SCHEDULE = {"weight_decay": 0.1, "lr_scheduler_type": "cosine", "warmup_steps": 1, "vf_coef": 0.5}
WHITENED = {"missing_eos_penalty": 1.0, "whiten_rewards": True, "kl_estimator": "k3", "gamma": 0.9, "lam": 0.8}
CASES = {
    "full width, schedule": (SCHEDULE, {}, ()),
    "stops, last batch of a pass": (STOPS | WHITENED, {"train_dataset": prompts(20)}, PADDED),
    "stops, minibatches": (STOPS | SPLIT, {}, PADDED),
    "adapter": ({}, lora, ()),
}


@pytest.mark.parametrize("name", CASES)
def test_three_updates(tmp_path, monkeypatch, name):
    """Weights after each update and logged metrics agree to 1e-4."""
    settings, changes, left_out = CASES[name]
    them, us = run(monkeypatch, tmp_path, settings, changes if callable(changes) else lambda: changes)
    assert len(them.seen) == len(us.seen) == 3
    for (their_weights, their_log), (our_weights, our_log) in zip(them.seen, us.seen, strict=True):
        assert our_weights.keys() == their_weights.keys() and our_log.keys() == their_log.keys()
        for key, weight in their_weights.items():
            torch.testing.assert_close(our_weights[key], weight, rtol=0, atol=TOLERANCE, msg=key)
        for key in their_log.keys() - {*left_out, "eps"}:
            assert our_log[key] == pytest.approx(their_log[key], rel=TOLERANCE, abs=TOLERANCE, nan_ok=True), key
    change = [float((us.seen[-1][0][key] - us.seen[0][0][key]).abs().max()) for key in us.seen[0][0]]
    assert sum(one > 20 * TOLERANCE for one in change) >= 10  # the comparison is of weights that move


def test_where_the_metrics_differ(tmp_path, monkeypatch):
    """The weights agree, but two of TRL's metrics are no means over what exists.

    With minibatches and accumulation, half of the cells of TRL's tables of statistics are never filled and count as 0. With
    stop tokens, its entropy also averages the positions after a response.
    """
    settings = STOPS | {"num_mini_batches": 2, "total_episodes": 8}
    them, us = run(monkeypatch, tmp_path, settings, dict)
    ((their_weights, their_log),), ((our_weights, our_log),) = them.seen, us.seen
    for key, weight in their_weights.items():
        torch.testing.assert_close(our_weights[key], weight, rtol=0, atol=TOLERANCE, msg=key)
    for key in ("val/ratio", "policy/approxkl_avg", "loss/value_avg"):
        assert our_log[key] == pytest.approx(2 * their_log[key], rel=TOLERANCE), key
    assert abs(our_log["policy/entropy_avg"] - 2 * their_log["policy/entropy_avg"]) > TOLERANCE / 2
