"""Check the prose of the repository against the list of words that the style avoids.

    python -m tests.wording [FILE ...]

Prose is: docstrings, comments and messages of exceptions in Python, comments in C++ and CUDA, and Markdown outside code. Words
of place, speech and handling ("behind", "told", "made") describe a technical relation less well than its name does ("follows",
"reported", "computed"). Names in backticks and in code blocks do not count.
"""

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

AVOIDED = {
    r"behind": "after, below, follows",
    r"besides?": "next to, with, as well as",
    r"lies?|lay|lain": "is, is stored, is between",
    r"stands?|stood": "is, holds, represents",
    r"said|says?|told|tells?": "reported, states, documented",
    r"hears?|heard": "receives, is called",
    r"nobody": "no caller, nothing",
    r"whoever|whatever": "any, the caller",
    r"alone": "only",
    r"made": "computed, created, built",
    r"taken": "used, read, chosen",
    r"another": "a different, a second, other",
    r"of (?:its|their|his|her|our) own": "custom, separate, its",
    r"are others now|has no room|got nothing": "name what changed, what is full, what is missing",
}
"""Pattern -> what to write instead."""
ALLOWED = re.compile(
    r"stand-alone|stand-ins?|one another|let alone|made-up|home-made|says who|man-made|for another \d+", re.IGNORECASE
)
"""Terms of the field, and fixed expressions, that contain an avoided word."""
GENERATED_OR_DATA = (
    "rlhf_engine/demo/data/",
    "benchmarks/results/h200/",
    "LICENSE",
    "tests/wording.py",
    "CHANGELOG.md",
)
"""Files that the check leaves out: data, logs of runs, and this list itself."""
PATTERNS = [(re.compile(rf"\b(?:{pattern})\b", re.IGNORECASE), instead) for pattern, instead in AVOIDED.items()]
C_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
CODE = re.compile(r"(?ms)^(?P<fence> *(?:```|~~~)).*?^(?P=fence)|`[^`\n]*`|\]\([^)\n]*\)|<!--.*?-->")
QUOTED = re.compile(r'`[^`\n]*`|``.*?``|"[^"\n]{1,60}"')


def python_prose(text: str) -> Iterator[tuple[int, str]]:
    """Yield (line, text) of comments, of strings that are statements (docstrings), and of strings inside `raise`."""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value
        if isinstance(node, ast.Raise) and node.exc is not None:
            for part in ast.walk(node.exc):
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    yield part.lineno, part.value


def prose(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, text) of the prose in a file, with code blanked out."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        for line, part in python_prose(text):
            yield line, QUOTED.sub(" ", part)
    elif path.suffix == ".md":
        yield 1, CODE.sub(lambda code: re.sub(r"[^\n]", " ", code.group()), text)
    else:
        for comment in C_COMMENT.finditer(text):
            yield text.count("\n", 0, comment.start()) + 1, QUOTED.sub(" ", comment.group())


def faults(path: Path) -> list[str]:
    """Return a line for every avoided word in a file: where it is and what to write instead."""
    found = []
    for first, part in prose(path):
        part = ALLOWED.sub(lambda term: " " * len(term.group()), part)
        for pattern, instead in PATTERNS:
            for match in pattern.finditer(part):
                line = first + part.count("\n", 0, match.start())
                found.append(f"{path}:{line}: {match.group()!r}; use: {instead}")
    return sorted(set(found), key=lambda line: int(line.split(":")[1]))


def tracked() -> list[Path]:
    """Return the files of the repository that contain prose."""
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True).stdout.splitlines()
    suffixes = (".py", ".md", ".cpp", ".h", ".cu", ".cuh")
    return [
        Path(x) for x in listed if x.endswith(suffixes) and not x.startswith(GENERATED_OR_DATA) and Path(x).is_file()
    ]


def main() -> None:
    """Print the faults of the files given, or of all, and exit with 1 if there are any."""
    found = [fault for path in map(Path, sys.argv[1:]) or () for fault in faults(path)]
    if not sys.argv[1:]:
        found = [fault for path in tracked() for fault in faults(path)]
    print("\n".join(found), end="\n" if found else "")
    raise SystemExit(1 if found else 0)


if __name__ == "__main__":
    main()
