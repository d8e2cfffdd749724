"""The table of families in the documentation: it is complete, nothing in it is wrong, and it is what the checks find today."""

import pytest
import transformers

from benchmarks.families.__main__ import PAGE, mark, rows_of
from benchmarks.families.checks import CHECKS, row
from benchmarks.families.configs import FAMILIES

QUICK = {
    "llama": "dense",
    "gpt2": "dense, learned positions",
    "mistral": "sliding window",
    "gemma2": "sliding window and softcaps",
    "mixtral": "experts",
    "dbrx": "experts whose bits depend on the batch",
    "deepseek_v3": "latent attention, experts",
    "lfm2": "hybrid: short convolutions",
    "mamba": "Mamba only",
    "falcon_alibi": "refused for sampling",
    "xlstm": "refused for sampling, softcap",
    "modernbert-decoder": "refused",
    "doge_moe": "refused",
}
SLOW = ("pages", "recomputed", "bfloat16", "PPO")
"""Checks that run here only for the families in THOROUGH, because of their time."""
THOROUGH = ("mistral", "xlstm", "falcon_alibi", "modernbert-decoder", "doge_moe")


def table():
    """Return the cells of each family in the documentation."""
    lines = rows_of(PAGE.read_text())
    return {family: dict(zip(CHECKS, line.split(" | ")[2:], strict=False)) for family, line in lines.items()}


def test_the_table_is_complete_and_nothing_in_it_is_wrong():
    cells = table()
    assert list(cells) == list(FAMILIES)
    assert len({kind for kind, _ in FAMILIES.values()}) >= 40
    assert {mark for line in cells.values() for mark in line.values()} == {"yes", "no"}
    assert f"transformers {transformers.__version__}" in PAGE.read_text()


@pytest.mark.parametrize("family", QUICK)
def test_the_table_is_what_the_checks_find(family):
    names = [name for name in CHECKS if name not in SLOW or family in THOROUGH]
    found = {name: mark(text) for name, text in row(family, names).items()}
    assert found == {name: table()[family][name] for name in names}


def test_the_documentation_names_every_family_whose_bits_may_depend_on_the_batch():
    found = {family for family, line in table().items() if line["slots"] == "yes" and line["float32"] == "no"}
    assert found == {"dbrx", "jetmoe"}
    text = (PAGE.parents[1] / "design" / "numerics.md").read_text()
    assert "DBRX" in text and "JetMoE" in text
