"""Config: accepted files and overrides, and the messages of errors."""

import ast
import importlib
import inspect
from dataclasses import replace
from pkgutil import iter_modules

import pytest

from rlhf_engine import config
from rlhf_engine.config import OptimConfig, PPOConfig, RunConfig, load_config, save_config
from rlhf_kernels.backend import BACKENDS


def write(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


def test_yaml_round_trip(tmp_path):
    original = RunConfig(seed=3, ppo=PPOConfig(kl_coef=0.05, cliprange_high=0.3, optim=OptimConfig(betas=(0.8, 0.9))))
    save_config(original, tmp_path / "run.yaml")
    assert load_config(tmp_path / "run.yaml") == original


def test_a_size_may_be_a_number_of_bytes(tmp_path):
    (tmp_path / "run.yaml").write_text("memory: {budget: 900000000}")
    assert load_config(tmp_path / "run.yaml").memory.budget == "900000000"
    with pytest.raises(ValueError, match=r"memory\.budget: got True \(bool\), expected a text or a whole number"):
        load_config(None, ["memory.budget=true"])
    with pytest.raises(ValueError, match=r"memory: budget: got '0', which is 0 bytes, expected at least a megabyte"):
        load_config(None, ["memory.budget=0"])


def test_exponent_without_a_dot_is_a_number(tmp_path):
    assert load_config(write(tmp_path, "ppo: {optim: {lr: 3e-6}}")).ppo.optim.lr == 3e-6
    assert load_config(None, ["ppo.optim.lr=3e-6"]).ppo.optim.lr == 3e-6


def test_setting_one_key_keeps_the_defaults_of_the_others():
    """PPO's optimizer has a different default learning rate and epsilon than the other stages."""
    usual, found = RunConfig().ppo.optim, load_config(None, ["ppo.optim.warmup_steps=3"]).ppo.optim
    assert found == replace(usual, warmup_steps=3) and (found.lr, found.eps) == (9e-6, 1e-5)
    assert load_config(None, ["ppo.optim.eps=1e-8"]).ppo.optim == replace(usual, eps=1e-8)
    assert load_config(None, ["sft.optim.warmup_steps=3"]).sft.optim == OptimConfig(warmup_steps=3)


def test_overrides_apply_in_order_after_the_file(tmp_path):
    path = write(tmp_path, "seed: 1\nppo: {rollout_batch: 32}")
    loaded = load_config(path, ["seed=2", "seed=3", "ppo.minibatch=8", "ppo.microbatch=4", "rollout.top_k=null"])
    assert (loaded.seed, loaded.ppo.rollout_batch, loaded.ppo.minibatch, loaded.rollout.top_k) == (3, 32, 8, None)


@pytest.mark.parametrize(
    "text, words",
    [
        ("ppo: {kl_coeff: 0.1}", ["run.yaml", "'ppo.kl_coeff'", "'ppo.kl_coef'"]),
        ("ppoo: {}", ["'ppoo'", "'ppo'"]),
        ("ppo: {kl_coef: high}", ["ppo.kl_coef", "'high' (str)", "float"]),
        ("ppo: {kl_coef: true}", ["ppo.kl_coef", "True (bool)", "float"]),
        ("ppo: {ppo_epochs: 1.5}", ["ppo.ppo_epochs", "1.5 (float)", "int"]),
        ("ppo: {lam: 1.5}", ["ppo.lam", "1.5", "at least 0 and at most 1"]),
        ("ppo: {kl_coef: .nan}", ["ppo.kl_coef", "nan", "at least 0"]),
        ("sft: {optim: {lr: .inf}}", ["sft.optim.lr", "inf", "finite number above 0"]),
        ("sft: {optim: {lr: 1e30}}", ["sft.optim.lr", "1e+30", "at most 1"]),
        ("ppo: {score_clip: .inf}", ["ppo.score_clip", "inf", "finite"]),
        ("seed: 99999999999999999999", ["seed", "99999999999999999999", "at most"]),
        (f"ppo: {{kl_coef: 1{'0' * 400}}}", ["ppo.kl_coef", "bits", "float"]),
        ("dtype: float16", ["dtype: got 'float16'", "'bfloat16'", "loss scaling"]),
        ("dtype: bfloat16\nppo: {objective: trpo}", ["dtype: got 'bfloat16'", "'float32'", "masters"]),
        ("backend: metal", ["backend", "'metal'", "'triton'"]),
        ("backend: gpu", ["backend", "'gpu'", "'cuda'"]),
        ("ppo: {value_warmup: 3, vf_coef: 0}", ["value_warmup: got 3", "only vf_coef above 0"]),
        ("ppo: {ema_decay: 1}", ["ema_decay: got 1.0", "below 1"]),
        (
            "ppo: {objective: trpo, baseline: none, vf_coef: 0}",
            ["baseline: got 'none', expected 'value' with objective 'trpo'"],
        ),
        ("data: {prompt_template: 'User: '}", ["data: prompt_template: got 'User: '", "{prompt}"]),
        ("output_dir: ''", ["output_dir: got '', expected the path of a folder"]),
        ("ppo: {old_kl_coef: 0.1}", ["old_kl_coef: got 0.1", "only objective 'kl_penalty'"]),
        ("ppo: {objective: ratio, dual_clip: 3}", ["dual_clip: got 3.0", "only objective 'clip'"]),
        ("ppo: {objective: kl_penalty, cliprange_high: 0.3}", ["cliprange_high: got 0.3", "only objective 'clip'"]),
        ("ppo: {kl_target: 6}", ["kl_target: got 6.0", "only kl_control 'adaptive'"]),
        ("ppo: {kl_control: adaptive}", ["kl_target is not set", "a number"]),
        ("ppo: {kl_control: adaptive, kl_target: 6, kl_coef: 0}", ["kl_coef: got 0.0", "above 0"]),
        ("ppo: {kl_control: adaptive, kl_target: 6, kl_horizon: 100}", ["kl_horizon: got 100", "102.4"]),
        ("ppo: {objective: kl_penalty, old_kl_target: 0.01}", ["old_kl_coef: got 0.0", "old_kl_target"]),
        (
            "ppo: {objective: sapo, cliprange: 0.1}",
            ["cliprange: got 0.1", "only objective 'clip', 'cispo', 'gspo_token'"],
        ),
        ("ppo: {objective: ipo, divergence_high: 0.1}", ["divergence_high: got 0.1", "only objective 'dppo_tv' or"]),
        ("ppo: {tau_pos: 2}", ["tau_pos: got 2.0", "only objective 'sapo'"]),
        ("ppo: {ratio_limit: 2}", ["ratio_limit: got 2.0", "only objective 'dppo_tv' or 'dppo_kl'"]),
        ("ppo: {log_ratio_coef: 0.1}", ["log_ratio_coef: got 0.1", "only objective 'ipo', 'dppo_tv' or 'dppo_kl'"]),
        ("ppo: {objective: gmpo, ratio_level: sequence}", ["ratio_level: got 'sequence'", "a ratio"]),
        ("ppo: {trpo: {max_kl: 0.1}}", ["trpo: got TRPOConfig(max_kl=0.1", "only objective 'trpo'"]),
        ("ppo: {objective: trpo, entropy_coef: 0.1}", ["entropy_coef: got 0.1", "other than 'trpo'"]),
        ("ppo: {objective: trpo, ptx_coef: 1}", ["ptx_coef: got 1.0", "other than 'trpo'"]),
        ("ppo: {ptx_ratio: 2}", ["ptx_ratio: got 2.0", "only ptx_coef above 0"]),
        ("ppo: {ptx_coef: 1, ptx_ratio: 0.001}", ["ptx_ratio: got 0.001", "one pretraining sequence"]),
        ("ppo: {baseline: none}", ["vf_coef: got 0.1", "only baseline 'value'"]),
        ("ppo: {value_warmup: 100}", ["value_warmup: got 100", "fewer than updates 100"]),
        (
            "ppo: {missing_eos_score: -1, missing_eos_penalty: 2}",
            ["missing_eos_penalty: got 2.0", "missing_eos_score None"],
        ),
        ("ppo: {missing_eos_score: .nan}", ["missing_eos_score", "nan", "finite"]),
        ("ppo: {whiten_advantages: false, whiten_scope: minibatch}", ["whiten_scope: got 'minibatch'"]),
        ("ppo: {preset: reinforce, objective: ratio}", ["objective: got 'ratio'", "preset 'reinforce'"]),
        ("ppo: {stop_kl: 0.1}", ["stop_kl: got 0.1", "only ppo_epochs above 1"]),
        *(
            (f"ppo: {{objective: {objective}, cliprange: 0.1, old_kl_coef: {coef}}}", ["cliprange: got 0.1", "'clip'"])
            for objective, coef in (("ratio", 0), ("policy_gradient", 0), ("kl_penalty", 1), ("trpo", 0))
        ),
        ("ppo: {baseline: none, vf_coef: 0, cliprange_value: 0.3}", ["cliprange_value: got 0.3", "baseline 'value'"]),
        ("ppo: {objective: kl_penalty}", ["old_kl_coef: got 0.0", "above 0", "objective 'kl_penalty'"]),
        ("ppo: {importance_cap: 2}", ["ppo.importance_cap: got 2.0", "rollout.top_k", "'rescored'"]),
        ("ppo: {objective: trpo, trpo: {shrink: 1}}", ["ppo.trpo: shrink: got 1.0", "below 1"]),
        ("ppo: {objective: policy_gradient, ratio_level: sequence}", ["ratio_level: got 'sequence'", "a ratio"]),
        ("ppo: {objective: clop}", ["ppo.objective", "'clop'", "'clip'"]),
        ("ppo: {optim: {betas: [0.9]}}", ["ppo.optim.betas", "1 values", "2"]),
        ("ppo: 3", ["ppo", "3 (int)", "mapping"]),
        ("seed: null", ["seed", "null", "int"]),
        ("rollout: {temperature: 0}", ["rollout.temperature", "above 0"]),
        ("ppo: {rollout_batch: 100}", ["ppo", "minibatch", "64", "100"]),
        ("- 1", ["run.yaml", "list", "mapping"]),
        ("a: [1", ["run.yaml", "not valid YAML"]),
        (
            "sft: {epochs: 1}\nppo: {updates: 1}\nsft: {batch_size: 1}",
            ["run.yaml", "the key 'sft' appears twice", "line 3"],
        ),
        ("ppo: {updates: 1, updates: 2}", ["run.yaml", "the key 'updates' appears twice"]),
    ],
)
def test_an_error_names_the_file_and_the_key(tmp_path, text, words):
    with pytest.raises(ValueError) as caught:
        load_config(write(tmp_path, text))
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "override, word", [("seed", "section.key=value"), ("seed.x=1", "section"), ("ppo.lr=1", "'ppo.lr'")]
)
def test_a_bad_override_is_refused(tmp_path, override, word):
    with pytest.raises(ValueError, match=word):
        load_config(write(tmp_path, "seed: 1"), [override])


def test_an_objective_accepts_its_options():
    assert PPOConfig(cliprange_high=0.3, dual_clip=3.0).objective == "clip"
    assert PPOConfig(objective="kl_penalty", old_kl_coef=0.1).old_kl_coef == 0.1
    assert PPOConfig(objective="dppo_kl", divergence=0.1, ratio_limit=3.0).divergence == 0.1
    assert PPOConfig(objective="cispo", cliprange=1.0, cliprange_high=4.0, ratio_level="sequence").cliprange_high == 4.0


def test_an_unused_option_may_have_its_default():
    assert PPOConfig(objective="ratio", cliprange=0.2).cliprange == 0.2
    assert PPOConfig(baseline="none", vf_coef=0.0, cliprange_value=None).cliprange_value is None
    filters = ["top_k=5", "top_p=0.9", "min_p=0.1", "repetition_penalty=1.1"]
    for more in (["ppo.old_logprobs=rescored"], *([f"rollout.{filter}"] for filter in filters)):
        assert load_config(None, ["ppo.importance_cap=2", *more]).ppo.importance_cap == 2.0


def test_every_backend_of_the_kernels_is_accepted():
    for backend in ("auto", *BACKENDS):
        assert load_config(None, [f"backend={backend}"]).backend == backend


def test_the_error_for_a_missing_file_names_it(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.yaml: no such config file"):
        load_config(tmp_path / "nowhere.yaml")


def test_sections_constructed_in_python_are_checked():
    with pytest.raises(ValueError, match=r"kl_coef: got -1\.0"):
        PPOConfig(kl_coef=-1)


@pytest.mark.parametrize(
    "module", [importlib.import_module(f"{config.__name__}.{m.name}") for m in iter_modules(config.__path__)]
)
def test_every_field_has_a_docstring(module):
    for section in ast.parse(inspect.getsource(module)).body:
        if isinstance(section, ast.ClassDef) and any(ast.unparse(base) == "Section" for base in section.bases):
            for statement, following in zip(section.body, [*section.body[1:], ast.Pass()], strict=True):
                if isinstance(statement, ast.AnnAssign):
                    documented = isinstance(following, ast.Expr) and isinstance(following.value.value, str)
                    assert documented, f"{section.name}.{statement.target.id}"


@pytest.mark.parametrize("text", ["1e+25", "1E5", "-.5e-3"])
def test_a_text_that_looks_like_a_number_is_saved_as_a_text(tmp_path, text):
    save_config(load_config(None, [f"output_dir='{text}'"]), tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml").output_dir == text
