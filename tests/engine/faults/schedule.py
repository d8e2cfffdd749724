"""What a seed chooses: a run, how often it saves, and one fault for each of its attempts."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from tests.engine.faults.disk import DISK_FAULTS, Fault
from tests.engine.faults.points import BACKWARD_FAULTS, REWARD_FAULTS, TIMED_FAULTS
from tests.engine.faults.runs import CASES


@dataclass(frozen=True)
class Counts:
    """Operations of the disk, calls of user code and backward passes of an undisturbed run."""

    operations: int
    rewards: int
    backwards: int


@dataclass(frozen=True)
class Schedule:
    """The faults of a seed."""

    seed: int
    case: str
    settings: tuple[str, ...]
    """Settings that change no number of the run."""
    seconds: float
    """Seconds of every operation of the disk, on the clock of the run."""
    faults: tuple[Fault, ...]
    moves_rescued: bool
    """Whether the user follows the advice to move a checkpoint that was rescued in a different place."""


WEIGHTS = {"iterate": 1, "generate": 3, "ppo, state in 8 bits": 0}
"""How often the cases are chosen; 4 for the others. The step with 8 bits is compiled, which takes long."""


def case_of(seed: int) -> str:
    """Return the name of a seed's run."""
    names = list(CASES)
    return Random(f"case {seed}").choices(names, [WEIGHTS.get(name, 4) for name in names])[0]


def schedule_of(seed: int, counts: Counts) -> Schedule:
    """Return the schedule of a seed, for a run with these `counts`."""
    rng, name = Random(f"schedule {seed}"), case_of(seed)
    settings, section = [f"checkpoint.keep={rng.choice([1, 2, 2, 3])}"], CASES[name].section
    if section is not None:
        settings.append(f"{section}.checkpoint_every={rng.choice(['1', '1', '1', '2', 'null', '0'])}")
    timed = any(setting.startswith("reward.timeout") for setting in CASES[name].settings)
    faults = tuple(_fault(rng, counts, timed) for _ in range(rng.choice([1, 1, 2, 3])))
    return Schedule(seed, name, tuple(settings), rng.choice([0.0, 0.0, 5.0, 40.0]), faults, rng.random() < 0.5)


def _fault(rng: Random, counts: Counts, timed: bool) -> Fault:
    kinds = [*DISK_FAULTS] * 3
    kinds += [*REWARD_FAULTS] if counts.rewards else []
    kinds += [*TIMED_FAULTS] if counts.rewards and timed else []
    kinds += [*BACKWARD_FAULTS] if counts.backwards else []
    kind = rng.choice(kinds)
    calls = counts.operations
    if kind in (*REWARD_FAULTS, *TIMED_FAULTS):
        calls = counts.rewards
    elif kind in BACKWARD_FAULTS:
        calls = counts.backwards
    return Fault(kind, rng.randint(1, calls), lasting=kind in ("eio", "enospc") and rng.random() < 0.5)
