"""Rounds of InstructGPT: sample answers, rank them, train a reward model on all rankings so far, train the policy, evaluate it.

Every round has a folder with completions.jsonl, rankings.jsonl, rm/, ppo/ and eval/. A repeated call runs the missing steps.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

from rlhf_engine.checkpoint import check_settings
from rlhf_engine.config import RunConfig
from rlhf_engine.data import Comparison, PromptRecord, read_comparisons, read_prompts
from rlhf_engine.data.records import prompt_field, prompt_of
from rlhf_engine.evaluate import WinRate, rank
from rlhf_engine.files import read_json_lines, with_new_file
from rlhf_engine.metrics import read_metrics
from rlhf_engine.notices import notice
from rlhf_engine.plots import plot_win_rate_lines
from rlhf_engine.recipes import run_ppo, run_rm
from rlhf_engine.recipes.evaluate import BY_HAND, configured_judge, run_eval
from rlhf_engine.recipes.generate import Answerer, answer_all
from rlhf_engine.recipes.loading import dated, given
from rlhf_engine.recipes.preflight import check_rounds
from rlhf_engine.recipes.starting import Start, continued, exclusive
from rlhf_engine.recipes.steps import Steps

_MAY_CHANGE = (
    *("output_dir", "device", "iterate.rounds", "checkpoint", "tracking", "http", "distributed"),
    *("ppo.checkpoint_every", "reward.checkpoint_every"),
)
_STATE = "state.json"

_ALWAYS = ("seed", "dtype", "compute_dtype", "backend", "model", "adapter", "memory")
_TEMPLATES = tuple(
    f"data.{name}" for name in ("prompt_template", "chat_template_kwargs", "chat_template_date", "keep_special_tokens")
)
_PROMPTS = ("data.prompts", *_TEMPLATES, "data.long_prompts", "rollout")
READS = {
    "generate": (*_ALWAYS, *_PROMPTS, "iterate.prompts", "iterate.completions"),
    "rank": (*_TEMPLATES, "iterate.judge", "eval.judge_batch", "eval.margin"),
    "rm": (
        *_ALWAYS,
        *_TEMPLATES,
        *(f"data.{name}" for name in ("demonstrations", "comparisons", "long_prompts")),
        *("data.max_response_tokens", "data.validation_share", "rollout.max_prompt_tokens", "reward"),
    ),
    "ppo": (*_ALWAYS, *_PROMPTS, "data.pretrain", "ppo", "iterate.start"),
    "eval": (*_ALWAYS, *_PROMPTS, "eval"),
}
"""Keys and sections of the config that each step depends on. A setting that no finished step has read may change between
calls: a smaller learning rate after PPO has diverged, a different judge after one that raised."""


@dataclass(frozen=True)
class Iteration:
    """Progress of the rounds."""

    win_rates: list[WinRate]
    """Win rate over `model.path` of the policy of each finished round."""
    waiting: str | None
    """What the user has to do before the next round can continue; None if nothing."""

    def table(self) -> str:
        """Return the win rates as a Markdown table, followed by `waiting` if it is set."""
        lines = ["| round | win rate over the SFT model | 95% interval | ties |", "|---|---|---|---|"]
        lines += [
            f"| {number} | {rate.rate:.3f} | {rate.low:.3f} to {rate.high:.3f} | {rate.ties:.2f} |"
            for number, rate in enumerate(self.win_rates, start=1)
        ]
        return "\n".join([*(lines if self.win_rates else []), *([self.waiting] if self.waiting else [])])


@exclusive
def run_iterate(config: RunConfig, say: Callable[[str], object] = print, *, resume: bool = False) -> Iteration:
    """Run `rlhf iterate`: `iterate.rounds` rounds in OUTPUT_DIR, starting from the SFT model `model.path`.

    Call `say` with one line at the start of each step. A run that was ended at any moment is continued; `resume` only reports
    if there is none.

    Raises:
        ValueError: a round could not read one of its inputs (see `check_rounds`), and nothing is written; or a setting
            differs from the value that a finished step has read.
    """
    config.check_training()
    config = dated(config)
    root = Path(config.output_dir)
    if resume and not (root / _STATE).is_file():
        notice(f"{root}: no step of an earlier run is finished, so the first one begins from the start")
    steps, rates, waiting = Steps(root / _STATE, config, _MAY_CHANGE), [], None
    if f"round {config.iterate.rounds}: eval" not in steps:
        check_rounds(config)
    policy = str(config.model.path)
    for number in range(1, config.iterate.rounds + 1):
        folder = root / f"round_{number}"
        waiting = _round(config, steps, policy, folder, number, say)
        if waiting is not None:
            break
        rates.append(WinRate(**steps.results[f"round {number}: eval"]))
        policy = str(folder / "ppo")
    if rates:
        points = {"policy": [(float(number), rate) for number, rate in enumerate(rates, start=1)]}
        plot_win_rate_lines(points, root / "plots" / "iterate.png", x_label="round", baseline="the SFT model")
    return Iteration(rates, waiting)


def _round(
    config: RunConfig, steps: Steps, policy: str, folder: Path, number: int, say: Callable[[str], object]
) -> str | None:
    """Run the steps of one round; return what it waits for, or None when it is finished."""

    def step(name: str, run: Callable[[], Any]) -> Any:
        full = f"round {number}: {name}"
        if full not in steps:
            say(f"{full} ...")
        return steps.once(full, run, READS[name])

    step("generate", lambda: _generate(config, policy, folder, number))
    if f"round {number}: rank" not in steps and config.iterate.judge == BY_HAND:
        if not (folder / "rankings.jsonl").is_file():
            return (
                f'{folder / "completions.jsonl"}: replace each null by a ranking such as "B > A = C", save it as '
                f"{folder / 'rankings.jsonl'} and run this command again"
            )
        step("rank", lambda: _check_rankings(folder))
    else:
        step("rank", lambda: _rank(config, folder))
    step("rm", lambda: _train_rm(config, folder, number, say))
    step("ppo", lambda: _train_policy(config, policy, folder, number, say))
    step("eval", lambda: _evaluate(config, folder))
    return None


def _generate(config: RunConfig, policy: str, folder: Path, number: int) -> dict[str, int]:
    """Write the policy's distinct answers to this round's prompts; skip and count prompts with fewer than two."""
    if (folder / "rm").exists():
        raise ValueError(f"{folder}: contains a round that is not recorded in {folder.parent / _STATE}; move it away")
    answerer = Answerer(config, policy, seed=config.seed * 1_000 + 300 + number)
    lines, skipped = [], 0
    for record, sampled in answer_all(
        answerer, config.data.prompts, _prompts_of(config, number), config.iterate.completions
    ):
        completions = list(dict.fromkeys(text for text in sampled.texts if text.strip()))
        if len(completions) < 2:
            skipped += 1
            continue
        lines.append(prompt_field(record.prompt) | {"completions": completions, "ranking": None})
    if not lines:
        raise ValueError(
            f"{policy}: no prompt got two different answers, so there is nothing to rank; raise rollout.temperature or "
            "iterate.completions"
        )
    _write_lines(folder / "completions.jsonl", lines)
    return {"prompts": len(lines), "skipped": skipped}


def _prompts_of(config: RunConfig, number: int) -> list[PromptRecord]:
    """Return this round's share of the training prompts, which the seed shuffles; start over when all have been used.

    The file is read twice, so that memory holds only this round's prompts and one integer per training prompt.
    """
    path = given(config.data.prompts, "data.prompts")
    order = array("q", range(sum(1 for _ in read_prompts(path, "train"))))
    if not order:
        raise ValueError(f"data.prompts: got no prompts of split train in {config.data.prompts}")
    Random(config.seed).shuffle(order)
    count = min(config.iterate.prompts, len(order))
    wanted = [order[((number - 1) * count + index) % len(order)] for index in range(count)]
    places = set(wanted)
    found = {place: one for place, one in enumerate(read_prompts(path, "train")) if place in places}
    return [found[place] for place in wanted]


def _rank(config: RunConfig, folder: Path) -> dict[str, int]:
    lines = read_json_lines(folder / "completions.jsonl")
    assert config.iterate.judge is not None
    judge = configured_judge(config, config.iterate.judge)
    ranks = rank(judge, [prompt_of(line) for line in lines], [line["completions"] for line in lines])
    ranked = [line | {"ranking": list(given)} for line, given in zip(lines, ranks, strict=True)]
    _write_lines(folder / "rankings.jsonl", ranked)
    return {"rankings": len(ranked)}


def _check_rankings(folder: Path) -> dict[str, int]:
    """Check the rankings of a file and return their number: every line must be in completions.jsonl; lines may be missing."""
    path = folder / "rankings.jsonl"
    written = {(prompt_of(line), tuple(line["completions"])) for line in read_json_lines(folder / "completions.jsonl")}
    count = 0
    for comparison in read_comparisons(path):
        if (comparison.prompt, comparison.completions) not in written:
            raise ValueError(
                f"{path}:{comparison.line}: got a prompt and completions that are not in completions.jsonl, expected a line "
                "of that file with its ranking filled in"
            )
        count += 1
    if not count:
        raise ValueError(f"{path}: got no rankings, expected at least one")
    return {"rankings": count}


def _train_rm(config: RunConfig, folder: Path, number: int, say: Callable[[str], object]) -> dict[str, float]:
    """Train a reward model, from the SFT model, on the rankings of `data.comparisons` (if set) and of all rounds so far."""
    rounds = [folder.parent / f"round_{earlier}" / "rankings.jsonl" for earlier in range(1, number + 1)]
    sources = [*([] if config.data.comparisons is None else [Path(config.data.comparisons)]), *rounds]
    everything = folder / "comparisons.jsonl"
    _write_lines(everything, (_line(found) for source in sources for found in read_comparisons(source)))
    stage = replace(config, data=replace(config.data, comparisons=str(everything)), output_dir=str(folder))
    found = run_rm(stage, **_continued(stage, folder / "rm.checkpoint", "rm", say))[-1]
    return {"accuracy": found.accuracy, "loss": found.loss}


def _line(comparison: Comparison) -> dict[str, Any]:
    named = {"completions": list(comparison.completions), "ranking": list(comparison.ranks)}
    return prompt_field(comparison.prompt) | named


def _train_policy(
    config: RunConfig, policy: str, folder: Path, number: int, say: Callable[[str], object]
) -> dict[str, float]:
    """Train the round's policy."""
    start = policy if config.iterate.start == "previous" else config.model.path
    stage = replace(
        config,
        # Each round has a different seed, so that no two rounds sample with the same random numbers.
        seed=(config.seed * 1_000 + number) % 2**32,
        model=replace(config.model, path=start),
        reward=replace(config.reward, path=str(folder / "rm")),
        output_dir=str(folder),
    )
    run_ppo(stage, **_continued(stage, folder / "ppo", "ppo", say))
    # Read from the file, because a call that continues after the last update makes none.
    *_, last = (row for row in read_metrics(folder) if row["stage"] == "ppo")
    return {name: last[name] for name in ("score_mean", "kl")}


def _continued(stage: RunConfig, checkpoint: Path, name: str, say: Callable[[str], object]) -> Start:
    """Return how a stage starts: from its checkpoint, or anew if there is none or its settings have changed."""
    found = continued(checkpoint)
    if found["resume"]:
        try:
            check_settings(checkpoint, stage, name)
        except ValueError as changed:
            say(f"{name} begins again: {changed}")
            return {"resume": False, "overwrite": True}
    return found


def _evaluate(config: RunConfig, folder: Path) -> dict[str, Any]:
    setting = replace(config.eval, candidate=str(folder / "ppo"), baseline=config.model.path)
    contest, _ = run_eval(replace(config, eval=setting, output_dir=str(folder)), overwrite=True)
    assert contest is not None  # `check_rounds` refuses the judge `file` for `eval.judge`
    return asdict(contest.win_rate)


def _write_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    def write(new: Path) -> None:
        with new.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)

    with_new_file(path, write)
