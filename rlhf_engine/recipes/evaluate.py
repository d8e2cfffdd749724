"""Win-rate evaluation: two models answer the same prompts, and a judge compares their answers.

Legend: M prompts, S answers per prompt and model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from rlhf_engine.config import RunConfig
from rlhf_engine.data import PromptRecord, read_prompts
from rlhf_engine.data.records import Prompt, prompt_field, prompt_of
from rlhf_engine.evaluate import (
    Judge,
    Pair,
    WinRate,
    load_judge,
    perplexity,
    preference_rate,
    read_documents,
    read_preferences,
    write_pairs,
)
from rlhf_engine.files import read_json, read_json_lines, recover, remove, with_new_file, with_new_folder, write_json
from rlhf_engine.notices import notice
from rlhf_engine.plots import plot_win_rates
from rlhf_engine.recipes.generate import Answerer, Answers, answer_all
from rlhf_engine.recipes.loading import dated, given, template_settings
from rlhf_engine.recipes.starting import exclusive
from rlhf_engine.recipes.training_use import training_use
from rlhf_engine.rewards.served import CACHE

BY_HAND = "file"
"""Value of `eval.judge` and `iterate.judge` for people, or an external program, that judge through a file."""

_SEEDS = {"candidate": 201, "baseline": 202}
"""Added to 1,000 times the run's seed, so that the two roles sample different answers even with the same model."""

_UNJUDGED = "unjudged"
"""Folder of the answers until the judge has finished. After a judge has failed, the next call reuses them."""

_ANSWERS, _CONTEST, _PAIRS, _JUDGED = "answers.jsonl", "contest.json", "pairs.jsonl", "judged.jsonl"


@dataclass(frozen=True)
class SampledResponses:
    """Answers of both models, with statistics of each model by its role (candidate or baseline)."""

    prompts: list[Prompt]
    """M prompts."""
    answers: dict[str, list[list[str]]]
    """M lists of S answers, by role."""
    ended: dict[str, float]
    """Share of the answers that ended before the token limit."""
    perplexity: dict[str, float] | None
    """Perplexity on `eval.text`; None if `eval.text` is not set."""
    truncated: dict[str, int]
    """Number of prompts that were cut on the left."""

    def pairs(self) -> list[Pair]:
        """Return the M * S pairs of answers: for each prompt, the k-th answers of both models."""
        columns = zip(self.prompts, self.answers["candidate"], self.answers["baseline"], strict=True)
        return [Pair(prompt, *two) for prompt, a, b in columns for two in zip(a, b, strict=True)]


@dataclass(frozen=True)
class Contest:
    """Result of an evaluation."""

    win_rate: WinRate
    """Win rate of the candidate over the baseline."""
    sampled: SampledResponses
    """The answers that were judged."""


@exclusive
def run_eval(config: RunConfig, *, overwrite: bool = False) -> tuple[Contest | None, str]:
    """Run `rlhf eval`: compare the two models of `config.eval` and write the result to OUTPUT_DIR/eval.

    Return the result and its table. With the judge `file`, write the pairs to judge to OUTPUT_DIR/judging and return None
    with instructions; if the judged file exists, read it and return the result.

    Raises:
        ValueError: a setting is missing, and nothing is written; the judge fails, and the answers are kept in
            OUTPUT_DIR/unjudged for the next call; an earlier evaluation exists, and `overwrite` is False.
    """
    setting = config.eval
    for name in ("candidate", "baseline", "judge"):
        if getattr(setting, name) is None:
            raise ValueError(
                f"eval.{name} is not set; give {'a judge' if name == 'judge' else 'the folder of a model'}"
            )
    config = dated(config)
    if setting.judge == BY_HAND:
        return _by_hand(config, overwrite=overwrite)
    folder = Path(config.output_dir) / "eval"
    recover(folder)
    if folder.exists() and not overwrite:
        raise ValueError(
            f"{folder}: an earlier evaluation is there; replace it with --overwrite, or set a different output_dir"
        )
    assert setting.judge is not None
    judge, unjudged = configured_judge(config, setting.judge), Path(config.output_dir) / _UNJUDGED
    sampled = _kept(config, unjudged) or ask_both(config)
    with_new_folder(unjudged, lambda new: _write_sampled(new, config, sampled))
    notice(*training_use(config, sampled.prompts))
    contest = judged_by(config, judge, sampled)

    def write(new: Path) -> None:
        _write_answers(new, sampled)
        _write_report(new, config, contest)

    with_new_folder(folder, write)
    remove(unjudged)
    return contest, table(config, contest)


def judged_by(config: RunConfig, judge: Judge, sampled: SampledResponses) -> Contest:
    """Return the result of the answers `sampled` under a judge that is not `file`."""
    pairs = sampled.pairs()
    preferences = judge.compare(
        [pair.prompt for pair in pairs], [pair.first for pair in pairs], [pair.second for pair in pairs]
    )
    return _contest(config, sampled, preferences)


def _kept(config: RunConfig, folder: Path) -> SampledResponses | None:
    """Return the answers of an earlier call whose judge failed; None without them, or if their inputs have changed.

    The inputs are the models, the prompts, the other files and the settings that the answers depend on.
    """
    if not (folder / _CONTEST).is_file():
        return None
    kept = read_json(folder / _CONTEST)
    same = all(kept.get(name) == value for name, value in (_identity(config) | _stamps(config)).items())
    return _read_sampled(config, folder) if same else None


def _stamps(config: RunConfig) -> dict[str, Any]:
    """Return sizes and modification times of the files that the answers depend on.

    They prevent the reuse of answers after a model has been trained again.
    """
    setting = config.eval
    places = (setting.candidate, setting.baseline, setting.candidate_prefix, setting.baseline_prefix, setting.text)
    roots = [Path(place) for place in (*places, config.data.prompts) if place is not None]
    files = [
        file for root in roots for file in ([root] if root.is_file() else sorted(root.glob("*"))) if file.is_file()
    ]
    return {"files": [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]}


def configured_judge(config: RunConfig, name: str) -> Judge:
    """Return the judge `name`: a function, a server, or a reward model on the config's device."""
    setting = config.eval
    return load_judge(
        name,
        prompt_template=config.data.prompt_template,
        batch=setting.judge_batch,
        margin=setting.margin,
        http=config.http,
        cache=Path(config.output_dir) / CACHE if config.http.cache else None,
        codec_settings=lambda tokenizer: (
            template_settings(config, tokenizer, strict=False)
            | {"keep_special_tokens": config.data.keep_special_tokens}
        ),
        device=config.device,
        trust_remote_code=config.model.trust_remote_code,
    )


def ask_both(config: RunConfig) -> SampledResponses:
    """Sample both models' answers to the prompts of the split, with one model in memory at a time."""
    setting = config.eval
    if setting.text is not None and not Path(setting.text).exists():
        raise ValueError(f"eval.text: {setting.text}: no such file or folder")
    prefixes = {role: prefix_of(config, role) for role in _SEEDS}
    records = list(islice(_records(config), setting.limit))
    if not records:
        raise ValueError(
            f"data.prompts: got no prompts of split {setting.split} in {config.data.prompts}; add some, or set a different "
            "eval.split"
        )
    found = {role: _ask(config, role, prefix, records) for role, prefix in prefixes.items()}
    answers = {role: sampled for role, (sampled, *_) in found.items()}
    flat = {role: [end for one in sampled for end in one.ended] for role, sampled in answers.items()}
    return SampledResponses(
        [record.prompt for record in records],
        {role: [one.texts for one in sampled] for role, sampled in answers.items()},
        {role: sum(ends) / len(ends) for role, ends in flat.items()},
        None if setting.text is None else {role: known for role, (_, known, _) in found.items() if known is not None},
        {role: cut for role, (*_, cut) in found.items()},
    )


def _ask(
    config: RunConfig, role: str, prefix: str, records: Sequence[PromptRecord]
) -> tuple[list[Answers], float | None, int]:
    """Return a role's answers, its perplexity on `eval.text` if that is set, and its number of truncated prompts."""
    setting = config.eval
    try:
        answerer = Answerer(
            config, getattr(setting, role), seed=config.seed * 1_000 + _SEEDS[role], prefix=prefix, stop=setting.stop
        )
    except ValueError as error:
        raise ValueError(f"eval.{role}: {str(error).removeprefix('model.path: ')}") from None
    known = None
    if setting.text is not None:
        documents = read_documents(setting.text, answerer.codec, config.output_dir)
        with answerer.actor.head.whole():  # the perplexity of the model as it is, with ids that are never sampled
            known = perplexity(answerer.actor, documents, pad_id=answerer.codec.pad_id)
    sampled = [answers for _, answers in answer_all(answerer, config.data.prompts, records, setting.samples)]
    return sampled, known, answerer.codec.truncated.count


def prefix_of(config: RunConfig, role: str) -> str:
    """Return the few-shot examples of a role, an empty text if there are none.

    Raises:
        ValueError: the file cannot be read.
    """
    path = getattr(config.eval, f"{role}_prefix")
    if path is None:
        return ""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"eval.{role}_prefix: {path}: {error}") from None


def _records(config: RunConfig) -> Iterator[PromptRecord]:
    return read_prompts(given(config.data.prompts, "data.prompts"), config.eval.split)


def _contest(config: RunConfig, sampled: SampledResponses, preferences: torch.Tensor) -> Contest:
    per_prompt = preferences.view(len(sampled.prompts), -1)
    return Contest(preference_rate(per_prompt, resamples=config.eval.resamples, seed=config.seed), sampled)


def _by_hand(config: RunConfig, *, overwrite: bool) -> tuple[Contest | None, str]:
    folder = Path(config.output_dir) / "judging"
    if overwrite and (folder / _JUDGED).is_file():
        raise ValueError(f"{folder / _JUDGED}: --overwrite would delete these judgements; move the folder away")
    if overwrite or not (folder / _CONTEST).is_file():
        sampled = ask_both(config)

        def write(new: Path) -> None:
            _write_sampled(new, config, sampled)
            write_pairs(new / _PAIRS, sampled.pairs(), config.seed)

        with_new_folder(folder, write)
    sampled = _read_sampled(config, folder)
    if read_json(folder / _CONTEST).get("files") != _stamps(config)["files"]:
        raise ValueError(
            f"{folder}: its answers are of other weights or prompts than those of today; sample new ones with --overwrite, or "
            "move the folder away"
        )
    notice(*training_use(config, sampled.prompts))
    if not (folder / _JUDGED).is_file():
        return None, (
            f'{len(sampled.pairs())} pairs to judge in {folder / _PAIRS}: replace each null by "A", "B" or "tie", save it as '
            f"{folder / _JUDGED} and run this command again"
        )
    contest = _contest(config, sampled, read_preferences(folder / _JUDGED, sampled.pairs(), config.seed))
    _write_report(folder, config, contest)
    return contest, table(config, contest)


def _identity(config: RunConfig) -> dict[str, Any]:
    """Return the settings that the answers depend on."""
    setting = config.eval.to_dict()
    for name in ("judge", "judge_batch", "margin", "resamples"):
        del setting[name]
    names = ("prompts", "prompt_template", "long_prompts", "chat_template_kwargs", "keep_special_tokens")
    data = {name: getattr(config.data, name) for name in names}
    return {"seed": config.seed, "eval": setting, "rollout": config.rollout.to_dict()} | data


def _read_sampled(config: RunConfig, folder: Path) -> SampledResponses:
    kept = read_json(folder / _CONTEST)
    for name, value in _identity(config).items():
        if kept.get(name) != value:
            raise ValueError(
                f"{folder}: its answers were sampled with {name} {kept.get(name)!r}, which is {value!r} now; judge them with "
                "the old value, or move the folder away"
            )
    lines = read_json_lines(folder / _ANSWERS)
    answers = {role: [line[role] for line in lines] for role in _SEEDS}
    return SampledResponses(
        [prompt_of(line) for line in lines], answers, kept["ended"], kept["perplexity"], kept["truncated_prompts"]
    )


def _write_sampled(folder: Path, config: RunConfig, sampled: SampledResponses) -> None:
    """Write the files that `_read_sampled` reads, and the settings and files that the answers depend on."""
    _write_answers(folder, sampled)
    found = {"ended": sampled.ended, "perplexity": sampled.perplexity, "truncated_prompts": sampled.truncated}
    write_json(folder / _CONTEST, _identity(config) | _stamps(config) | found)


def _write_answers(folder: Path, sampled: SampledResponses) -> None:
    with (folder / _ANSWERS).open("w", encoding="utf-8") as file:
        for prompt, candidate, baseline in zip(sampled.prompts, *sampled.answers.values(), strict=True):
            line = prompt_field(prompt) | {"candidate": candidate, "baseline": baseline}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _write_report(folder: Path, config: RunConfig, contest: Contest) -> None:
    setting, sampled = config.eval, contest.sampled
    report = {
        "win_rate": asdict(contest.win_rate),
        "perplexity": sampled.perplexity,
        "ended": sampled.ended,
        "truncated_prompts": sampled.truncated,
        "seed": config.seed,
        "eval": asdict(setting),
        "rollout": config.rollout.to_dict(),
    }
    text = table(config, contest) + "\n"
    with_new_file(folder / "report.json", lambda new: write_json(new, report))
    with_new_file(folder / "report.md", lambda new: new.write_text(text, encoding="utf-8"))
    plot_win_rates({str(setting.candidate): contest.win_rate}, str(setting.baseline), folder / "win_rate.png")


def table(config: RunConfig, contest: Contest) -> str:
    """Return the result as a Markdown table."""
    setting, rate, sampled = config.eval, contest.win_rate, contest.sampled
    lines = [
        f"Win rate of {setting.candidate} over {setting.baseline} by {setting.judge}, {rate.prompts} prompts (ties half):",
        "",
        "| | win rate | 95% interval | ties | answers ended | perplexity |",
        "|---|---|---|---|---|---|",
    ]
    back = replace(rate, rate=1 - rate.rate, low=1 - rate.high, high=1 - rate.low)
    for role, found in (("candidate", rate), ("baseline", back)):
        known = "" if sampled.perplexity is None else f"{sampled.perplexity[role]:.2f}"
        lines.append(
            f"| {role} | {found.rate:.3f} | {found.low:.3f} to {found.high:.3f} | {found.ties:.2f} | {sampled.ended[role]:.2f} "
            f"| {known} |"
        )
    return "\n".join(lines)
