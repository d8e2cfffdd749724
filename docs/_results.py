"""Tables of the files in benchmarks/results, for the README and for the pages of the section Results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from docs._tables import digits, seconds, table

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"


class Row(NamedTuple):
    """Row of the README's table: a check of a results file, and its description."""

    words: str
    file: str
    check: str
    group: str = ""
    """Part of the title of the group with the check. If it is empty, the first group with the check is used."""


_CPU = (
    Row(
        "`linear_ppo_loss`, bfloat16: its time / time of the products",
        "linear_ppo_loss",
        "ours / floor",
        "bfloat16",
    ),
    Row("`linear_ppo_loss`, bfloat16: memory above its inputs, MB", "linear_ppo_loss", "extra MB, ours", "bfloat16"),
    Row(
        "PPO update, float32: our time / TRL's",
        *("ppo_step", "seconds, ours in float32 / TRL", "of 32 sequences"),
    ),
    Row(
        "PPO update, bfloat16 on a CPU without it: our time / TRL's",
        *("ppo_step", "seconds, ours in bfloat16 / TRL", "of 32 sequences"),
    ),
    Row(
        "PPO update in micro-batches of 8: our peak memory / TRL's",
        *("ppo_step", "extra MB, ours in float32 / TRL", "of 8 sequences"),
    ),
    Row(
        "sampling: our tokens/s / those of transformers' `generate`",
        *("rollout", "tokens/s, ours / transformers generate", "each: wall"),
    ),
)

_H200 = (
    ("PPO update, 1.5B parameters: our samples/s / TRL's", "qwen2.5-1.5b: samples a second, ours / TRL"),
    ("its peak memory: error of the plan, as a share", "qwen2.5-1.5b: planned by measured peak of train, from 1"),
    ("its decode step: speed / limit by memory bandwidth", "qwen2.5-1.5b: decode, of its bandwidth bound"),
    ("`linear_ppo_loss`, bfloat16: its time / time of the products", "linear_ppo_loss / three products"),
    ("`logits_ppo_loss`: speed / limit by memory bandwidth", "moving 6NV bytes / logits_ppo_loss forward+backward, triton"),
    ("`gae` of 128 x 4096 tokens: time", "gae 128x4096, triton"),
)  # fmt: skip


def at_a_glance() -> str:
    """Return the README's table: six checks on a CPU and six on an H200."""
    rows = [("CPU, 2 cores", row.words, *_cells(_cpu_check(row))) for row in _CPU]
    entries = {entry["name"]: entry for entry in _h200_entries()}
    rows += [("H200", words, *_cells(entries[name])) for words, name in _H200]
    return table(("on", "what", "measured", "bound", "met"), rows)


def cpu_page() -> str:
    """Return every group of every benchmark that ran on a CPU."""
    return "\n".join(_benchmark(name) for name in _CPU_FILES)


_CPU_FILES = {
    "linear_ppo_loss": "`linear_ppo_loss` from hidden states",
    "token_logprobs": "`token_logprobs` from logits",
    "gae": "`gae` and `rollout_advantages`",
    "ppo_step": "One PPO update",
    "rollout": "Sampling",
    "memory_plan": "Planned and measured memory",
    "adapters": "PPO updates with adapters and with full fine-tuning",
    "objectives": "`linear_ppo_loss` with every objective",
    "hydra": "The reference of trained top layers",
    "hygiene": "Prompt hygiene",
}


def integrations() -> str:
    """Return the measurements of one step of each peer's trainer, with and without our head and loss."""
    return _groups(_load("integrations"))


def peer_suites() -> str:
    """Return the counts of the peers' own tests with our functions swapped in, and why some are expected to fail."""
    suites = _load("peer_suites")
    rows = []
    for peer, suite in suites.items():
        count = suite["outcomes"].get
        counts = (
            count("passed", 0),
            suite["calling"].get("passed", 0),
            count("expected failure", 0),
            count("skipped", 0),
        )
        rows.append((peer, suite["version"], ", ".join(f"`{_function(name)}`" for name in suite["calls"]), *counts))
    head = ("peer", "version", "swapped", "passed", "of which call ours", "expected failures", "skipped")
    reasons = [(peer, n, reason) for peer, suite in suites.items() for reason, n in suite["expected"].items()]
    text = table(head, rows)
    return text + "\n" + table(("peer", "expected failures", "reason"), reasons) if reasons else text


def _function(target: str) -> str:
    return target.partition(":")[2].removesuffix(".apply")


def h200_bounds() -> str:
    """Return every bound of the run on an H200."""
    rows = [(entry["name"], *_cells(entry)) for entry in _h200_entries() if "bound" in entry]
    return table(("what", "measured", "bound", "met"), rows)


def h200_measured() -> str:
    """Return what each step of the run measured."""
    wanted = ("ceilings", "heads", "tokens", "peers", "engine")
    steps = [step for step in _load("h200/results")["steps"] if step["name"] in wanted]
    parts = []
    for step in steps:
        rows = [(e["name"], _value(e), e.get("note", "")) for e in step["entries"] if e["value"] is not None]
        parts.append(f"### {step['name']}\n\n" + table(("what", "measured", "note"), rows))
    return "\n".join(parts)


def h200_machine() -> str:
    """Return the machine and the versions of the run on an H200."""
    run = _load("h200/results")
    wanted = ("device", "memory", "driver_version before", "torch", "triton", "transformers", "trl", "liger-kernel",
              "cut-cross-entropy", "python")  # fmt: skip
    facts = {e["name"]: e["value"] for e in next(s for s in run["steps"] if s["name"] == "environment")["entries"]}
    rows = [(name.removesuffix(" before"), facts[name]) for name in wanted if name in facts]
    return table(("fact", "value"), [("started", run["started"]), ("finished", run["finished"]), *rows])


def seeds() -> str:
    """Return the results of the demo for each seed."""
    runs = _load("demo_seeds")["runs"]
    chosen = next(name for name in runs[0]["win_rates"] if name.startswith("SFT, best of "))
    rows = []
    for run in runs:
        rates = run["win_rates"]
        best, same = rates[chosen], rates["SFT against itself, resampled"]
        rows.append((run["seed"], _rate(rates["PPO"]), _short(best["rate"]), _short(same["rate"]), f"{run['kl']:.2f}"))
    head = ("seed", "PPO over SFT", chosen, "SFT against itself", "KL to SFT, nats per sequence")
    return table(head, rows)


def ptx() -> str:
    """Return win rate and perplexity of PPO and PPO-ptx."""
    policies = _load("ptx_coef")["policies"]
    base = policies["SFT"]["perplexity"]
    rows = [
        ("SFT, other random numbers" if name == "SFT" else name, _rate(policy), f"{policy['perplexity']:.2f}",
         "" if name == "SFT" else f"{policy['perplexity'] - base:+.2f}")
        for name, policy in policies.items()
    ]  # fmt: skip
    return table(("policy", "win rate over SFT", "perplexity", "difference to SFT's"), rows)


def figure() -> str:
    """Return the paper's figure in miniature, as a table."""
    contestants = _load("figure")["contestants"]
    sizes = [entry["parameters"] for entry in next(iter(contestants.values()))]
    head = ["", *(word for size in sizes for word in (f"{size:,} parameters", "perplexity"))]
    rows = [
        [name, *(cell for e in entries for cell in (_rate(e["win_rate"]), f"{e['perplexity']:.2f}"))]
        for name, entries in contestants.items()
    ]
    return table(head, rows)


def reliability() -> str:
    """Return the report of the soak test: checks and counts of every section."""
    if not (RESULTS / "reliability.json").exists():
        return "It has not run yet.\n"
    report = _load("reliability")
    machine = report["machine"]
    versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items() if v != "not installed")
    parts = [f"{machine['cpu']}; {versions}.\n"]
    for section in report["sections"].values():
        minutes = section["seconds"] / 60
        parts.append(f"## {section['title']}\n\n{section['date']} UTC, {minutes:.0f} minutes.\n")
        checks = [(check["name"], *_cells(check)) for check in section["checks"]]
        parts.append(table(("check", "measured", "bound", "met"), checks))
        for name in ("counts", "faults", "ends"):
            if name in section:
                parts.append(table((_COUNTED[name], "number"), section[name].items()))
        parts += [f"* {failure.splitlines()[0]}\n" for failure in section["failures"][:20] if failure]
    return "\n".join(parts)


_COUNTED = {"counts": "what", "faults": "fault", "ends": "end of an attempt"}


def _benchmark(name: str) -> str:
    results = _load(name)
    machine = results["machine"]
    versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items() if v != "not installed")
    where = (
        f"{machine['cpu']}, {machine['capability']}, {machine['threads']} threads, {machine['time'][:10]}; {versions}."
    )
    command = f"`python -m benchmarks {name}`"
    return f"## {_CPU_FILES[name]}\n\n{command}. {where}\n\n" + _groups(results)


def _groups(results: dict[str, Any]) -> str:
    return "\n".join(_group(group) for group in results["groups"])


def _group(group: dict[str, Any]) -> str:
    rows = [
        (row["name"], seconds(row["best"]), seconds(row["median"]),
         digits(row["ratio_to_floor"]) if row.get("ratio_to_floor") else "",
         digits(row["extra_mb"]) if row.get("extra_mb") is not None else "", row["note"] or row["error"] or "")
        for row in group["rows"]
    ]  # fmt: skip
    text = f"### {group['title']}\n\n" + table(("case", "best", "median", "ratio to floor", "extra MB", "note"), rows)
    if group["checks"]:
        checks = [(check["name"], *_cells(check)) for check in group["checks"]]
        text += "\n" + table(("check", "measured", "bound", "met"), checks)
    return text


def _cpu_check(row: Row) -> dict[str, Any]:
    for group in _load(row.file)["groups"]:
        for check in group["checks"]:
            if check["name"] == row.check and row.group in group["title"]:
                return check
    raise ValueError(f"{row.file}.json has no check {row.check!r} in a group {row.group!r}")


def _h200_entries() -> list[dict[str, Any]]:
    return [entry for step in _load("h200/results")["steps"] for entry in step["entries"]]


def _cells(check: dict[str, Any]) -> tuple[str, str, str]:
    sign = ">=" if check.get("at_least") else "<="
    unit = f" {check['unit']}" if check.get("unit") else ""
    met = "yes" if check["met"] else "**no**"
    return _value(check), f"{sign} {check['bound']:g}{unit}", met


def _value(entry: dict[str, Any]) -> str:
    value = entry["value"]
    text = digits(value) if isinstance(value, int | float) and not isinstance(value, bool) else str(value)
    return f"{text} {entry['unit']}" if entry.get("unit") else text


def _rate(rate: dict[str, Any]) -> str:
    return f"{_short(rate['rate'])} [{_short(rate['low'])}, {_short(rate['high'])}]"


def _short(value: float) -> str:
    return f"{value:.3f}".removeprefix("0")


def _load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())
