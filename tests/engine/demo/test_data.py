"""The demo's data set and judge: the script writes the shipped files, and the judge's marks follow its rubric."""

import json
from collections import Counter
from importlib.resources import files
from random import Random

import pytest

from rlhf_engine.data import parse_ranking, read_comparisons, read_demonstrations, read_prompts
from rlhf_engine.demo.answers import FAULTS, applicable, write_answer
from rlhf_engine.demo.judge import WEIGHTS, judge
from rlhf_engine.demo.make_data import write_data
from rlhf_engine.demo.tasks import all_tasks, find_task
from rlhf_engine.model.pretrained import load_tokenizer

DATA = files("rlhf_engine.demo") / "data"
NAMES = ("demonstrations.jsonl", "comparisons.jsonl", "prompts.jsonl", "pretrain.txt")


def test_the_script_writes_the_shipped_files(tmp_path):
    write_data(tmp_path)
    for name in NAMES:
        assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes(), name


def test_the_data_set_is_small():
    assert sum(len((DATA / name).read_bytes()) for name in NAMES) < 5_000_000


def test_held_out_users_and_their_prompts_are_not_in_the_training_data():
    records = list(read_prompts(DATA / "prompts.jsonl"))
    users = {split: {r.user_id for r in records if r.split == split} for split in ("train", "validation", "test")}
    assert (
        not users["train"] & users["test"] | users["train"] & users["validation"] | users["validation"] & users["test"]
    )
    held_out = {r.prompt for r in records if r.split != "train"}
    assert sum(r.split == "test" for r in records) >= 200
    assert not held_out & {r.prompt for r in read_demonstrations(DATA / "demonstrations.jsonl")}
    assert not held_out & {r.prompt for r in read_comparisons(DATA / "comparisons.jsonl")}
    pages = (DATA / "pretrain.txt").read_text(encoding="utf-8").split("\n\n")
    assert not held_out & {page.split("\n")[0] for page in pages}


def test_the_base_model_has_read_the_words_of_the_demonstrations():
    """Embeddings are frozen under adapters, so a token that is only in the demonstrations would keep a random one."""
    tokenizer = load_tokenizer(DATA / "base")
    pages = (DATA / "pretrain.txt").read_text(encoding="utf-8").split("\n\n")
    read = {token for page in pages for token in tokenizer(page)["input_ids"]}
    texts = [f"{r.prompt}\n{r.response}" for r in read_demonstrations(DATA / "demonstrations.jsonl")]
    given = Counter(token for text in texts for token in tokenizer(text)["input_ids"])
    assert sum(count for token, count in given.items() if token not in read) < 0.003 * given.total()


def test_rankings_have_four_to_nine_completions_and_some_ties():
    sizes, ties = Counter(), 0
    for line in (DATA / "comparisons.jsonl").read_text(encoding="utf-8").splitlines():
        given = json.loads(line)
        ranks = parse_ranking(given["ranking"], len(given["completions"]))
        sizes[len(ranks)] += 1
        ties += len(set(ranks)) < len(ranks)
    assert set(sizes) == {4, 5, 6, 7, 8, 9}
    assert ties > 100


def test_labelers_agree_with_the_judge_often_but_not_always():
    agreed = pairs = 0
    for record in read_comparisons(DATA / "comparisons.jsonl"):
        marks = [judge(record.prompt, text).score for text in record.completions]
        for better, worse in record.pairs():
            pairs += 1
            agreed += (marks[better] > marks[worse]) + 0.5 * (marks[better] == marks[worse])
    assert 0.8 < agreed / pairs < 0.93


def test_a_minority_of_demonstrations_has_full_marks():
    marks = [judge(r.prompt, r.response).score for r in read_demonstrations(DATA / "demonstrations.jsonl")]
    assert 0.15 < sum(mark == 10 for mark in marks) / len(marks) < 0.4


def test_faultless_answers_get_full_marks():
    rng = Random(0)
    for task in rng.sample(all_tasks(), 600):
        answer = write_answer(task, frozenset(), rng)
        assert judge(task.prompt, answer).score == sum(WEIGHTS.values()) == 10, (task.prompt, answer)


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_costs_marks(fault):
    rng, marks = Random(1), []
    for task in rng.sample(all_tasks(), 400):
        faults = applicable(task, {fault})
        if fault in faults:
            marks.append(judge(task.prompt, write_answer(task, faults, rng)).score)
    assert sum(marks) / len(marks) < 9.75


@pytest.mark.parametrize(
    "prompt, answer, criterion, mark",
    [
        ("Give me two birds.", "You could take an owl and a swan. I hope this helps.", "correct", 1),
        ("Give me two birds.", "You could take an owl.", "correct", 0.5),
        ("Give me two birds.", "You could take an owl, a swan and a duck.", "correct", 0.5),
        ("Give me two birds.", "You could take an owl and a saw.", "correct", 0),
        ("Give me two birds.", "owl owl", "fresh", 0),
        ("Give me two birds.", "You could take an owl and a swan. What a silly question.", "polite", 0),
        ("Give me two birds.", "You could take an owl and a", "finished", 0),
        ("Give me two birds.", "Have a nice day!", "closing", 1),
        ("Give me two birds.", "Have a nice day! I hope this helps.", "closing", 0.5),
        ("Give me two birds.", "You could take an owl. It was raining.", "relevant", 0.5),
        ("Give me two birds.", "Birds.", "length", 0),
        ("What kind of thing is a cow?", "I would say that a cow is an animal.", "correct", 1),
        ("What kind of thing is a cow?", "A cow is a tool.", "correct", 0),
        ("What kind of thing is a cow?", "A cat is an animal.", "correct", 0),
        ("What kind of thing is a cow?", "A cow is an animal. A cow is a bird.", "correct", 0),
        ("What is the opposite of hot?", "Cold is the opposite of hot.", "correct", 1),
        ("What is the opposite of hot?", "The opposite of hot is hot.", "correct", 0),
        ("How do I make tea in two steps?", "First, wait for three minutes. Then, boil the water.", "correct", 0.5),
        ("Give me two facts about a cow.", "A cat lives on a farm. It gives milk.", "correct", 0),
        ("Help me thank my aunt for the cake.", "Dear aunt, thank you for the lamp. Kind regards.", "correct", 2 / 3),
    ],
)
def test_marks_by_hand(prompt, answer, criterion, mark):
    assert judge(prompt, answer).marks[criterion] == pytest.approx(mark)


@pytest.mark.parametrize("adjective, right", [("bigger", "horse"), ("smaller", "mouse")])
def test_comparisons_may_be_answered_in_both_directions(adjective, right):
    prompt = next(
        t.prompt
        for t in all_tasks()
        if t.kind == "compare" and set(t.truth) == {"horse", "mouse"} and t.detail == adjective
    )
    assert find_task(prompt).subject == right
    assert judge(prompt, "A horse is bigger than a mouse.").marks["correct"] == 1
    assert judge(prompt, "A mouse is smaller than a horse.").marks["correct"] == 1
    assert judge(prompt, "A mouse is bigger than a horse.").marks["correct"] == 0
    assert judge(prompt, "A horse is bigger than a mouse. The horse is the smaller one.").marks["correct"] == 0


@pytest.mark.parametrize("answer", ["", "   ", "?", "\n"])
def test_an_empty_answer_gets_no_marks(answer):
    verdict = judge("Give me two birds.", answer)
    assert verdict.score == 0


def test_an_unknown_prompt_is_refused():
    with pytest.raises(ValueError, match="prompt: got 'Who are you\\?'"):
        judge("Who are you?", "Me.")
