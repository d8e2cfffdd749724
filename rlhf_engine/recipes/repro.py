"""The command `rlhf repro`: repeat the computation of a number that was not finite."""

from __future__ import annotations

from pathlib import Path

from rlhf_engine.ppo.build import make_generator
from rlhf_engine.ppo.repro import Repro, with_device
from rlhf_engine.recipes.loading import load_reward_model, load_start
from rlhf_engine.recipes.ppo import make_policy


def run_repro(path: str | Path, *, device: str | None = None) -> tuple[list[str], bool]:
    """Repeat what the file of a run describes; return lines about it, and whether a number is not finite here too.

    The models are loaded from the paths in the run's config, and the weights of the file replace those that the run trained.
    `device` replaces the config's.

    Raises:
        ValueError: the file is not one of `rlhf_engine.ppo.repro`, or a model cannot be loaded.
    """
    repro = Repro(Path(path))
    config = with_device(repro.config, device)
    model, codec = load_start(config)
    from_reward = config.ppo.value_init == "reward_model" and not config.reward.by_text
    policy = make_policy(config, model, load_reward_model(config, model) if from_reward else None)
    make_generator(policy, codec, config, config.seed)  # excludes ids that are no token, as in the run
    lines, op = repro.replay(policy)
    here = f"here: first in {op}" if op is not None else f"here: all numbers are finite on {policy.device}"
    return [f"in the run: {repro.found}", *lines, here], op is not None or bool(lines)
