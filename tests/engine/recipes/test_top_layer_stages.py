"""Commands that train only the top layers: what their checkpoints and results hold, resumption, and what is refused."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rlhf_engine.model.reward_model import RewardModel
from tests.engine.helpers.cli_run import new_model, new_run, rlhf, run, start

TOP = "model.train_layers=1"
TRAINED = ("model.layers.1.", "model.norm.", "lm_head.")
"""Beginnings of the names of the weights that are trained of an untied model with two layers."""
PARTIAL = {"top_layers.safetensors", "rlhf_top_layers.json"}


def names(folder):
    return {path.name for path in folder.iterdir()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return the folder of a run whose stages `stages` finishes in the first test."""
    folder = tmp_path_factory.mktemp("top")
    return new_run(folder, new_model(folder / "base", tie_word_embeddings=False), updates=2)


@pytest.fixture
def stages(finished, capsys):
    """Run sft, rm and ppo once, with every update of ppo kept as a checkpoint."""
    out = finished / "out"
    if not out.is_dir():
        run(capsys, finished, "sft", TOP, "ppo.reference=hydra")
        run(capsys, finished, "rm", TOP, f"model.path={out / 'sft'}")
        run(capsys, finished, "ppo", *ppo_sets(out), "ppo.ema_decay=0.9", "checkpoint.keep=2")
    return finished


def ppo_sets(out):
    return [TOP, f"model.path={out / 'sft'}", f"reward.path={out / 'rm'}", "ppo.checkpoint_every=1"]


def changed(before, after, prefix=""):
    """Return the names of the weights that differ, of a model's file and one with weights of the same names."""
    ours, theirs = (load_file(place / "model.safetensors") for place in (before, after))
    return {name for name in theirs if not torch.equal(ours[prefix + name], theirs[name])}


def test_every_result_is_a_complete_model_of_which_only_the_top_layers_have_changed(stages):
    out = stages / "out"
    for before, place in (
        (stages / "base", out / "sft"),
        (out / "sft", out / "ppo"),
        (out / "sft", out / "ppo" / "ema"),
    ):
        assert not PARTIAL & names(place)
        model = AutoModelForCausalLM.from_pretrained(place)
        expected = {name for name, _ in model.named_parameters() if name.startswith(TRAINED)}
        assert len(expected) == 11 and changed(before, place) == expected
    moved = changed(out / "sft", out / "rm", prefix="model.")
    assert moved and all(name.startswith(("layers.1.", "norm.")) for name in moved)
    assert isinstance(RewardModel.load(out / "rm"), RewardModel)


def test_a_checkpoint_holds_the_trained_weights_and_names_those_below(stages, tmp_path, capsys):
    place = stages / "out" / "checkpoints" / "ppo-1"
    assert names(place) >= PARTIAL and not {"config.json", "model.safetensors"} & names(place)
    assert names(place / "ema") >= PARTIAL
    stored = load_file(place / "top_layers.safetensors")
    assert len(stored) == 11 and all(name.startswith(TRAINED) for name in stored)
    moments = {name for name in load_file(place / "optimizer.safetensors") if name.endswith("exp_avg")}
    assert len(moments) == 13  # and those of the value head
    rlhf(capsys, "merge", place, tmp_path / "merged")
    assert changed(stages / "out" / "sft", tmp_path / "merged") == stored.keys()
    assert changed(tmp_path / "merged", stages / "out" / "ppo") == stored.keys()
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged" / "ema")
    options = ["--prompts", stages / "prompts.jsonl"]
    answers = []
    for number, model in enumerate((place, tmp_path / "merged")):
        file = tmp_path / f"{number}.jsonl"
        run(capsys, stages, "generate", f"model.path={model}", options=[*options, "--output", file])
        answers.append(file.read_text())
    assert answers[0] == answers[1]


@pytest.mark.parametrize("command", ["sft", "rm", "ppo"])
def test_a_run_that_continues_from_a_checkpoint_ends_with_the_same_bits(stages, tmp_path, capsys, command, monkeypatch):
    out, new = stages / "out", tmp_path / "new"
    sets = {"sft": [TOP], "rm": [TOP, f"model.path={out / 'sft'}"], "ppo": [*ppo_sets(out), "ppo.ema_decay=0.9"]}[
        command
    ]
    sets = [*sets, f"output_dir={new}"]
    place, first = (
        (new / "ppo", out / "checkpoints" / "ppo-1") if command == "ppo" else (new / f"{command}.checkpoint", None)
    )
    if first is None:
        section = {"sft": "sft", "rm": "reward"}[command]
        sets.append(f"{section}.checkpoint_every=1")
        monkeypatch.setattr("rlhf_engine.recipes.session.remove_checkpoints", lambda folder: None)
        run(capsys, stages, command, *sets, "checkpoint.keep=9")
        monkeypatch.undo()
        shutil.move(new / "checkpoints" / f"{command}-1", tmp_path / "first")
        shutil.rmtree(new)
        first = tmp_path / "first"
    assert names(first) >= PARTIAL
    shutil.copytree(first, place)
    run(capsys, stages, command, *sets, options=["--resume"])
    assert same_weights(new / command, out / command)


def test_a_complete_run_goes_on_with_more_updates(stages, tmp_path, capsys):
    sets = [*ppo_sets(stages / "out"), "ppo.ema_decay=0.9", f"output_dir={tmp_path}"]
    run(capsys, stages, "ppo", *sets, "ppo.updates=1")
    assert not PARTIAL & names(tmp_path / "ppo")
    run(capsys, stages, "ppo", *sets, options=["--resume"])
    assert same_weights(tmp_path / "ppo", stages / "out" / "ppo")


def same_weights(ours, theirs):
    """Return whether two folders have the same safetensors, with the same bytes."""
    files = {path.relative_to(ours) for path in ours.rglob("*.safetensors")}
    assert files and files == {path.relative_to(theirs) for path in theirs.rglob("*.safetensors")}
    return all((ours / name).read_bytes() == (theirs / name).read_bytes() for name in files)


def test_changed_weights_below_are_refused(stages, tmp_path, capsys):
    shutil.copytree(stages, tmp_path / "run")
    sft, place = tmp_path / "run" / "out" / "sft", tmp_path / "run" / "out" / "checkpoints" / "ppo-1"
    record = place / "rlhf_top_layers.json"
    record.write_text(record.read_text().replace(str(stages), str(tmp_path / "run")))
    shutil.copy(stages / "base" / "model.safetensors", sft / "model.safetensors")
    options = ["--prompts", stages / "prompts.jsonl", "--output", tmp_path / "answers.jsonl"]
    code, _, err = start(capsys, stages, "generate", f"model.path={place}", options=options)
    assert code == 2 and f"{place}: the top layers belong to other weights than those of {sft}" in err


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["model.train_layers=0"], "model.train_layers: got 0, expected"),
        (["model.train_layers=-1"], "model.train_layers: got -1, expected"),
        (["model.train_layers=3"], "model.train_layers: got 3, expected at most 2, the number of layers of"),
        (["ppo.reference=hydra"], "ppo.reference: got 'hydra' without model.train_layers, expected 'frozen_copy'"),
        (
            ["ppo.reference=hydra", "adapter.rank=2"],
            "ppo.reference: got 'hydra' without model.train_layers, expected 'adapter_off' or 'frozen_copy': every layer has",
        ),
        (
            [TOP, "ppo.reference=adapter_off"],
            "ppo.reference: got 'adapter_off' with adapter.rank 0, expected 'hydra' or 'frozen_copy'",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_weights_are_read(stages, tmp_path, capsys, sets, message):
    shutil.copytree(stages / "base", tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").unlink()
    more = [f"model.path={tmp_path / 'base'}", f"reward.path={stages / 'out' / 'rm'}", f"output_dir={tmp_path / 'out'}"]
    code, _, err = start(capsys, stages, "ppo", *more, *sets)
    assert code == 2 and message in err and err.count("\n") == 1
    if "reference" not in message:
        code, _, err = start(capsys, stages, "sft", *more, *sets)
        assert code == 2 and message in err and err.count("\n") == 1


def test_a_start_without_the_frozen_weights_is_refused(stages, tmp_path, capsys):
    place = stages / "out" / "checkpoints" / "ppo-1"
    code, _, err = start(capsys, stages, "sft", TOP, f"model.path={place}", f"output_dir={tmp_path}")
    assert code == 2 and f"model.path: got {place}, the checkpoint of an unfinished run with only its top layers" in err
    run(capsys, stages, "sft", "adapter.rank=2", f"output_dir={tmp_path / 'adapter'}")
    adapter = f"model.path={tmp_path / 'adapter' / 'sft'}"
    code, _, err = start(capsys, stages, "sft", TOP, adapter, f"output_dir={tmp_path / 'new'}")
    assert code == 2 and "with model.train_layers 1 and adapter.rank 0, expected a model" in err
    code, _, err = start(capsys, stages, "sft", TOP, adapter, "adapter.rank=2", f"output_dir={tmp_path / 'new'}")
    assert code == 2 and "adapter.targets: got all-linear in the layers of model.train_layers, expected" in err


def test_adapters_in_the_top_layers_are_trained_by_every_stage(stages, tmp_path, capsys):
    out = tmp_path / "out"
    top = [TOP, "adapter.rank=2", f"output_dir={out}"]
    run(capsys, stages, "sft", *top)
    run(capsys, stages, "rm", *top, f"model.path={out / 'sft'}")
    more = [*top, f"model.path={out / 'sft'}", f"reward.path={out / 'rm'}", "ppo.value_model=backbone"]
    run(capsys, stages, "ppo", *more, "ppo.reference=hydra")
    for place in (out / "sft", out / "rm", out / "ppo", out / "ppo" / "value_model"):
        tensors = load_file(place / "adapter_model.safetensors")
        assert len(tensors) == 14 and all(".layers.1." in name for name in tensors), place


@pytest.mark.parametrize("init", ["zero", "reward_model"])
def test_a_value_function_with_its_own_trunk_trains_all_of_its_layers(stages, tmp_path, capsys, init):
    out = stages / "out"
    sets = [*ppo_sets(out), "ppo.value_model=backbone", f"ppo.value_init={init}", f"output_dir={tmp_path}"]
    run(capsys, stages, "ppo", *sets, "checkpoint.keep=2")
    before = {"zero": (out / "sft", "model."), "reward_model": (out / "rm", "")}[init]
    moved = changed(before[0], tmp_path / "ppo" / "value_model", prefix=before[1])
    assert any(name.startswith("layers.0.") for name in moved) and "embed_tokens.weight" in moved
    first = tmp_path / "checkpoints" / "ppo-1"
    assert names(first) >= PARTIAL and "model.safetensors" in names(first / "value_model")
    shutil.move(tmp_path / "ppo", tmp_path / "theirs")
    shutil.copytree(first, tmp_path / "ppo")
    run(capsys, stages, "ppo", *sets, options=["--resume"])
    assert same_weights(tmp_path / "ppo", tmp_path / "theirs")


def test_a_partial_checkpoint_is_not_quantised(stages, capsys):
    """Its float weights would be copied into integer codes."""
    out = stages / "out"
    partial = next(
        path for path in sorted((out / "checkpoints").iterdir()) if (path / "top_layers.safetensors").is_file()
    )
    options = ("--prompts", stages / "prompts.jsonl", "--output", stages / "quantised.jsonl")
    code, _, err = start(capsys, stages, "generate", f"model.path={partial}", "model.quant=int8", options=options)
    assert code == 2 and "model.quant: got 'int8', expected 'none' for" in err and "run rlhf merge on it first" in err


def test_merging_without_an_adapter_is_refused_before_anything_is_loaded(stages, capsys):
    code, _, err = start(
        capsys,
        stages,
        "ppo",
        *ppo_sets(stages / "out"),
        f"output_dir={stages / 'other'}",
        "rollout.merge_adapters=always",
    )
    assert code == 2 and "rollout.merge_adapters: got 'always' with adapter.rank 0 and a model without adapters" in err
