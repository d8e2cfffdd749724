"""Scores: responses without EOS, normalization, and scores that are not finite."""

import pytest
import torch

from rlhf_engine.checkpoint import resume, save_checkpoint
from rlhf_engine.config import PPOConfig, RunConfig
from rlhf_engine.rewards.scaling import ScoreScale, score_answers
from tests.engine.helpers.pretraining import make_stream
from tests.engine.helpers.tiny_trainer import SETTINGS, make_trainer, target_share, weights_of


@pytest.fixture(scope="module")
def rollout():
    trainer = make_trainer()
    return trainer.generator.generate(trainer.prompts(0, 16), torch.arange(16))


def scores_of(rollout, reward=target_share, scale=None, **settings):
    config = PPOConfig(**SETTINGS, **settings)
    return score_answers(rollout, reward, config, scale or ScoreScale(config.score_scale))[:2]


def test_s6_responses_without_eos_get_the_fixed_score(rollout):
    seen = []
    kept, scores = scores_of(rollout, lambda r: seen.append(r) or target_share(r) + 1, missing_eos_score=-1.0)
    ended = rollout.ended
    assert 0 < int(ended.sum()) < 16 and kept is rollout
    assert torch.equal(scores[~ended], torch.full((16 - int(ended.sum()),), -1.0))
    torch.testing.assert_close(scores[ended], target_share(rollout)[ended] + 1)
    assert torch.equal(seen[0].response_ids, rollout.response_ids[ended]) and bool(seen[0].ended.all())
    assert torch.equal(seen[0].prompt_ids, rollout.prompt_ids[ended])


def test_s6_the_reward_is_not_called_if_no_response_ended(rollout):
    none = rollout.take((~rollout.ended).nonzero()[:, 0])
    _, scores = scores_of(none, lambda r: 1 / 0, missing_eos_score=-1.0)
    assert scores.tolist() == [-1.0] * len(none)


def test_s6_the_penalty_is_subtracted_after_scaling(rollout):
    _, plain = scores_of(rollout, score_scale="batch")
    _, punished = scores_of(rollout, score_scale="batch", missing_eos_penalty=3.0)
    torch.testing.assert_close(punished, plain - 3.0 * ~rollout.ended)
    torch.testing.assert_close(plain.mean(), torch.zeros(()), atol=1e-6, rtol=0)
    assert float(plain.std(correction=0)) == pytest.approx(1.0, rel=1e-5)


def test_s6_only_scored_responses_define_the_scale(rollout):
    _, scores = scores_of(rollout, score_scale="batch", missing_eos_score=-50.0)
    assert float(scores[rollout.ended].mean()) == pytest.approx(0.0, abs=1e-6)


def test_s6_moments_of_each_kind():
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(n, generator=generator) * 3 + 100 for n in (5, 1, 9)]
    for kind in ("none", "batch", "first", "running"):
        scale, so_far = ScoreScale(kind), []
        for batch in batches:
            so_far.append(batch)
            of = {"batch": batch, "first": batches[0], "running": torch.cat(so_far)}.get(
                kind, torch.tensor([1.0, -1.0])
            )
            expected = batch - of.mean() if len(of) == 1 else (batch - of.mean()) / of.std(correction=0)
            torch.testing.assert_close(scale(batch), expected, rtol=1e-4, atol=1e-4, msg=kind)


def test_s6_first_skips_rollouts_without_a_deviation():
    """A rollout with equal scores has no deviation to divide by, so the moments of the next rollout are used."""
    scale, batches = (
        ScoreScale("first"),
        (torch.full((4,), 7.3), torch.tensor([1.0, 3.0]), torch.tensor([9.0, 5.0, 5.0])),
    )
    assert float(scale(batches[0]).abs().max()) < 1e-5
    assert [scale(batch).tolist() for batch in batches[1:]] == [[-1.0, 1.0], [7.0, 3.0, 3.0]]


def test_s6_equal_scores_become_zero():
    for value in (0.0, 7.3, 1e6):
        assert float(ScoreScale("batch")(torch.full((7,), value)).abs().max()) <= 1e-6 * max(1, value)


def test_s6_rounding_differences_count_as_equal():
    scores = torch.full((7,), 7.3)
    scores[0] = torch.nextafter(scores[0], torch.tensor(8.0))
    assert float(ScoreScale("batch")(scores).abs().max()) < 1e-5


@pytest.mark.parametrize("value, words", [(torch.nan, "nan"), (torch.inf, "inf")])
def test_s6_a_score_that_is_not_finite_stops_the_run(tmp_path, value, words):
    def reward(rollout):
        calls.append(1)
        return torch.where(torch.arange(16) == (3 if len(calls) > 1 else 99), value, 0.5)

    calls = []
    trainer = make_trainer(reward=reward)
    trainer.step()
    save_checkpoint(tmp_path / "checkpoint", trainer, None, RunConfig())
    before = weights_of(trainer)
    with pytest.raises(
        ValueError, match=rf"reward: got {words} for sample 19 of the run \(1 of 16 .*expected 16 finite"
    ):
        trainer.step()
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(trainer).items())
    again = make_trainer()
    resume(tmp_path / "checkpoint", again, RunConfig())
    assert again.state() == trainer.state()


def test_s6_a_wrong_number_of_scores_is_refused():
    with pytest.raises(ValueError, match=r"reward: got scores of shape \(3,\), expected 16 finite scores"):
        make_trainer(reward=lambda r: torch.zeros(3)).step()


def test_s6_an_error_of_the_whole_batch_names_the_first_and_last_sample():
    def reward(rollout):
        if calls:
            raise ValueError("out of memory")
        calls.append(1)
        return target_share(rollout)

    calls = []
    trainer = make_trainer(reward=reward)
    trainer.step()
    with pytest.raises(ValueError, match=r"^samples 16 to 31 of the run: out of memory$") as failed:
        trainer.step()
    assert str(failed.value.__cause__) == "out of memory"


def test_s6_a_skipped_sample_is_removed_and_counted():
    """An update with a skipped sample uses the other samples; without a bad score no sample is skipped."""

    def reward(rollout):
        return torch.where(torch.arange(len(rollout)) == 3, torch.nan, target_share(rollout))

    trainer = make_trainer(reward=reward, nonfinite_scores="skip")
    rollout = trainer.generator.generate(trainer.prompts(0, 16), torch.arange(16))
    kept, scores, _ = score_answers(rollout, reward, trainer.config, trainer.scale)
    others = [row for row in range(16) if row != 3]
    assert torch.equal(kept.prompt_ids, rollout.prompt_ids[others])
    assert torch.equal(kept.response_ids, rollout.response_ids[others])
    torch.testing.assert_close(scores, target_share(rollout)[others])
    log = trainer.step()
    assert log["scores_skipped"] == 1 and log["score_mean"] == pytest.approx(float(scores.mean()))
    assert make_trainer(nonfinite_scores="skip").step()["scores_skipped"] == 0
    with pytest.raises(ValueError, match=r"got nan for sample 0, 1, 2, 3, 4, \.\.\. of the run \(16 of 16"):
        make_trainer(reward=lambda r: torch.full((16,), torch.nan), nonfinite_scores="skip").step()


def test_s6_s9_skipping_may_leave_a_short_minibatch():
    """Nine of sixteen remain: a minibatch of eight and one of a single response, which also gets a pretraining sequence."""

    def reward(rollout):
        return torch.where(torch.arange(16) < 7, torch.nan, target_share(rollout))

    settings = {"ptx_coef": 1.0, "ptx_ratio": 0.25, "ppo_epochs": 1, "nonfinite_scores": "skip"}
    trainer = make_trainer(reward=reward, pretrain=make_stream(), **settings)
    log = trainer.step()
    assert (
        log["scores_skipped"] == 7
        and trainer.update_rule.optimizer_steps == 2
        and trainer.update_rule.pretrain.position == 2 + 1
    )
    assert all(weight.isfinite().all() for weight in weights_of(trainer).values())


@pytest.mark.parametrize("kind", ["none", "batch", "first"])
def test_s6_the_log_has_the_raw_scores(kind):
    """Normalized scores do not show progress: with the kind `batch` their mean is 0 in every update."""
    seen = []

    def reward(rollout):
        seen.append(target_share(rollout) * 3 + 5)
        return seen[-1]

    trainer = make_trainer(reward=reward, score_scale=kind, missing_eos_penalty=0.5)
    for _ in range(2):
        log = trainer.step()
        assert log["score_mean"] == pytest.approx(float(seen[-1].mean()), rel=1e-6)
        assert log["score_std"] == pytest.approx(float(seen[-1].std(correction=0)), rel=1e-5)
        if kind == "batch":
            assert log["scaled_score_mean"] == pytest.approx(0.5 * log["ended"] - 0.5, abs=1e-5)
        elif kind == "none":
            assert log["scaled_score_mean"] == pytest.approx(log["score_mean"] + 0.5 * log["ended"] - 0.5, rel=1e-6)


@pytest.mark.parametrize("kind", ["first", "running"])
def test_s6_a_resumed_run_has_the_moments(tmp_path, kind):
    straight, first, second = (make_trainer(score_scale=kind) for _ in range(3))
    straight.step()
    log = straight.step()
    first.step()
    save_checkpoint(tmp_path / "checkpoint", first, None, RunConfig())
    resume(tmp_path / "checkpoint", second, RunConfig())
    assert second.step()["scaled_score_mean"] == log["scaled_score_mean"]
    assert second.state() == straight.state()


def test_s10_minibatch_whitening_is_over_the_minibatch():
    logs = {}
    for scope in ("batch", "minibatch"):
        trainer = make_trainer(whiten_scope=scope, minibatch=4, ppo_epochs=1)
        seen, forward = [], trainer.policy.forward

        def spy(batch, want, seen=seen, forward=forward, **options):
            if "loss" in want:
                seen.append(options["loss"]["advantages"])
            return forward(batch, want, **options)

        trainer.policy.forward = spy
        trainer.step()
        logs[scope] = seen
    for part in logs["minibatch"]:  # each micro-batch is a minibatch here
        assert float(part.mean()) == pytest.approx(0.0, abs=1e-5) and float(part.std()) == pytest.approx(1.0, rel=1e-4)
    assert any(abs(float(part.mean())) > 0.05 for part in logs["batch"])
    whole = torch.cat(logs["batch"])
    assert float(whole.mean()) == pytest.approx(0.0, abs=1e-5) and float(whole.std()) == pytest.approx(1.0, rel=1e-4)
