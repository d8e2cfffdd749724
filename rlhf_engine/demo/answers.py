"""Answers as people of different care write them: with right content, or with faults inserted on purpose.

Only the generator of the data set uses this file. The judge reads the finished text and does not know the inserted faults.
"""

from functools import cache
from random import Random

from rlhf_engine.demo.tasks import Task, all_tasks
from rlhf_engine.demo.world import CATEGORIES, COUNTS, EVENTS, GIFTS, MISHAPS, article

FAULTS = ("topic", "wrong", "count", "no_closing", "rude", "repeat", "ramble", "truncate", "garble", "double_closing")
"""Faults of an answer. In order: wrong topic, a false piece, missing or surplus pieces, no polite closing, rudeness, a repeated
sentence, rambling, a truncated end, mixed-up words, two closings."""

OPENINGS = ["Sure!", "Of course.", "Certainly.", "Good question!"]
CLOSINGS = [
    "I hope this helps.",
    "I hope that helps you.",
    "Let me know if you need more.",
    "Feel free to ask again.",
    "Have a nice day!",
]
SIGN_OFFS = ["Best wishes.", "Kind regards.", "With love."]
RUDE = [
    "What a silly question.",
    "I guess so, whatever.",
    "Who cares about that?",
    "You should look it up yourself.",
    "This is so boring.",
]
RAMBLE = [
    "My uncle told me a long story about the weather.",
    "By the way, it was raining here yesterday.",
    "I once saw a film about a train.",
    "Anyway, the bus was full this morning.",
    "My sister has a red bicycle and a blue one.",
]
SENTENCE_KINDS = ("list", "describe", "howto", "advice")
"""Kinds whose answers have several pieces, so that the number of pieces can be wrong."""


def write_answer(task: Task, faults: frozenset[str], rng: Random) -> str:
    """Return an answer to `task` with the given faults (see `FAULTS`)."""
    source = _other_task(task, rng) if "topic" in faults else task
    sentences = _body(source, _content(source, faults, rng), rng)
    if "repeat" in faults:
        sentences.insert(rng.randrange(1, len(sentences) + 1), rng.choice(sentences))
    if "ramble" in faults:
        sentences[len(sentences) :] = rng.sample(RAMBLE, rng.choice([1, 2]))
    if "rude" in faults:
        sentences.insert(rng.choice([0, len(sentences)]), rng.choice(RUDE))
    elif task.kind != "note" and rng.random() < 0.3:
        sentences.insert(0, rng.choice(OPENINGS))
    if "no_closing" not in faults:
        pool = SIGN_OFFS if task.kind == "note" else CLOSINGS
        sentences += rng.sample(pool, 2 if "double_closing" in faults else 1)
    text = " ".join(sentences)
    if "garble" in faults:
        text = _garble(text, rng)
    if "truncate" in faults:
        words = text.split()
        text = " ".join(words[: rng.randrange(2, max(3, len(words) - 2))]).rstrip(".,!?:")
    return text


def applicable(task: Task, faults: set[str]) -> frozenset[str]:
    """Return `faults` without those that an answer to `task` cannot show and those that a different fault hides."""
    kept = set(faults)
    if task.kind not in SENTENCE_KINDS:
        kept.discard("count")
    if "topic" in kept:
        kept -= {"wrong", "count"}
    if "truncate" in kept or "no_closing" in kept:
        kept.discard("double_closing")
    if "truncate" in kept:
        kept.add("no_closing")
    return frozenset(kept)


def _other_task(task: Task, rng: Random) -> Task:
    return rng.choice(
        [
            other
            for other in all_tasks()
            if other.kind == task.kind and other.subject != task.subject and other.truth != task.truth
        ]
    )


def _content(task: Task, faults: frozenset[str], rng: Random) -> list[str]:
    if task.kind not in SENTENCE_KINDS:
        return list(_wrong_choice(task, rng) if "wrong" in faults else task.truth)
    count = task.wanted or rng.choice([3, 4] if task.kind == "howto" else [2, 3])
    if "count" in faults:
        count = max(1, count + rng.choice([-1, -1, 1, -2])) if task.wanted else 1
    count = min(count, len(task.truth))
    if "count" in faults and count == task.wanted:
        count -= 1
    picked = sorted(rng.sample(range(len(task.truth)), count))
    if task.kind in ("list", "advice"):
        rng.shuffle(picked)
    elif task.kind == "describe" and 0 not in picked and rng.random() < 0.7:
        picked[0] = 0
    content = [task.truth[i] for i in picked]
    if "wrong" in faults:
        if task.kind == "howto" and count > 1 and rng.random() < 0.5:
            content.reverse()
        else:
            content[rng.randrange(count)] = rng.choice(_lies(task))
    return content


def _lies(task: Task) -> list[str]:
    if task.kind == "list":
        return [thing for kind, (_, members) in CATEGORIES.items() if kind != task.subject for thing in members]
    return [piece for piece in _pieces(task.kind) if piece not in task.truth]


@cache
def _pieces(kind: str) -> tuple[str, ...]:
    return tuple(sorted({piece for task in all_tasks() if task.kind == kind for piece in task.truth}))


def _wrong_choice(task: Task, rng: Random) -> tuple[str, ...]:
    if task.kind == "compare":
        return task.truth[::-1]
    if task.kind == "note":
        return (rng.choice([purpose for purpose in ("thank", "sorry", "invite") if purpose != task.truth[0]]),)
    return (rng.choice(_lies(task)),)


def _join(pieces: list[str]) -> str:
    return pieces[0] if len(pieces) == 1 else ", ".join(pieces[:-1]) + " and " + pieces[-1]


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _body(task: Task, content: list[str], rng: Random) -> list[str]:
    return _BODIES[task.kind](task, content, rng)


def _list_body(task: Task, content: list[str], rng: Random) -> list[str]:
    plural = CATEGORIES[task.subject][0]
    assert task.wanted is not None
    word = {number: name for name, number in COUNTS.items()}[task.wanted]
    items = _join([article(item) for item in content])
    return [
        rng.choice(
            [
                f"{_capital(word)} {plural} are {items}.",
                f"Here are {word} {plural}: {items}.",
                f"You could take {items}.",
            ]
        )
    ]


def _describe_body(task: Task, content: list[str], rng: Random) -> list[str]:
    sentences = [f"{_capital(article(task.subject))} {content[0]}."]
    rest = content[1:]
    if len(rest) >= 2 and rng.random() < 0.5:
        sentences.append(f"It {rest[0]} and it {rest[1]}.")
        rest = rest[2:]
    return sentences + [
        f"It {'also ' if i else ''}{fact}." if not fact.startswith(("is", "can")) else f"It {fact}."
        for i, fact in enumerate(rest)
    ]


def _compare_body(task: Task, content: list[str], rng: Random) -> list[str]:
    winner, loser = content
    opposite = "smaller" if task.detail == "bigger" else "bigger"
    main = f"{_capital(article(winner))} is {task.detail} than {article(loser)}."
    return rng.choice(
        [[main], [main, f"The {loser} is the {opposite} one."], [f"The {winner} is the {task.detail} one.", main]]
    )


def _opposite_body(task: Task, content: list[str], rng: Random) -> list[str]:
    word, other = task.subject, content[0]
    return [
        rng.choice(
            [
                f"The opposite of {word} is {other}.",
                f"{_capital(other)} is the opposite of {word}.",
                f"If something is not {word}, it is {other}.",
            ]
        )
    ]


def _howto_body(task: Task, content: list[str], rng: Random) -> list[str]:
    if len(content) == 1:
        return [f"To {task.subject}, {content[0]}."]
    middle = [f"{rng.choice(['Then', 'Next', 'After that'])}, {step}." for step in content[1:-1]]
    return [
        f"{rng.choice(['First', f'To {task.subject}, first'])}, {content[0]}.".replace("first,", "first"),
        *middle,
        f"Finally, {content[-1]}.",
    ]


def _advice_body(task: Task, content: list[str], rng: Random) -> list[str]:
    lead = rng.choice(["You could", "I would", "Try this:"])
    if rng.random() < 0.5:
        return [f"{lead} {_join(content)}."]
    return [
        f"{lead} {content[0]}.",
        *[f"{rng.choice(['It may help to', 'You can also'])} {idea}." for idea in content[1:]],
    ]


def _note_body(task: Task, content: list[str], rng: Random) -> list[str]:
    purpose = content[0]
    own = {"thank": GIFTS, "sorry": MISHAPS, "invite": EVENTS}[purpose]
    detail = task.detail if task.detail in own else rng.choice(own)
    bodies = {
        "thank": (
            [f"thank you so much for the {detail}.", f"many thanks for the {detail}."],
            ["That was very kind of you.", "It made me very happy."],
        ),
        "sorry": (
            [f"I am sorry for {detail}.", f"please excuse me for {detail}."],
            ["It will not happen again.", "I feel bad about it."],
        ),
        "invite": (
            [f"I would like to invite you to {detail}.", f"please come to {detail} with us."],
            ["Please tell me if you can come.", "It would be so nice to see you."],
        ),
    }
    first, second = bodies[purpose]
    return [f"Dear {task.subject}, {rng.choice(first)}", rng.choice(second)]


def _kind_body(task: Task, content: list[str], rng: Random) -> list[str]:
    thing, kind = article(task.subject), article(content[0])
    return [rng.choice([f"{_capital(thing)} is {kind}.", f"I would say that {thing} is {kind}."])]


_BODIES = {
    "list": _list_body,
    "describe": _describe_body,
    "compare": _compare_body,
    "opposite": _opposite_body,
    "howto": _howto_body,
    "advice": _advice_body,
    "note": _note_body,
    "kind": _kind_body,
}


def _garble(text: str, rng: Random) -> str:
    """Mix up words as a weak language model does: repeat, drop and replace some."""
    words = text.split()
    foreign = write_answer(rng.choice(all_tasks()), frozenset(), rng).split()
    out: list[str] = []
    for word in words:
        draw = rng.random()
        if draw < 0.06:
            out += [word, word]
        elif draw < 0.12:
            out.append(rng.choice(foreign))
        elif draw > 0.06 + 0.88:
            continue
        else:
            out.append(word)
    return " ".join(out) if out else text


__all__ = ["FAULTS", "applicable", "write_answer"]
