"""The report of the demo: a table, plots and sampled responses, all in its output folder."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from rlhf_engine.config import save_config
from rlhf_engine.demo.config import DemoRunConfig
from rlhf_engine.demo.examine import Answers, Examination
from rlhf_engine.memory.arena import peak_rss_mb
from rlhf_engine.plots import plot_calibration, plot_curves, plot_histograms, plot_win_rates
from rlhf_engine.supervised.reward_model import RankingEvaluation
from rlhf_engine.supervised.sft import FitReport

PPOHistory = list[dict[str, float]]


def write_report(
    root: Path,
    config: DemoRunConfig,
    fits: dict[str, FitReport],
    rm: tuple[RankingEvaluation, ...],
    ppo: PPOHistory,
    examination: Examination,
    seconds: dict[str, float],
) -> str:
    """Write config.yaml, report.json, report.md, samples.md and plots/ into `root`; return the table as text."""
    save_config(config, root / "config.yaml")
    _draw(root / "plots", fits, rm, ppo, examination)
    (root / "samples.md").write_text(_samples(examination), encoding="utf-8")
    table = _table(fits, rm, ppo, examination, seconds)
    (root / "report.md").write_text(table + "\n", encoding="utf-8")
    numbers = {
        "seed": config.seed,
        "win_rates": {name: dataclasses.asdict(rate) for name, rate in examination.win_rates.items()},
        "judge": {"sft": _summary(examination.sft), "ppo": _summary(examination.ppo)},
        "fits": {name: dataclasses.asdict(report) for name, report in fits.items()},
        "reward_model": [dataclasses.asdict(found) for found in rm],
        "ppo": ppo[-1],
        "seconds": seconds,
        "peak_rss_mb": peak_rss_mb(),
    }
    (root / "report.json").write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    return table


def _summary(answers: Answers) -> dict[str, float]:
    return {
        "marks": float(answers.scores.mean()),
        "full_marks": float((answers.scores > 9.99).double().mean()),
        "reward": float(answers.rewards.mean()),
        "kl": answers.kl,
        "length": answers.length,
        "ended": answers.ended,
        **{f"mark_{name}": mark for name, mark in answers.mean_marks().items()},
    }


def _table(
    fits: dict[str, FitReport],
    rm: tuple[RankingEvaluation, ...],
    ppo: PPOHistory,
    examination: Examination,
    seconds: dict[str, float],
) -> str:
    sft, policy = _summary(examination.sft), _summary(examination.ppo)
    minimum = fits["sft"].best
    lines = [f"Win rate over SFT by the judge, {len(examination.prompts)} held-out prompts (ties count half):", ""]
    lines += ["| responses of | win rate | 95% interval | ties |", "|---|---|---|---|"]
    lines += [
        f"| {name} | {rate.rate:.3f} | {rate.low:.3f} to {rate.high:.3f} | {rate.ties:.2f} |"
        for name, rate in examination.win_rates.items()
    ]
    lines += ["", "| on held-out prompts | SFT | PPO |", "|---|---|---|"]
    rows = [("judge's marks, of 10", "marks", ".2f"), ("share with full marks", "full_marks", ".3f")]
    rows += [(f"  {name.removeprefix('mark_')}", name, ".2f") for name in sft if name.startswith("mark_")]
    rows += [("reward model's score", "reward", ".2f"), ("KL to SFT per sequence, nats", "kl", ".2f")]
    rows += [("tokens per response", "length", ".1f"), ("ended by EOS", "ended", ".3f")]
    lines += [f"| {label} | {sft[key]:{form}} | {policy[key]:{form}} |" for label, key, form in rows]
    sampled = sum(log["sampled_tokens_per_second"] for log in ppo) / len(ppo)
    whole = sum(log["tokens_per_second"] for log in ppo) / len(ppo)
    lines += ["", "| run | |", "|---|---|"]
    lines += [
        f"| SFT validation minimum | {minimum.validation_loss:.3f} nats per token at step {minimum.step} "
        f"of {fits['sft'].history[-1].step} |",
        f"| reward model on held-out rankings | accuracy {rm[-1].accuracy:.3f}, margin {rm[-1].margin:.2f}, calibration "
        f"error {rm[-1].calibration_error:.3f} |",
        f"| PPO tokens per second | {sampled:.0f} sampling, {whole:.0f} whole update |",
        f"| peak memory (RSS) | {peak_rss_mb():.0f} MB |",
        f"| seconds | {', '.join(f'{name} {spent:.0f}' for name, spent in seconds.items())}; "
        f"total {sum(seconds.values()):.0f} |",
    ]
    return "\n".join(lines)


def _samples(examination: Examination, count: int = 40) -> str:
    """Return the first response of both policies to the first `count` held-out prompts, with the judge's marks."""
    lines = ["# Responses to held-out prompts", ""]
    for row, prompt in enumerate(examination.prompts[:count]):
        lines.append(f"**{prompt}**")
        for name, answers in (("SFT", examination.sft), ("PPO", examination.ppo)):
            lines.append(f"* {name} ({answers.verdicts[row][0].score:.1f}): {answers.texts[row][0]}")
        lines.append("")
    return "\n".join(lines)


def _draw(
    folder: Path,
    fits: dict[str, FitReport],
    rm: tuple[RankingEvaluation, ...],
    ppo: PPOHistory,
    examination: Examination,
) -> None:
    plot_win_rates(examination.win_rates, "SFT", folder / "win_rate.png")
    for name, report in fits.items():
        curves = {
            "training": [(found.step, found.train_loss) for found in report.history],
            "validation": [(found.step, found.validation_loss) for found in report.history],
        }
        panels = {f"{name}: nats per token": curves}
        plot_curves(panels, folder / f"{name}.png", x_label="optimizer step", mark=report.best.step)
    plot_calibration(rm[-1].bins, rm[-1].accuracy, folder / "reward_model.png")
    shown = {
        "reward model's score": "score_mean",
        "KL to SFT per sequence": "kl",
        "entropy": "entropy",
        "tokens per response": "response_length",
        "value: explained variance": "explained_variance",
        "clipped share of tokens": "clipfrac",
    }
    panels = {title: {key: [(i + 1, log[key]) for i, log in enumerate(ppo)]} for title, key in shown.items()}
    plot_curves(panels, folder / "ppo.png", x_label="update")
    marks = {name: a.scores.flatten().tolist() for name, a in (("SFT", examination.sft), ("PPO", examination.ppo))}
    plot_histograms(marks, folder / "marks.png", x_label="judge's marks of 10")
