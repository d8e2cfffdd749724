"""`python -m benchmarks.kernels_hub FOLDER`: write the Python-only package for the kernels hub of Hugging Face.

FOLDER gets the layout that the hub requires (https://huggingface.co/docs/kernels/kernel-requirements): for each variant,
`build/<variant>` with the package, `metadata.json` and, for older loaders, a folder with the name of the package. The variant
`torch-cuda` runs the Triton kernels, and `torch-cpu` the reference. The compiled extension, the adapters for other trainers
and `info` are left out, because a package of the hub may import only torch, Triton and itself.

Every import is relative, and the operations are registered as `torch.ops.<id>`, so that several versions, and an installed
rlhf-kernels, can be loaded in one process. Unlike the hub asks for, Python 3.11 is needed instead of 3.9.
"""

from __future__ import annotations

import argparse
import ast
import base64
import hashlib
import json
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NAME = "rlhf-kernels"
VERSION = 0
"""Version of the kernel in the hub, whose revisions are in the branch `v<VERSION>`; 0 is for interfaces that may change."""
BACKENDS: Mapping[str, Mapping[str, object]] = {
    "cuda": {"type": "cuda", "archs": ["8.0", "9.0", "10.0", "12.0"]},
    "cpu": {"type": "cpu"},
}
LEFT_OUT = ("_C.pyi", "info.py", "integrations")
_PACKAGE = NAME.replace("-", "_")
_ALLOWED = ("torch", "triton")

_COMPATIBILITY = '''"""The package, for loaders that look for it in a folder of its name."""

import importlib.util
import sys
from pathlib import Path

_NAME = "{id}"
if _NAME not in sys.modules:
    _spec = importlib.util.spec_from_file_location(_NAME, Path(__file__).parents[1] / "__init__.py")
    sys.modules[_NAME] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules[_NAME])
globals().update({{name: getattr(sys.modules[_NAME], name) for name in sys.modules[_NAME].__all__}})
__all__ = list(sys.modules[_NAME].__all__)
'''


def sources() -> dict[str, str]:
    """Return the files of the package by their path in it, with relative imports only.

    Raises:
        ValueError: a file imports a package that the hub does not allow.
    """
    folder, found = ROOT / _PACKAGE, {}
    for path in sorted(folder.rglob("*.py")):
        name = str(path.relative_to(folder))
        if not name.startswith(LEFT_OUT):
            text = path.read_text(encoding="utf-8")
            depth = "." * len(Path(name).parts)
            found[name] = re.sub(rf"\bimport {_PACKAGE}\._C as (\w+)", rf"from {depth} import _C as \1", text)
            _check_imports(name, found[name])
    return found


def _check_imports(name: str, text: str) -> None:
    for node in ast.walk(ast.parse(text)):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            modules = [node.module or ""]
        for module in modules:
            top = module.partition(".")[0]
            if top not in _ALLOWED and top not in sys.stdlib_module_names:
                raise ValueError(
                    f"{name}:{node.lineno}: imports {module}, expected the standard library, torch or Triton"
                )


def build(folder: Path) -> dict[str, str]:
    """Write `folder/build`, replacing it; return the id of each variant."""
    files = sources()
    digest = hashlib.sha1("".join(f"{name}\0{text}\0" for name, text in files.items()).encode()).hexdigest()[:10]
    shutil.rmtree(folder / "build", ignore_errors=True)
    ids = {}
    for backend, settings in BACKENDS.items():
        ids[f"torch-{backend}"] = one = f"_{_PACKAGE}_{backend}_{digest}"
        _write(folder / "build" / f"torch-{backend}", one, files, settings)
    (folder / "README.md").write_text(_CARD, encoding="utf-8")
    return ids


def _write(folder: Path, name: str, files: Mapping[str, str], backend: Mapping[str, object]) -> None:
    written = {path: _namespaced(path, text, name) for path, text in files.items()}
    written[f"{_PACKAGE}/__init__.py"] = _COMPATIBILITY.format(id=name)
    for path, text in written.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    digests = {
        path: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for path, text in sorted(written.items())
    }
    metadata = {
        "name": NAME,
        "id": name,
        "version": VERSION,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": dict(backend),
        "digest": {"algorithm": "sha256", "files": digests},
    }
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")


def _namespaced(path: str, text: str, name: str) -> str:
    """Return a file with `name` as the namespace of its torch operations, and its advice about the extension replaced."""
    if path == "backend.py":
        places = (f'Library("{_PACKAGE}"', f'f"{_PACKAGE}::', f"torch.ops.{_PACKAGE}")
        for place in places:
            if place not in text:
                raise ValueError(f"{path}: expected {place!r}, with which the operations are registered")
            text = text.replace(place, place.replace(_PACKAGE, name))
    advice = '"install the package again"'
    if path == "_native.py":
        if advice not in text:
            raise ValueError(f"{path}: expected the advice {advice}")
        text = text.replace(advice, f'"packages of the kernels hub have none; pip install {NAME} has one"')
    return text


_CARD = f"""---
license: apache-2.0
tags:
- kernels
---

# {NAME}

Fused PPO operations for language models: log-probs, losses and advantages, as Triton kernels. This is the Python-only part of
[{NAME}](https://github.com/rlhf-kernels/rlhf-kernels), which also has kernels in C++ and CUDA.

```python
from kernels import get_kernel

ops = get_kernel("OWNER/{NAME}", version={VERSION}, trust_remote_code=True)
advantages, returns = ops.gae(rewards, values, mask)
```
"""


def main() -> None:
    """Write the folder that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels_hub", description=__doc__)
    parser.add_argument("folder", type=Path, help="folder for build/ and README.md")
    folder = parser.parse_args().folder
    for variant, name in build(folder).items():
        print(f"{folder / 'build' / variant}: torch.ops.{name}")


if __name__ == "__main__":
    main()
