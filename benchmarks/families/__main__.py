"""`python -m benchmarks.families [NAME ...]`: check model families and write docs/reference/families.md.

With names only those rows are computed, and the others are kept.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import transformers

from benchmarks.families.checks import CHECKS, row
from benchmarks.families.configs import FAMILIES

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "families.md"

_HEAD = """# Model families

Decoder-only families of transformers {version}, each a tiny random model. `python -m benchmarks.families` writes this page.
Results are compared with the model's own forward pass in float64, for sequences on both sides of every boundary in the config
(sliding window, chunk, original context of a scaled rotary embedding), together with longer sequences and each by itself.

| column | meaning |
| --- | --- |
| scored | log-probs of a forward pass |
| slots, pages | sampled log-probs, with `rollout.cache` slots and paged |
| gradient, recomputed | the gradient of a policy loss, without and with `memory.gradient_checkpointing` |
| PPO | an update of PPO, whose sampled log-probs are recomputed |
| saved | the same log-probs after saving and loading |
| float32, bfloat16 | sampled on a CPU, the bits of a sequence do not depend on the batch |

Where a cell is `no`, the engine refuses the family when it starts, with the reason in the last column. In the columns float32
and bfloat16 it may also be that the bits of a sequence depend on the batch, which the log states when sampling starts
([numerics](../design/numerics.md)). On a GPU the bits of a sequence may depend on the number of rows, for every family.

"""


def mark(text: str) -> str:
    """Return the cell of the table for a result of `row`."""
    return "yes" if text == "yes" else ("wrong" if text.startswith("wrong") else "no")


def table_row(family: str, cells: dict[str, str]) -> str:
    """Return a line of the table."""
    reasons = [text for text in dict.fromkeys(cells.values()) if text != "yes"]
    reason = "; ".join(re.sub(r"^(policy|model|memory\.\w+): ", "", text).replace("|", "\\|") for text in reasons[:2])
    return f"| {family} | {FAMILIES[family][0]} | {' | '.join(map(mark, cells.values()))} | {reason} |"


def rows_of(page: str) -> dict[str, str]:
    """Return the lines of a page's table by family."""
    lines = {
        line.split(" | ")[0].removeprefix("| "): line for line in page.splitlines() if line.count(" | ") > len(CHECKS)
    }
    return {family: line for family, line in lines.items() if family in FAMILIES}


def main() -> None:
    """Check the families and write the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.families", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="families; all by default")
    names = parser.parse_args().names or list(FAMILIES)
    if unknown := sorted(set(names) - set(FAMILIES)):
        parser.error(f"unknown family {', '.join(unknown)}; expected some of {', '.join(FAMILIES)}")
    for name in names:
        line = table_row(name, row(name))
        print(line, flush=True)
        rows = {**(rows_of(PAGE.read_text()) if PAGE.is_file() else {}), name: line}
        columns = ["family", "config", *CHECKS, "reason"]
        head = f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}\n"
        body = "".join(f"{rows[family]}\n" for family in FAMILIES if family in rows)
        PAGE.write_text(_HEAD.format(version=transformers.__version__) + head + body)


if __name__ == "__main__":
    main()
