"""The reward model: the position of its score, the K-way loss by hand, and its evaluation on held-out rankings."""

import math

import pytest
import torch

from rlhf_engine.config import OptimConfig, RewardConfig
from rlhf_engine.data import Codec, Comparison, Example, rank_batch, train_tokenizer
from rlhf_engine.model.reward_model import RewardModel
from rlhf_engine.supervised.reward_model import (
    RankedPrompt,
    centre_on_demonstrations,
    encode_comparison,
    evaluate_rankings,
    fit_reward_model,
    ranking_loss,
    score_examples,
)
from tests.engine.helpers.tiny_models import tiny

PROMPT = (5, 6)
ANSWERS = tuple(Example(PROMPT, answer) for answer in ((7, 2), (8, 9, 10, 2), (11, 2), (12, 13, 2)))


def ranked(pairs, answers=ANSWERS):
    return RankedPrompt(answers, tuple(pairs))


def test_the_score_is_read_at_the_last_token_with_any_padding():
    model = RewardModel.from_causal_lm(tiny(), seed=1)
    scores = score_examples(model, ANSWERS, pad_id=0)
    for answer, score in zip(ANSWERS, scores, strict=True):
        hidden = model.trunk(input_ids=torch.tensor([answer.prompt + answer.response])).last_hidden_state[0, -1]
        assert float(score) == pytest.approx(float((hidden @ model.head.weight).detach()), rel=1e-5, abs=1e-5)


def test_long_responses_are_scored_in_passes_of_a_limited_number_of_tokens(monkeypatch):
    """Rows times width is at most the limit, unless a single row is longer; every score stays in its place."""
    model = RewardModel.from_causal_lm(tiny(), seed=1)
    examples = [Example(PROMPT, tuple(range(3, 3 + length))) for length in (12, 1, 5, 30, 2, 9, 4)]
    whole, shapes = score_examples(model, examples, pad_id=0), []
    assert not whole.requires_grad
    monkeypatch.setattr("rlhf_engine.supervised.reward_model._SCORED_TOKENS", 24)
    forward = RewardModel.forward
    monkeypatch.setattr(
        RewardModel, "forward", lambda self, ids, *rest: shapes.append(tuple(ids.shape)) or forward(self, ids, *rest)
    )
    torch.testing.assert_close(score_examples(model, examples, pad_id=0), whole, rtol=1e-5, atol=1e-5)
    assert all(rows == 1 or rows * width <= 24 for rows, width in shapes) and max(width for _, width in shapes) == 32


def test_scoring_in_chunks_keeps_the_order():
    model = RewardModel.from_causal_lm(tiny(), seed=1)
    batch = rank_batch([(ANSWERS, [(0, 1)])], pad_id=0).batch
    lengths = batch.attention_mask.sum(1)
    torch.testing.assert_close(
        model.score_rows(batch.ids, lengths, chunk=1), model(batch.ids, lengths), rtol=1e-5, atol=1e-5
    )


def test_ranking_loss_by_hand():
    """D > C > A = B with scores (1, 0, 2, 4) has five pairs without the tied one; the second prompt has one pair."""
    pairs = Comparison("p", ("a", "b", "c", "d"), (2, 2, 1, 0)).pairs()
    batch = rank_batch([(ANSWERS, pairs), (ANSWERS[:2], [(1, 0)])], pad_id=0)
    scores = torch.tensor([1.0, 0.0, 2.0, 4.0, 3.0, 1.0], requires_grad=True)

    def softplus(gap):
        return math.log1p(math.exp(-gap))

    first = (softplus(4 - 2) + softplus(4 - 1) + softplus(4 - 0) + softplus(2 - 1) + softplus(2 - 0)) / 5
    loss = ranking_loss(scores, batch)
    assert loss.item() == pytest.approx((first + softplus(1 - 3)) / 2, rel=1e-6)
    loss.backward()
    down = 1 / (1 + math.exp(2))  # d/dr of softplus(r_worse - r_better) at a gap of 2
    assert scores.grad[5].item() == pytest.approx(-(1 - down) / 2, rel=1e-5)
    assert scores.grad.sum().item() == pytest.approx(0, abs=1e-6)


def test_every_completion_passes_through_the_model_once():
    """K completions need K rows, not K (K - 1)."""
    model = RewardModel.from_causal_lm(tiny(), seed=1)
    rows = []
    model.trunk.register_forward_hook(
        lambda module, args, kwargs, out: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    all_pairs = [(i, j) for i in range(4) for j in range(i)]
    config = RewardConfig(batch_size=2, optim=OptimConfig(lr=1e-3))
    fit_reward_model(model, [ranked(all_pairs)] * 2, [ranked(all_pairs)], config, pad_id=0, seed=0)
    assert rows == [8, 4]  # one training step, one validation


def test_micro_batches_add_up_to_the_batch():
    weights, logs = [], []
    for microbatch in (0, 1):
        model = RewardModel.from_causal_lm(tiny(), seed=1)
        config = RewardConfig(batch_size=3, microbatch=microbatch, optim=OptimConfig(lr=1e-3))
        prompts = [ranked([(0, 1), (0, 2)]), ranked([(3, 1)]), ranked([(2, 0)], ANSWERS[:3])]
        fit_reward_model(model, prompts, prompts, config, pad_id=0, seed=0, log=lambda step, row: logs.append(row))
        weights.append(torch.cat([parameter.flatten() for parameter in model.parameters()]))
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-4, atol=2e-5)
    # Adam hides a wrong scale of the gradient; its norm and the loss show it.
    assert logs[0]["loss"] == pytest.approx(logs[2]["loss"], rel=1e-4)
    assert logs[0]["grad_norm"] == pytest.approx(logs[2]["grad_norm"], rel=1e-3)


def test_training_learns_the_ranking():
    model = RewardModel.from_causal_lm(tiny(), seed=1)
    prompts = [ranked([(2, 0), (2, 1), (2, 3), (0, 1)])]
    config = RewardConfig(epochs=30, batch_size=1, evaluate_every=10, optim=OptimConfig(lr=3e-3))
    history = fit_reward_model(model, prompts, prompts, config, pad_id=0, seed=0)
    assert [found.step for found in history] == [10, 20, 30]
    assert history[-1].accuracy == 1.0
    assert history[-1].loss < history[0].loss < math.log(2)


class _Fixed:
    """A reward model whose score is fixed by the first token of the response."""

    device = torch.device("cpu")

    def __init__(self, scores):
        self.scores = scores

    def score_rows(self, ids, lengths):
        return torch.tensor([self.scores[int(token)] for token in ids[:, len(PROMPT)]])


def test_accuracy_and_calibration_by_hand():
    scores = _Fixed({7: 0.0, 8: 2.0, 11: 2.0, 12: -1.0})
    # gaps: +2 (right), -1 (wrong), 0 (equal scores count half)
    found = evaluate_rankings(scores, [ranked([(1, 0), (3, 0), (1, 2)])], pad_id=0)
    assert found.accuracy == pytest.approx(1.5 / 3)
    sigmoid = [1 / (1 + math.exp(-gap)) for gap in (2, -1, 0)]
    assert found.loss == pytest.approx(-sum(map(math.log, sigmoid)) / 3, rel=1e-6)
    # Both orders of a pair count: bins at .88 (preferred), .12 (not), .27 (preferred), .73 (not), .5 (half).
    expected = (2 * (1 - sigmoid[0]) + 2 * (1 - sigmoid[1]) + 2 * 0) / 6
    assert found.calibration_error == pytest.approx(expected, rel=1e-6)


def test_the_bias_centres_the_demonstrations_at_zero():
    model = RewardModel.from_causal_lm(tiny(), seed=1)
    before = score_examples(model, ANSWERS, pad_id=0)
    shift = centre_on_demonstrations(model, ANSWERS, pad_id=0)
    assert abs(shift) > 1e-3
    assert shift == pytest.approx(float(before.mean()), rel=1e-5)
    assert float(score_examples(model, ANSWERS, pad_id=0).mean()) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("family", ["llama_tied", "qwen2", "gpt2"])
def test_a_saved_model_loads_back(tmp_path, family):
    model = RewardModel.from_causal_lm(tiny(family), seed=1)
    centre_on_demonstrations(model, ANSWERS, pad_id=0)
    model.save(tmp_path / "rm")
    again = RewardModel.load(tmp_path / "rm")
    assert torch.equal(score_examples(again, ANSWERS, pad_id=0), score_examples(model, ANSWERS, pad_id=0))
    (tmp_path / "rm" / "reward_head.safetensors").unlink()
    with pytest.raises(ValueError, match=r"reward_head\.safetensors is missing"):
        RewardModel.load(tmp_path / "rm")


def test_a_comparison_with_only_ties_is_skipped():
    codec = Codec(train_tokenizer(["ab"], 280))
    assert encode_comparison(Comparison("p", ("a", "b"), (0, 0)), codec) is None
    assert encode_comparison(Comparison("p", ("a", "b"), (0, 1)), codec).pairs == ((0, 1),)


def test_an_empty_set_of_rankings_is_refused():
    model = RewardModel.from_causal_lm(tiny(), seed=1)
    with pytest.raises(ValueError, match="train: no ranking has an untied pair"):
        fit_reward_model(model, [], [ranked([(0, 1)])], RewardConfig(), pad_id=0, seed=0)
