"""Commands with quantised weights: what they write, what they continue from, and what is refused."""

import json
import shutil
import sys

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, MixtralConfig

from rlhf_engine.config import RunConfig
from rlhf_engine.model.adapter_files import Base, trained_on
from rlhf_engine.model.quantised import FORMATS
from rlhf_engine.recipes.loading import check_packages
from tests.engine.helpers.cli_run import new_model, new_run, read_lines, rlhf, start

QUANTS = ("nf4", "int8")
RANK = "adapter.rank=4"


def run(capsys, folder, command, *sets, options=()):
    code, _, err = start(capsys, folder, command, *sets, options=options)
    assert code == 0, err
    return err


def ppo_sets(out, quant):
    more = ["ppo.value_model=backbone", "ppo.checkpoint_every=1", "ppo.ema_decay=0.9"]
    return [RANK, f"model.quant={quant}", f"model.path={out / 'sft'}", f"reward.path={out / 'rm'}", *more]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return a folder for the run of each format, whose stages `stages` finishes in the first test that needs it."""
    found = {}
    for quant in QUANTS:
        folder = tmp_path_factory.mktemp(quant)
        found[quant] = new_run(folder, new_model(folder / "base"), updates=2)
    return found


@pytest.fixture
def stages(folders, capsys):
    """Return a function that runs sft, rm and ppo with a format once, as a user does, and returns the folder."""

    def finished(quant):
        folder = folders[quant]
        out = folder / "out"
        if not out.is_dir():
            run(capsys, folder, "sft", RANK, f"model.quant={quant}")
            run(capsys, folder, "rm", RANK, f"model.quant={quant}", f"model.path={out / 'sft'}")
            run(capsys, folder, "ppo", *ppo_sets(out, quant))
        return folder

    return finished


@pytest.fixture
def nf4(stages):
    return stages("nf4")


# ---- what is written ----


@pytest.mark.parametrize("quant", QUANTS)
def test_every_stage_writes_an_adapter_with_its_format_and_the_fingerprint_of_the_files(stages, quant):
    folder = stages(quant)
    base = Base.of(folder / "base")
    for place in ("sft", "rm", "ppo", "ppo/ema", "ppo/value_model"):
        record = json.loads((folder / "out" / place / "rlhf_adapter.json").read_text())
        assert record == {"base": base.folder, "base_fingerprint": base.fingerprint, "quant": quant}, place
        tensors = load_file(folder / "out" / place / "adapter_model.safetensors")
        assert {one.dtype for one in tensors.values()} == {torch.float32}
        assert max(one.abs().max() for name, one in tensors.items() if "lora_B" in name) > 0
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), folder / "out" / place)
    assert not [path for path in (folder / "out").rglob("*.safetensors") if path.name == "model.safetensors"]
    rows = [row for row in read_lines(folder / "out" / "metrics.jsonl") if row["stage"] == "ppo"]
    assert abs(rows[0]["kl"]) < 1e-5 and all(row["logprob_deviation"] < 1e-4 for row in rows)


@pytest.mark.parametrize("quant", QUANTS)
def test_the_ratio_is_1_before_the_first_step(stages, tmp_path, capsys, quant):
    """With a learning rate of almost 0 the policy stays the one that sampled, so that no ratio is clipped."""
    out = stages(quant) / "out"
    sets = [*ppo_sets(out, quant), f"output_dir={tmp_path}", "ppo.optim.lr=1e-30", "ppo.updates=1"]
    run(capsys, stages(quant), "ppo", *sets)
    (row,) = [row for row in read_lines(tmp_path / "metrics.jsonl") if row["stage"] == "ppo"]
    assert row["clipfrac"] == 0 and abs(row["approx_kl"]) < 1e-7


@pytest.mark.parametrize("quant", QUANTS)
def test_a_resumed_run_goes_on_with_the_same_bits(stages, tmp_path, capsys, quant):
    folder, sets = stages(quant), ppo_sets(stages(quant) / "out", quant)
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    run(capsys, folder, "ppo", *sets, "ppo.updates=4", f"output_dir={straight}")
    run(capsys, folder, "ppo", *sets, "ppo.updates=2", f"output_dir={resumed}")
    run(capsys, folder, "ppo", *sets, "ppo.updates=4", f"output_dir={resumed}", options=["--resume"])
    straight, resumed = straight / "ppo", resumed / "ppo"
    files = sorted(path.relative_to(straight) for path in straight.rglob("*.safetensors"))
    assert len(files) == 5  # policy, average, value, its head, optimizer
    for file in files:
        one, other = load_file(straight / file), load_file(resumed / file)
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one), file


@pytest.mark.parametrize("quant", ["none", *FORMATS])
def test_generate_eval_and_merge_read_the_result_in_any_format(nf4, tmp_path, capsys, quant):
    """Without adapter.rank, which only training needs."""
    out, answers = nf4 / "out", tmp_path / "answers.jsonl"
    options = ["--prompts", nf4 / "prompts.jsonl", "--output", answers]
    err = run(capsys, nf4, "generate", f"model.path={out / 'ppo'}", f"model.quant={quant}", options=options)
    assert len(read_lines(answers)) == 10
    notice = f"model.path: the adapter in {out / 'ppo'} was trained with model.quant=nf4 and is used with model.quant={quant}"
    assert (notice in err) == (quant != "nf4")
    sets = [f"eval.candidate={out / 'ppo'}", f"eval.baseline={nf4 / 'base'}", f"eval.judge={out / 'rm'}"]
    run(capsys, nf4, "eval", *sets, f"model.quant={quant}", f"output_dir={tmp_path / 'eval'}")
    if quant == "none":
        code, _, err = rlhf(capsys, "merge", out / "ppo", tmp_path / "merged")
        assert code == 0 and (tmp_path / "merged" / "model.safetensors").is_file(), err


def test_ppo_from_an_adapter_of_a_different_format_gives_a_notice(nf4, tmp_path, capsys):
    out = nf4 / "out"
    err = run(capsys, nf4, "ppo", *ppo_sets(out, "int8"), f"output_dir={tmp_path}", "ppo.updates=1")
    for key, stage in (("model.path", "sft"), ("reward.path", "rm")):
        assert (
            f"{key}: the adapter in {out / stage} was trained with model.quant=nf4 and is used with model.quant=int8"
            in err
        )
    assert trained_on(tmp_path / "ppo") == "int8"


def test_iterate_trains_on_quantised_weights(nf4, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    judge = "def judge(prompts, a, b):\n    return [len(x) for x in a], [len(x) for x in b]\n"
    (tmp_path / "judge.py").write_text(judge)
    sets = [RANK, "model.quant=nf4", "iterate.rounds=1", "iterate.prompts=4", f"output_dir={tmp_path / 'rounds'}"]
    run(capsys, nf4, "iterate", *sets, "iterate.judge=judge.py:judge", "eval.judge=judge.py:judge")
    assert trained_on(tmp_path / "rounds" / "round_1" / "ppo") == "nf4"


def test_a_reward_model_on_other_weights_is_quantised_too(nf4, tmp_path, capsys):
    """S22: values get an adapter on the trunk of the reward model."""
    new_model(tmp_path / "small", seed=3, num_hidden_layers=1)
    run(
        capsys, nf4, "rm", RANK, "model.quant=nf4", f"model.path={tmp_path / 'small'}", f"output_dir={tmp_path / 'out'}"
    )
    sets = [one for one in ppo_sets(nf4 / "out", "nf4") if not one.startswith("reward.path")]
    run(capsys, nf4, "ppo", *sets, f"reward.path={tmp_path / 'out' / 'rm'}", f"output_dir={tmp_path / 'new'}")
    assert trained_on(tmp_path / "new" / "ppo" / "value_model") == "nf4"


# ---- refused ----


def test_a_run_is_not_resumed_with_a_different_format(nf4, tmp_path, capsys):
    shutil.copytree(nf4 / "out", tmp_path / "out")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for command, sets in (("sft", [RANK, "model.quant=int8"]), ("ppo", ppo_sets(tmp_path / "out", "int8"))):
        more = [f"output_dir={tmp_path / 'out'}", "ppo.updates=4"]
        code, _, err = start(capsys, nf4, command, *sets, *more, options=["--resume"])
        assert code == 2 and "model.quant: got 'int8', expected 'nf4' to go on with the run of" in err, err
    changed = {path for path, content in before.items() if path.read_bytes() != content}
    assert not changed


@pytest.mark.parametrize("command", ["sft", "rm", "ppo", "iterate"])
def test_training_without_a_rank_names_both_settings(nf4, tmp_path, capsys, command):
    """Also from an adapter, which would be merged into the weights."""
    sets = ["model.quant=nf4", f"model.path={nf4 / 'out' / 'sft'}", f"reward.path={nf4 / 'out' / 'rm'}"]
    code, _, err = start(capsys, nf4, command, *sets, f"output_dir={tmp_path / 'new'}")
    message = (
        "model.quant: got 'nf4' with adapter.rank 0, expected 'none': quantised weights cannot be trained; set adapter"
    )
    assert code == 2 and message in err and err.count("\n") == 1
    assert not (tmp_path / "new" / command).exists()


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("command", ["sft", "ppo", "generate"])
def test_without_the_package_the_extra_is_named(nf4, tmp_path, capsys, monkeypatch, command, quant):
    package = FORMATS[quant].package
    for name in [package, *(one for one in sys.modules if one.startswith(f"{package}."))]:
        monkeypatch.setitem(sys.modules, name, None)
    options = ["--prompts", nf4 / "prompts.jsonl", "--output", tmp_path / "answers"] if command == "generate" else []
    sets = [RANK, f"model.quant={quant}", f"model.path={nf4 / 'out' / 'sft'}", f"reward.path={nf4 / 'out' / 'rm'}"]
    code, _, err = start(capsys, nf4, command, *sets, f"output_dir={tmp_path / 'new'}", options=options)
    assert code == 2 and err.count("\n") == 1, err
    assert (
        f"model.quant: '{quant}' needs {package}, which cannot be imported; run pip install 'rlhf-kernels[quant]'"
        in err
    )


def test_the_package_is_imported_before_the_plan(nf4, monkeypatch):
    """Its memory is in use before the first weight is read, and the plan does not count it."""
    monkeypatch.setitem(sys.modules, "torchao", None)
    sections = {"model": {"path": str(nf4 / "base"), "quant": "int8"}, "adapter": {"rank": 2}}
    with pytest.raises(ValueError, match="needs torchao, which cannot be imported"):
        check_packages(RunConfig.from_dict(sections))


def test_a_model_that_cannot_be_quantised_is_refused(nf4, tmp_path, capsys):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    experts = {"num_key_value_heads": 2, "num_local_experts": 2, "num_experts_per_tok": 1}
    shutil.copytree(nf4 / "base", tmp_path / "experts")
    model = AutoModelForCausalLM.from_config(MixtralConfig(**sizes, **experts, vocab_size=300))
    model.save_pretrained(tmp_path / "experts")
    new_model(tmp_path / "odd", intermediate_size=45)
    for name, part in (
        ("experts", "gate_up_proj of MixtralForCausalLM has 3 dim"),
        ("odd", "gate_proj.weight of shape"),
    ):
        sets = [RANK, "model.quant=nf4", f"model.path={tmp_path / name}", f"output_dir={tmp_path / 'new'}"]
        code, _, err = start(capsys, nf4, "sft", *sets)
        assert code == 2 and err.startswith("rlhf: model.quant: the weight model.layers.0.mlp.") and part in err, err
        assert err.count("\n") == 1
