"""The tests that docs/design/reliability.md names exist."""

import ast
import re

import pytest

from tests.docs.helpers.blocks import ROOT

PAGE = (ROOT / "docs/design/reliability.md").read_text(encoding="utf-8")
NAMED = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)


@pytest.mark.parametrize("path, name", NAMED)
def test_every_promise_has_its_test(path, name):
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_row_of_promises_names_a_test():
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and "`tests/" not in line]
    assert len(NAMED) >= 15
    assert all(re.match(r"\| (promise|code|\d)", row) for row in rows), rows
