"""The command `rlhf`: data, training, evaluation, settings, the demo. The commands are in `app`."""

from __future__ import annotations

import sys

ENGINE = frozenset(
    [
        "httpx2",
        "huggingface_hub",
        "matplotlib",
        "numpy",
        "phonenumbers",
        "rich",
        "safetensors",
        "stdnum",
        "tensorboard",
        "tokenizers",
        "tqdm",
        "transformers",
        "typer",
        "yaml",
    ]
)
"""Modules that the extra `engine` installs."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line, `sys.argv` if `arguments` is None. Always ends in SystemExit.

    Without the extra `engine`, print the command that installs it and exit with 2.
    """
    try:
        from rlhf_engine.cli.app import run

        run(arguments)
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        if package not in ENGINE:
            raise
        print(
            f"rlhf: the package {package} is not installed; pip install 'rlhf-kernels[engine]' installs everything that the "
            "command needs (from a clone: pip install '.[engine]')",
            file=sys.stderr,
        )
        sys.exit(2)
