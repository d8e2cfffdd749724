"""TRPO: products with the Fisher matrix, conjugate gradient, and steps that keep the constraint and increase the surrogate."""

from dataclasses import replace

import pytest
import torch

from rlhf_engine.checkpoint import resume, save_checkpoint
from rlhf_engine.config import OptimConfig, PPOConfig, RolloutConfig, RunConfig
from rlhf_engine.config.trpo import TRPOConfig
from rlhf_engine.model import frozen_copy
from rlhf_engine.ppo import trpo
from rlhf_engine.ppo.trpo import (
    TrustRegionProblem,
    assign,
    conjugate_gradient,
    fisher_product,
    flat,
    measure,
    surrogate_gradient,
    trpo_step,
)
from tests.engine.helpers.bandits import arm
from tests.engine.helpers.experience import make_experience
from tests.engine.helpers.rollouts import sequence_of
from tests.engine.helpers.tiny_trainer import OnUpdate, make_trainer, weights_of

SHORT = RolloutConfig(max_prompt_tokens=8, max_response_tokens=4, batch_size=16)


def make_problem(microbatch=4, temperature=1.0):
    trainer = make_trainer(objective="trpo", rollout=replace(SHORT, temperature=temperature), attention="eager")
    experience = make_experience(trainer, temperature)
    parts = (experience.rollout, experience.old_logprobs, experience.advantages)
    return TrustRegionProblem(trainer.policy, *parts, temperature, microbatch)


def direction_of(problem, seed=0):
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(parameter.shape, generator=generator) for parameter in problem.parameters()]
    # The padding row of an embedding never gets a gradient, although a policy may sample that token.
    embedding = problem.policy.model.get_input_embeddings()
    where = next(i for i, parameter in enumerate(problem.parameters()) if parameter is embedding.weight)
    parts[where][embedding.padding_idx] = 0.0
    return flat(parts)


def by_hand(problem):
    """Return the mean of `exp(log pi - log pi_old) A` over the actions, from the model's logits."""
    rollout, total = problem.rollout, 0.0
    for row in range(16):
        ids = sequence_of(rollout, row)[None]
        p, n = int(rollout.prompt_lengths[row]), int(rollout.response_lengths[row])
        logits = problem.policy.model(input_ids=ids).logits[0, p - 1 : -1] / problem.temperature
        taken = logits.log_softmax(-1).gather(-1, ids[0, p:, None])[:, 0]
        total = total + ((taken - problem.old_logprobs[row, :n]).exp() * problem.advantages[row, :n]).sum()
    return total / rollout.mask.sum()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_s15_surrogate_and_gradient_are_those_of_the_formula(temperature):
    """Check at the old policy, where the value is the mean advantage, and at different weights."""
    problem = make_problem(temperature=temperature)
    mask, old = problem.rollout.mask, frozen_copy(problem.policy)
    assert surrogate_gradient(problem)[1] == pytest.approx(float(problem.advantages[mask].mean()), abs=1e-5)
    for moved in (False, True):
        if moved:
            assign(problem.parameters(), flat(problem.parameters()).detach() + 0.03 * direction_of(problem))
        found, value = surrogate_gradient(problem)
        surrogate = by_hand(problem)
        assert value == pytest.approx(float(surrogate.detach()), rel=1e-3, abs=1e-5)
        assert measure(problem, old)[0] == pytest.approx(value, rel=1e-4, abs=1e-5)
        expected = flat(torch.autograd.grad(surrogate, problem.parameters()))
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_s15_fisher_product_is_the_curvature_of_the_kl(temperature):
    """v^T F v = lim 2 KL(old || old + e v) / e^2 with the KL over the full vocabulary; damping adds its multiple of v."""
    problem = make_problem(temperature=temperature)
    vector = direction_of(problem)
    product = fisher_product(problem, vector, 0.0)
    start, old, step = flat(problem.parameters()).detach().clone(), frozen_copy(problem.policy), 2e-3
    kls = []
    for sign in (1, -1):
        assign(problem.parameters(), start + sign * step * vector)
        kls.append(measure(problem, old)[1])
    assign(problem.parameters(), start)
    assert float(vector @ product) == pytest.approx(sum(kls) / step**2, rel=0.02)
    other = direction_of(problem, 1)
    assert float(other @ product) == pytest.approx(float(vector @ fisher_product(problem, other, 0.0)), rel=1e-3)
    torch.testing.assert_close(fisher_product(problem, vector, 0.3), product + 0.3 * vector, rtol=1e-4, atol=1e-4)


def test_s15_products_do_not_depend_on_micro_batches():
    whole, parts = make_problem(16), make_problem(3)
    vector = direction_of(whole)
    for ours, theirs in (
        (fisher_product(whole, vector, 0.1), fisher_product(parts, vector, 0.1)),
        (surrogate_gradient(whole)[0], surrogate_gradient(parts)[0]),
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5 * float(ours.abs().max()))


def test_s15_conjugate_gradient_solves_a_linear_system():
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(12, 12, generator=generator, dtype=torch.float64)
    matrix, target = root @ root.T + torch.eye(12), torch.randn(12, generator=generator, dtype=torch.float64)
    products = []
    found = conjugate_gradient(lambda v: products.append(1) or matrix @ v, target, 50, 1e-10)
    torch.testing.assert_close(found, torch.linalg.solve(matrix, target), rtol=1e-7, atol=1e-9)
    assert len(products) < 30  # it stops at the tolerance
    assert float(conjugate_gradient(lambda v: matrix @ v, torch.zeros(12), 5, 0.0).abs().max()) == 0.0


def test_s15_a_loose_tolerance_ends_the_solution_early(monkeypatch):
    counts = []
    for tolerance in (1e-5, 0.9):
        problem, calls = make_problem(), []
        monkeypatch.setattr(trpo, "fisher_product", lambda *a, calls=calls: calls.append(1) or fisher_product(*a))
        trpo_step(problem, TRPOConfig(cg_tolerance=tolerance, cg_iterations=8, damping=1e-3))
        counts.append(len(calls))
    assert counts[0] == 9 and counts[1] < 9, counts  # 8 iterations, and one product for the curvature along the step


@pytest.mark.parametrize("max_kl", [1e-4, 1e-2])
def test_s15_a_step_keeps_the_constraint_and_gains(max_kl):
    problem = make_problem()
    old = frozen_copy(problem.policy)
    before, _ = measure(problem, old)
    found = trpo_step(problem, TRPOConfig(max_kl=max_kl, damping=1e-3))
    after, kl = measure(problem, old)
    assert found == {"trpo_kl": kl, "trpo_gain": after - before, "trpo_step": found["trpo_step"]}
    assert 0.2 * max_kl < kl <= max_kl and after > before and found["trpo_step"] > 0


def test_s15_a_step_gains_more_than_a_gradient_step_of_the_same_kl():
    problem = make_problem()
    old, start = frozen_copy(problem.policy), flat(problem.parameters()).detach().clone()
    gradient, before = surrogate_gradient(problem)
    found = trpo_step(problem, TRPOConfig(max_kl=1e-3, damping=1e-3, cg_iterations=20))
    low, high = 0.0, 100.0
    for _ in range(30):  # the step along the gradient that has the same KL
        middle = (low + high) / 2
        assign(problem.parameters(), start + middle * gradient)
        surrogate, kl = measure(problem, old)
        low, high = (middle, high) if kl < found["trpo_kl"] else (low, middle)
    assert found["trpo_gain"] > 1.2 * (surrogate - before) > 0


class Impossible(TrustRegionProblem):
    """A problem whose constraint no step satisfies."""

    def kl(self, old, new):
        return super().kl(old, new) + (0.0 if torch.is_grad_enabled() else torch.inf)


def test_s15_no_step_if_none_is_accepted():
    """An infeasible constraint and zero advantages leave the weights unchanged; NaN advantages raise and leave them too."""
    problem, nothing = make_problem(), {"trpo_kl": 0.0, "trpo_gain": 0.0, "trpo_step": 0.0}
    start = flat(problem.parameters()).detach().clone()
    impossible = Impossible(**vars(problem))
    assert trpo_step(impossible, TRPOConfig(backtracks=3)) == nothing
    assert torch.equal(flat(problem.parameters()), start)
    assert trpo_step(replace(problem, advantages=torch.zeros_like(problem.advantages)), TRPOConfig()) == nothing
    broken = replace(problem, advantages=torch.full_like(problem.advantages, torch.nan))
    with pytest.raises(FloatingPointError, match="training diverged"):
        trpo_step(broken, TRPOConfig())
    assert torch.equal(flat(problem.parameters()), start)


class Broken(TrustRegionProblem):
    """A problem with a finite surrogate whose KL is NaN."""

    def kl(self, old, new):
        return super().kl(old, new) * torch.nan


def test_s15_a_curvature_that_is_not_finite_raises():
    problem = make_problem()
    start = flat(problem.parameters()).detach().clone()
    with pytest.raises(FloatingPointError, match=r"training diverged: got the curvature nan .*ppo\.trpo\.damping"):
        trpo_step(Broken(**vars(problem)), TRPOConfig())
    assert torch.equal(flat(problem.parameters()), start)


def test_s15_training_reaches_the_optimum_of_a_bandit():
    rollout = RolloutConfig(max_prompt_tokens=8, max_response_tokens=1, batch_size=128)
    trainer = make_trainer(
        rollout=rollout,
        reward=arm,
        attention="eager",
        objective="trpo",
        trpo=TRPOConfig(max_kl=0.2, damping=1e-2, cg_iterations=5),
        **{"updates": 30, "rollout_batch": 128, "minibatch": 128, "microbatch": 128, "kl_coef": 0.0, "ppo_epochs": 1},
        optim=OptimConfig(lr=1e-2),
    )
    trainer.prompts = lambda first, count: [torch.tensor([4, 9])] * count
    logs = []
    trainer.callbacks.append(OnUpdate(lambda number, log: logs.append(log)))
    trainer.train()
    scores = [log["score_mean"] for log in logs]
    assert scores[0] < 0.45 and sum(scores[-3:]) / 3 > 0.9, scores
    assert all(log["trpo_kl"] <= 0.2 for log in logs)


def test_s15_the_optimizer_trains_only_values_and_resuming_is_bitwise_exact(tmp_path):
    def make(**settings):
        return make_trainer(objective="trpo", rollout=SHORT, attention="eager", ema_decay=0.9, **settings)

    still = make(trpo=TRPOConfig(max_kl=1e-30))
    before = weights_of(still)
    still.step()
    moved = {name for name, weight in weights_of(still).items() if not torch.equal(weight, before[name])}
    assert moved == {"value.weight", "value.bias"}
    straight, first, second = make(), make(), make()
    straight.step()
    log = straight.step()
    assert log["trpo_step"] > 0
    first.step()
    save_checkpoint(tmp_path / "checkpoint", first, None, RunConfig())
    resume(tmp_path / "checkpoint", second, RunConfig())
    assert second.step()["trpo_kl"] == log["trpo_kl"]
    after = weights_of(second)
    assert all(torch.equal(weight, after[name]) for name, weight in weights_of(straight).items())


@pytest.mark.parametrize("choice", ["skip", "halve"])
def test_a_step_that_cannot_be_left_out_is_refused(choice):
    words = f"on_nonfinite: got '{choice}', expected 'stop'; only an objective other than 'trpo' reads it"
    with pytest.raises(ValueError, match=words):
        PPOConfig(objective="trpo", on_nonfinite=choice)
