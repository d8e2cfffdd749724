"""All prompts of the demo, and what a right answer to each contains.

A task has the right content (in order where order matters), not the wording of an answer: `answers.py` words answers for the
data set, and `judge.py` reads answers that a model wrote.
"""

from dataclasses import dataclass
from functools import cache

from rlhf_engine.demo.world import (
    ADVICE,
    CATEGORIES,
    COUNTS,
    EVENTS,
    FACTS,
    GIFTS,
    MISHAPS,
    OPPOSITES,
    PEOPLE,
    PROCEDURES,
    SIZES,
    article,
)


@dataclass(frozen=True)
class Task:
    """A prompt with the facts that an answer needs."""

    prompt: str
    """Text of the prompt."""
    kind: str
    """list | describe | compare | opposite | howto | advice | note | kind."""
    subject: str
    """Subject of the prompt: a category, a thing, a procedure, a trouble, a person ..."""
    truth: tuple[str, ...]
    """The right pieces of content; in order for `howto`, the winner and the loser for `compare`."""
    wanted: int | None = None
    """Number of pieces that the prompt asks for; None if it does not state one."""
    detail: str = ""
    """compare: the adjective. note: the occasion. Empty for the other kinds."""


def _lists() -> list[Task]:
    shapes = [
        "Name {n} {c}.",
        "Can you name {n} {c}?",
        "Give me {n} {c}.",
        "Please list {n} {c}.",
        "What are {n} {c}?",
        "I need {n} {c}.",
        "Tell me {n} {c}.",
        "Write down {n} {c}.",
    ]
    return [
        Task(shape.format(n=word, c=plural), "list", kind, tuple(members), count)
        for kind, (plural, members) in CATEGORIES.items()
        for word, count in COUNTS.items()
        for shape in shapes
    ]


def _descriptions() -> list[Task]:
    free = [
        "What is {t}?",
        "Describe {t}.",
        "Tell me about {t}.",
        "Can you describe {t}?",
        "Explain what {t} is.",
        "I have never seen {t}. What is it?",
        "Please tell me what {t} is.",
    ]
    counted = [
        "Tell me {n} things about {t}.",
        "Give me {n} facts about {t}.",
        "What are {n} facts about {t}?",
        "Please say {n} things about {t}.",
    ]
    tasks = []
    for thing, facts in FACTS.items():
        noun = article(thing)
        tasks += [Task(shape.format(t=noun), "describe", thing, tuple(facts)) for shape in free]
        tasks += [
            Task(shape.format(n=word, t=noun), "describe", thing, tuple(facts), COUNTS[word])
            for shape in counted
            for word in ("two", "three", "four")
        ]
    return tasks


def _comparisons() -> list[Task]:
    shapes = ["Which is {adj}, {a} or {b}?", "Is {a} {adj} than {b}?", "What is {adj}, {a} or {b}?"]
    tasks = []
    for i, first in enumerate(SIZES):
        for j, second in enumerate(SIZES):
            if i == j:
                continue
            for adjective in ("bigger", "smaller"):
                winner, loser = (first, second) if (i > j) == (adjective == "bigger") else (second, first)
                # One wording for each pair, in turn: all three would drown the other kinds.
                prompt = shapes[len(tasks) % 3].format(adj=adjective, a=article(first), b=article(second))
                tasks.append(Task(prompt, "compare", winner, (winner, loser), None, adjective))
    return tasks


def _opposites() -> list[Task]:
    shapes = [
        "What is the opposite of {w}?",
        "Tell me the opposite of {w}.",
        "Which word means the opposite of {w}?",
        "I need the opposite of the word {w}.",
        "Please give me the opposite of {w}.",
    ]
    both = OPPOSITES + [(b, a) for a, b in OPPOSITES]
    return [Task(shape.format(w=word), "opposite", word, (other,)) for word, other in both for shape in shapes]


def _procedures() -> list[Task]:
    free = [
        "How do I {p}?",
        "How can I {p}?",
        "Please explain how to {p}.",
        "Tell me how to {p}.",
        "I want to {p}. How?",
        "What is the best way to {p}?",
        "Can you teach me how to {p}?",
    ]
    counted = ["How do I {p} in {n} steps?", "Explain in {n} steps how to {p}.", "Give me {n} steps to {p}."]
    tasks = []
    for name, steps in PROCEDURES.items():
        tasks += [Task(shape.format(p=name), "howto", name, tuple(steps)) for shape in free]
        tasks += [
            Task(shape.format(p=name, n=word), "howto", name, tuple(steps), COUNTS[word])
            for shape in counted
            for word in ("two", "three", "four")
        ]
    return tasks


def _advice() -> list[Task]:
    free = [
        "{p}. What should I do?",
        "{p}. Can you help me?",
        "{p}. What would you do?",
        "{p}. Any ideas?",
        "{p}. Please help.",
        "{p}. What can I try?",
    ]
    counted = ["{p}. Give me {n} ideas.", "{p}. What are {n} things that I can try?", "{p}. I need {n} tips."]
    tasks = []
    for trouble, ideas in ADVICE.items():
        tasks += [Task(shape.format(p=trouble), "advice", trouble, tuple(ideas)) for shape in free]
        tasks += [
            Task(shape.format(p=trouble, n=word), "advice", trouble, tuple(ideas), COUNTS[word])
            for shape in counted
            for word in ("two", "three", "four")
        ]
    return tasks


def _notes() -> list[Task]:
    occasions = [("thank", x, "Write a short note to thank my {who} for the {x}.") for x in GIFTS]
    occasions += [("thank", x, "Help me thank my {who} for the {x}.") for x in GIFTS]
    occasions += [("sorry", x, "Write a note to my {who} to say sorry for {x}.") for x in MISHAPS]
    occasions += [("invite", x, "Write a note to invite my {who} to {x}.") for x in EVENTS]
    occasions += [("invite", x, "Please invite my {who} to {x} in a short note.") for x in EVENTS]
    return [
        Task(shape.format(who=who, x=x), "note", who, (purpose,), None, x)
        for who in PEOPLE
        for purpose, x, shape in occasions
    ]


def _kinds() -> list[Task]:
    choices = ["Is {t} {a} or {b}?", "Would you call {t} {a} or {b}?", "Tell me if {t} is {a} or {b}."]
    names = list(CATEGORIES)
    tasks = []
    for number, (kind, (_, members)) in enumerate(CATEGORIES.items()):
        for offset, thing in enumerate(members):
            prompts = [f"What kind of thing is {article(thing)}?", f"What do you call things such as {article(thing)}?"]
            for step, shape in enumerate(choices):
                other = names[(number + 1 + (offset + 2 * step) % (len(names) - 1)) % len(names)]
                # The right kind comes first in half of the questions, so that its place is worth nothing.
                first, second = (kind, other) if (offset + step) % 2 else (other, kind)
                prompts.append(shape.format(t=article(thing), a=article(first), b=article(second)))
            tasks += [Task(prompt, "kind", thing, (kind,)) for prompt in prompts]
    return tasks


@cache
def all_tasks() -> tuple[Task, ...]:
    """Return all tasks in a fixed order; prompts are unique."""
    tasks = [
        *_lists(),
        *_descriptions(),
        *_comparisons(),
        *_opposites(),
        *_procedures(),
        *_advice(),
        *_notes(),
        *_kinds(),
    ]
    assert len({task.prompt for task in tasks}) == len(tasks)
    return tuple(tasks)


@cache
def tasks_by_prompt() -> dict[str, Task]:
    """Return the tasks by prompt."""
    return {task.prompt: task for task in all_tasks()}


def find_task(prompt: str) -> Task:
    """Return the task of a prompt.

    Raises:
        ValueError: no task has this prompt.
    """
    task = tasks_by_prompt().get(prompt.strip())
    if task is None:
        raise ValueError(f"prompt: got {prompt!r}, expected one of the {len(all_tasks())} prompts of the demo's world")
    return task
