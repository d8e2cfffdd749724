"""Layers of the packages, sizes of files and functions, and other rules of the design."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import rlhf_kernels
from tests.engine.helpers.tiny_trainer import make_trainer

ROOT = Path(__file__).parent.parent
SOURCES = sorted(p for package in ("rlhf_kernels", "rlhf_engine") for p in (ROOT / package).rglob("*.py"))
MAX_FILE, MAX_FUNCTION = 400, 60

# Layer -> the other layers that it may import from.
KERNEL_LAYERS = {
    "_options": (),
    "launch_args": ("_options",),
    "token_args": ("launch_args",),
    "trials": ("_options",),
    "_C": (),  # compiled
    "_native": ("_C", "launch_args", "token_args"),
    "_cpu": ("_native", "launch_args", "token_args"),
    "_cuda": ("_C", "_native", "launch_args", "token_args"),  # _C: types only
    "_triton": ("_native", "launch_args", "_options", "token_args"),
    "_varlen": (),
    "reference": ("launch_args", "_options", "token_args"),
    "backend": ("_native", "launch_args", "token_args"),
    "ops": ("reference", "backend", "_native", "launch_args", "_options", "token_args"),
    "output_layer": ("ops", "launch_args"),
    "matrices": ("output_layer", "ops"),
    "modules": ("matrices", "output_layer", "ops", "launch_args", "token_args", "_options"),
    "integrations": ("modules", "output_layer", "ops", "launch_args", "_options"),
    "info": ("ops", "backend", "_native"),
}

# Packages that an adapter may import only inside functions, because the adapter must be importable without them.
PEERS = ("trl", "openrlhf", "verl", "nemo_rl", "torchtune", "deepspeed", "peft")

# From low to high: a module or package of the engine may import only from itself and from those before it.
ENGINE_LAYERS = (
    "_lazy",
    "errors",
    "notices",
    "config",
    "files",
    "manifest",
    "progress",
    "trackers",
    "metrics",
    "checkpoint_folders",
    "checkpoint",
    "distributed",
    "data",
    "memory",
    "model",
    "rollout",
    "optim",
    "rewards",
    "supervised",
    "ppo",
    "planner",
    "evaluate",
    "plots",
    "recipes",
    "compat",
    "demo",
    "bench",
    "cli",
)


def imports(path: Path, *, for_types: bool = True) -> list[tuple[str, list[str]]]:
    """Return absolute module and names of every import of a file, also in functions; under TYPE_CHECKING if `for_types`."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    tree, found = ast.parse(path.read_text()), []
    typing = [node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    left_out = set() if for_types else {inner for node in typing for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if node in left_out:
            continue
        if isinstance(node, ast.Import):
            found += [(alias.name, []) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            found.append((".".join([*base, *([node.module] if node.module else [])]), [a.name for a in node.names]))
    return found


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_files_and_functions_fit(path):
    text = path.read_text()
    assert text.count("\n") <= MAX_FILE, f"{name(path)}: {text.count(chr(10))} lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            doc = node.body[0].end_lineno - node.body[0].lineno + 1 if ast.get_docstring(node) else 0
            signature = node.body[0].lineno - node.lineno
            lines = node.end_lineno - node.lineno + 1 - doc - signature
            assert lines <= MAX_FUNCTION, f"{name(path)}:{node.lineno} {node.name}: {lines} lines of body"


@pytest.mark.parametrize("path", [p for p in SOURCES if "rlhf_kernels" in p.parts], ids=name)
def test_kernels_layering(path):
    """`rlhf_kernels` needs torch only, and each of its layers imports from lower ones."""
    parts = path.relative_to(ROOT / "rlhf_kernels").with_suffix("").parts
    layer = parts[0]
    for module, names in imports(path):
        top = module.split(".")[0]
        assert top not in ("rlhf_engine", "transformers"), f"{name(path)} imports {module}"
        if top != "rlhf_kernels" or layer == "__init__":
            continue
        targets = [module.split(".")[1]] if "." in module else names
        for target in targets:
            assert target == layer or target in KERNEL_LAYERS[layer], f"{name(path)} imports {module} {names}"


@pytest.mark.parametrize("path", sorted((ROOT / "rlhf_kernels" / "integrations").glob("*.py")), ids=name)
def test_no_peer_is_needed_to_import_its_adapter(path):
    tree = ast.parse(path.read_text())
    inside = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom) and id(node) not in inside and not getattr(node, "level", 0):
            modules = [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            assert not {m.split(".")[0] for m in modules} & set(PEERS), f"{name(path)}:{node.lineno}"


@pytest.mark.parametrize("path", [p for p in SOURCES if "rlhf_engine" in p.parts], ids=name)
def test_engine_layering(path):
    layer = path.relative_to(ROOT / "rlhf_engine").with_suffix("").parts[0]
    if layer == "__init__":
        loaded = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
        modules = {node.module for node in loaded if isinstance(node, ast.ImportFrom)}
        assert modules <= {"typing", "rlhf_engine._lazy"}, (
            f"{name(path)} may import only typing and rlhf_engine._lazy, because every import of the engine loads it"
        )
        return
    allowed = ENGINE_LAYERS[: ENGINE_LAYERS.index(layer) + 1]
    for module, names in imports(path):
        top, *below = module.split(".")
        if top == "rlhf_engine":
            for target in below[:1] or names:
                assert target in allowed, f"{name(path)} imports {module} {names}"


@pytest.mark.parametrize("path", [p for p in SOURCES if "rlhf_engine" in p.parts], ids=name)
def test_engine_uses_the_public_kernels_only(path):
    for module, names in imports(path):
        if module.split(".")[0] != "rlhf_kernels":
            continue
        public = module in ("rlhf_kernels", "rlhf_kernels.info")
        assert public, f"{name(path)} imports {module}, which is not public"
        unknown = set(names) - set(rlhf_kernels.__all__) - {"info"}
        assert module == "rlhf_kernels.info" or not unknown, f"{name(path)} imports {unknown}"


OPS = (
    "gae",
    "rollout_advantages",
    "sample_tokens",
    "paged_attention",
    "decode_attention",
    "kl_penalty",
    "group_advantages",
    "importance_weights",
    "masked",
    "token_logprobs",
    "top_entropy_mask",
    "ppo_loss",
)
COMPOSED = (
    "linear_token_logprobs",
    "linear_ppo_loss",
    "logits_ppo_loss",
)  # compositions of other ops, without a definition in rlhf_kernels/reference


def test_every_op_has_its_files():
    """One op, one name everywhere: public function, definition, test."""
    files = {
        folder: {p.stem for p in (ROOT / folder).glob("*.py")}
        for folder in ("rlhf_kernels/ops", "rlhf_kernels/reference")
    }
    tests = {p.stem for p in (ROOT / "tests/kernels").glob("test_*.py")}
    for op in (*OPS, *COMPOSED):
        assert op in files["rlhf_kernels/ops"] and f"test_{op}" in tests, op
        assert op in files["rlhf_kernels/reference"] or op in COMPOSED, op


def test_no_catch_all_and_no_pickle():
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ExceptHandler):
                caught = ast.unparse(node.type) if node.type else "everything"
                assert caught not in ("everything", "Exception", "BaseException"), f"{name(path)}:{node.lineno}"
        assert all(module.split(".")[0] != "pickle" for module, _ in imports(path)), name(path)


def test_no_test_imports_another():
    """Code that tests share is in a `helpers` folder."""
    for path in sorted((ROOT / "tests").rglob("*.py")):
        shared = [module for module, _ in imports(path) if module.split(".")[-1].startswith("test_")]
        assert not shared, f"{name(path)} imports {shared}"


MOST_FILES, MOST_MODULES = 46, 104
"""Limits: files that a default update on a CPU runs through; modules of ours that importing the trainer loads."""


def test_an_update_is_read_in_few_files():
    trainer, files = make_trainer(), set()
    trainer.step()  # creates everything that is created only once
    folders = tuple(f"{ROOT / package}/" for package in ("rlhf_engine", "rlhf_kernels"))
    sys.setprofile(lambda frame, *_: files.add(frame.f_code.co_filename))
    try:
        trainer.step()
    finally:
        sys.setprofile(None)
    ours = sorted(file.removeprefix(f"{ROOT}/") for file in files if file.startswith(folders))
    assert len(ours) <= MOST_FILES, "\n".join(ours)


def test_the_trainer_imports_few_modules():
    count = "len([name for name in sys.modules if name.startswith(('rlhf_engine', 'rlhf_kernels'))])"
    code = f"import sys, rlhf_engine.ppo.trainer; print({count})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(run.stdout) <= MOST_MODULES


def test_no_import_cycles_below_the_packages():
    """Imports inside functions count too: a module in a cycle cannot be read or tested without the others."""
    graph = {}
    modules = {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in SOURCES}
    for module, path in modules.items():
        found = set()
        for target, names in imports(path, for_types=False):
            found |= {target, *(f"{target}.{one}" for one in names)}
        graph[module] = {one for one in found & set(modules) if modules[one].name != "__init__.py"} - {module}
    inits = {module for module, path in modules.items() if path.name == "__init__.py"}
    done, cycles = set(), []

    def visit(module, trail):
        if module in trail:
            cycles.append(" -> ".join([*trail[trail.index(module) :], module]))
        elif module not in done:
            for target in sorted(graph[module]):
                visit(target, [*trail, module])
            done.add(module)

    for module in sorted(set(graph) - inits):
        visit(module, [])
    assert not cycles, cycles
