"""`rlhf chat` and `rlhf check`: conversations, and what is reported about a machine and a config."""

import io
import json

import pytest
from rich.console import Console
from transformers import AutoTokenizer

from rlhf_engine.config import RunConfig, load_config
from rlhf_engine.recipes.chat import Chat, replies_view, run_chat, shown
from rlhf_engine.recipes.check import Finding, Report, findings_view, run_check
from tests.engine.helpers.cli_run import new_model, new_run, rlhf
from tests.engine.helpers.conversations import CHAT


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return the folder of a run with a model whose tokenizer has a chat template, and one without."""
    folder = tmp_path_factory.mktemp("chat")
    for name, seed in (("templated", 0), ("plain", 1)):
        new_model(folder / name, seed=seed)
    tokenizer = AutoTokenizer.from_pretrained(folder / "templated")
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder / "templated")
    return new_run(folder, folder / "templated")


@pytest.fixture
def settings(folder):
    return load_config(folder / "run.yaml", ["rollout.max_prompt_tokens=90"])


def console(width=80):
    return Console(file=io.StringIO(), width=width, color_system=None)


def test_each_model_sees_its_own_conversation(folder, settings):
    chat = Chat(settings, [str(folder / "templated"), str(folder / "plain")], None)
    assert chat.templated == [True, False]
    asked = []
    for answerer in chat.answerers:
        encode = answerer.encode
        answerer.encode = lambda record, encode=encode: (asked.append(record.prompt), encode(record))[1]
    first = chat.ask("hi")
    chat.ask("more")
    assert [len(one) for one in asked if not isinstance(one, str)] == [1, 3]
    assert asked[2][1].content == (first[0] or " ") and asked[3] == "more"
    with pytest.raises(ValueError, match=r"--system: the tokenizer of .*plain has no chat template"):
        Chat(settings, [str(folder / "plain")], "be kind")


def test_the_commands_of_a_conversation(folder, settings):
    chat, out = Chat(settings, [str(folder / "templated")], "be kind"), console()
    run_chat(chat, ["hi\n", "\n", "more\n", "/undo\n", "/what\n", "long " * 200, "/quit\n", "never\n"], out)
    assert [text for text, _ in chat.turns] == ["hi"]
    printed = out.file.getvalue()
    assert "max_prompt_tokens" in printed and printed.count("/undo removes the last turn") == 2
    run_chat(chat, ["/reset"], out)
    assert chat.turns == []


@pytest.mark.parametrize("width", [80, 160])
def test_two_responses_are_side_by_side_and_fit(width):
    out = console(width)
    out.print(replies_view(["runs/mine/sft", "runs/mine/ppo"], ["left " * 30, "right " * 30]))
    lines = out.file.getvalue().splitlines()
    assert all(len(line) <= width for line in lines)
    assert any("left" in line and "right" in line for line in lines)
    assert "runs/mine/sft" in lines[1] and "runs/mine/ppo" in lines[1]


def test_control_characters_are_not_sent_to_the_terminal():
    assert shown("a\x1b[2Jb\n\tc\r") == "a\ufffd[2Jb\n\tc\ufffd" and shown("") == "(empty)"


def test_a_good_config_has_no_error(folder, capsys):
    code, out, _ = rlhf(capsys, "check", "--config", folder / "run.yaml", "--json")
    report = json.loads(out)
    assert code == 0, report["findings"]
    about = {finding["about"]: finding for finding in report["findings"]}
    assert about["data.comparisons"]["what"].startswith("records 6") and about["memory"]["level"] == "ok"
    assert report["machine"]["build"]["torch"] and report["config"]["seed"] == 0
    assert {"op", "device", "dtypes", "auto", "because"} == report["machine"]["backends"][0].keys()


def test_every_mistake_is_reported_with_a_remedy(folder, capsys):
    (folder / "bad.jsonl").write_text('{"prompt": "p"}\n')
    sets = [
        f"data.demonstrations={folder / 'bad.jsonl'}",
        "model.path=nowhere",
        "device=cuda:7",
        "eval.judge=openai:http://localhost#",
        "memory.budget=2MB",
    ]
    report = run_check(lambda: load_config(folder / "run.yaml", sets))
    wrong = {finding.about: finding for finding in report.findings if finding.level == "error"}
    assert wrong.keys() >= {"data.demonstrations", "model.path", "device", "judge"} and not report.ok
    assert "bad.jsonl:1" in wrong["data.demonstrations"].what
    assert "nowhere" in wrong["model.path"].what and "save the model" in wrong["model.path"].remedy
    code, out, _ = rlhf(capsys, "check", "--config", folder / "run.yaml", sets=["memory.budget=2MB"])
    assert code == 1 and "more than" in out and "-> rlhf plan finds settings that fit" in out
    code, out, _ = rlhf(capsys, "check", sets=["ppo.kl_coeff=1"])
    assert code == 1 and "unknown key 'ppo.kl_coeff'" in " ".join(out.split())


@pytest.mark.parametrize("width", [80, 160])
def test_the_table_of_findings_fits(width):
    out = console(width)
    findings = [Finding("ok", "torch", "version 2.13"), Finding("error", "data.demonstrations", "x " * 120, "y " * 60)]
    out.print(findings_view(Report(findings, {}, RunConfig().to_dict())))
    lines = out.file.getvalue().splitlines()
    assert all(len(line) <= width for line in lines)
    assert lines[0].startswith("error") and lines[-1].startswith("ok") and any("-> y y" in line for line in lines)
