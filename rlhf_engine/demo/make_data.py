"""Generate the demo's data set: demonstrations, rankings, prompts with user ids, and a text for pretraining.

    python -m rlhf_engine.demo.make_data DIR

Demonstrations come from labelers of mixed care, so a model that imitates them imitates their average. Rankings come from noisy
preferences (`TASTE`) over the faults of an answer, with ties. The judge (`judge.py`) has a separate rubric, from which neither
file is generated. The same seed gives the same bytes.
"""

import argparse
import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from random import Random

from rlhf_engine.demo.answers import CLOSINGS, FAULTS, OPENINGS, RAMBLE, RUDE, SIGN_OFFS, applicable, write_answer
from rlhf_engine.demo.tasks import Task, all_tasks
from rlhf_engine.demo.world import ADVICE, CATEGORIES, COUNTS, FACTS, OPPOSITES, PEOPLE, PROCEDURES, SIZES, article

SEED = 20220304
KIND_WEIGHTS = {
    "list": 16,
    "describe": 18,
    "compare": 12,
    "opposite": 8,
    "howto": 12,
    "advice": 12,
    "note": 12,
    "kind": 10,
}
"""Share of each kind of prompt, in percent."""

HABITS: dict[str, tuple[float, dict[str, float]]] = {
    "careful": (0.25, {"wrong": 0.03, "count": 0.05, "no_closing": 0.2, "rude": 0.02, "ramble": 0.05}),
    "average": (
        0.4,
        {
            "wrong": 0.05,
            "count": 0.25,
            "no_closing": 0.65,
            "rude": 0.15,
            "repeat": 0.05,
            "ramble": 0.2,
            "topic": 0.01,
            "truncate": 0.03,
            "double_closing": 0.1,
        },
    ),
    "careless": (
        0.35,
        {
            "wrong": 0.1,
            "count": 0.4,
            "no_closing": 0.8,
            "rude": 0.4,
            "repeat": 0.15,
            "ramble": 0.35,
            "topic": 0.04,
            "truncate": 0.1,
            "double_closing": 0.15,
        },
    ),
}
"""Labeler -> (share of the demonstrations, probability of each fault)."""

MODEL_FAULTS = {
    "wrong": 0.2,
    "count": 0.25,
    "no_closing": 0.4,
    "rude": 0.15,
    "repeat": 0.2,
    "ramble": 0.15,
    "topic": 0.12,
    "truncate": 0.15,
    "garble": 0.25,
    "double_closing": 0.2,
}
"""Probability of each fault in ranked completions: what a model of this training samples, weaknesses included."""

TASTE = {
    "topic": 3.2,
    "wrong": 1.8,
    "count": 1.6,
    "no_closing": 1.1,
    "rude": 1.6,
    "repeat": 1.2,
    "ramble": 1.0,
    "truncate": 2.2,
    "garble": 1.6,
    "double_closing": 0.8,
}
"""Utility that each fault costs in a ranking."""

TASTE_NOISE = 0.6
"""Standard deviation of the noise in a labeler's utility, per completion."""

TIE_GAP = 0.3
"""Neighbours whose utilities differ by less are ranked equal."""


@dataclass(frozen=True)
class Sizes:
    """Number of records of each kind."""

    demonstrations: int = 4000
    comparisons: int = 2400
    users: int = 130
    pretrain_documents: int = 8000
    test_prompts: int = 300
    validation_prompts: int = 100


def write_data(folder: Path, sizes: Sizes = Sizes(), seed: int = SEED) -> None:
    """Write the four files into `folder`, which is created if it does not exist."""
    folder.mkdir(parents=True, exist_ok=True)
    splits = split_by_user(sizes, Random(f"{seed} users"))
    train = [task for task, _, split in splits if split == "train"]
    _write_lines(
        folder / "prompts.jsonl",
        [{"prompt": task.prompt, "user_id": user, "split": split} for task, user, split in splits],
    )
    _write_lines(folder / "demonstrations.jsonl", demonstrations(train, sizes.demonstrations, Random(f"{seed} sft")))
    _write_lines(folder / "comparisons.jsonl", comparisons(train, sizes.comparisons, Random(f"{seed} rm")))
    (folder / "pretrain.txt").write_text(
        pretrain_text(train, sizes.pretrain_documents, Random(f"{seed} text")), "utf-8"
    )


def split_by_user(sizes: Sizes, rng: Random) -> list[tuple[Task, str, str]]:
    """Assign every prompt to one user and every user to one split, so that no user's prompts are in two splits."""
    tasks = list(all_tasks())
    rng.shuffle(tasks)
    shares = [rng.paretovariate(1.5) for _ in range(sizes.users)]
    owners = rng.choices(range(sizes.users), shares, k=len(tasks))
    split_of: dict[int, str] = {}
    for split, wanted in (("test", sizes.test_prompts), ("validation", sizes.validation_prompts)):
        count = 0
        # Light users first: a heavy user could fill a split with the prompts of one person.
        for user in sorted(set(owners), key=owners.count):
            if user not in split_of and count < wanted:
                split_of[user] = split
                count += owners.count(user)
    return [
        (task, f"user_{owner:03d}", split_of.get(owner, "train")) for task, owner in zip(tasks, owners, strict=True)
    ]


def demonstrations(tasks: list[Task], count: int, rng: Random) -> list[dict]:
    """Return prompts, each with the answer of one labeler."""
    return [
        {"prompt": task.prompt, "response": write_answer(task, _slips(task, _habit(rng), rng), rng)}
        for task in _draw(tasks, count, rng)
    ]


def comparisons(tasks: list[Task], count: int, rng: Random) -> list[dict]:
    """Return prompts with 4 to 9 completions and one labeler's ranking of them, such as "D > C > A = B"."""
    records = []
    for task in _draw(tasks, count, rng):
        completions: dict[str, float] = {}
        size = rng.choice([4, 4, 5, 5, 6, 7, 8, 9])
        while len(completions) < size:
            habit = _habit(rng) if rng.random() < 0.5 else MODEL_FAULTS
            faults = _slips(task, habit, rng)
            utility = -sum(TASTE[fault] for fault in sorted(faults)) + rng.gauss(0, TASTE_NOISE)
            completions.setdefault(write_answer(task, faults, rng), utility)
        records.append(
            {"prompt": task.prompt, "completions": list(completions), "ranking": _ranking(list(completions.values()))}
        )
    return records


def _habit(rng: Random) -> dict[str, float]:
    shares, habits = zip(*HABITS.values(), strict=True)
    return rng.choices(habits, shares)[0]


def _slips(task: Task, habit: dict[str, float], rng: Random) -> frozenset[str]:
    return applicable(task, {fault for fault in FAULTS if rng.random() < habit.get(fault, 0.0)})


def _draw(tasks: list[Task], count: int, rng: Random) -> list[Task]:
    """Return `count` tasks by the weight of their kind; a prompt repeats only after all prompts of its kind are used."""
    piles: dict[str, list[Task]] = {}
    drawn = []
    for kind in rng.choices(list(KIND_WEIGHTS), list(KIND_WEIGHTS.values()), k=count):
        if not piles.get(kind):
            piles[kind] = [task for task in tasks if task.kind == kind]
            rng.shuffle(piles[kind])
        drawn.append(piles[kind].pop())
    return drawn


def _ranking(utilities: list[float]) -> str:
    order = sorted(range(len(utilities)), key=lambda i: -utilities[i])
    text = "ABCDEFGHI"[order[0]]
    for better, worse in pairwise(order):
        text += (" = " if utilities[better] - utilities[worse] < TIE_GAP else " > ") + "ABCDEFGHI"[worse]
    return text


def pretrain_text(tasks: list[Task], count: int, rng: Random) -> str:
    """Return prose about the world and pages of questions with terse, right answers; a blank line ends a document.

    The prose has every word of the answers: the embedding of a word that a base model has never read is noise, which no adapter
    on the linear layers makes up for.
    """
    makers = [_fact_page, _fact_page, _list_page, _size_page, _opposite_page, _procedure_page, _advice_page, _talk_page]
    pages = [rng.choice(makers)(rng) for _ in range(count // 2)]
    for task in _draw(tasks, count - count // 2, rng):
        pages.append(f"{task.prompt}\n{write_answer(task, frozenset({'no_closing'}), rng)}")
    rng.shuffle(pages)
    return "\n\n".join(pages) + "\n"


def _fact_page(rng: Random) -> str:
    thing = rng.choice(list(FACTS))
    facts = rng.sample(FACTS[thing], rng.choice([2, 3, 4]))
    noun = article(thing)
    return " ".join(
        [f"{noun[0].upper()}{noun[1:]} {facts[0]}.", *[f"It {rng.choice(['', 'also '])}{fact}." for fact in facts[1:]]]
    )


def _list_page(rng: Random) -> str:
    kind, (plural, members) = rng.choice(list(CATEGORIES.items()))
    word, count = rng.choice(list(COUNTS.items()))
    picked = [article(item) for item in rng.sample(members, count)]
    items = ", ".join(picked[:-1]) + " and " + picked[-1]
    thing = article(rng.choice(members))
    return rng.choice(
        [
            f"In the shop there were {word} {plural}: {items}.",
            f"They saw {items}, which made {word} {plural}.",
            f"{thing[0].upper()}{thing[1:]} is {article(kind)}. Other {plural} are {items}.",
        ]
    )


def _size_page(rng: Random) -> str:
    small, big = sorted(rng.sample(range(len(SIZES)), 2))
    a, b = article(SIZES[small]), article(SIZES[big])
    return rng.choice(
        [
            f"We know that {a} is smaller than {b}, and that {b} is bigger than {a}.",
            f"{b[0].upper()}{b[1:]} is bigger than {a}. The {SIZES[small]} is the smaller one.",
            f"{a[0].upper()}{a[1:]} is smaller than {b}. The {SIZES[big]} is the bigger one.",
        ]
    )


def _opposite_page(rng: Random) -> str:
    word, other = rng.sample(rng.choice(OPPOSITES), 2)
    return rng.choice(
        [
            f"It is not {word} but {other}, and {other} is the opposite of {word}.",
            f"Some days are {word} and some are {other}.",
            f"The opposite of {word} is {other}.",
        ]
    )


def _procedure_page(rng: Random) -> str:
    name, steps = rng.choice(list(PROCEDURES.items()))
    one, two, three, four = steps
    return rng.choice(
        [
            f"To {name}, people first {one}, then {two}. Next they {three} and finally {four}.",
            f"How to {name}. First {one}. Then {two}. After that, {three}. Finally, {four}.",
        ]
    )


def _advice_page(rng: Random) -> str:
    trouble, ideas = rng.choice(list(ADVICE.items()))
    first, second, third = rng.sample(ideas, 3)
    return rng.choice(
        [
            f"Many people say: {trouble}. It may help to {first}, to {second} or to {third}.",
            f"{trouble}, said the man. You could {first}, said the woman, or {second}.",
        ]
    )


def _talk_page(rng: Random) -> str:
    one, other = rng.sample(PEOPLE, 2)
    story, more = rng.sample(RAMBLE, 2)
    return rng.choice(
        [
            f"{story} {more}",
            f"{rng.choice(OPENINGS)} {story}",
            f"{rng.choice(RUDE)} That was the {one}. The {other} said: {rng.choice(CLOSINGS)}",
            f"Dear {one}, {story[0].lower()}{story[1:]} {rng.choice(CLOSINGS)} {rng.choice(SIGN_OFFS)}",
        ]
    )


def _write_lines(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), "utf-8")


def main() -> None:
    """Run the command line `python -m rlhf_engine.demo.make_data DIR`."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the four files go")
    parser.add_argument("--seed", type=int, default=SEED, help="another seed gives another data set")
    arguments = parser.parse_args()
    write_data(arguments.folder, seed=arguments.seed)


if __name__ == "__main__":
    main()
