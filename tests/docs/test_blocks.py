"""The blocks of README and of the pages run, and print the output that the pages show."""

import json

import pytest

from tests.docs.helpers.blocks import ROOT, Reader, blocks_of, commands, pages
from tests.engine.helpers.cli_run import new_model, new_run

SMALL = [
    *("sft.epochs=1", "ppo.updates=1", "ppo.rollout_batch=4", "ppo.minibatch=2", "ppo.microbatch=2"),
    *("rollout.max_response_tokens=6", "rollout.max_prompt_tokens=8"),
]

BRINGS_FILES = ("README.md", "docs/guides/")
"""Pages that assume a model and data files; the blocks of other pages create all that they need."""

NOT_RUN = {
    "CONTRIBUTING.md": ["make test            # virtual environment", "python -m tests.fuzz", "python -m docs.generate"],
    "README.md": ["pip install -e .", "head = head_arguments(model)", "make demo", "make test"],
    "docs/install.md": ["pip install -e ."],
    "docs/tutorials/instructgpt.md": ["from transformers import AutoModelForCausalLM, AutoTokenizer"],
    "docs/guides/backends.md": ["python -m benchmarks.compile_check"],
    "docs/guides/benchmarks.md": ["rlhf bench", "rlhf bench compare"],
    "docs/guides/deepspeed_chat.md": ["from rlhf_kernels.integrations.deepspeed_chat import PPOMixin"],
    "docs/guides/evaluation.md": ["rlhf eval", "rlhf iterate"],
    "docs/guides/many_gpus.md": ["rlhf ppo", "torchrun --standalone", "torchrun --nnodes", "#!/bin/bash"],
    "docs/guides/nemo_rl.md": ["from nemo_rl.algorithms.loss"],
    "docs/guides/openrlhf.md": ["from openrlhf.models import Actor"],
    "docs/guides/terminal.md": ["rlhf chat", "rlhf push", "from rlhf_engine.recipes.hub import"],
    "docs/guides/trl.md": ["from rlhf_kernels.integrations.trl import GRPOMixin, fused_helpers"],
    "docs/guides/verl.md": ["from rlhf_kernels.integrations.verl import LOSSES", "from rlhf_kernels.integrations.verl_model"],
}  # fmt: skip
"""First words of every block that no test runs; a new block of this kind must be added here."""

BLOCKS = {page: blocks_of(page) for page in pages()}
RUN = [
    page for page in BLOCKS if any(b.language in ("python", "bash") and "not_run" not in b.notes for b in BLOCKS[page])
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return new_model(tmp_path_factory.mktemp("model") / "base")


@pytest.fixture
def folder(tmp_path, model, monkeypatch):
    """Change to a temporary folder, in which the blocks run."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(page, folder, model):
    """Run the blocks of a page in order, in `folder`."""
    reader = Reader()
    if page.startswith(BRINGS_FILES):
        new_run(folder, model)
        (folder / "base").symlink_to(model)
        (folder / "pretrain.txt").write_text("yes or no\n\nmaybe so\n\n" * 40)
        reader.overrides = SMALL
    for block in BLOCKS[page]:
        if "not_run" not in block.notes:
            reader.read(block)


@pytest.mark.parametrize("page", [page for page in RUN if page != "README.md"])
def test_every_block_of_the_page_runs(page, folder, model):
    read(page, folder, model)


def test_readme_runs_and_trains_a_model_of_every_stage(folder, model):
    """The section "Train your own" is a chain from prompts and a base model to the policy."""
    training = [
        commands(block) for block in BLOCKS["README.md"] if block.language == "bash" and "rlhf sft" in block.text
    ]
    assert [line[:2] for line in training[0]] == [["rlhf", stage] for stage in ("data", "sft", "rm", "ppo")]
    read("README.md", folder, model)
    numbers = [json.loads(line) for line in (folder / "runs/mine/metrics.jsonl").read_text().splitlines()]
    explained = (ROOT / "docs/reference/metrics.md").read_text()
    assert not [name for name in numbers[-1] if f"`{name}`" not in explained and name not in ("stage", "step")]
    for stage in ("runs/mine/sft", "runs/mine/rm", "runs/mine/ppo"):
        assert (folder / stage / "model.safetensors").is_file()


def test_blocks_that_do_not_run_are_listed_and_have_a_reason():
    found = {page: [block for block in blocks if "not_run" in block.notes] for page, blocks in BLOCKS.items()}
    found = {page: blocks for page, blocks in found.items() if blocks}
    assert found.keys() == NOT_RUN.keys()
    for page, blocks in found.items():
        assert len(blocks) == len(NOT_RUN[page]), page
        for block, begins in zip(blocks, NOT_RUN[page], strict=True):
            assert block.text.startswith(begins), f"{block}: expected a block that begins with {begins!r}"
            assert len(block.notes["not_run"].split()) > 1, f"{block}: expected a reason"
