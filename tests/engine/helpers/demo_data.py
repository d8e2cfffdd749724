"""A small part of the demo's data: enough to run every stage, not enough to learn from."""

from dataclasses import replace
from pathlib import Path

from rlhf_engine.config import RunConfig
from rlhf_engine.demo.run import with_shipped_data

KEPT = {"demonstrations": 600, "comparisons": 300}


def with_few_examples(config: RunConfig, output: str | Path, seed: int) -> RunConfig:
    """Replace `with_shipped_data`: the first lines of the demonstrations and comparisons, copied next to `output`."""
    config = with_shipped_data(config, output, seed)
    folder = Path(output).with_name("few_examples")
    folder.mkdir(exist_ok=True)
    for name, count in KEPT.items():
        lines = Path(getattr(config.data, name)).read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / f"{name}.jsonl").write_text("".join(lines[:count]), encoding="utf-8")
    return replace(config, data=replace(config.data, **{name: str(folder / f"{name}.jsonl") for name in KEPT}))
