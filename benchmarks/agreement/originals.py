"""The original code of the peers, loaded from where it is installed.

A module whose import requires a GPU library or outdated packages is not imported: its file is loaded by path, or the required
functions are compiled from its text. No code of a peer is copied. Sources that are incompatible with the installed packages
are in `SOURCES`, where `make test-peers` puts them.
"""

from __future__ import annotations
import __future__

import ast
import importlib
import importlib.util
import sys
import types
import warnings
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from types import ModuleType

import torch
from torch.nn import functional as F

SOURCES = Path(__file__).parents[2] / ".venv-peers" / "sources"


class Missing(ImportError):
    """A peer is not installed."""


def installed(module: str) -> ModuleType:
    """Import a module of an installed package; raise `Missing` if it cannot be imported."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Missing(f"{module}: {error}") from error


def package_folder(name: str) -> Path:
    """Return the folder of an installed package without importing the package."""
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise Missing(f"{name} is not installed")
    return Path(spec.submodule_search_locations[0])


def _file(path: Path) -> Path:
    if not path.exists():
        raise Missing(f"{path} does not exist; run `make test-peers`")
    return path


def definitions(path: Path, names: Iterable[str], namespace: dict) -> dict:
    """Return functions and methods of a file, compiled from its text without its imports, decorators and annotations."""
    wanted = set(names)
    found = [
        n for n in ast.walk(ast.parse(_file(path).read_text())) if isinstance(n, ast.FunctionDef) and n.name in wanted
    ]
    assert {n.name for n in found} == wanted, f"{path}: {wanted - {n.name for n in found}} not found"
    for node in found:
        node.decorator_list = []
    flags = __future__.annotations.compiler_flag
    exec(compile(ast.Module(found, []), str(path), "exec", flags=flags, dont_inherit=True), namespace)
    return {name: namespace[name] for name in wanted}


def verl() -> ModuleType:
    return installed("verl.trainer.ppo.core_algos")


def trl_ppo() -> ModuleType:
    return installed("trl.experimental.ppo.ppo_trainer")


@cache
def openrlhf(release: str = "") -> tuple[ModuleType, ModuleType]:
    """Load `openrlhf.models.loss` and `.utils` from their files: the package requires flash_attn, and utils deepspeed."""
    root = SOURCES / f"openrlhf-{release}" / "openrlhf" if release else package_folder("openrlhf")
    package = types.ModuleType(f"openrlhf_{release.replace('.', '_')}_models")
    package.__path__ = [str(_file(root / "models"))]
    sys.modules[package.__name__] = package
    absent = importlib.util.find_spec("deepspeed") is None
    if absent:
        sys.modules["deepspeed"] = types.ModuleType("deepspeed")
    try:
        names = (f"{package.__name__}.{part}" for part in ("loss", "utils"))
        return tuple(importlib.import_module(name) for name in names)
    finally:
        if absent:
            del sys.modules["deepspeed"]


@cache
def openrlhf_advantages() -> types.FunctionType:
    """Return `get_advantages_and_returns` of the experience maker, whose module requires Ray, vLLM and flash_attn."""
    path = package_folder("openrlhf") / "trainer" / "ppo_utils" / "experience_maker.py"
    method = definitions(path, ["get_advantages_and_returns"], {"torch": torch})["get_advantages_and_returns"]
    return lambda *args: method(None, *args)


@cache
def openrlhf_actor() -> type:
    """Return `Actor` with only its `forward`; its module requires flash_attn, deepspeed and peft."""
    _, utils = openrlhf()
    # OpenRLHF decorates the entropy with torch.compile, which would compile in every process that measures. The undecorated
    # function is the same formula in eager mode.
    entropy = getattr(utils.compute_entropy, "_torchdynamo_orig_callable", utils.compute_entropy)
    helpers = {"torch": torch, "log_probs_from_logits": utils.log_probs_from_logits, "compute_entropy": entropy}
    return type(
        "Actor",
        (torch.nn.Module,),
        definitions(package_folder("openrlhf") / "models" / "actor.py", ["forward"], helpers),
    )


@cache
def torchtune() -> tuple[type, types.FunctionType]:
    """Return `PPOLoss` and `estimate_advantages` from their files: the package requires torchao and a tokenizer library."""
    folder = package_folder("torchtune") / "rlhf"
    names = ("masked_mean", "masked_var", "whiten", "estimate_advantages")
    functions = definitions(folder / "rewards.py", names, {"torch": torch})
    methods = definitions(
        folder / "loss" / "ppo.py", ["forward"], {"torch": torch, "rlhf": types.SimpleNamespace(**functions)}
    )

    class PPOLoss(torch.nn.Module):
        def __init__(self, **options):
            super().__init__()
            vars(self).update(options)

        forward = methods["forward"]

    return PPOLoss, functions["estimate_advantages"]


@cache
def deepspeed_chat() -> type:
    """Return `DeepSpeedPPOTrainer` with only the functions that are compared; its module requires deepspeed."""
    names = ("compute_rewards", "actor_loss_fn", "critic_loss_fn", "get_advantages_and_returns", "gather_log_probs")
    path = SOURCES / "DeepSpeed-Chat" / "dschat" / "rlhf" / "ppo_trainer.py"
    return type("DeepSpeedPPOTrainer", (), definitions(path, names, {"torch": torch, "F": F}))


@cache
def trl_classic() -> type:
    """Return the PPOTrainer of TRL 0.11 with only the functions that are compared; its module requires an old transformers."""
    root = SOURCES / "trl-0.11.4" / "trl"
    helpers = ("masked_mean", "masked_var", "masked_whiten", "clip_by_value", "entropy_from_logits", "flatten_dict")
    namespace = {"torch": torch, "F": F, "Mapping": Mapping, "warnings": warnings}
    definitions(root / "core.py", helpers, namespace)
    names = ("compute_rewards", "compute_advantages", "loss", "_kl_penalty")
    return type("PPOTrainer", (), definitions(root / "trainer" / "ppo_trainer.py", names, namespace))
