"""`rlhf generate`: answers to the prompts of a file."""

import json

import pytest

from rlhf_engine.config import load_config
from rlhf_engine.data import PromptRecord
from rlhf_engine.recipes.generate import Answerer
from tests.engine.helpers.cli_run import new_model, new_run, read_lines, rlhf, write_lines


@pytest.fixture
def run(tmp_path, base):
    return new_run(tmp_path, base)


def generate(capsys, run, name, *arguments, sets=()):
    files = ("--prompts", run / "prompts.jsonl", "--output", run / name)
    return rlhf(capsys, "generate", "--config", run / "run.yaml", *files, *arguments, sets=sets)


def test_every_prompt_is_answered_in_order(run, capsys):
    code, shown, _ = generate(capsys, run, "a.jsonl", "--samples", 3)
    lines = read_lines(run / "a.jsonl")
    assert code == 0 and "10 prompts, 0 of them truncated on the left, 3 responses each" in shown
    assert [line["prompt"] for line in lines] == [f"q{i}" for i in range(10)]
    assert all(len(line["answers"]) == len(line["ended"]) == 3 for line in lines)
    assert len({tuple(line["answers"]) for line in lines}) > 5


def test_a_line_has_each_answers_stop_reason_and_logprobs(run, capsys):
    """With a stop string, the answers are those of a run without it, up to the string."""
    assert generate(capsys, run, "free.jsonl", "--samples", 4)[0] == 0
    free = read_lines(run / "free.jsonl")
    stop = next(text[1] for line in free for text in line["answers"] if len(text) > 2 and text[1] not in " \ufffd")
    settings = [f"rollout.stop=[{json.dumps(stop)}]"]
    assert generate(capsys, run, "a.jsonl", "--samples", 4, sets=settings)[0] == 0
    seen = set()
    for line, before in zip(read_lines(run / "a.jsonl"), free, strict=True):
        said = zip(line["answers"], line["ended"], line["stop_reason"], line["logprobs"], strict=True)
        for (text, ended, reason, logprobs), (whole, all_logprobs) in zip(
            said, zip(before["answers"], before["logprobs"], strict=True), strict=True
        ):
            assert text == whole.partition(stop)[0] and (reason == "stop_string") == (stop in whole)
            assert ended == (reason != "length") and logprobs == all_logprobs[: len(logprobs)]
            assert (
                1 <= len(logprobs) <= 6 and all(x < 0 for x in logprobs) and (reason != "length" or len(logprobs) == 6)
            )
            seen.add(reason)
    assert {"stop_string", "length"} <= seen


def test_a_stop_string_that_can_never_occur_is_refused(run, capsys):
    code, _, shown = generate(capsys, run, "a.jsonl", sets=["rollout.stop=['']"])
    assert code == 2 and "stop[0]: got an empty text" in shown and not (run / "a.jsonl").exists()


def test_answers_depend_on_the_seed_and_not_on_the_batch(run, capsys):
    assert generate(capsys, run, "a.jsonl", "--samples", 2)[0] == 0
    assert generate(capsys, run, "b.jsonl", "--samples", 2, sets=["rollout.batch_size=1"])[0] == 0
    assert generate(capsys, run, "c.jsonl", "--samples", 2, "--seed", 7)[0] == 0
    a, b, c = ((run / name).read_bytes() for name in ("a.jsonl", "b.jsonl", "c.jsonl"))
    assert a == b and a != c


def test_the_temperature_reaches_the_sampler(run, capsys):
    assert generate(capsys, run, "cold.jsonl", "--samples", 4, "--temperature", 1e-6)[0] == 0
    assert all(len(set(line["answers"])) == 1 for line in read_lines(run / "cold.jsonl"))


def test_a_split_may_be_chosen(run, capsys):
    assert generate(capsys, run, "a.jsonl", "--split", "test")[0] == 0
    assert [line["prompt"] for line in read_lines(run / "a.jsonl")] == ["q6", "q7", "q8", "q9"]
    code, _, shown = generate(capsys, run, "b.jsonl", "--split", "validation")
    assert code == 2 and "prompts.jsonl: got no prompts of split validation" in shown
    assert not (run / "b.jsonl").exists()


def test_an_unknown_split_is_refused_and_the_splits_are_named(run, capsys):
    code, _, shown = generate(capsys, run, "b.jsonl", "--split", "tset")
    assert code == 2 and "split: got 'tset', expected 'train', 'validation' or 'test'" in shown


def test_the_prompts_are_not_overwritten_by_the_answers(run, capsys, monkeypatch):
    before = (run / "prompts.jsonl").read_bytes()
    (run / "link.jsonl").symlink_to(run / "prompts.jsonl")
    monkeypatch.chdir(run)
    for name in ("prompts.jsonl", "link.jsonl"):
        code, _, shown = generate(capsys, run, name)
        assert code == 2 and f"output: got {run / name}, the file of prompts, expected a different file" in shown
    assert (run / "prompts.jsonl").read_bytes() == before


def test_an_output_that_is_a_folder_is_refused(run, capsys):
    code, _, shown = generate(capsys, run, "", "--samples", "100")
    assert code == 2 and f"output: got {run}, a folder, expected a file" in shown


def test_a_bad_line_leaves_the_existing_output(run, capsys):
    (run / "a.jsonl").write_text("before")
    write_lines(run / "prompts.jsonl", [{"prompt": "q", "user_id": "u"}] * 3 + [{"user_id": "u"}])
    code, _, shown = generate(capsys, run, "a.jsonl", "--overwrite", sets=["rollout.batch_size=1"])
    assert code == 2 and "prompts.jsonl:4: no field 'prompt'" in shown
    assert (run / "a.jsonl").read_text() == "before"
    assert not [path for path in run.iterdir() if path.name.startswith("a.jsonl.")]
    write_lines(run / "prompts.jsonl", [{"prompt": "q", "user_id": "u"}, {"prompt": "q" * 30, "user_id": "u"}])
    code, _, shown = generate(capsys, run, "a.jsonl", "--overwrite")
    assert code == 2 and "prompts.jsonl:2: prompt: got" in shown


def test_sequences_longer_than_the_positions_are_refused(run, capsys):
    code, _, shown = generate(capsys, run, "a.jsonl", sets=["rollout.max_prompt_tokens=123"])
    assert code == 2 and "max_prompt_tokens 123 and max_response_tokens 6, expected at most 128 together" in shown


def test_s20_a_prefix_precedes_every_prompt_and_a_stop_string_ends_the_answer(run, base):
    config = load_config(run / "run.yaml", ["rollout.max_prompt_tokens=40"])
    records = [PromptRecord("q1", "u"), PromptRecord("q2", "u")]
    few = Answerer(config, str(base), seed=1, prefix="q8\nyes\n\n")
    whole = Answerer(config, str(base), seed=1).answer(None, [PromptRecord("q8\nyes\n\nq1", "u")], 4)
    assert few.answer(None, records, 4)[0] == whole[0]
    first = next(text for text in whole[0].texts if len(text) > 2 and text[1] not in text[0] + "\ufffd")
    stopped = Answerer(config, str(base), seed=1, prefix="q8\nyes\n\n", stop=first[1]).answer(None, records, 4)[0]
    index = whole[0].texts.index(first)
    assert stopped.texts[index] == first[0] and stopped.ended[index]
    with pytest.raises(ValueError, match=r"prefix: got a text with \{prompt\} in it"):
        Answerer(config, str(base), seed=1, prefix="{prompt}")


def test_letters_outside_ascii_are_kept(run, capsys):
    write_lines(run / "prompts.jsonl", [{"prompt": "ü", "user_id": "u"}])
    assert generate(capsys, run, "a.jsonl")[0] == 0
    assert json.loads((run / "a.jsonl").read_text(encoding="utf-8"))["prompt"] == "ü"


# ---- interrupted calls ----


def interrupted(capsys, run, monkeypatch, chunk):
    """Call `generate` with chunks of 4 prompts, and interrupt it when it answers chunk number `chunk`."""
    calls, real = [], Answerer.answer

    def answer(self, *arguments):
        calls.append(1)
        if len(calls) == chunk:
            raise KeyboardInterrupt
        return real(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Answerer, "answer", answer)
        assert generate(capsys, run, "a.jsonl", "--samples", 2, sets=["rollout.batch_size=2"])[0] == 130


@pytest.mark.parametrize("chunk, kept", [(1, None), (2, 4), (3, 8)])
@pytest.mark.parametrize("torn", ["", '{"prompt": "q', '{"prompt": "q8", "answers": ["x"]}\n'])
def test_an_interrupted_call_is_continued_and_writes_the_same_file(run, capsys, monkeypatch, chunk, kept, torn):
    """A chunk has 4 prompts. Lines of an incomplete chunk are written again, and so is a line that a kill has cut."""
    assert generate(capsys, run, "whole.jsonl", "--samples", 2, sets=["rollout.batch_size=2"])[0] == 0
    interrupted(capsys, run, monkeypatch, chunk)
    partial = run / "a.jsonl.partial"
    assert partial.exists() == (kept is not None) and not (run / "a.jsonl").exists()
    if kept is not None:
        assert len(read_lines(partial)) == 1 + kept
        with partial.open("a") as file:
            file.write(torn)
    answered, real = [], Answerer.answer

    def answer(self, source, records, *more):
        answered.extend(record.prompt for record in records)
        return real(self, source, records, *more)

    monkeypatch.setattr(Answerer, "answer", answer)
    arguments = ("--samples", 2, "--resume")
    code, shown, _ = generate(capsys, run, "a.jsonl", *arguments, sets=["rollout.batch_size=2"])
    assert code == 0 and shown.startswith("10 prompts, 0 of them truncated")
    assert answered == [f"q{n}" for n in range(kept or 0, 10)]
    assert (run / "a.jsonl").read_bytes() == (run / "whole.jsonl").read_bytes()
    assert not [path.name for path in run.iterdir() if "partial" in path.name]


def test_a_chunk_with_a_damaged_line_is_answered_again(run, capsys, monkeypatch):
    """After a power cut, a line may have zeros in its middle."""
    assert generate(capsys, run, "whole.jsonl", "--samples", 2, sets=["rollout.batch_size=2"])[0] == 0
    interrupted(capsys, run, monkeypatch, 3)
    partial = run / "a.jsonl.partial"
    lines = partial.read_bytes().splitlines(keepends=True)
    lines[6] = lines[6][:9] + bytes(len(lines[6]) - 12) + lines[6][-3:]
    partial.write_bytes(b"".join(lines))
    assert generate(capsys, run, "a.jsonl", "--samples", 2, "--resume", sets=["rollout.batch_size=2"])[0] == 0
    assert (run / "a.jsonl").read_bytes() == (run / "whole.jsonl").read_bytes()


@pytest.mark.parametrize("left", [(), ("partial", "lock"), ("lock",)])
def test_a_resumed_call_leaves_a_complete_file(run, capsys, monkeypatch, left):
    """A process that is killed after it has written the file leaves the partial one, whose lines are the same, or its lock."""
    sets, arguments = ["rollout.batch_size=2"], ("--samples", 2, "--resume")
    assert generate(capsys, run, "a.jsonl", *arguments, sets=sets)[0] == 0
    before, partial = (run / "a.jsonl").read_bytes(), run / "a.jsonl.partial"
    if "partial" in left:
        partial.write_bytes(b'{"settings": {}}\n' + before)
    if "lock" in left:
        (run / "a.jsonl.partial.lock").write_text("1 on a machine")
    monkeypatch.setattr(Answerer, "answer", None)
    code, shown, err = generate(capsys, run, "a.jsonl", *arguments, sets=sets)
    assert code == 0 and shown.startswith("10 prompts, 0 of them truncated") and "is complete" in err
    assert (run / "a.jsonl").read_bytes() == before and not list(run.glob("*partial*"))


@pytest.mark.parametrize("lines", [["x"], [{"answers": []}] * 10, [{"answers": ["x", "y"]}] * 9])
def test_a_resumed_call_refuses_a_file_that_is_not_its_result(run, capsys, lines):
    write_lines(run / "a.jsonl", lines)
    code, _, shown = generate(capsys, run, "a.jsonl", "--samples", 2, "--resume")
    assert code == 2 and "a.jsonl exists; replace it with --overwrite" in shown
    write_lines(run / "a.jsonl", [{"answers": ["x", "y"]}] * 10)
    write_lines(run / "a.jsonl.partial", [{"settings": {}}, {"answers": ["x", "z"]}])
    code, _, shown = generate(capsys, run, "a.jsonl", "--samples", 2, "--resume")
    assert code == 2 and "a.jsonl exists; replace it with --overwrite" in shown and read_lines(run / "a.jsonl.partial")


@pytest.mark.parametrize("sets, key", [(["seed=1"], "seed"), (["rollout.temperature=0.5"], "rollout.temperature")])
def test_a_call_with_other_settings_continues_nothing(run, capsys, monkeypatch, sets, key):
    interrupted(capsys, run, monkeypatch, 3)
    sets = ["rollout.batch_size=2", *sets]
    code, _, shown = generate(capsys, run, "a.jsonl", "--samples", 2, "--resume", sets=sets)
    assert code == 2 and f"rlhf: {key}: got" in shown and "differs from that of" in shown
    assert not list(run.glob("*.lock"))
    assert generate(capsys, run, "a.jsonl", "--samples", 2, sets=sets)[0] == 0
    assert generate(capsys, run, "whole.jsonl", "--samples", 2, sets=sets)[0] == 0
    assert (run / "a.jsonl").read_bytes() == (run / "whole.jsonl").read_bytes()


def test_changed_prompts_and_weights_continue_nothing(run, capsys, monkeypatch, tmp_path_factory):
    interrupted(capsys, run, monkeypatch, 3)
    sets = ["rollout.batch_size=2", f"model.path={new_model(tmp_path_factory.mktemp('other'), seed=1)}"]
    code, _, shown = generate(capsys, run, "a.jsonl", "--samples", 2, "--resume", sets=sets)
    assert code == 2 and "rlhf: model.path: got" in shown
    lines = read_lines(run / "prompts.jsonl")
    write_lines(run / "prompts.jsonl", [*lines, lines[0]])
    code, _, shown = generate(capsys, run, "a.jsonl", "--samples", 2, "--resume", sets=sets[:1])
    assert code == 2 and "rlhf: prompts: got" in shown


@pytest.mark.parametrize("line", ["{\n", "[1]\n", '"text"\n', "my only copy", '{"samples": 1}\n'])
def test_a_partial_file_of_something_else_is_named_and_kept(run, capsys, line):
    partial = run / "a.jsonl.partial"
    partial.write_text(line)
    code, _, shown = generate(capsys, run, "a.jsonl")
    assert code == 2 and f"{partial}:1: not the settings of an interrupted call" in shown
    assert partial.read_text() == line and not list(run.glob("*.lock"))


@pytest.mark.parametrize("zeros", [b"", bytes(100)])
@pytest.mark.parametrize("size", [0, 5, 40])
def test_a_first_line_that_was_cut_off_is_dropped(run, capsys, monkeypatch, size, zeros):
    """After a power cut, a file may have zeros in the place of what was written."""
    interrupted(capsys, run, monkeypatch, 3)
    partial = run / "a.jsonl.partial"
    partial.write_bytes(partial.read_bytes()[:size] + zeros)
    assert generate(capsys, run, "a.jsonl")[0] == 0 and len(read_lines(run / "a.jsonl")) == 10
