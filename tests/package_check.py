"""Check an installed wheel from within its environment, which has no extra: `python -I tests/package_check.py`."""

import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import torch

import rlhf_kernels
from rlhf_kernels import info


def main() -> None:
    """Check that the wheel has its extension and data, that a loss runs, and that `rlhf` names the missing extra."""
    root = Path(__file__).resolve().parents[1]
    installed = Path(rlhf_kernels.__file__).resolve()
    assert installed.is_relative_to(sys.prefix) and not installed.is_relative_to(root / "rlhf_kernels"), installed
    state = dict(info.build())
    assert state["extension"].startswith("loaded"), state["extension"]

    hidden, head = torch.randn(2, 8, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
    ids, mask = torch.randint(50, (2, 8)), torch.ones(2, 8, dtype=torch.bool)
    loss, _ = rlhf_kernels.linear_ppo_loss(hidden, head, ids, torch.full((2, 8), -4.0), torch.randn(2, 8), mask)
    loss.backward()
    assert hidden.grad is not None and head.grad is not None

    data = files("rlhf_engine.demo")
    for name in ("demo.yaml", "data/demonstrations.jsonl", "data/base/model.safetensors", "data/base/tokenizer.json"):
        assert (data / name).is_file(), f"the wheel does not contain rlhf_engine/demo/{name}"
    command = Path(sys.executable).with_name("rlhf")
    found = subprocess.run([command, "sft", "--config", "my.yaml"], capture_output=True, text=True, check=False)
    assert found.returncode == 2 and not found.stdout, found
    assert found.stderr.count("\n") == 1 and "pip install 'rlhf-kernels[engine]'" in found.stderr, found.stderr
    print(f"{installed.parent}: ok; {found.stderr.strip()}")


if __name__ == "__main__":
    main()
