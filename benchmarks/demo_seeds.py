"""`python -m benchmarks.demo_seeds RUN ... --out FOLDER`: compare finished demo runs with different seeds.

Each RUN is the output of `rlhf demo --seed N --output RUN`. Writes `demo_seeds.json`, `.md` and `.png` with the win rates of
all RUNs, and whether the bounds hold for each of them: the win rate of the PPO policy over its SFT model is at least 0.7 with a
95% interval above 0.6, and that of the SFT model over itself is between 0.45 and 0.55.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from rlhf_engine.evaluate import WinRate
from rlhf_engine.plots import plot_win_rates

LOWEST, INTERVAL, SELF = 0.70, 0.60, (0.45, 0.55)
_PPO, _SELF = "PPO", "SFT against itself, resampled"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo_seeds", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of finished demo runs")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder for the results")
    arguments = parser.parse_args()
    reports = [json.loads((run / "report.json").read_text(encoding="utf-8")) for run in arguments.runs]
    reports.sort(key=lambda report: report["seed"])
    rates = [report["win_rates"][_PPO]["rate"] for report in reports]
    lowest, median = min(rates), statistics.median(rates)
    low = min(report["win_rates"][_PPO]["low"] for report in reports)
    same = [report["win_rates"][_SELF]["rate"] for report in reports]
    held = (lowest >= LOWEST, low > INTERVAL, SELF[0] <= min(same) <= max(same) <= SELF[1])
    verdict = (
        f"{len(rates)} seeds: lowest {lowest:.3f} (bound {LOWEST}: {_state(held[0])}), median {median:.3f}; lowest end of an "
        f"interval {low:.3f} (bound {INTERVAL}: {_state(held[1])}); SFT against itself {min(same):.3f} to {max(same):.3f} "
        f"(bounds {SELF[0]} to {SELF[1]}: {_state(held[2])})"
    )
    table = "\n".join([_table(reports), "", verdict])
    arguments.out.mkdir(parents=True, exist_ok=True)
    numbers = {"lowest": lowest, "median": median, "runs": [_numbers(report) for report in reports]}
    (arguments.out / "demo_seeds.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    (arguments.out / "demo_seeds.md").write_text(table + "\n", encoding="utf-8")
    found = {f"seed {report['seed']}": WinRate(**report["win_rates"][_PPO]) for report in reports}
    plot_win_rates(found, "each seed's SFT model", arguments.out / "demo_seeds.png")
    print(table)
    raise SystemExit(0 if all(held) else 1)


def _state(held: bool) -> str:
    return "held" if held else "MISSED"


def _numbers(report: dict) -> dict:
    return {
        "seed": report["seed"],
        "win_rates": report["win_rates"],
        "kl": report["judge"]["ppo"]["kl"],
        "seconds": sum(report["seconds"].values()),
    }


def _table(reports: list[dict]) -> str:
    best = next(name for name in reports[0]["win_rates"] if name.startswith("SFT, best of "))
    lines = [
        f"| seed | {_PPO} over SFT | {best} | {_SELF} | KL to SFT, nats per sequence |",
        "|---|---|---|---|---|",
    ]
    for report in reports:
        rates = [report["win_rates"][name] for name in (_PPO, best, _SELF)]
        cells = [f"{rate['rate']:.3f} [{rate['low']:.3f}, {rate['high']:.3f}]" for rate in rates]
        lines.append(f"| {report['seed']} | {' | '.join(cells)} | {report['judge']['ppo']['kl']:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
