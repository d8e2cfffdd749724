"""Kinds of text files: data sets, configs, overrides, and the JSON Lines that a run reads when it is resumed."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from random import Random
from typing import Any

import yaml

from rlhf_engine.config import RunConfig, flat_settings, load_config, save_config
from rlhf_engine.data.loading import read_comparisons, read_demonstrations, read_prompts, read_texts
from rlhf_engine.data.records import prompt_texts
from rlhf_engine.data.summary import summarise
from rlhf_engine.demo.config import DemoRunConfig
from rlhf_engine.metrics import METRICS, read_metrics
from rlhf_engine.ppo.callbacks import earlier_responses
from rlhf_engine.recipes.partial import PartialFile
from tests.fuzz.harness import Case, Kind, Wrong
from tests.fuzz.mutations import VALUES, YAML_VALUES, damage_bytes, damage_json, damage_yaml, json_bytes

_CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
]
_TURNS = "\n\nHuman: What is 2 + 2?\n\nAssistant:"
_TEXTS = ["A first text.\n\nA second, with é and 漢.\n", "one line", "a\r\n\r\nb\r\nc\n\n\n"]
_ROWS: Mapping[str, list[list[dict[str, Any]]]] = {
    "demonstrations": [
        [{"prompt": f"q{i}", "response": f"answer {i}"} for i in range(4)],
        [{"messages": _CHAT}, {"messages": _CHAT[1:]}],
        [{"instruction": "Add.", "input": "1 2", "output": "3", "system": "", "history": [["a", "b"]]}],
        [{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], "system": "s"}],
        [{"prompt": "q", "completion": "a", "label": True}, {"prompt": "q", "completion": "b", "label": False}],
    ],
    "comparisons": [
        [{"prompt": f"q{i}", "completions": ["a", "b", "c"], "ranking": "B > A = C"} for i in range(3)],
        [{"prompt": "q", "completions": ["a", "b"], "ranking": [0, 1.5]}],
        [{"prompt": "q", "chosen": "a", "rejected": "b"}, {"chosen": _CHAT, "rejected": [*_CHAT[:-1],
        _CHAT[2] | {"content": "x"}]}],
        [{"chosen": _TURNS + " 4", "rejected": _TURNS + " 5"}],
    ],
    "prompts": [
        [{"prompt": f"q{i}", "user_id": f"u{i % 2}", "split": "train"} for i in range(4)],
        [{"messages": _CHAT[:2], "user_id": 7, "answer": [1, {"a": None}]}],
    ],
    "pretraining": [[{"text": "A document."}, {"text": "A second\n\none."}]],
}  # fmt: skip
_READERS = {
    "demonstrations": read_demonstrations, "comparisons": read_comparisons, "prompts": read_prompts,
    "pretraining": read_texts,
}  # fmt: skip
_NAMES = (
    "prompt", "response", "messages", "conversations", "instruction", "input", "output", "system", "history",
    "completion", "label",
    "completions", "ranking", "chosen", "rejected", "user_id", "split", "text", "role", "content", "from", "value",
)  # fmt: skip


class JsonLines(Kind):
    """Data sets, as `rlhf data check` and training read them."""

    name, share = "jsonl", 34

    def case(self, random: Random) -> Case:
        kind = random.choice(list(_ROWS))
        if kind == "pretraining" and random.random() < 0.4:
            text = random.choice(_TEXTS).encode()
            return Case({"pretraining.txt": damage_bytes(random, text)})
        rows = random.choice(_ROWS[kind])
        at = random.randrange(len(rows))
        values: list[Any] = list(rows)
        if random.random() < 0.75:
            values[at] = damage_json(random, rows[at], _NAMES)
        content = b"".join(json_bytes(value) + b"\n" for value in values)
        return Case({f"{kind}.jsonl": damage_bytes(random, content) if random.random() < 0.35 else content})

    def names(self, case: Case) -> Collection[str]:
        return [str(self.folder / name) for name in case.files]

    def run(self, case: Case) -> None:
        (name,) = case.files
        kind, path = name.partition(".")[0], self.folder / name
        counts = summarise(kind, path)
        records = list(_READERS[kind](path))
        if counts["records"] != len(records):
            raise Wrong(f"{counts} for {len(records)} records")
        content = case.files[name]
        assert content is not None
        if path.suffix == ".txt":
            read = "\n".join(record.text for record in records).split()
            if read != content.decode("utf-8-sig").split():
                raise Wrong(f"read {read}")
            return
        self._check(
            records, [json.loads(line) for line in content.removeprefix(b"\xef\xbb\xbf").split(b"\n") if line.strip()]
        )

    def _check(self, records: list[Any], rows: list[Any]) -> None:
        """Check that each record has texts of its row only, and that no row but a bad response of KTO's format is left out."""
        left_out = [row for row in rows if row.get("label") is False and "completion" in row]
        if not len(rows) - len(left_out) <= len(records) <= len(rows):
            raise Wrong(f"{len(records)} records of {len(rows)} rows")
        texts = {row_text for row in rows for row_text in _strings(row)}
        whole = "\n".join(texts)
        for record in records:
            found = [*prompt_texts(record.prompt)] if hasattr(record, "prompt") else [record.text]
            found += [getattr(record, "response", "x"), *getattr(record, "completions", ())]
            for text in found:
                parts = (
                    text.split("\n\n")
                    if "instruction" in whole or any("instruction" in row for row in rows)
                    else [text]
                )
                if any(part not in whole for part in parts if part != "x"):
                    raise Wrong(f"got the text {text!r}, which no row has")
            if any(not math.isfinite(rank) for rank in getattr(record, "ranks", ())):
                raise Wrong(f"got the ranks {record.ranks}")


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _strings(one)


def _same(given: Any, found: Any) -> bool:
    """Return whether a setting has the value that YAML gives."""
    if isinstance(given, list):
        return isinstance(found, list) and len(given) == len(found) and all(map(_same, given, found))
    if isinstance(found, float) and type(given) is int:
        return float(given) == found
    if isinstance(found, str) and type(given) is int:
        return found == str(given)  # a text of digits
    if isinstance(given, str) and isinstance(found, float):
        return float(given) == found  # 1e-5 is a text in YAML 1.1
    return given == found and isinstance(given, bool) == isinstance(found, bool)


class ConfigFile(Kind):
    """Config files, as every command reads them."""

    name, share = "yaml", 26

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        root = Path(__file__).parents[2] / "rlhf_engine"
        found = [*(root / "examples").glob("*.yaml"), root / "demo" / "demo.yaml"]
        self.texts = [path.read_text(encoding="utf-8") for path in sorted(found)]
        save_config(RunConfig(), folder / "all.yaml")
        lines = (folder / "all.yaml").read_text().splitlines(keepends=True)
        starts = [at for at, line in enumerate(lines) if line[0].isalpha()] + [len(lines)]
        # The parser takes a millisecond per ten lines, so that a file of all settings is too long for many cases.
        self.texts += ["".join(lines[begin:end]) for begin, end in itertools.pairwise(starts)]

    def case(self, random: Random) -> Case:
        return Case({"run.yaml": damage_yaml(random, random.choice(self.texts))})

    def names(self, case: Case) -> Collection[str]:
        return [str(self.folder / "run.yaml")]

    def run(self, case: Case) -> None:
        path = self.folder / "run.yaml"
        config = load_config(path, kind=DemoRunConfig)
        _check_config(config, yaml.load(path.read_bytes().decode(), Loader=yaml.CSafeLoader) or {}, self.folder)


def _check_config(config: RunConfig, given: dict[str, Any], folder: Path) -> None:
    """Check that a config has every value of the YAML, and that it is written and read back as it is."""
    found = dict(flat_settings(config.to_dict()))
    for key, value in flat_settings(given):
        if value != {} and not _same(value, found.get(key, config.to_dict().get(key))):
            raise Wrong(f"{key}: got {found.get(key)!r} for {value!r}")
    save_config(config, folder / "saved.yaml")
    if load_config(folder / "saved.yaml", kind=type(config)) != config:
        raise Wrong("the config differs after it is written and read")


class Overrides(Kind):
    """Values of `--set`."""

    name, share = "set", 20

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.keys = RunConfig.keys()

    def case(self, random: Random) -> Case:
        return Case(overrides=tuple(self._override(random) for _ in range(random.choice((1, 1, 2)))))

    def _override(self, random: Random) -> str:
        key = random.choice(self.keys)
        hostile = [str(value) if not isinstance(value, tuple) else value[0] for value in VALUES]
        value = random.choice((random.choice(YAML_VALUES), random.choice(hostile), str(random.randrange(-2, 100))))
        kind = random.randrange(8)
        if kind == 0:
            key = damage_bytes(random, key.encode()).decode("utf-8", "surrogateescape")
        elif kind == 1:
            key = random.choice(
                (f".{key}", f"{key}.", f"{key}.a", key.replace(".", ".."), "a." * 3_000, "", "__class__", key + "[0]")
            )
        text = random.choice(
            (f"{key}={value}", f"{key} = {value}", f"{key}={value}", f"{key}{value}", f"{key}:{value}")
        )
        return (
            text
            if random.random() < 0.8
            else damage_bytes(random, text.encode("utf-8", "surrogatepass")).decode("utf-8", "surrogateescape")
        )

    def names(self, case: Case) -> Collection[str]:
        # A long override is shown without its middle, and a section's message begins with its key.
        return [
            "override",
            *(part for one in case.overrides for part in (one[:20], one.partition("=")[0][:20].strip())),
        ]

    def run(self, case: Case) -> None:
        config = load_config(None, case.overrides)
        given: dict[str, Any] = {}
        for one in case.overrides:
            key, _, text = one.partition("=")
            *parents, name = key.split(".")
            node = given
            for parent in parents:
                node = node.setdefault(parent, {})
            node[name] = yaml.load(text, Loader=yaml.CSafeLoader)
        _check_config(config, given, self.folder)


class RunFiles(Kind):
    """Metrics, sampled responses and unfinished answers of an earlier run, which a resumed one reads and continues."""

    name, share = "run", 8

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.metrics = [{"stage": "ppo", "step": step, "kl": 0.5 / step, "loss": None} for step in range(1, 4)]
        self.samples = [{"update": step, "prompt": "q", "response": "a", "score": 0.5} for step in range(1, 4)]
        self.settings = {"samples": 2, "split": None, "model.path": "ab" * 32, "rollout.stop": ["x"]}
        self.answers = [{"settings": self.settings}, *({"prompt": f"q{n}", "answers": ["a", "b"]} for n in range(4))]

    def case(self, random: Random) -> Case:
        name, rows = random.choice(
            ((METRICS, self.metrics), ("samples.jsonl", self.samples), ("out.jsonl.partial", self.answers))
        )
        values: list[Any] = list(rows)
        at = random.randrange(len(values))
        if random.random() < 0.6:
            values[at] = damage_json(random, values[at], ("stage", "step", "update", "settings"))
        content = b"".join(json_bytes(value) + b"\n" for value in values)
        return Case({name: damage_bytes(random, content) if random.random() < 0.6 else content})

    def names(self, case: Case) -> Collection[str]:
        return [str(self.folder / name) for name in case.files]

    def run(self, case: Case) -> None:
        for name, content in case.files.items():
            assert content is not None
            lines = content.split(b"\n")
            if name == METRICS:
                _check_lines(read_metrics(self.folder), lines)
            elif name == "samples.jsonl":
                kept = earlier_responses(self.folder / name, after=2)
                if any(line not in lines for line in kept.split(b"\n")[:-1]):
                    raise Wrong(f"got the lines {kept!r}")
            else:
                target = self.folder / name.removesuffix(".partial")
                with PartialFile(target, self.settings, chunk=2, resume=True) as file:
                    file.write({"prompt": "last"})
                    file.finish()
                    if file.kept != target.read_bytes().count(b"\n") - 1:
                        raise Wrong(f"kept {file.kept} lines of {target.read_bytes()!r}")


def _check_lines(rows: list[dict[str, Any]], lines: list[bytes]) -> None:
    whole = [line for line in lines if line]
    if not len(whole) - 1 <= len(rows) <= len(whole):
        raise Wrong(f"{len(rows)} rows of {len(whole)} lines")
    for row, line in zip(rows, whole, strict=False):
        if repr(json.loads(line)) != repr(row):
            raise Wrong(f"got {row!r} for {line!r}")
