"""Commands with adapters: what they write, what they continue from, and what is refused."""

import json
import shutil
import sys

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rlhf_engine.model.reward_model import RewardModel
from rlhf_engine.model.saving import load_policy
from tests.engine.helpers.cli_run import new_model, new_run, read_lines, rlhf, run, start

RANK = "adapter.rank=2"
PEFT = {"adapter_config.json", "adapter_model.safetensors", "rlhf_adapter.json"}
IDS = torch.arange(3, 15)[None]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return the folder of a run whose stages `stages` finishes in the first test."""
    folder = tmp_path_factory.mktemp("adapters")
    return new_run(folder, new_model(folder / "base"), updates=2)


@pytest.fixture
def stages(finished, capsys):
    """Run sft, rm and ppo once, as a user does: only adapter.rank differs from full fine-tuning."""
    out = finished / "out"
    if not out.is_dir():
        run(capsys, finished, "sft", RANK)
        run(capsys, finished, "rm", RANK, f"model.path={out / 'sft'}")
        run(capsys, finished, "ppo", *ppo_sets(out), "ppo.ema_decay=0.9", "ppo.checkpoint_every=1")
    return finished


def ppo_sets(out):
    return [RANK, f"model.path={out / 'sft'}", f"reward.path={out / 'rm'}", "ppo.value_model=backbone"]


@pytest.fixture
def copied(stages, tmp_path):
    """Return a copy of the finished run that a test may change; its adapters name the base in the copy."""
    shutil.copytree(stages, tmp_path / "run")
    for path in (tmp_path / "run").rglob("*"):
        # The manifest of the checkpoint in `ppo` has the checksums of its files.
        if path.name in ("adapter_config.json", "run.yaml") and "ppo" not in path.parts:
            path.write_text(path.read_text().replace(str(stages), str(tmp_path / "run")))
    return tmp_path / "run"


def names(folder):
    return {path.name for path in folder.iterdir()}


def logits_of(folder):
    return AutoModelForCausalLM.from_pretrained(folder)(input_ids=IDS).logits


# ---- what is written ----


def test_every_stage_writes_an_adapter_that_peft_loads(stages):
    out, plain = stages / "out", logits_of(stages / "base")
    for place in (out / "sft", out / "rm", out / "ppo", out / "ppo" / "ema", out / "ppo" / "value_model"):
        assert names(place) >= PEFT and not {"config.json", "model.safetensors"} & names(place)
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(stages / "base"), place).eval()
        assert (loaded(input_ids=IDS).logits - plain).abs().max() > 1e-6, place
    assert "reward_head.safetensors" in names(out / "rm") & names(out / "ppo" / "value_model")
    config = json.loads((out / "sft" / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )


def test_a_checkpoint_holds_trained_tensors_only(stages):
    place = stages / "out" / "ppo"
    tensors = {name for path in place.rglob("*.safetensors") for name in load_file(path)}
    layers = {name for name in tensors if "lora_" in name}
    assert {name.rpartition("lora_")[2] for name in layers} == {"A.weight", "B.weight"}
    moments = {name for name in tensors if name.rpartition(".")[2] in ("step", "exp_avg", "exp_avg_sq")}
    assert tensors == layers | moments | {"weight", "bias"}
    size = sum(path.stat().st_size for path in place.rglob("*.safetensors"))
    assert size < 0.9 * (stages / "base" / "model.safetensors").stat().st_size  # of 4 adapters with two moments each


def test_s8_the_values_start_from_the_reward_adapter_and_the_policy_from_that_of_sft(copied, capsys):
    """With a learning rate of almost 0 the saved adapters are those that the run started from."""
    out = copied / "out"
    run(capsys, copied, "ppo", *ppo_sets(out), "ppo.optim.lr=1e-30", "ppo.updates=1", options=["--overwrite"])
    for trained, first in (("ppo", "sft"), ("ppo/value_model", "rm")):
        ours, theirs = (load_file(out / place / "adapter_model.safetensors") for place in (trained, first))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    head, theirs = (load_file(out / place / "reward_head.safetensors") for place in ("ppo/value_model", "rm"))
    assert all(torch.equal(head[name], theirs[name]) for name in theirs)
    rows = [row for row in read_lines(out / "metrics.jsonl") if row["stage"] == "ppo"]
    assert abs(rows[0]["kl"]) < 1e-5  # to the SFT policy, not to the base model


def test_s8_a_head_on_the_policys_states_starts_from_the_head_of_a_reward_adapter(copied, capsys):
    out = copied / "out"
    sets = [one for one in ppo_sets(out) if "value_model" not in one]
    run(capsys, copied, "ppo", *sets, "ppo.optim.lr=1e-30", "ppo.updates=1", options=["--overwrite"])
    head, theirs = (load_file(out / place) for place in ("ppo/value_head.safetensors", "rm/reward_head.safetensors"))
    assert all(torch.equal(head[name], theirs[name]) for name in theirs)
    assert "value_model" not in names(out / "ppo")


def test_s22_values_get_an_adapter_on_the_trunk_of_a_smaller_reward_model(copied, capsys):
    """The reward model has other weights, which are frozen and shared with the value function."""
    out = copied / "out"
    new_model(copied / "small", seed=3, num_hidden_layers=1)
    run(capsys, copied, "rm", f"model.path={copied / 'small'}", f"output_dir={copied / 'small_out'}")
    sets = [RANK, f"reward.path={copied / 'small_out' / 'rm'}", "ppo.value_model=backbone", "ppo.updates=2"]
    run(capsys, copied, "ppo", f"model.path={out / 'sft'}", *sets, options=["--overwrite"])
    value = load_policy(out / "ppo").value
    assert len(value.trunk.layers) == 1 and names(out / "ppo" / "value_model") >= PEFT
    moved = [tensor for key, tensor in value.adapters.tensors(value.name).items() if "lora_B" in key]
    assert len(moved) == 7 and all(tensor.abs().max() > 0 for tensor in moved)


@pytest.mark.parametrize("base", ["plain", "adapter"])
def test_without_a_rank_the_weights_are_trained_and_an_adapter_is_merged_first(stages, tmp_path, capsys, base):
    place = {"plain": stages / "base", "adapter": stages / "out" / "sft"}[base]
    run(capsys, stages, "sft", f"model.path={place}", f"output_dir={tmp_path / 'full'}", "sft.optim.lr=1e-12")
    folder = tmp_path / "full" / "sft"
    assert "model.safetensors" in names(folder) and not PEFT & names(folder)
    expected = load_policy(place).model(input_ids=IDS).logits
    torch.testing.assert_close(logits_of(folder), expected, rtol=1e-4, atol=1e-4)


# ---- merge, generate, eval ----


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_a_merged_model_loads_without_peft_and_has_equal_logits(stages, tmp_path, capsys, stage):
    source, target = stages / "out" / stage, tmp_path / "merged"
    code, out, err = rlhf(capsys, "merge", source, target)
    assert code == 0 and str(target) in out, err
    assert not PEFT & names(target)
    torch.testing.assert_close(logits_of(target), load_policy(source).model(input_ids=IDS).logits, rtol=1e-4, atol=1e-4)
    if stage == "ppo":
        torch.testing.assert_close(
            logits_of(target / "ema"), load_policy(source / "ema").model(input_ids=IDS).logits, rtol=1e-4, atol=1e-4
        )
        ours, theirs = RewardModel.load(target / "value_model"), RewardModel.load(source / "value_model")
        assert ours.adapters is None
        torch.testing.assert_close(ours(IDS, torch.tensor([12])), theirs(IDS, torch.tensor([12])))
    code, _, err = rlhf(capsys, "merge", source, target)
    assert code == 2 and "exists already; give a new folder" in err
    code, _, err = rlhf(capsys, "merge", stages / "base", tmp_path / "other")
    assert code == 2 and "got no adapter (adapter_config.json), expected the folder of one" in err


def test_a_merged_reward_model_gives_equal_scores(stages, tmp_path, capsys):
    source, target = stages / "out" / "rm", tmp_path / "merged"
    code, _, err = rlhf(capsys, "merge", source, target, "--dtype", "float32")
    assert code == 0, err
    ours, theirs = RewardModel.load(target), RewardModel.load(source)
    torch.testing.assert_close(ours(IDS, torch.tensor([12])), theirs(IDS, torch.tensor([12])))


def test_generate_and_eval_sample_from_an_adapter(stages, tmp_path, capsys):
    out, answers = stages / "out", tmp_path / "answers.jsonl"
    options = ["--prompts", stages / "prompts.jsonl", "--output", answers]
    run(capsys, stages, "generate", f"model.path={out / 'ppo'}", options=options)
    assert len(read_lines(answers)) == 10
    sets = [f"eval.candidate={out / 'ppo'}", f"eval.baseline={out / 'sft'}", f"eval.judge={out / 'rm'}"]
    shown = run(capsys, stages, "eval", *sets, f"output_dir={tmp_path / 'eval'}")
    assert "| candidate |" in shown


def test_iterate_trains_an_adapter_in_every_round(stages, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "judge.py").write_text(
        "def judge(prompts, a, b):\n    return [len(x) for x in a], [len(x) for x in b]\n"
    )
    out = tmp_path / "rounds"
    sets = [RANK, f"model.path={stages / 'out' / 'sft'}", "iterate.rounds=2", "iterate.prompts=4", f"output_dir={out}"]
    run(capsys, stages, "iterate", *sets, "iterate.judge=judge.py:judge", "eval.judge=judge.py:judge")
    for number in (1, 2):
        for stage in ("rm", "ppo"):
            place = out / f"round_{number}" / stage
            assert json.loads((place / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
                stages / "base"
            )
    tensors = [load_file(out / f"round_{number}" / "ppo" / "adapter_model.safetensors") for number in (1, 2)]
    assert {name: one.shape for name, one in tensors[0].items()} == {
        name: one.shape for name, one in tensors[1].items()
    }


# ---- resumed runs ----


def test_a_resumed_run_goes_on_with_the_same_bits(copied, capsys):
    out, more = copied / "out", ["ppo.ema_decay=0.9", "ppo.updates=4"]
    run(capsys, copied, "ppo", *ppo_sets(out), *more, f"output_dir={copied / 'straight'}")
    run(capsys, copied, "ppo", *ppo_sets(out), *more, options=["--resume"])
    ours, theirs = copied / "straight" / "ppo", out / "ppo"
    files = sorted(path.relative_to(ours) for path in ours.rglob("*.safetensors"))
    assert len(files) == 5  # policy, average, value, its head, optimizer
    for file in files:
        one, other = load_file(ours / file), load_file(theirs / file)
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one), file


def test_a_base_that_has_changed_is_refused(copied, capsys):
    weights = copied / "base" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"][0] += 1e-3
    save_file(tensors, weights, metadata={"format": "pt"})
    out = copied / "out"
    code, _, err = start(capsys, copied, "ppo", *ppo_sets(out), "ppo.updates=3", options=["--resume"])
    assert code == 2 and f"{out / 'sft'}: the adapter belongs to other weights than those of {copied / 'base'}" in err
    code, _, err = start(capsys, copied, "ppo", RANK, f"reward.path={out / 'rm'}", f"output_dir={copied / 'new'}")
    assert code == 2 and f"reward.path: {out / 'rm'}: the adapter belongs to other weights" in err


def test_a_checkpoint_on_another_base_is_refused(copied, capsys):
    """The run began from a plain model, so that only the checkpoint has a fingerprint of it."""
    (copied / "rewards.py").write_text("def reward(prompts, answers):\n    return [float(len(a)) for a in answers]\n")
    sets = [
        RANK,
        f"reward.function={copied / 'rewards.py'}:reward",
        "ppo.value_init=zero",
        f"output_dir={copied / 'new'}",
    ]
    run(capsys, copied, "ppo", *sets, "ppo.updates=1")
    before = {path: path.read_bytes() for path in (copied / "new" / "ppo").rglob("*") if path.is_file()}
    new_model(copied / "other", seed=9)
    shutil.copy(copied / "other" / "model.safetensors", copied / "base" / "model.safetensors")
    code, _, err = start(capsys, copied, "ppo", *sets, "ppo.updates=2", options=["--resume"])
    assert code == 2 and "the adapter belongs to other weights than those of" in err
    assert all(path.read_bytes() == content for path, content in before.items())


# ---- refused ----


def test_a_reward_adapter_without_head_is_refused(copied, capsys):
    out = copied / "out"
    (out / "rm" / "reward_head.safetensors").unlink()
    code, _, err = start(capsys, copied, "ppo", *ppo_sets(out), options=["--overwrite"])
    assert code == 2 and f"reward.path: {out / 'rm'}: got an adapter without the head of a reward model" in err
    assert (out / "ppo" / "trainer.json").is_file()


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["adapter.rank=4"], "adapter.rank: got 4, expected 2, that of the adapter in"),
        ([RANK, "adapter.alpha=8"], "adapter.alpha: got 8.0, expected 32.0"),
        ([RANK, "adapter.targets=[q_proj]"], "adapter.targets: got q_proj, expected down_proj, gate_proj"),
        (["ppo.reference=adapter_off"], "ppo.reference: got 'adapter_off' with adapter.rank 0, expected 'frozen_copy'"),
        ([RANK, "adapter.dora=true"], "adapter: dora: got True, expected False: DoRA is not supported"),
    ],
)
def test_settings_that_do_not_fit_the_adapter_are_refused(stages, tmp_path, capsys, sets, message):
    out = stages / "out"
    more = [f"model.path={out / 'sft'}", f"reward.path={out / 'rm'}", f"output_dir={tmp_path}"]
    code, _, err = start(capsys, stages, "ppo", *more, *sets)
    assert code == 2 and message in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora: got True, expected False: DoRA is not supported"),
        ({"peft_type": "IA3"}, "peft_type: got 'IA3', expected 'LORA'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: got 'pissa', expected True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save: got ['lm_head'], which is not supported"),
        (
            {"base_model_name_or_path": "nowhere"},
            "base_model_name_or_path: got 'nowhere', expected the folder of the model",
        ),
        ({"r": 3}, "got (2, 48) for model.layers.0.mlp.down_proj.lora_A.weight of the adapter, expected (3, 48)"),
        ({"target_modules": ["nothing"]}, "adapter.targets: got 'nothing', which matches no linear layer"),
        ({"r": "two"}, "not the config of a LoRA adapter"),
    ],
)
def test_adapters_of_other_kinds_are_refused(copied, capsys, change, message):
    path = copied / "out" / "sft" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    options = ["--prompts", copied / "prompts.jsonl", "--output", copied / "answers.jsonl"]
    code, _, err = start(capsys, copied, "generate", f"model.path={copied / 'out' / 'sft'}", options=options)
    assert code == 2 and message in err and err.count("\n") == 1
    assert not (copied / "answers.jsonl").exists()


def test_without_peft_the_extra_is_named(stages, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    code, _, err = start(capsys, stages, "sft", RANK, f"output_dir={tmp_path}")
    assert code == 2 and "run pip install 'rlhf-kernels[adapters]'" in err and err.count("\n") == 1
