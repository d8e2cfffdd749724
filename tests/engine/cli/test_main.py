"""The entry point of `rlhf` where packages of the extra `engine` are missing."""

import subprocess
import sys
from importlib.metadata import requires

import pytest

from rlhf_engine.cli import ENGINE

MODULES = {"pyyaml": "yaml", "python-stdnum": "stdnum"}
"""Requirement -> module, where the names differ."""


@pytest.mark.parametrize("module", ["typer", "transformers", "yaml"])
def test_a_missing_package_is_one_line_with_the_command_that_installs_it(tmp_path, module):
    (tmp_path / "c.yaml").write_text("output_dir: run\n")
    code = f"import sys; sys.modules[{module!r}] = None; from rlhf_engine.cli import main; main(['sft', '--config', 'c.yaml'])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert found.returncode == 2 and "Traceback" not in found.stderr
    assert found.stderr.startswith(f"rlhf: the package {module} is not installed; pip install 'rlhf-kernels[engine]'")
    assert found.stderr.count("\n") == 1


def test_other_missing_modules_keep_their_traceback():
    code = (
        "import sys, rlhf_engine.cli as cli, rlhf_engine.cli.app as app; "
        "app.run = lambda arguments: __import__('a_module_of_the_user'); cli.main([])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode == 1 and "ModuleNotFoundError: No module named 'a_module_of_the_user'" in found.stderr


def test_every_package_of_the_extra_is_known():
    wanted = [line for line in requires("rlhf-kernels") or [] if 'extra == "engine"' in line]
    names = {line.split(";")[0].split(">")[0].split("=")[0].strip() for line in wanted}
    assert {MODULES.get(name, name.replace("-", "_")) for name in names} == ENGINE
