"""Publication of a model on the Hugging Face Hub, with a model card that is generated from the run's files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, ModelCardData
from huggingface_hub.utils import validate_repo_id

from rlhf_engine.checkpoint import CONFIG
from rlhf_engine.checkpoint_folders import TRAINER
from rlhf_engine.config import RunConfig, flat_settings, load_saved_config
from rlhf_engine.errors import foreign_errors
from rlhf_engine.files import OPTIMIZER, disk, read_json
from rlhf_engine.manifest import MANIFEST
from rlhf_engine.metrics import METRICS, read_metrics
from rlhf_engine.planner.report import size
from rlhf_engine.recipes.loading import REPORT
from rlhf_engine.recipes.ppo import SAMPLES

CARD = "README.md"
NOT_PUBLISHED = frozenset((OPTIMIZER, TRAINER, CONFIG, MANIFEST, METRICS, SAMPLES, REPORT, ".lock"))
"""Files of a run that are no part of a model. The config has paths of the machine; the card has its other settings."""

_LOCAL = (
    "output_dir",
    "device",
    "model.path",
    "reward.path",
    "reward.function",
    "reward.url",
    "data",
    "eval",
    "iterate",
)
"""Keys and sections of the config that are left out of a card: paths, and commands that did not train the model."""
_WORDS = {
    "sft": "supervised fine-tuning on demonstrations",
    "rm": "a reward model, trained on rankings of responses",
    "ppo": "reinforcement learning from a reward (PPO)",
}


@dataclass(frozen=True)
class License:
    """The licence fields of a card, as the Hub defines them."""

    id: str | None = None
    """Identifier, such as apache-2.0; `other` needs a name and a link."""
    name: str | None = None
    link: str | None = None

    def __post_init__(self) -> None:
        if (self.id == "other") != (self.name is not None and self.link is not None):
            raise ValueError("--license: 'other' needs --license-name and --license-link, which no other licence has")


def model_card(
    folder: str | Path,
    *,
    base: str | None = None,
    license: License = License(),  # immutable
    evaluation: str | Path | None = None,
) -> str:
    """Return the model card of a folder that `rlhf sft`, `rlhf rm` or `rlhf ppo` wrote.

    `base` is the name of the base model on the Hub, and `evaluation` the folder of `rlhf eval`, by default the one next to the
    model if it compared this model.

    Raises:
        ValueError: the folder is not one of these, or `evaluation` has no report.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise ValueError(
            f"{folder}: the file {CONFIG} is missing; give a folder that rlhf sft, rlhf rm or rlhf ppo wrote"
        )
    config = load_saved_config(folder / CONFIG)
    state = read_json(folder / TRAINER) if (folder / TRAINER).is_file() else {}
    stage = _stage(folder, state)
    tags = ["rlhf-kernels", "rlhf", stage]
    data = ModelCardData(
        base_model=base,
        license=license.id,
        license_name=license.name,
        license_link=license.link,
        library_name="peft" if (folder / "adapter_config.json").is_file() else "transformers",
        pipeline_tag="text-classification" if stage == "rm" else "text-generation",
        tags=tags,
    )
    sections = [
        f"---\n{data.to_yaml()}\n---",
        f"# {folder.resolve().name}: {_WORDS[stage]}",
        _origin(config, base, license),
        _data(config, state),
        _numbers(folder, stage),
        _win_rate(folder, evaluation),
        _plan(folder) if stage == "ppo" else "",
        _settings(config),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def push(
    folder: str | Path,
    repo: str,
    *,
    card: str,
    private: bool = False,
    endpoint: str | None = None,
    token: str | None = None,
) -> str:
    """Upload the model of a folder and its card in one commit; return the URL of the commit.

    The repository is created if it does not exist. A README.md in the folder replaces `card`. The token is that of
    `hf auth login` or `HF_TOKEN`, if `token` is None.

    Raises:
        ValueError: the folder holds no model, `repo` is not a valid name, or the Hub refuses; the message has its reason.
    """
    folder = Path(folder)
    files = published(folder)
    with foreign_errors(f"the Hub, {repo}"):
        validate_repo_id(repo)
        api = HfApi(endpoint=endpoint, token=token, library_name="rlhf-kernels")
        api.create_repo(repo, private=private, exist_ok=True)
        operations = [
            CommitOperationAdd(str(path.relative_to(folder)), path) for path in files if path != folder / CARD
        ]
        own = folder / CARD
        operations.append(CommitOperationAdd(CARD, own if own.is_file() else card.encode()))
        made = api.create_commit(repo, operations, commit_message=f"Upload {folder.resolve().name}")
    return made.commit_url


def published(folder: Path) -> list[Path]:
    """Return the files of a folder that `push` uploads.

    Raises:
        ValueError: it is not the folder of a model.
    """
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise ValueError(f"{folder}: the file config.json is missing; give the folder of a model or an adapter")
    found = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return [path for path in found if path.name not in NOT_PUBLISHED]


def _stage(folder: Path, state: Mapping[str, Any]) -> str:
    if state:
        return str(state["stage"])
    if not (folder / REPORT).is_file():
        raise ValueError(f"{folder}: neither {TRAINER} nor {REPORT} is there; give a folder of a finished run")
    return "rm" if "bias_shift" in read_json(folder / REPORT) else "sft"


def _origin(config: RunConfig, base: str | None, license: License) -> str:
    name = base or Path(config.model.path or "").name
    where = "" if base else " (a local folder; name the model on the Hub with --base)"
    lines = [f"Trained from {name}{where} with [rlhf-kernels](https://github.com/rlhf-kernels/rlhf-kernels)."]
    if config.adapter.rank:
        lines.append(f"It is a low-rank adapter of rank {config.adapter.rank} on that model.")
    if license.id is None:
        lines.append("Licence: not stated; the licences of the base model and of the data apply.")
    return " ".join(lines)


def _data(config: RunConfig, state: Mapping[str, Any]) -> str:
    """Return the table of the fingerprints: those that the run stored, or the SHA-256 of the files that are still there."""
    known = dict(state.get("data", {}))
    for key in ("demonstrations", "comparisons", "prompts", "pretrain"):
        path = getattr(config.data, key)
        if f"data.{key}" not in known and not state and path is not None and Path(path).is_file():
            known[f"data.{key}"] = disk.digest(Path(path))
    if not known:
        return ""
    lines = [f"| `{key}` | `{digest}` |" for key, digest in known.items()]
    return "\n".join(["## Fingerprints of the inputs", "", "| input | SHA-256 |", "|---|---|", *lines])


def _numbers(folder: Path, stage: str) -> str:
    where = folder if (folder / METRICS).is_file() else folder.parent
    rows = [row for row in read_metrics(where) if row["stage"] == stage]
    shown = {
        "ppo": {
            "score_mean": "mean score",
            "kl": "KL to the reference, nats per response",
            "response_length": "tokens",
        },
        "sft": {"validation_loss": "validation loss, nats per token"},
        "rm": {"accuracy": "accuracy on held-out pairs", "loss": "loss, nats per pair"},
    }[stage]
    lines = []
    for name, words in shown.items():
        values = [row[name] for row in rows if row.get(name) is not None]
        if values:
            lines.append(f"| {words} | {values[0]:.4f} | {values[-1]:.4f} |")
    if not lines:
        return ""
    steps = f"{rows[-1]['step']} {'updates' if stage == 'ppo' else 'steps'}"
    return "\n".join([f"## Training: {steps}", "", "| | first | last |", "|---|---|---|", *lines])


def _win_rate(folder: Path, evaluation: str | Path | None) -> str:
    path = Path(evaluation or folder.parent / "eval") / REPORT
    if not path.is_file():
        if evaluation is not None:
            raise ValueError(f"{path.parent}: the file {REPORT} is missing; give the folder eval of rlhf eval")
        return ""
    report = read_json(path)
    setting, rate = report["eval"], report["win_rate"]
    if evaluation is None and Path(setting["candidate"]).resolve() != folder.resolve():
        return ""
    judge = Path(str(setting["judge"])).name
    return (
        f"## Win rate\n\n{rate['rate']:.3f} over {Path(setting['baseline']).name}, 95% interval {rate['low']:.3f} to "
        f"{rate['high']:.3f}, on {rate['prompts']} prompts of split {setting['split']}, by the judge {judge}; ties count half."
    )


def _plan(folder: Path) -> str:
    path = folder.parent / "plan.json"
    if not path.is_file():
        return ""
    plan = read_json(path)
    if "peak_bytes" not in plan:
        return ""
    return f"## Memory\n\nPlanned peak {size(plan['peak_bytes'])}, in the phase {plan['largest_phase']}."


def _settings(config: RunConfig) -> str:
    """Return the settings that differ from their defaults, as YAML-like lines."""
    lines = list(_changed(config))
    return "\n".join(["## Settings that differ from the defaults", "", "```yaml", *lines, "```"]) if lines else ""


def _changed(config: RunConfig) -> Iterator[str]:
    usual = dict(flat_settings(RunConfig().to_dict(), _LOCAL))
    for key, value in flat_settings(config.to_dict(), _LOCAL):
        if usual.get(key) != value:
            yield f"{key}: {json.dumps(value)}"
