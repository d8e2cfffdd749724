"""`python -m benchmarks.ptx_coef --coefs 0.1 1 --out FOLDER`: benefit and cost of PPO-ptx's coefficient, at the demo's size.

Trains one SFT model, one PPO policy from it, and one PPO-ptx policy per coefficient with the same prompts and random numbers.
Measures for each the win rate over that SFT model by the demo's judge, and the perplexity of held-out pretraining text, as
Ouyang et al. 2022 did to choose their coefficient. An interrupted run resumes where it stopped, and a run with more
coefficients adds them.

The chosen coefficient has the highest win rate among those that lose at most half of the perplexity that PPO loses against
SFT. Bound: its win rate is at most 0.05 below PPO's.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from functools import partial
from pathlib import Path

from rlhf_engine.demo.figure import Result, at_width, do_once, judge, prepare, train
from rlhf_engine.evaluate import WinRate, win_rate
from rlhf_engine.plots import plot_trade_off

SHARE, WITHIN = 0.5, 0.05


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ptx_coef", description=__doc__)
    parser.add_argument("--coefs", nargs="+", type=float, required=True, metavar="COEF", help="values of ppo.ptx_coef")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder for models and results")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--set", nargs="*", default=[], dest="overrides", metavar="KEY=VALUE", help="settings, as in `rlhf figure`"
    )
    arguments = parser.parse_args()
    config, steps, held_out = prepare(arguments.out, arguments.seed, tuple(arguments.overrides))
    width = config.figure.widths[-1]
    sized = at_width(config, width)
    coefs = {f"ptx_{coef:g}": coef for coef in sorted(arguments.coefs)}
    train(sized, coefs, steps, print)
    folders = {"SFT": "sft", "PPO": "ppo"} | {f"PPO-ptx, {coef:g}": f"{name}/ppo" for name, coef in coefs.items()}
    # All policies sample with the same random numbers; the SFT model that they are compared with samples with different ones.
    judged = {
        name: Result(**do_once(steps, f"{width}: {name}", partial(judge, sized, name, folder, 1, held_out), print))
        for name, folder in folders.items()
    }
    baseline = Result(**do_once(steps, "baseline", partial(judge, sized, "SFT", "sft", 0, held_out), print))
    rates = {name: win_rate(one.marks, baseline.marks, seed=config.seed) for name, one in judged.items()}
    losses = {name: one.perplexity - judged["SFT"].perplexity for name, one in judged.items()}
    chosen, verdict = choose(rates, losses)
    table = "\n".join([*_rows(judged, rates, losses), "", verdict])
    numbers = {
        "seed": config.seed,
        "prompts": len(baseline.marks),
        "chosen": chosen,
        "policies": {name: {"perplexity": judged[name].perplexity} | asdict(rates[name]) for name in judged},
    }
    (arguments.out / "ptx_coef.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    (arguments.out / "ptx_coef.md").write_text(table + "\n", encoding="utf-8")
    points = {name: (judged[name].perplexity, rate) for name, rate in rates.items()}
    plot_trade_off(points, arguments.out / "ptx_coef.png", x_label="perplexity on held-out pretraining text")
    print(table)
    raise SystemExit(0 if chosen is not None else 1)


def choose(rates: dict[str, WinRate], losses: dict[str, float]) -> tuple[str | None, str]:
    """Return the policy with the highest win rate that meets the bounds, or None, and the verdict as text."""
    if losses["PPO"] <= 0:
        return None, f"PPO lost no perplexity ({losses['PPO']:+.2f}): nothing for PPO-ptx to keep"
    keeping = [name for name in rates if name.startswith("PPO-ptx") and losses[name] <= SHARE * losses["PPO"]]
    if not keeping:
        return None, f"no coefficient loses at most {SHARE:g} of the perplexity that PPO loses: MISSED"
    best = max(keeping, key=lambda name: rates[name].rate)
    gap = rates["PPO"].rate - rates[best].rate
    share = losses[best] / losses["PPO"]
    held = gap <= WITHIN
    said = (
        f"{best}: {share:.2f} of PPO's loss of perplexity (bound {SHARE:g}: held), win rate {gap:+.3f} below PPO's "
        f"(bound {WITHIN:g}: {'held' if held else 'MISSED'})"
    )
    return best if held else None, said


def _rows(judged: dict[str, Result], rates: dict[str, WinRate], losses: dict[str, float]) -> list[str]:
    lines = ["| policy | win rate over SFT | perplexity | more than SFT's |", "|---|---|---|---|"]
    for name, one in judged.items():
        lines.append(f"| {name} | {rates[name]} | {one.perplexity:.2f} | {losses[name]:+.2f} |")
    return lines


if __name__ == "__main__":
    main()
