"""The two diagrams of the architecture page, generated from the code: imports between layers, and the calls of an update."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlhf_engine.ppo import experience
from rlhf_engine.ppo.trainer import PPOTrainer
from rlhf_engine.ppo.update import SurrogateSteps

ROOT = Path(__file__).resolve().parent.parent
_UPDATE: tuple[tuple[str, Callable[..., Any]], ...] = (
    ("collect", PPOTrainer.collect),
    ("score", PPOTrainer.score),
    ("advantages", experience.advantages),
    ("update_rule", SurrogateSteps.__call__),
    ("adapt", PPOTrainer.adapt),
)


def layers() -> str:
    """Return the layers of the engine and of the kernels: each package or module is above everything that it imports."""
    rows = []
    for package in ("rlhf_engine", "rlhf_kernels"):
        levels = _levels(package)
        for level in sorted(set(levels.values()), reverse=True):
            names = sorted(name for name in levels if levels[name] == level)
            rows.append(
                f"{package if level == max(levels.values()) else '':<14} {level:>2}  {', '.join(names)}".rstrip()
            )
        if package == "rlhf_engine":
            rows += ["", f"{'':<18} |  only what rlhf_kernels exports", f"{'':<18} v", ""]
    return _fence(rows)


def update() -> str:
    """Return the functions that one update calls, in order, with the types of their arguments and results."""
    rows = ["policy, prompts"]
    for name, function in _UPDATE:
        signature = inspect.signature(function)
        takes = ", ".join(
            f"{one.name}: {one.annotation}"
            for one in signature.parameters.values()
            if one.name != "self" and one.annotation in ("Rollout", "Scored", "Experience", "Step")
        )
        rows += ["  |", "  v", f"{name}({takes}) -> {signature.return_annotation}"]
    rows += ["  |", "  +--> policy, KL coefficients: input of the next update"]
    body = inspect.getsource(PPOTrainer.step)
    order = [body.index(f"self.{name}(" if hasattr(PPOTrainer, name) else f"{name}(") for name, _ in _UPDATE]
    assert order == sorted(order), "the order of the diagram differs from that of PPOTrainer.step"
    return _fence(rows)


def _levels(package: str) -> dict[str, int]:
    """Return the layer of each package or module: the number of imports in its longest chain of imports."""
    folder = ROOT / package
    units = {path.stem: [path] for path in folder.glob("*.py") if path.stem not in ("__init__", "__main__")}
    units |= {path.parent.name: sorted(path.parent.rglob("*.py")) for path in folder.glob("*/__init__.py")}
    below = {
        name: {one for path in paths for one in _imported(path, package)} - {name} for name, paths in units.items()
    }

    def level(name: str) -> int:
        return 1 + max((level(one) for one in below[name] & units.keys()), default=-1)

    return {name: level(name) for name in units}


def _imported(path: Path, package: str) -> set[str]:
    """Return the packages and modules of `package` that a file imports at run time, by their first name below it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing = [node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    left_out = {inner for node in typing for inner in ast.walk(node)}
    here = path.relative_to(ROOT).with_suffix("").parts[:-1]
    found = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or node in left_out:
            continue
        base = ".".join(here[: len(here) - node.level + 1]) if node.level else ""
        module = ".".join(part for part in (base, node.module or "") if part)
        if module == package:
            found |= {alias.name for alias in node.names}
        elif match := re.match(rf"{package}\.(\w+)", module):
            found.add(match[1])
    return found


def _fence(rows: list[str]) -> str:
    return "\n".join(["```text", *rows, "```", ""])
