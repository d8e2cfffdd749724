"""Seconds and peak memory of `rlhf data clean` on 1,000,000 generated prompts, in a separate process.

No peer does all of these steps, so the bounds are absolute: 3 minutes and 1 GB on two cores. The prompts are English-like
words, 300 characters on average and up to several thousand. One prompt in six repeats a template, one in 25 contains
personal data, one in five contains numbers, and each of twenty users has far more than 200 prompts.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from random import Random

from benchmarks.harness import Check, Session, Worker, alternate_workers, report

PROMPTS, SECONDS, PEAK_MB = 1_000_000, 180, 1000
_PERSONAL = (
    "write to {name}.{number}@example.com",
    "call (415) 555-0{number}",
    "ring +44 20 7946 0{number}",
    "my card is 4111 1111 1111 1111",
    "pay into DE89 3704 0044 0532 0130 00",
    "from 203.0.113.{byte}",
    "and tell Dr. {name} Smith",
)


def main(*, quick: bool) -> None:
    count = 20_000 if quick else PROMPTS
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "prompts.jsonl"
        write_prompts(source, count)
        title = f"{count:,} prompts, {source.stat().st_size / 1e6:.0f} MB"
        worker = Worker(
            "data clean",
            "benchmarks.bench_hygiene:clean",
            {"source": str(source), "output": str(Path(folder) / "clean")},
            start_limit=300,
            step_limit=1200,
            note="the memory is the whole process, imports included",
        )
        rows = alternate_workers([worker], rounds=1, warmup=0)
        cpu = Path(folder) / "clean.cpu"
        rows[0].note += f"; {float(cpu.read_text()):.1f} s of processor time" if cpu.is_file() else ""
    row = rows[0]
    share = count / PROMPTS
    checks = [
        Check(f"seconds for {count:,} prompts", None if row.error else row.best, SECONDS * share),
        Check("peak MB", row.extra_mb, PEAK_MB),
    ]
    report("hygiene", title, rows, checks=checks)


def clean(session: Session, source: str, output: str) -> None:
    """Clean the prompts once per step of the session."""
    from rlhf_engine.config import HygieneConfig
    from rlhf_engine.data.hygiene import clean_prompts

    session.ready()
    while session.begin():
        started = time.process_time()
        table = clean_prompts(source, output, HygieneConfig()).table()
        Path(f"{output}.cpu").write_text(str(time.process_time() - started))
        session.end()
        with open(2, "w", closefd=False) as log:
            print(table, file=log)


def write_prompts(path: Path, count: int, seed: int = 0) -> None:
    """Write `count` prompts with user ids as lines of JSON; equal seeds give equal files."""
    rng = Random(seed)
    letters = "etaoinshrdlucmfwypvbgkjqxz"
    vocabulary = ["".join(rng.choices(letters, range(26, 0, -1), k=rng.randint(2, 9))) for _ in range(4000)]
    text = " ".join(rng.choices(vocabulary, k=200_000))
    templates = [text[start : start + 400] for start in range(0, 40_000, 400)]
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            start, length = rng.randrange(len(text) - 5000), min(4000, int(rng.lognormvariate(5.3, 0.9)) + 10)
            prompt = f"{text[start : start + length].capitalize()} {number % 977}."
            kind = rng.random()
            if kind < 1 / 6:
                prompt = templates[number % len(templates)] + prompt
            elif kind < 1 / 6 + 1 / 25:
                personal = rng.choice(_PERSONAL)
                prompt += " Please " + personal.format(
                    name=rng.choice(vocabulary).capitalize(), number=rng.randint(100, 199), byte=rng.randint(1, 254)
                )
            elif kind < 0.4:
                prompt += f" From {rng.randint(1900, 2024)} to 2025-01-{rng.randint(10, 28)}: {rng.random() * 1e6:.3f}?"
            user = rng.randrange(20) if rng.random() < 0.05 else rng.randrange(300_000)
            file.write(json.dumps({"prompt": prompt, "user_id": f"user_{user}"}) + "\n")
