"""`rlhf iterate`: rounds, the files that they write, and how they continue."""

import json
import shutil

import pytest

from rlhf_engine.config import RunConfig, flat_settings, load_config
from rlhf_engine.evaluate import RewardJudge, load_judge, rank
from rlhf_engine.recipes import iterate, run_rm
from rlhf_engine.recipes.generate import Answers
from rlhf_engine.recipes.iterate import READS, run_iterate
from rlhf_engine.recipes.steps import is_among
from tests.engine.helpers.cli_run import new_run, read_lines, rlhf, write_lines

JUDGE = "def judge(prompts, a, b):\n    return [len(x) for x in a], [len(x) for x in b]\n"


@pytest.fixture
def run(tmp_path, base, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "judge_by_length.py").write_text(JUDGE)
    return new_run(tmp_path, base)


def sets(*more, judge="judge_by_length.py:judge"):
    return [f"iterate.judge={judge}", "eval.judge=judge_by_length.py:judge", "iterate.prompts=4", *more]


def config_of(run, *more, **options):
    return load_config(run / "run.yaml", sets(*more, **options))


def test_s21_two_rounds_each_on_all_rankings_so_far(run, base, capsys):
    code, shown, _ = rlhf(capsys, "iterate", "--config", run / "run.yaml", sets=sets("iterate.rounds=2"))
    assert code == 0 and "| 2 | " in shown
    out = run / "out"
    state = json.loads((out / "state.json").read_text())
    names = ["generate", "rank", "rm", "ppo", "eval"]
    assert list(state["steps"]) == [f"round {number}: {name}" for number in (1, 2) for name in names]
    old = [line | {"ranking": [0, 1, 1, 2]} for line in read_lines(run / "comparisons.jsonl")]
    new = [read_lines(out / f"round_{number}" / "rankings.jsonl") for number in (1, 2)]
    assert read_lines(out / "round_1" / "comparisons.jsonl") == old + new[0]
    assert read_lines(out / "round_2" / "comparisons.jsonl") == old + new[0] + new[1]
    for line in new[0]:
        # The judge prefers the longer answer: more characters, lower rank.
        order = sorted(range(len(line["completions"])), key=lambda i: line["ranking"][i])
        lengths = [len(line["completions"][i]) for i in order]
        assert lengths == sorted(lengths, reverse=True) and len(set(line["completions"])) == len(line["completions"])
    # Six training prompts, four per round: the second round starts with the two unused ones.
    asked = [{line["prompt"] for line in rankings} for rankings in new]
    assert all(prompt in {f"q{i}" for i in range(6)} for prompt in asked[0] | asked[1]) and asked[0] != asked[1]
    for number in (1, 2):
        report = json.loads((out / f"round_{number}" / "eval" / "report.json").read_text())
        assert report["eval"]["candidate"] == str(out / f"round_{number}" / "ppo")
        assert report["eval"]["baseline"] == str(base)
        assert report["win_rate"] == state["steps"][f"round {number}: eval"]
    assert (out / "plots" / "iterate.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("start, begins", [("previous", "round_1/ppo"), ("sft", None)])
def test_s21_ppo_starts_from_the_previous_policy_or_from_sft(run, base, monkeypatch, start, begins):
    started, real = [], iterate.run_ppo

    def note(config, **options):
        started.append((config.model.path, config.seed))
        return real(config, **options)

    monkeypatch.setattr(iterate, "run_ppo", note)
    run_iterate(config_of(run, "iterate.rounds=2", f"iterate.start={start}"), lambda text: None)
    assert [path for path, _ in started] == [str(base), str(run / "out" / begins) if begins else str(base)]
    assert started[0][1] != started[1][1]


@pytest.fixture(scope="module")
def one_and_two_rounds(tmp_path_factory, base):
    """A folder with a run of two rounds in `whole` and a run of one round in `first`, which was written to `out`."""
    folder = tmp_path_factory.mktemp("rounds")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        (folder / "judge_by_length.py").write_text(JUDGE)
        run = new_run(folder, base)
        run_iterate(config_of(run, f"output_dir={run / 'whole'}", "iterate.rounds=2"), lambda text: None)
        run_iterate(config_of(run, "iterate.rounds=1"), lambda text: None)
        (run / "out").rename(run / "first")
    return run


@pytest.mark.parametrize("broken", ["run_rm", "run_ppo", "run_eval"])
def test_s21_an_interrupted_run_continues_at_the_failed_step(one_and_two_rounds, monkeypatch, broken):
    """It ends with the results of an uninterrupted run, and no step runs twice."""
    run = one_and_two_rounds
    monkeypatch.chdir(run)
    shutil.rmtree(run / "out", ignore_errors=True)
    shutil.copytree(run / "first", run / "out")

    def fail(*arguments, **options):
        raise OSError("the disk is full")

    config = config_of(run, "iterate.rounds=2")
    with monkeypatch.context() as patch:
        patch.setattr(iterate, broken, fail)
        with pytest.raises(OSError, match="disk"):
            run_iterate(config, lambda text: None)
    said = []
    found = run_iterate(config, said.append)
    names = ["generate", "rank", "rm", "ppo", "eval"]
    left = names[names.index(broken.removeprefix("run_")) :]
    assert said == [f"round 2: {name} ..." for name in left]
    states = [json.loads((run / name / "state.json").read_text())["steps"] for name in ("whole", "out")]
    assert states[0] == states[1] and len(found.win_rates) == 2
    said.clear()
    assert run_iterate(config, said.append) == found and said == []


def test_s21_identical_and_empty_answers_are_left_out_and_counted(run, monkeypatch):
    said = [["yes", "yes", "", "no"], ["no", "no", "no", ""], ["a", "b", "c", "b"]]

    def answers(answerer, source, records, samples):
        return zip(
            records,
            [Answers(texts, [True] * samples, ["eos"] * samples, [[]] * samples) for texts in said],
            strict=False,
        )

    with monkeypatch.context() as patch:
        patch.setattr(iterate, "answer_all", answers)
        run_iterate(config_of(run, judge="file"), lambda text: None)
    lines = read_lines(run / "out" / "round_1" / "completions.jsonl")
    assert [line["completions"] for line in lines] == [["yes", "no"], ["a", "b", "c"]]
    steps = json.loads((run / "out" / "state.json").read_text())["steps"]
    assert steps == {"round 1: generate": {"prompts": 2, "skipped": 1}}


def test_s21_ppo_continues_from_its_checkpoint(run, monkeypatch):
    real, calls = iterate.run_ppo, []

    def break_after(config, *, resume, overwrite):
        calls.append(resume)
        history = real(config, resume=resume, overwrite=overwrite)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return history

    monkeypatch.setattr(iterate, "run_ppo", break_after)
    with pytest.raises(KeyboardInterrupt):
        run_iterate(config_of(run, "iterate.rounds=1"), lambda text: None)
    run_iterate(config_of(run, "iterate.rounds=1"), lambda text: None)
    assert calls == [False, True]


def test_s21_it_waits_for_a_file_of_rankings(run, capsys):
    arguments = ("iterate", "--config", run / "run.yaml")
    options = sets("iterate.rounds=1", judge="file")
    code, shown, _ = rlhf(capsys, *arguments, sets=options)
    folder = run / "out" / "round_1"
    assert code == 0 and f"save it as {folder / 'rankings.jsonl'} and run this command again" in shown
    lines = read_lines(folder / "completions.jsonl")
    assert all(line["ranking"] is None for line in lines) and not (folder / "rm").exists()
    write_lines(folder / "rankings.jsonl", lines)
    code, _, shown = rlhf(capsys, *arguments, sets=options)
    assert code == 2 and "rankings.jsonl:1: no field 'ranking'" in shown and "(null: ranking)" in shown
    for line in lines:
        line["ranking"] = list(range(len(line["completions"])))
    foreign = {"prompt": "q0", "completions": ["x", "y"], "ranking": "A > B"}
    write_lines(folder / "rankings.jsonl", [*lines, foreign])
    code, _, shown = rlhf(capsys, *arguments, sets=options)
    assert code == 2 and f"rankings.jsonl:{len(lines) + 1}: got a prompt and completions that are not in" in shown
    write_lines(folder / "rankings.jsonl", lines)
    code, shown, _ = rlhf(capsys, *arguments, sets=options)
    assert code == 0 and "| 1 | " in shown
    assert read_lines(folder / "comparisons.jsonl")[6:] == lines


@pytest.mark.parametrize(
    "override, message",
    [
        ("iterate.judge=null", "iterate.judge is not set; give a judge"),
        ("eval.judge=file", "eval.judge: got 'file', expected a function or a reward model"),
        ("eval.candidate=x", "eval.candidate: got 'x', expected null: every round sets it"),
        ("reward.path=x", "reward.path: got 'x', expected null"),
        ("reward.function=x:y", "reward.function: got 'x:y', expected null"),
        ("iterate.completions=1", "completions: got 1, expected at least 2"),
        ("model.path=null", "model.path is not set"),
        ("data.prompts=null", "data.prompts is not set; give a file of prompts"),
        ("iterate.judge=judge_by_length.py:nothing", "judge: 'nothing' in judge_by_length.py is not defined"),
        ("rollout.temperature=0.0001", "no prompt got two different answers"),
    ],
)
def test_s21_mistakes_are_reported_in_one_line(run, capsys, override, message):
    code, _, shown = rlhf(capsys, "iterate", "--config", run / "run.yaml", sets=sets(override))
    assert code == 2 and message in shown and shown.count("\n") == 1


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["data.demonstrations=null"], "data.demonstrations is not set; give a file of demonstrations"),
        (["data.demonstrations=nowhere.jsonl"], "data.demonstrations: nowhere.jsonl: no such file"),
        (["data.comparisons=nowhere.jsonl"], "data.comparisons: nowhere.jsonl: no such file"),
        (["eval.split=validation"], "data.prompts: got no prompts of split validation in"),
        (["data.prompts=test_only.jsonl"], "data.prompts: got no prompts of split train in"),
        (["data.prompts=long.jsonl"], "long.jsonl:2: prompt: got"),
        (["ppo.ptx_coef=1"], "data.pretrain is not set; give a file of pretraining text"),
        (["ppo.ptx_coef=1", "data.pretrain=nowhere.txt"], "data.pretrain: nowhere.txt: no such file"),
        (["iterate.judge=nowhere"], "iterate.judge: nowhere: no such folder"),
        (["model.train_layers=3"], "model.train_layers: got 3, expected at most 2, the number of layers of"),
        (["ppo.reference=hydra"], "ppo.reference: got 'hydra' without model.train_layers, expected 'frozen_copy'"),
        (["eval.judge=nowhere"], "eval.judge: nowhere: no such folder"),
        (["eval.judge=judge_by_length.py:nothing"], "eval.judge: 'nothing' in judge_by_length.py is not defined"),
        (["eval.text=nowhere.txt"], "nowhere.txt: no such file"),
        (["eval.candidate_prefix=nowhere.txt"], "eval.candidate_prefix: nowhere.txt: "),
        (["eval.baseline_prefix=judge_by_length.py"], "prompts.jsonl:7: prompt: got"),
        (["ppo.objective=trpo"], "model.attention: got 'sdpa' with ppo.objective 'trpo', expected 'eager'"),
        (["rollout.max_prompt_tokens=122"], "expected at most 127 together, the positions of"),
        (["data.max_response_tokens=6"], "data.max_response_tokens: got 6, expected more than rollout."),
        (["data.comparisons=null", "iterate.prompts=1"], "iterate.prompts: got 1 of the training prompts of"),
        (["model.path=nowhere"], "model.path: nowhere: no such folder"),
    ],
)
def test_s21_unreadable_inputs_are_refused_before_anything_is_written(run, capsys, overrides, message):
    write_lines(run / "test_only.jsonl", [{"prompt": "q", "user_id": "u", "split": "test"}])
    prompts = ("q", "a prompt of too many tokens")
    lines = [{"prompt": text, "user_id": "u", "split": split} for split in ("train", "test") for text in prompts]
    write_lines(run / "long.jsonl", lines)
    code, _, shown = rlhf(capsys, "iterate", "--config", run / "run.yaml", sets=sets(*overrides))
    assert code == 2 and message in shown and shown.count("\n") == 1
    assert not (run / "out").exists()


def test_s21_settings_that_no_finished_step_has_read_may_change(run):
    """After PPO has diverged, or a judge has raised, the step is repeated with other settings; earlier results are kept."""
    diverging = ("iterate.rounds=1", "ppo.optim.lr=1", "ppo.optim.weight_decay=1e30", "ppo.updates=3")
    with pytest.raises(FloatingPointError, match="diverged"):
        run_iterate(config_of(run, *diverging), lambda text: None)
    with pytest.raises(ValueError, match=r"reward\.epochs: got 2, expected 1 .* whose step 'round 1: rm' has read it"):
        run_iterate(config_of(run, "reward.epochs=2"), lambda text: None)
    (run / "broken.py").write_text("def judge(prompts, a, b):\n    assert len(a) == 2, 'no idea'\n    return [1, 0]\n")
    said = []
    with pytest.raises(ValueError, match="no idea"):
        run_iterate(config_of(run, "iterate.rounds=1", "eval.judge=broken.py:judge"), said.append)
    assert [line for line in said if line.endswith("...")] == ["round 1: ppo ...", "round 1: eval ..."]
    said.clear()
    assert len(run_iterate(config_of(run, "iterate.rounds=1"), said.append).win_rates) == 1
    assert said == ["round 1: eval ..."]


def test_s21_ppo_with_other_settings_does_not_continue_from_its_checkpoint(run, monkeypatch):
    real, resumed = iterate.run_ppo, []

    def break_after(config, *, resume, overwrite):
        resumed.append(resume)
        real(config, resume=resume, overwrite=overwrite)
        raise KeyboardInterrupt

    monkeypatch.setattr(iterate, "run_ppo", break_after)
    said = []
    for rate in (1e-3, 1e-4, 1e-4):
        with pytest.raises(KeyboardInterrupt):
            run_iterate(config_of(run, "iterate.rounds=1", f"ppo.optim.lr={rate}"), said.append)
    assert resumed == [False, False, True]
    (begins,) = [line for line in said if "again" in line]
    assert begins.startswith("ppo begins again: ppo.optim.lr: got 0.0001, expected 0.001 to go on with the run of")


def test_s21_every_setting_is_declared_by_a_step_or_read_by_none():
    """If a step read a setting without declaring it, the setting could change after the step is finished."""
    unread = {
        key for key, _ in flat_settings(RunConfig().to_dict()) if not any(is_among(key, r) for r in READS.values())
    }
    nobodys = (
        "output_dir",
        "device",
        "iterate.rounds",
        "sft",
        "data.hygiene",
        "data.unknown_columns",
        "checkpoint",
        "tracking",
        "http",
        "distributed",
    )
    assert {key for key in unread if not is_among(key, nobodys)} == set()
    known = [key for key, _ in flat_settings(RunConfig().to_dict())]
    assert all(any(is_among(key, [name]) for key in known) for names in READS.values() for name in names)


def test_s21_other_settings_are_refused(run):
    run_iterate(config_of(run, "iterate.rounds=1"), lambda text: None)
    with pytest.raises(ValueError, match=r"ppo\.kl_coef: got 0\.5, expected 0\.02 to go on with the run of"):
        run_iterate(config_of(run, "ppo.kl_coef=0.5"), lambda text: None)
    (run / "out" / "state.json").unlink()
    with pytest.raises(ValueError, match="round_1: contains a round that"):
        run_iterate(config_of(run), lambda text: None)


def test_s21_a_reward_model_ranks_and_reads_every_completion_once(run):
    run_rm(load_config(run / "run.yaml"))
    judge = load_judge(str(run / "out" / "rm"), prompt_template="{prompt}\n")
    completions = [["yes", "no", "maybe so"], ["no", "I do not know"]]
    one_by_one = RewardJudge(judge.model, judge.codec).scores(["q"] * 3, completions[0])
    rows = []
    judge.model.trunk.register_forward_hook(
        lambda module, args, kwargs, out: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    ranks = rank(judge, ["q", "q"], completions)
    assert sum(rows) == 5
    assert [ranks[0][i] for i in one_by_one.argsort(descending=True).tolist()] == [0.0, 1.0, 2.0]
