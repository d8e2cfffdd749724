"""`rlhf bench` on the command line."""

import json

import pytest

from tests.engine.helpers.cli_run import rlhf

SIZES = ("--model", "llama-7m", "--tokens", "16", "--hidden", "16", "--vocab", "40", "--device", "cpu", "--quick")


def test_a_run_prints_its_report_and_two_of_them_are_compared(capsys, tmp_path):
    before, after = tmp_path / "before", tmp_path / "after"
    code, out, _ = rlhf(capsys, "bench", "loss", *SIZES, "--output", str(before))
    assert code == 0 and "| linear_ppo_loss, forward+backward | N=16 H=16 V=40 | cpu |" in out
    record = json.loads((before / "bench.json").read_text())
    record["limits"] = {"copy": [1.0], "product": [1.0]}
    after.mkdir()
    for folder, seconds in ((before, 1.0), (after, 2.0)):
        for number, case in enumerate(record["suites"]["loss"]["cases"]):
            case["samples"] = [seconds] * 2 if number == 1 else [1.0] * 2
        (folder / "bench.json").write_text(json.dumps(record))
    code, out, _ = rlhf(capsys, "bench", "compare", before / "bench.json", after / "bench.json")
    assert code == 1 and "+100.0%" in out and out.endswith("1 slower, 0 faster, 3 the same within the spread\n")
    code, out, _ = rlhf(capsys, "bench", "compare", after / "bench.json", before / "bench.json")
    assert code == 0 and "0 slower, 1 faster" in out


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["kernel"], "unknown suite 'kernel': did you mean 'kernels'? expected one of kernels, loss"),
        (
            ["--model", "qwen2.5-7"],
            "unknown model 'qwen2.5-7': did you mean 'qwen2.5-7b'? expected one of llama-7m, gpt2",
        ),
        (["--device", "gpu"], "unknown device 'gpu': did you mean 'cpu'? expected one of cpu, cuda"),
        (["--dtype", "fp32"], "unknown dtype 'fp32': did you mean 'float32'? expected one of float32, bfloat16"),
        (["--tokens", "1"], "--tokens: got 1, expected at least 2"),
        (["--quick", "--full"], "pass --quick or --full, not both"),
        (["compare", "here.json", "here.json"], "here.json: not a bench.json of this version"),
        (["compare", "none.json", "none.json"], "none.json"),
        (["--output", "here.json"], "--output: here.json is a file"),
    ],
)
def test_a_mistake_is_one_line(capsys, tmp_path, monkeypatch, arguments, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.json").write_text("{}")
    code, out, err = rlhf(capsys, "bench", *arguments)
    assert code == 2 and out == "" and err.count("\n") == 1 and expected in err
    assert [path.name for path in tmp_path.iterdir()] == ["here.json"]
