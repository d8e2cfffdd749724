"""Limits on a run's metrics: a warning, the end of the run, and their counts in a checkpoint."""

import json
import math

import pytest

from rlhf_engine.config import LimitsConfig, OptimConfig, PPOConfig
from rlhf_engine.ppo.divergence import Diverged, Divergence
from tests.engine.helpers.cli_run import new_model, new_run, read_lines, rlhf
from tests.engine.helpers.tiny_trainer import make_trainer

ADVICE = "; begin a new run with a lower ppo.optim.lr or a higher ppo.kl_coef"
GOOD = {"kl": 1.0, "kl_per_token": 0.1, "entropy": 2.0, "grad_norm": 1.0}


def fed(rows, **limits):
    found = Divergence(PPOConfig(**limits))
    for number, row in enumerate(rows, start=1):
        found.add(GOOD | row, number)
    return found


@pytest.mark.parametrize(
    "bad, words",
    [
        ({"kl": 180.0}, "kl is 180 nats per sequence, above ppo.warn_on.kl 100 in 3 updates in a row"),
        ({"kl_per_token": 5.0}, "kl_per_token is 5 nats per token, above ppo.warn_on.kl_per_token 2 in 3 updates"),
        ({"entropy": 1e-4}, "entropy is 0.0001 nats per token, below ppo.warn_on.entropy 0.01 in 3 updates"),
        ({"grad_norm": 2e4}, "grad_norm is 2e+04, above ppo.warn_on.grad_norm 1000 in 3 updates"),
        ({"kl": math.nan}, "kl is nan nats per sequence, above ppo.warn_on.kl 100 in 3 updates"),
    ],
)
def test_the_default_limits_warn_once_after_three_updates(bad, words, caplog):
    fed([bad, bad, {}, bad, bad])
    assert not caplog.messages  # not in a row
    fed([{}, bad, bad, bad, bad])
    (message,) = caplog.messages
    assert message.startswith(f"update 4: {words}") and message.endswith(ADVICE)


def test_a_run_that_ends_beyond_a_limit_warns_although_too_few_updates_were_left(caplog):
    fed([{}, {"kl": 180.0}]).end()
    assert caplog.messages == [
        "the run ended beyond a limit: kl is 180 nats per sequence, above ppo.warn_on.kl 100 in the last update; read its "
        "samples" + ADVICE
    ]
    caplog.clear()
    fed([{"kl": 180.0}, {}]).end()
    fed([]).end()
    assert not caplog.messages


def test_no_limit_stops_by_default_and_each_can():
    fed([{"kl": 1e9, "entropy": 0.0, "grad_norm": 1e9}] * 9).check()
    for name, value in {"kl": 2.0, "kl_per_token": 0.2, "grad_norm": 2.0}.items():
        limits = LimitsConfig(**{name: value}, updates=2)
        fed([{name: 9.0}], stop_on=limits).check()
        with pytest.raises(
            Diverged, match=rf"training diverged: {name} is 9.*above ppo.stop_on.{name} .* in 2 updates"
        ):
            fed([{name: 9.0}] * 2, stop_on=limits).check()
    with pytest.raises(Diverged, match=r"entropy is 2 nats per token, below ppo.stop_on.entropy 3 in the last update"):
        fed([{}], stop_on=LimitsConfig(entropy=3.0, updates=1)).check()


def test_a_section_keeps_the_other_defaults():
    config = PPOConfig.from_dict({"warn_on": {"kl": 7.0}, "stop_on": {"kl": None}})
    assert config.warn_on == LimitsConfig(kl=7.0, kl_per_token=2.0, entropy=0.01, grad_norm=1000.0)
    assert config.stop_on == LimitsConfig()
    for name, value in {"kl": 0.0, "entropy": -1.0, "updates": 0}.items():
        with pytest.raises(ValueError, match=f"stop_on.{name}"):
            PPOConfig.from_dict({"stop_on": {name: value}})


def test_the_counts_are_part_of_the_state():
    trainer = make_trainer(updates=4, stop_on=LimitsConfig(grad_norm=1e-6, updates=2))
    trainer.step()
    state = json.loads(json.dumps(trainer.state()))
    again = make_trainer(updates=4, stop_on=LimitsConfig(grad_norm=1e-6, updates=2))
    again.load_state(state)
    assert again.divergence.state() == trainer.divergence.state() and again.divergence.counts["stop_on.grad_norm"] == 1
    with pytest.raises(Diverged, match="in 2 updates in a row"):
        again.train()
    assert again.updates_done == 2 and again.whole
    del state["limits"]  # of an earlier release
    again.load_state(state)
    assert again.divergence.counts == {}


@pytest.mark.parametrize("name, wider, same", [("kl", 60.0, 40.0), ("entropy", 0.5, 1.5)])
def test_a_changed_limit_that_the_last_update_keeps_counts_from_zero(name, wider, same):
    """The last update has a KL of 50 and an entropy of 1; `same` is a second limit that it exceeds."""
    bad, limits = {"kl": 50.0, "entropy": 1.0}, {"kl": 5.0, "entropy": 1.9}
    stopped = fed([bad, bad], stop_on=LimitsConfig(**{name: limits[name]}, updates=2))
    state = json.loads(json.dumps(stopped.state()))
    word = "higher" if name == "kl" else "lower"
    advice = rf"{ADVICE}, or resume this one with a {word} ppo.stop_on.{name}$"
    for limit in (limits[name], same):
        again = Divergence(PPOConfig(stop_on=LimitsConfig(**{name: limit}, updates=2)))
        again.load_state(state)
        with pytest.raises(Diverged, match=rf"ppo.stop_on.{name} {limit:g} in 2 updates in a row{advice}"):
            again.check()
    again = Divergence(PPOConfig(stop_on=LimitsConfig(**{name: wider}, updates=2)))
    again.load_state(state)
    again.check()
    for number in (3, 4):
        again.check()
        again.add(GOOD | {"kl": 99.0, "entropy": 0.1}, number)
    with pytest.raises(Diverged, match=rf"ppo.stop_on.{name} {wider:g} in 2 updates in a row"):
        again.check()


def test_a_run_with_a_learning_rate_of_one_warns(caplog):
    make_trainer(updates=4, optim=OptimConfig(lr=1.0, max_grad_norm=None)).train()
    assert any("above ppo.warn_on.kl" in message for message in caplog.messages)


SETS = ["reward.function=rewards.py:reward", "ppo.value_init=zero", "ppo.updates=4", "ppo.optim.lr=1e-3"]
STOP = ["ppo.stop_on.grad_norm=1e-6", "ppo.stop_on.updates=2"]


def test_stop_on_ends_the_command_and_the_finished_updates_are_saved(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = new_run(tmp_path, new_model(tmp_path / "base"))
    (run / "rewards.py").write_text("def reward(prompts, responses):\n    return [float(len(r)) for r in responses]\n")

    def start(*flags, sets=STOP):
        return rlhf(capsys, "ppo", "--config", "run.yaml", *flags, sets=[*SETS, *sets])

    for flags in ((), ("--resume",)):  # a resumed run with the same limits does not go on
        code, _, shown = start(*flags)
        assert code == 1 and "training diverged: grad_norm is" in shown and "holds 2 updates" in shown
        assert [row["step"] for row in read_lines(run / "out" / "metrics.jsonl")] == [1, 2]
    assert start("--resume", sets=["ppo.stop_on.grad_norm=1e9", "ppo.stop_on.updates=2"])[0] == 0
    assert start(sets=["output_dir=whole"])[0] == 0
    rows = [[row["score_mean"] for row in read_lines(run / out / "metrics.jsonl")] for out in ("out", "whole")]
    assert rows[0] == rows[1] and len(rows[0]) == 4
