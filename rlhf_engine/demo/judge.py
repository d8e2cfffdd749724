"""The judge of the demo: a rubric that gives an answer to a prompt up to 10 marks.

The judge is a program and not a model. Nothing is trained on it, and it does not use the labelers' preferences
(`make_data.py`), so a policy that exploits its reward model gains nothing here.
"""

import re
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

from rlhf_engine.demo.tasks import Task, find_task
from rlhf_engine.demo.world import ADVICE, CATEGORIES, EVENTS, FACTS, GIFTS, MISHAPS, PROCEDURES

WEIGHTS = {"correct": 4.0, "relevant": 1.0, "polite": 1.0, "closing": 1.5, "fresh": 1.0, "finished": 1.0, "length": 0.5}
"""Marks for each criterion; they add up to 10."""

_RUDE = re.compile(r"\b(silly|whatever|who cares|yourself|boring|stupid|i guess)\b")
_CLOSING = re.compile(r"(hope (this|that) helps|let me know|feel free|have a nice day|good luck|you are welcome)")
_SIGN_OFF = re.compile(r"(best wishes|kind regards|with love|yours)")
_OPENING = re.compile(r"^(sure|of course|certainly|good question)\b")
_LENGTH = (4, 45)


@dataclass(frozen=True)
class Verdict:
    """The judge's marks for one answer."""

    score: float
    """Marks out of 10."""
    marks: dict[str, float]
    """Criterion -> share of its marks, from 0 to 1."""


def judge(prompt: str, answer: str) -> Verdict:
    """Mark one answer: `score = sum_i weight_i * mark_i` over the criteria of `WEIGHTS`.

    Raises:
        ValueError: the prompt is not one of the demo's tasks.
    """
    task = find_task(prompt)
    lower = answer.lower().strip()
    sentences = [part.strip() for part in re.split(r"(?<=[.!?])\s+", lower) if part.strip()]
    words = re.findall(r"[a-z']+", lower)
    marks = {
        "correct": _CHECKS[task.kind](task, lower),
        "relevant": _relevance(task, sentences),
        "polite": 0.0 if _RUDE.search(lower) or not words else 1.0,
        "closing": _closing(task, sentences),
        "fresh": _freshness(sentences),
        "finished": float(bool(re.fullmatch(r"[A-Z].*[.!?]", answer.strip(), re.DOTALL))),
        "length": float(_LENGTH[0] <= len(words) <= _LENGTH[1]),
    }
    return Verdict(sum(WEIGHTS[name] * mark for name, mark in marks.items()), marks)


def score(prompt: str, answer: str) -> float:
    """Return `judge(prompt, answer).score`."""
    return judge(prompt, answer).score


def _has(text: str, phrase: str) -> bool:
    """Return whether `text` contains `phrase` as whole words."""
    return re.search(rf"\b{re.escape(phrase.lower())}\b", text) is not None


def _find(text: str, phrases: tuple[str, ...]) -> list[str]:
    """Return the phrases that `text` contains, in the order of their first positions."""
    places = {phrase: text.find(phrase.lower()) for phrase in phrases if _has(text, phrase)}
    return sorted(places, key=places.__getitem__)


@cache
def _all_pieces(kind: str) -> tuple[str, ...]:
    """Return every piece of content that an answer of this kind may contain, right or wrong for its prompt."""
    tables = {
        "list": [members for _, members in CATEGORIES.values()],
        "describe": list(FACTS.values()),
        "howto": list(PROCEDURES.values()),
        "advice": list(ADVICE.values()),
    }
    return tuple(dict.fromkeys(piece for members in tables[kind] for piece in members))


def _pieces_mark(task: Task, text: str) -> float:
    """Return right pieces over the number asked for; a wrong or surplus piece costs as much as a right one adds."""
    found = _find(text, _all_pieces(task.kind))
    right = [piece for piece in found if piece in task.truth]
    wanted = task.wanted or {"howto": 3}.get(task.kind, 2)
    surplus = max(0, len(right) - wanted) if task.wanted else 0
    if task.kind == "howto":
        order = [task.truth.index(piece) for piece in right]
        surplus += sum(later < earlier for earlier, later in pairwise(order))
    wrong = len(found) - len(right)
    return max(0.0, min(wanted, len(right)) - wrong - surplus) / wanted


def _check_describe(task: Task, text: str) -> float:
    # A fact counts only when the sentence is about the thing that was asked for.
    return _pieces_mark(task, text) if re.search(rf"\ban? {task.subject}\b", text) else 0.0


def _check_compare(task: Task, text: str) -> float:
    winner, loser = task.truth
    other = "smaller" if task.detail == "bigger" else "bigger"
    right = rf"an? {winner} is {task.detail} than an? {loser}\b|an? {loser} is {other} than an? {winner}\b"
    wrong = (
        rf"an? {loser} is {task.detail} than|an? {winner} is {other} than|the {loser} is the {task.detail} one"
        rf"|the {winner} is the {other} one"
    )
    return float(bool(re.search(right, text)) and not re.search(wrong, text))


def _check_opposite(task: Task, text: str) -> float:
    word, other = task.subject, task.truth[0]
    shapes = (
        rf"opposite of {word} is {other}\b",
        rf"\b{other} is the opposite of {word}\b",
        rf"is not {word}, it is {other}\b",
    )
    return float(any(re.search(shape, text) for shape in shapes))


def _check_kind(task: Task, text: str) -> float:
    stated = re.findall(rf"\ban? {task.subject} is an? ([a-z ]+)", text)
    return float(bool(stated) and all(kind.strip() == task.truth[0] for kind in stated))


def _check_note(task: Task, text: str) -> float:
    words = {"thank": r"\bthank", "sorry": r"\bsorry\b|\bexcuse me\b", "invite": r"\binvite\b|\bplease come\b"}
    others = [detail for detail in (*GIFTS, *MISHAPS, *EVENTS) if detail != task.detail]
    marks = [
        bool(re.match(rf"(\w+[.!] )?dear {task.subject},", text)),
        bool(re.search(words[task.truth[0]], text)),
        _has(text, task.detail) and not _find(text, tuple(others)),
    ]
    return sum(marks) / len(marks)


_CHECKS = {
    "list": _pieces_mark,
    "describe": _check_describe,
    "compare": _check_compare,
    "opposite": _check_opposite,
    "howto": _pieces_mark,
    "advice": _pieces_mark,
    "note": _check_note,
    "kind": _check_kind,
}


_NOTE_WORDS = "dear kind happy happen again feel bad tell come nice see"


@cache
def _subject_words(task: Task) -> frozenset[str]:
    """Return the words that make a sentence relevant to this task."""
    text = " ".join((task.subject, task.detail, *task.truth, _NOTE_WORDS if task.kind == "note" else ""))
    return frozenset(re.findall(r"[a-z]+", text.lower())) - {"a", "an", "the", "is", "was", "my", "i", "it", "in"}


def _relevance(task: Task, sentences: list[str]) -> float:
    """The share of sentences that open, close, or speak about the subject; 0 for an empty answer."""

    def is_relevant(sentence: str) -> bool:
        if _OPENING.match(sentence) or _CLOSING.search(sentence) or _SIGN_OFF.search(sentence):
            return True
        return bool(_subject_words(task) & set(re.findall(r"[a-z]+", sentence)))

    return sum(map(is_relevant, sentences)) / len(sentences) if sentences else 0.0


def _closing(task: Task, sentences: list[str]) -> float:
    """Return 1 if only the last sentence is a polite closing, 0.5 if there are more, 0 if the last sentence is none."""
    pattern = _SIGN_OFF if task.kind == "note" else _CLOSING
    if not sentences or not pattern.search(sentences[-1]):
        return 0.0
    return 1.0 if sum(bool(pattern.search(sentence)) for sentence in sentences) == 1 else 0.5


def _freshness(sentences: list[str]) -> float:
    """Return 0 if a sentence or two adjacent words are repeated, 0.5 if more than four runs of three words are, else 1."""
    spoken = [re.findall(r"[a-z']+", sentence) for sentence in sentences]
    if not any(spoken) or len(set(sentences)) < len(sentences):
        return 0.0
    if any(first == second for words in spoken for first, second in pairwise(words)):
        return 0.0
    triples = [triple for words in spoken for triple in zip(words, words[1:], words[2:], strict=False)]
    return 1.0 if len(triples) - len(set(triples)) <= 4 else 0.5
