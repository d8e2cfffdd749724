"""Effects of sampling on a PPO step: the deviation of the log-probs, and responses that end at a stop string."""

from dataclasses import replace

import pytest
import torch

from rlhf_engine.ppo.experience import score
from rlhf_engine.rollout import LENGTH, STOP_STRING
from tests.engine.helpers.tiny_trainer import ROLLOUT, make_trainer, target_share


@pytest.mark.parametrize("old_logprobs", ["sampled", "rescored"])
def test_the_deviation_of_the_sampled_logprobs_is_logged(old_logprobs, monkeypatch):
    """The deviation is over `check_sequences` sequences, or over all of them with rescored log-probs."""
    log = make_trainer(old_logprobs=old_logprobs).step()
    assert 0 <= log["logprob_deviation"] <= 1e-5
    none = make_trainer(old_logprobs=old_logprobs, rollout=replace(ROLLOUT, check_sequences=0)).step()
    assert ("logprob_deviation" in none) == (old_logprobs == "rescored")
    timed = ("seconds", "tokens", "peak", "sampled", "logprob_deviation")
    assert {k: v for k, v in log.items() if not k.startswith(timed)} == {
        k: v for k, v in none.items() if not k.startswith(timed)
    }
    trainer = make_trainer(old_logprobs=old_logprobs)
    plain = trainer.generator.generate

    def wrong(*arguments, **options):
        rollout = plain(*arguments, **options)
        rollout.logprobs[1, 0] -= 0.5
        return rollout

    monkeypatch.setattr(trainer.generator, "generate", wrong)
    assert trainer.step()["logprob_deviation"] == pytest.approx(0.5, abs=1e-4)


def test_a_response_with_a_stop_string_has_no_missing_eos_penalty():
    trainer = make_trainer(missing_eos_penalty=3.0)
    rollout = trainer.generator.generate(trainer.prompts(0, 16), torch.arange(16))
    late = (rollout.stop_reason == LENGTH).nonzero()[:, 0]
    assert len(late) > 1
    rollout.stop_reason[late[0]] = STOP_STRING
    scored = score(rollout, trainer.policy, trainer.reference, target_share, trainer.config, 1.0)
    expected = target_share(rollout) - 3.0 * (rollout.stop_reason == LENGTH)
    torch.testing.assert_close(scored.scores, expected)
    assert int((rollout.stop_reason == LENGTH).sum()) == len(late) - 1
