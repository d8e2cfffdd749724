"""A run that is resumed with a different number of updates: its learning rate has no jump, and it resumes exactly."""

import pytest
import torch

from rlhf_engine.checkpoint import resume, save_checkpoint
from rlhf_engine.config import OptimConfig, RunConfig
from tests.engine.helpers.cli_run import new_model, new_run, read_lines, rlhf
from tests.engine.helpers.tiny_trainer import ROLLOUT, make_trainer, weights_of

REWARD = """
def reward(prompts, answers):
    return [float(len(answer)) for answer in answers]
"""


def test_the_learning_rate_of_a_longer_run_has_no_jump(tmp_path, capsys):
    """Two steps per update. The rate of an update is that of its last step."""
    new_run(tmp_path, new_model(tmp_path / "base"))
    (tmp_path / "rewards.py").write_text(REWARD)
    sets = [f"reward.function={tmp_path / 'rewards.py'}:reward", "ppo.value_init=zero", "ppo.ppo_epochs=1"]
    sets += ["ppo.optim.schedule=linear", "ppo.optim.final_lr_share=0.25", "ppo.optim.lr=1e-3"]

    def run(updates, *options):
        code, _, err = rlhf(
            capsys, "ppo", "--config", tmp_path / "run.yaml", *options, sets=[*sets, f"ppo.updates={updates}"]
        )
        assert code == 0, err
        return [row["lr"] for row in read_lines(tmp_path / "out" / "metrics.jsonl")], err

    assert run(2)[0] == pytest.approx([0.75e-3, 0.25e-3])
    rates, err = run(3, "--resume")
    assert rates == pytest.approx([0.75e-3, 0.25e-3, 0.25e-3])
    line = "ppo.updates: the run was planned for 2 updates and has 3 now; the learning rate of update 3 stays 0.00025"
    assert line in err and err.count("ppo.updates") == 1


def planned(updates):
    """Return a trainer with two steps per update, and its config."""
    trainer = make_trainer(updates=updates, ppo_epochs=1, optim=OptimConfig(lr=1e-2, schedule="cosine"))
    return trainer, RunConfig(seed=1, ppo=trainer.config, rollout=ROLLOUT)


@pytest.mark.parametrize("before", [1, 2])
def test_a_longer_run_resumes_exactly(tmp_path, before):
    """Planned for 3 updates, after one of which it is planned for 5: killed once more or not, it ends with the same bits."""
    trainer, config = planned(3)
    trainer.step()
    save_checkpoint(tmp_path / "short", trainer, None, config)
    expected = trainer.step()["lr"]
    straight, config = planned(5)
    resume(tmp_path / "short", straight, config)
    rates = [straight.step()["lr"] for _ in range(4)]
    # The first step of the second update has the rate of the old plan; the run's last step has the final one.
    assert straight.update_rule.schedule.rate(2) == trainer.update_rule.schedule.rate(2)
    assert rates[0] > expected and rates[-1] == pytest.approx(1e-3)
    killed, _ = planned(5)
    resume(tmp_path / "short", killed, config)
    for _ in range(before):
        killed.step()
    save_checkpoint(tmp_path / "killed", killed, None, config)
    ours, _ = planned(5)
    resume(tmp_path / "killed", ours, config)
    assert [ours.step()["lr"] for _ in range(4 - before)] == rates[before:]
    weights = weights_of(straight)
    assert all(torch.equal(weight, weights[name]) for name, weight in weights_of(ours).items())
