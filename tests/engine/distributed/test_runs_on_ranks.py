"""`rlhf ppo` on two ranks: a run that goes on with other numbers of ranks, ranks that fail, and settings that are refused."""

import os

import pytest
import torch
from safetensors.torch import load_file

from rlhf_engine.cli import main
from rlhf_engine.config import load_config
from rlhf_engine.distributed.launch import check_count
from rlhf_engine.distributed.placement import Placement
from rlhf_engine.distributed.ranks import joined
from tests.engine.helpers.cli_run import new_model, new_run, read_lines
from tests.engine.helpers.ranks import on_ranks

REWARD = """
import os, signal

def reward(prompts, responses):
    update = len(responses) > 1  # the trial before the first update has one response per rank
    if update and os.environ.get("RANK") == "1" and os.path.exists("raise"):
        raise ValueError("the service is closed")
    if update and os.environ.get("RANK") == "1" and os.path.exists("die"):
        os.kill(os.getpid(), signal.SIGKILL)
    return [float(len(response)) for response in responses]
"""
SETS = (
    "reward.function=rewards.py:reward",
    "ppo.value_init=zero",
    "ppo.score_scale=running",
    "ppo.checkpoint_every=1",
    # A larger eps, because Adam's first steps make rounding of a gradient near zero as large as any update.
    *(f"{section}.optim.eps=1e-5" for section in ("sft", "reward", "ppo")),
)


CHAIN = (1, 2, 4, 1) if "CI" in os.environ else (1, 2, 1)
"""Number of ranks of every update of a run that goes on with different numbers of ranks."""


def arguments(out, updates, *options, sets=(), command="ppo"):
    sets = (*SETS, f"ppo.updates={updates}", f"output_dir={out}", *sets)
    return [command, "--config", "run.yaml", *options, *(word for one in sets for word in ("--set", one))]


def one_rank(*given, **options):
    with pytest.raises(SystemExit) as exit_:
        main(arguments(*given, **options))
    assert not exit_.value.code


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return the folder of an uninterrupted run on one rank, in `whole`."""
    folder = tmp_path_factory.mktemp("run")
    before = os.getcwd()
    os.chdir(folder)
    new_run(folder, new_model(folder / "base"))
    (folder / "rewards.py").write_text(REWARD)
    one_rank("whole", len(CHAIN))
    yield folder
    os.chdir(before)


def several(folder, name, *given, sets=lambda rank: (), ranks=2, command="ppo"):
    """Run the command on ranks; return the exit codes, the lines on stderr and the seconds."""

    def child(rank):
        main(arguments(*given, sets=sets(rank), command=command))

    _, codes, seconds = on_ranks(ranks, child, folder, stderr=f"{name}.txt")
    return codes, (folder / f"{name}.txt").read_text().splitlines(), seconds


def assert_same_update(folder, one, other):
    start, end, ours = (load_file(folder / out / "model.safetensors") for out in ("base", one, other))
    start |= {
        name.removeprefix("model."): weight for name, weight in start.items()
    }  # a reward model has only the trunk
    changed = {name: end[name] - weight for name, weight in start.items() if name in end}
    update = sum(float(change.square().sum()) for change in changed.values()) ** 0.5
    difference = sum(float((end[name] - ours[name]).square().sum()) for name in end) ** 0.5
    assert update > 0.01
    assert difference <= 1e-5 * update, f"{difference / update:.2e} of the update"


@pytest.mark.parametrize("stage", ["sft", "rm"])
def test_supervised_stages_end_as_on_one_rank(folder, stage):
    one_rank("alone", 1, command=stage)
    codes, lines, _ = several(folder, stage, "together", 1, command=stage)
    assert codes == [0, 0], lines
    assert_same_update(folder, f"alone/{stage}", f"together/{stage}")
    ours, theirs = (
        [row for row in read_lines(folder / out / "metrics.jsonl") if row["stage"] == stage]
        for out in ("together", "alone")
    )
    assert len(ours) == len(theirs) > 2
    for row, expected in zip(ours, theirs, strict=True):
        assert row.keys() == expected.keys()
        numbers = [name for name in expected if name != "stage"]
        assert [row[name] for name in numbers] == pytest.approx(
            [expected[name] for name in numbers], rel=1e-4, abs=1e-6
        )


def test_a_run_goes_on_with_other_numbers_of_ranks_and_after_ranks_that_failed(folder, monkeypatch):
    one_rank("parts", 1)
    before = {path.name: path.read_bytes() for path in (folder / "parts" / "ppo").iterdir()}
    for failure, error in (("raise", "the service is closed"), ("die", "the process ended without a message")):
        (folder / failure).touch()
        codes, lines, seconds = several(folder, failure, "parts", 2, "--resume")
        (folder / failure).unlink()
        assert all(codes), codes
        assert seconds < 60
        named = [line for line in lines if line.startswith("rlhf: rank")]
        assert len(named) == 1, lines
        assert named[0].startswith("rlhf: rank 1: ")
        assert error in named[0]
        assert not any("Traceback" in line for line in lines)
        assert {path.name: path.read_bytes() for path in (folder / "parts" / "ppo").iterdir()} == before
    for update, ranks in list(enumerate(CHAIN, 1))[1:]:
        if ranks == 1:
            one_rank("parts", update, "--resume")
            continue
        codes, lines, _ = several(folder, f"resumed-{update}", "parts", update, "--resume", ranks=ranks)
        assert codes == [0] * ranks, lines
        said = [line for line in lines if f"{ranks} ranks: the sharded weights are gathered once per update" in line]
        assert len(said) == 1
        assert "(metric idle_share)" in said[0]
        assert not (folder / "parts" / "ppo.parts").exists()

    rows, expected = (read_lines(folder / out / "metrics.jsonl") for out in ("parts", "whole"))
    assert [row["step"] for row in rows] == list(range(1, len(CHAIN) + 1))
    for row, theirs in zip(rows, expected, strict=True):
        assert row["kl"] == pytest.approx(theirs["kl"], abs=1e-5)
        assert row["score_mean"] == theirs["score_mean"]
    assert_same_update(folder, "whole/ppo", "parts/ppo")
    moments, theirs = (load_file(folder / out / "ppo" / "optimizer.safetensors") for out in ("whole", "parts"))
    for name in moments:
        torch.testing.assert_close(theirs[name], moments[name], rtol=1e-3, atol=1e-6)


def test_ranks_with_different_configs_are_refused(folder):
    codes, lines, _ = several(folder, "differ", "differ", 1, sets=lambda rank: (f"ppo.kl_coef=0.{rank + 1}",))
    assert codes == [2, 2]
    assert [line for line in lines if "rank" in line] == [
        line for line in lines if "ppo.kl_coef: rank 0 has 0.1 and rank 1 has 0.2" in line
    ]
    assert not (folder / "differ" / "ppo").exists()


REFUSED = {
    "objective": (["ppo.objective=trpo"], 2, r"ppo.objective: got 'trpo' with 2 ranks"),
    "few": (
        ["ppo.rollout_batch=4", "ppo.minibatch=4", "ppo.microbatch=4"],
        8,
        r"ppo.rollout_batch: got 4 with 8 ranks",
    ),
    "product": (
        ["distributed.shard=2", "distributed.replicate=2"],
        8,
        r"distributed: got shard 2 and replicate 2 for 8",
    ),
    "one": (["distributed.shard=2"], 1, r"expected a product of 1"),
    "half": (["dtype=bfloat16"], 2, r"dtype: got 'bfloat16' with sharded weights.*distributed.shard=1"),
    "ema": (["ppo.ema_decay=0.9"], 2, r"ppo.ema_decay: got 0.9"),
    "8bit": (["memory.optimizer_state=8bit"], 2, r"memory.optimizer_state: got '8bit'"),
    "host": (["memory.reference=host"], 2, r"memory.reference: got 'host'"),
    "backbone": (["ppo.value_model=backbone"], 2, r"ppo.value_model: got 'backbone'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_that_several_ranks_do_not_support_are_refused_by_name(case):
    sets, ranks, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        Placement.of(load_config(None, sets), ranks, parts=False)


@pytest.mark.parametrize(
    ("sets", "ranks", "parts", "expected"),
    [
        ([], 8, False, (8, 1)),
        ([], 8, True, (1, 8)),
        (["distributed.shard=4"], 8, False, (4, 2)),
        (["distributed.replicate=4"], 8, False, (2, 4)),
        (["distributed.shard=1", "ppo.ema_decay=0.9"], 2, False, (1, 2)),
        ([], 1, False, (1, 1)),
    ],
)
def test_placements(sets, ranks, parts, expected):
    placement = Placement.of(load_config(None, sets), ranks, parts=parts)
    assert (placement.shard, placement.replicate) == expected


def test_adapters_are_not_sharded():
    with pytest.raises(ValueError, match=r"distributed.shard: .*adapters.* is not sharded"):
        Placement.of(load_config(None, ["distributed.shard=2"]), 2, parts=True)


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="--gpus: got 2, expected at most 1, the number of visible GPUs"):
        check_count(2, "cuda")
    with pytest.raises(ValueError, match="--gpus: got 0"):
        check_count(0, "cpu")
    check_count(2, "cpu")


@pytest.mark.parametrize(
    ("device", "message"), [("cuda:0", "device: got 'cuda:0' with several ranks"), ("cuda", "which has 1 visible GPUs")]
)
def test_devices_that_ranks_cannot_have_are_refused(monkeypatch, device, message):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ValueError, match=message), joined(device, 1.0):
        pass
