"""Rows S1 to S5 of the InstructGPT table: SFT and the reward model, compared with the paper."""

import json
import math
from itertools import combinations

import pytest
import torch

from rlhf_engine.config import load_config
from rlhf_engine.data import Example, rank_batch, read_demonstrations
from rlhf_engine.model import ActorCritic
from rlhf_engine.model.pretrained import load_tokenizer
from rlhf_engine.model.reward_model import RewardModel
from rlhf_engine.recipes import load_model, run_rm
from rlhf_engine.supervised.reward_model import RankedPrompt, evaluate_rankings, ranking_loss, score_examples
from rlhf_engine.supervised.sft import evaluate_nll
from tests.engine.helpers.cli_run import new_model, new_run
from tests.engine.helpers.tiny_models import tiny

K = 9
COMPLETIONS = tuple(Example((5, 6, 9), (*range(7, 8 + length), 2)) for length in range(1, K + 1))
RANKS = (3, 1, 2, 2, 0, 5, 4, 4, 8)
PAIRS = tuple((i, j) for i in range(K) for j in range(K) if RANKS[i] < RANKS[j])


@torch.no_grad()
def test_s1_only_response_tokens_count_in_the_loss():
    lm = tiny()
    examples = (Example((5, 6, 7, 8, 9), (10, 11, 2)), Example((5,), (12, 2)))
    nll = []
    for one in examples:
        logits = lm(torch.tensor([one.prompt + one.response])).logits[0, len(one.prompt) - 1 : -1]
        nll += (-logits.log_softmax(1)[range(len(one.response)), list(one.response)]).tolist()
    assert evaluate_nll(ActorCritic(lm), examples, 2, pad_id=0) == pytest.approx(sum(nll) / 5, rel=1e-4)


def forward_rows(model):
    """Return a list to which every forward pass of the trunk appends its number of rows."""
    rows = []
    model.trunk.register_forward_hook(
        lambda module, args, kwargs, out: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    return rows


def test_s2_nine_completions_cost_nine_rows_not_one_per_pair():
    model = RewardModel.from_causal_lm(tiny(), seed=1)
    rows = forward_rows(model)
    evaluate_rankings(model, [RankedPrompt(COMPLETIONS, PAIRS)], pad_id=0)
    assert len(PAIRS) == 34 and sum(rows) == 9


def test_s2_a_scalar_head_replaces_the_unembedding():
    lm = tiny()
    model = RewardModel.from_causal_lm(lm, seed=1)
    ours, theirs = (sum(parameter.numel() for parameter in part.parameters()) for part in (model, lm))
    head = lm.get_output_embeddings().weight
    assert ours == theirs - head.numel() + head.shape[1] + 1
    assert score_examples(model, COMPLETIONS, 0).shape == (K,)


def test_s3_a_k_way_batch_is_the_sum_over_its_pairs():
    """Compare loss and gradient of one batch with those of a separate batch per pair, with two forward passes each."""
    model = RewardModel.from_causal_lm(tiny(), seed=1).double()
    losses, gradients = [], []
    for groups in ([(COMPLETIONS, PAIRS)], [((COMPLETIONS[i], COMPLETIONS[j]), ((0, 1),)) for i, j in PAIRS]):
        model.zero_grad()
        loss = 0.0
        for completions, pairs in groups:
            batch = rank_batch([(completions, pairs)], pad_id=0)
            scores = model(batch.batch.ids, batch.batch.attention_mask.sum(1))
            term = ranking_loss(scores, batch) / len(groups)
            term.backward()
            loss += term.item()
        losses.append(loss)
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert (gradients[0] - gradients[1]).abs().max() <= 1e-6 * gradients[1].abs().max()
    assert gradients[1].abs().max() > 1e-3


def test_s3_tied_pairs_do_not_count():
    assert (2, 3) not in PAIRS and (3, 2) not in PAIRS and (6, 7) not in PAIRS
    assert len(PAIRS) == len(list(combinations(range(K), 2))) - 2


def test_s4_the_loss_is_the_bradley_terry_likelihood():
    """The loss is the negative mean log-probability of the labeler's preferences with `P(1 > 2) = sigmoid(r1 - r2)`."""
    model = RewardModel.from_causal_lm(tiny(), seed=1)
    scores = score_examples(model, COMPLETIONS, 0).tolist()
    chances = [1 / (1 + math.exp(scores[j] - scores[i])) for i, j in PAIRS]
    found = evaluate_rankings(model, [RankedPrompt(COMPLETIONS, PAIRS)], pad_id=0)
    assert found.loss == pytest.approx(-sum(map(math.log, chances)) / len(PAIRS), rel=1e-4)
    assert found.accuracy == pytest.approx(sum(chance > 0.5 for chance in chances) / len(PAIRS))
    assert found.margin == pytest.approx(sum(scores[i] - scores[j] for i, j in PAIRS) / len(PAIRS), rel=1e-4)
    assert abs(found.margin) > 0.01


def test_s5_the_demonstrations_score_zero_on_average(tmp_path):
    new_run(tmp_path, new_model(tmp_path / "base"))
    config = load_config(tmp_path / "run.yaml")
    run_rm(config)
    folder = tmp_path / "out" / "rm"
    model, (_, codec) = RewardModel.load(folder), load_model(config)
    examples = [codec.example(record) for record in read_demonstrations(tmp_path / "demonstrations.jsonl")]
    assert float(score_examples(model, examples, codec.pad_id).mean()) == pytest.approx(0, abs=1e-6)
    assert abs(json.loads((folder / "report.json").read_text())["bias_shift"]) > 1e-3
    assert load_tokenizer(folder).get_vocab() == codec.tokenizer.get_vocab()
