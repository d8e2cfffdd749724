"""`rlhf eval`: two models, one judge, a win rate."""

import json
import math
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf_engine.config import load_config
from rlhf_engine.evaluate import read_preferences, write_pairs
from rlhf_engine.model.pretrained import load_tokenizer
from rlhf_engine.model.reward_model import RewardModel
from rlhf_engine.recipes import evaluate as contest
from rlhf_engine.recipes.evaluate import ask_both
from tests.engine.helpers.cli_run import new_model, new_run, read_lines, rlhf, write_lines


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two policies and a smaller reward model."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("a", "b")):
        new_model(folder / name, seed)
    new_model(folder / "small", 2, hidden_size=16, num_hidden_layers=1, head_dim=4)
    RewardModel.from_causal_lm(AutoModelForCausalLM.from_pretrained(folder / "small"), 3).save(folder / "rm")
    load_tokenizer(folder / "small").save_pretrained(folder / "rm")
    return folder


@pytest.fixture
def run(tmp_path, models, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return new_run(tmp_path, models / "a")


def sets(models, judge, *more):
    return [f"eval.candidate={models / 'a'}", f"eval.baseline={models / 'b'}", f"eval.judge={judge}", *more]


def evaluate(capsys, run, models, judge, *more, flags=()):
    return rlhf(capsys, "eval", "--config", run / "run.yaml", *flags, sets=sets(models, judge, *more))


def write_judge(run, name, body):
    """Write a module to the working directory, where a user's judge would be; return the judge's name."""
    (run / f"{name}.py").write_text(f"def judge(prompts, a, b):\n    {body}\n")
    return f"{name}.py:judge"


def test_s20_win_rate_under_a_function(run, models, capsys):
    judge = write_judge(run, "judge_length", "return [len(x) for x in a], [len(x) for x in b]")
    (run / "text.txt").write_text("yes no maybe\n\nI do not know\n")
    code, shown, _ = evaluate(capsys, run, models, judge, "eval.samples=3", f"eval.text={run / 'text.txt'}")
    assert code == 0 and "| candidate | " in shown
    report = json.loads((run / "out" / "eval" / "report.json").read_text())
    lines = read_lines(run / "out" / "eval" / "answers.jsonl")
    assert [line["prompt"] for line in lines] == ["q6", "q7", "q8", "q9"]
    points = [
        (len(x) > len(y)) + 0.5 * (len(x) == len(y))
        for line in lines
        for x, y in zip(line["candidate"], line["baseline"], strict=True)
    ]
    assert len(points) == 12 and report["win_rate"]["rate"] == pytest.approx(sum(points) / 12)
    assert 0 < report["win_rate"]["rate"] < 1
    assert report["win_rate"]["low"] <= report["win_rate"]["rate"] <= report["win_rate"]["high"]
    assert report["perplexity"]["candidate"] != report["perplexity"]["baseline"]
    assert (run / "out" / "eval" / "report.md").read_text().strip() in shown
    assert (run / "out" / "eval" / "win_rate.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("batch, sizes", [(3, [3, 3, 2]), (64, [8])])
def test_s20_a_function_gets_batches_of_pairs(run, models, capsys, batch, sizes):
    judge = write_judge(run, "judge_sizes", "open('sizes', 'a').write(f'{len(a)} '); return [0.5] * len(a)")
    assert evaluate(capsys, run, models, judge, "eval.samples=2", f"eval.judge_batch={batch}")[0] == 0
    assert list(map(int, (run / "sizes").read_text().split())) == sizes


@torch.no_grad()
def test_s20_perplexity_is_that_of_the_text(run, models):
    (run / "text.txt").write_text("yes no maybe\n\n\n\nI do not know\n")
    found = ask_both(
        load_config(run / "run.yaml", sets(models, "x:y", f"eval.text={run / 'text.txt'}", "eval.limit=1"))
    )
    model, tokenizer = AutoModelForCausalLM.from_pretrained(models / "a"), load_tokenizer(models / "a")
    nll, count = 0.0, 0
    for document in ("yes no maybe", "I do not know"):
        ids = torch.tensor([tokenizer(document)["input_ids"] + [0]])
        nll += float(torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="sum"))
        count += ids.shape[1] - 1
    assert found.perplexity["candidate"] == pytest.approx(math.exp(nll / count), rel=1e-4)
    assert len(found.prompts) == 1


def test_s22_a_smaller_reward_model_judges(run, models, capsys):
    assert evaluate(capsys, run, models, models / "rm")[0] == 0
    report = json.loads((run / "out" / "eval" / "report.json").read_text())
    again = rlhf(
        capsys,
        "eval",
        *("--config", run / "run.yaml", "--overwrite"),
        sets=[f"eval.candidate={models / 'b'}", f"eval.baseline={models / 'a'}", f"eval.judge={models / 'rm'}"],
    )
    assert again[0] == 0 and report["win_rate"]["prompts"] == 4 and report["perplexity"] is None


def test_s20_a_model_compared_with_itself_samples_different_answers(run, models):
    overrides = [f"eval.candidate={models / 'a'}", f"eval.baseline={models / 'a'}"]
    found = ask_both(load_config(run / "run.yaml", overrides))
    assert found.answers["candidate"] != found.answers["baseline"]


def test_s20_prompts_and_answers_hold_any_character(tmp_path):
    """Unicode has line separators that JSON does not escape, and some editors write a byte order mark."""
    prompt, first, second = "one\u2028two", "a\x85b", "c\u2029d"
    sampled = contest.SampledResponses([prompt], {"candidate": [[first]], "baseline": [[second]]}, {}, None, {})
    config = load_config(None)
    contest._write_sampled(tmp_path, config, sampled)
    assert contest._read_sampled(config, tmp_path) == sampled
    write_pairs(tmp_path / "pairs.jsonl", sampled.pairs(), 0)
    line = (tmp_path / "pairs.jsonl").read_text(encoding="utf-8").replace("null", '"A"')
    (tmp_path / "judged.jsonl").write_text(line, encoding="utf-8-sig")
    expected = [float(json.loads(line)["A"] == first)]
    assert read_preferences(tmp_path / "judged.jsonl", sampled.pairs(), 0).tolist() == expected


def test_s20_people_judge_through_a_file(run, models, capsys):
    code, shown, _ = evaluate(capsys, run, models, "file", "eval.samples=2")
    folder = run / "out" / "judging"
    assert code == 0 and f"8 pairs to judge in {folder / 'pairs.jsonl'}" in shown
    assert not (folder / "report.json").exists()
    before = (folder / "pairs.jsonl").read_bytes()
    assert evaluate(capsys, run, models, "file", "eval.samples=2")[1] == shown
    assert (folder / "pairs.jsonl").read_bytes() == before
    # This judge prefers the candidate's answers to the first three prompts and the baseline's to the fourth.
    lines, sampled = read_lines(folder / "pairs.jsonl"), read_lines(folder / "answers.jsonl")
    for line in lines:
        candidate = sampled[line["id"] // 2]["candidate"][line["id"] % 2]
        likes_a = (line["A"] == candidate) == (line["id"] < 6)
        line["preference"] = "tie" if line["A"] == line["B"] else "A" if likes_a else "B"
    write_lines(folder / "judged.jsonl", lines)
    code, shown, _ = evaluate(capsys, run, models, "file", "eval.samples=2")
    report = json.loads((folder / "report.json").read_text())
    ties = sum(line["preference"] == "tie" for line in lines)
    assert code == 0 and ties <= 2
    expected = sum(0.5 if line["preference"] == "tie" else line["id"] < 6 for line in lines) / 8
    assert report["win_rate"]["rate"] == pytest.approx(expected)
    code, _, shown = evaluate(capsys, run, models, "file", "eval.samples=1")
    assert code == 2 and "its answers were sampled with eval" in shown
    code, _, shown = evaluate(capsys, run, models, "file", "eval.samples=2", "data.prompt_template=Say {prompt}")
    assert code == 2 and "its answers were sampled with prompt_template" in shown
    assert (folder / "judged.jsonl").exists()


def test_judgements_of_other_prompts_are_not_those_of_today(run, models, capsys):
    folder = run / "out" / "judging"
    assert evaluate(capsys, run, models, "file")[0] == 0
    before = (folder / "pairs.jsonl").read_bytes()
    with (run / "prompts.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "qx", "user_id": "u9", "split": "test"}) + "\n")
    code, _, shown = evaluate(capsys, run, models, "file")
    assert code == 2 and f"{folder}: its answers are of other weights or prompts than those of today" in shown
    assert (folder / "pairs.jsonl").read_bytes() == before
    code, shown, _ = evaluate(capsys, run, models, "file", flags=["--overwrite"])
    assert code == 0 and "5 pairs to judge" in shown and (folder / "pairs.jsonl").read_bytes() != before
    (folder / "judged.jsonl").write_bytes((folder / "pairs.jsonl").read_bytes())
    code, _, shown = evaluate(capsys, run, models, "file", flags=["--overwrite"])
    assert code == 2 and f"{folder / 'judged.jsonl'}: --overwrite would delete these judgements" in shown
    assert (folder / "judged.jsonl").exists()


@pytest.mark.parametrize(
    "body, message",
    [
        ("raise KeyError('no idea')", "sample 0: it raised KeyError: 'no idea'"),
        (
            "return [float('nan') if i == 2 else 1 for i in range(len(a))]",
            "sample 2: got nan, expected a finite number",
        ),
    ],
)
def test_s20_a_judge_that_fails_leaves_the_earlier_result(run, models, capsys, body, message):
    (run / "out" / "eval").mkdir(parents=True)
    (run / "out" / "eval" / "report.json").write_text("before")
    judge = write_judge(run, "judge_broken", body)
    code, _, shown = evaluate(capsys, run, models, judge, flags=("--overwrite",))
    assert code == 2 and shown.startswith(f"rlhf: judge {judge}: {message}") and shown.count("\n") == 1
    assert ("; prompt: 'q" in shown) == ("KeyError" in message)
    assert sorted(path.name for path in (run / "out").iterdir()) == ["eval", "unjudged"]
    assert (run / "out" / "eval" / "report.json").read_text() == "before"


def test_s20_after_a_judge_has_failed_the_same_answers_are_judged_again(run, models, capsys, monkeypatch):
    asked, real = [], contest.ask_both
    monkeypatch.setattr(contest, "ask_both", lambda config: asked.append(1) or real(config))
    broken, good = (
        write_judge(run, "judge_broken", "raise KeyError('no idea')"),
        write_judge(run, "judge_a", "return [1] * len(a)"),
    )
    shutil.copytree(models / "a", run / "a")
    more = [f"eval.candidate={run / 'a'}", "eval.samples=2"]
    assert evaluate(capsys, run, models, broken, *more)[0] == 2
    sampled = (run / "out" / "unjudged" / "answers.jsonl").read_bytes()
    assert evaluate(capsys, run, models, broken, *more, "eval.margin=1")[0] == 2 and len(asked) == 1
    assert evaluate(capsys, run, models, good, *more)[0] == 0 and len(asked) == 1
    assert (run / "out" / "eval" / "answers.jsonl").read_bytes() == sampled
    assert [path.name for path in (run / "out").iterdir()] == ["eval"]
    # After a change of settings or of a model, new answers are sampled.
    over = {"flags": ("--overwrite",)}
    assert evaluate(capsys, run, models, broken, *more, **over)[0] == 2 and len(asked) == 2
    assert evaluate(capsys, run, models, broken, *more, "eval.samples=1", **over)[0] == 2 and len(asked) == 3
    new_model(run / "a", 5)
    assert evaluate(capsys, run, models, good, *more, "eval.samples=1", **over)[0] == 0 and len(asked) == 4


@pytest.mark.parametrize(
    "override, message",
    [
        ("eval.judge=null", "eval.judge is not set; give a judge"),
        ("eval.candidate=null", "eval.candidate is not set; give the folder of a model"),
        ("eval.baseline=nowhere", "eval.baseline: nowhere: no such folder"),
        ("eval.judge=nowhere", "judge: nowhere: no such folder"),
        ("eval.split=validation", "data.prompts: got no prompts of split validation"),
        ("eval.text=nowhere", "eval.text: nowhere: no such file"),
        ("eval.candidate_prefix=nowhere", "eval.candidate_prefix: nowhere: "),
        ("data.prompts=null", "data.prompts is not set; give a file of prompts"),
        ("rollout.max_prompt_tokens=1", "prompts.jsonl:7: prompt: got"),
    ],
)
def test_s20_mistakes_are_reported_in_one_line(run, models, capsys, override, message):
    code, _, shown = evaluate(capsys, run, models, models / "rm", override)
    assert code == 2 and message in shown and shown.count("\n") == 1
    assert not (run / "out").exists()


def test_s20_a_prefix_changes_only_the_answers_of_its_model(run, models):
    (run / "shots.txt").write_text("q1\nyes\n\n")
    overrides = sets(models, "x:y", "rollout.max_prompt_tokens=40", "eval.samples=4")
    plain = ask_both(load_config(run / "run.yaml", overrides))
    shot = ask_both(load_config(run / "run.yaml", [*overrides, f"eval.candidate_prefix={run / 'shots.txt'}"]))
    assert plain.answers["baseline"] == shot.answers["baseline"]
    assert plain.answers["candidate"] != shot.answers["candidate"]


def test_s20_an_incomplete_model_folder_is_named(run, models, capsys):
    shutil.copytree(models / "b", run / "torn")
    (run / "torn" / "model.safetensors").unlink()
    code, _, shown = evaluate(capsys, run, models, models / "rm", f"eval.baseline={run / 'torn'}")
    assert code == 2 and "eval.baseline: " in shown and "model.safetensors is missing" in shown
