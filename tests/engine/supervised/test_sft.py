"""Supervised fine-tuning: the loss covers only the response, and the final weights are those of the validation minimum."""

import dataclasses
import math

import pytest
import torch

from rlhf_engine.config import OptimConfig, SFTConfig
from rlhf_engine.data import Example, pad_sequences
from rlhf_engine.evaluate import perplexity
from rlhf_engine.model import ActorCritic
from rlhf_engine.supervised.sft import batch_logprobs, evaluate_nll, fit_language_model
from tests.engine.helpers.tiny_models import VOCABULARY, tiny

EXAMPLES = [Example((5, 6, 7), (8, 9, 2)), Example((10,), (11, 12, 13, 14, 2)), Example((), (20, 21, 2))]
CONFIG = SFTConfig(epochs=3, batch_size=2, optim=OptimConfig(lr=1e-3))


def expected_logprobs(model):
    """Return the log-probs computed one row at a time with the model's head."""
    found = []
    for example in EXAMPLES:
        ids = torch.tensor([example.prompt + example.response])
        logprobs = model(input_ids=ids).logits.double().log_softmax(-1)[0]
        first = max(1, len(example.prompt))
        found += [logprobs[at - 1, ids[0, at]] for at in range(first, len(example))]
    return torch.stack(found)


def test_logprobs_cover_exactly_the_response_and_its_eos():
    model = tiny()
    logprobs = batch_logprobs(ActorCritic(model), pad_sequences(EXAMPLES, pad_id=0))
    torch.testing.assert_close(logprobs.double(), expected_logprobs(model), rtol=1e-5, atol=1e-5)


def test_perplexity_is_the_exponential_of_the_mean_over_tokens():
    model = tiny()
    mean = -expected_logprobs(model).mean().item()
    assert evaluate_nll(ActorCritic(model), EXAMPLES, 2, pad_id=0) == pytest.approx(mean, rel=1e-5)
    assert perplexity(ActorCritic(model), EXAMPLES, pad_id=0) == pytest.approx(math.exp(mean), rel=1e-4)


def test_prompt_tokens_are_no_targets():
    """Token 5 is only in a prompt. As a target it would get an additional gradient in its row of an untied head."""
    model = tiny("llama")
    actor = ActorCritic(model)
    (-batch_logprobs(actor, pad_sequences([EXAMPLES[0]], pad_id=0)).sum()).backward()
    # Every row of the head gets the softmax term; only the rows of targets also get the -1 of the cross-entropy.
    hidden = model.model(input_ids=torch.tensor([[5, 6, 7, 8, 9]])).last_hidden_state[0, 2:].detach()
    probabilities = (hidden @ model.lm_head.weight.T).softmax(-1)[:, 5]
    expected = (probabilities[:, None] * hidden).sum(0)
    torch.testing.assert_close(model.lm_head.weight.grad[5], expected.detach(), rtol=1e-3, atol=1e-5)


def test_micro_batches_add_up_to_the_batch():
    weights = []
    for microbatch in (0, 1):
        model = tiny()
        config = dataclasses.replace(CONFIG, batch_size=3, epochs=1, microbatch=microbatch)
        fit_language_model(ActorCritic(model), EXAMPLES, EXAMPLES, config, pad_id=0, seed=1)
        weights.append(torch.cat([parameter.flatten() for parameter in model.parameters()]))
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-4, atol=2e-5)


def test_the_model_ends_at_its_validation_minimum():
    """Training on token 9 after 5 soon increases the loss of a validation set with token 10, so the first weights are best."""
    model = tiny()
    train, validation = [Example((5,), (9, 2))] * 4, [Example((5,), (10, 2))]
    config = SFTConfig(epochs=20, batch_size=4, patience=3, optim=OptimConfig(lr=2e-2))
    report = fit_language_model(ActorCritic(model), train, validation, config, pad_id=0, seed=0)
    losses = [found.validation_loss for found in report.history]
    assert report.best.validation_loss == min(losses)
    assert len(losses) == losses.index(min(losses)) + 1 + config.patience < config.epochs
    assert evaluate_nll(ActorCritic(model), validation, 4, pad_id=0) == pytest.approx(min(losses), rel=1e-6)


def test_training_is_logged_and_reproducible():
    logs = []
    for _ in range(2):
        rows = []
        actor = ActorCritic(tiny())
        report = fit_language_model(
            actor,
            EXAMPLES,
            EXAMPLES,
            CONFIG,
            pad_id=0,
            seed=5,
            log=lambda step, row, rows=rows: rows.append((step, row)),
        )
        logs.append(rows)
    assert logs[0] == logs[1]
    assert report.tokens == 3 * 10
    assert {"loss", "grad_norm", "lr"} <= set(logs[0][0][1])
    assert logs[0][-1][1]["validation_loss"] < logs[0][2][1]["validation_loss"]


def test_empty_sets_are_refused():
    for name, train, validation in (("train", [], EXAMPLES), ("validation", EXAMPLES, [])):
        with pytest.raises(ValueError, match=name):
            fit_language_model(ActorCritic(tiny()), train, validation, CONFIG, pad_id=0, seed=0)


assert max(max(example.prompt + example.response) for example in EXAMPLES) < VOCABULARY
