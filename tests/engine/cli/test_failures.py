"""The line and the exit code of an exception that ends a command, and `--traceback`."""

import pytest
import torch

from rlhf_engine.errors import described, foreign_errors
from tests.engine.helpers.cli_run import new_model, new_run, rlhf


@pytest.fixture
def failing(tmp_path, monkeypatch):
    """Return a function that lets `rlhf sft` raise what it is given."""
    (tmp_path / "run.yaml").write_text("output_dir: out\n")

    def fail(raising):
        monkeypatch.setattr("rlhf_engine.recipes.run_sft", lambda config, **options: raising())
        return "sft", "--config", tmp_path / "run.yaml"

    return fail


def of_torch():
    torch.ones(2) @ torch.ones(3)


def of_memory():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ...")


def diverged():
    raise FloatingPointError("training diverged: got a gradient norm of inf")


def of_us():
    raise KeyError("left out")


def of_a_user():
    raise ValueError("a.jsonl:3: first\n  second")


def of_a_package():
    raise ModuleNotFoundError("No module named 'flash_attn'", name="flash_attn.ops")


@pytest.mark.parametrize(
    "raising, code, line",
    [
        (of_torch, 1, "an error in rlhf itself: RuntimeError: "),  # an operator of torch has no frame in torch
        (
            of_memory,
            1,
            "out of memory: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...; lower rollout.batch",
        ),
        (diverged, 1, "training diverged: got a gradient norm of inf\n"),
        (of_us, 1, "an error in rlhf itself: KeyError: 'left out'; --traceback shows where it was raised\n"),
        (of_a_user, 2, "a.jsonl:3: first second\n"),
        (of_a_package, 2, "the Python package flash_attn.ops is not installed, and these settings need it\n"),
    ],
)
def test_every_exception_is_one_line(failing, capsys, raising, code, line):
    found, _, err = rlhf(capsys, *failing(raising))
    assert found == code and err.startswith(f"rlhf: {line}") and err.count("\n") == 1, err


def test_the_library_that_raised_is_named(failing, capsys):
    def of_transformers():
        from transformers import AutoConfig

        AutoConfig.for_model("nonsense")

    code, _, err = rlhf(capsys, *failing(of_transformers))
    assert code == 2 and err.startswith(
        "rlhf: an error in transformers: ValueError: Unrecognized model identifier: nonsense"
    )


@pytest.mark.parametrize("place", ["before", "after"])
def test_the_traceback_has_the_original_exception(tmp_path, capsys, place):
    run = new_run(tmp_path, new_model(tmp_path / "base"))
    (tmp_path / "base" / "tokenizer.json").write_text("{")
    arguments = ("sft", "--config", run / "run.yaml")
    found = rlhf(capsys, *(("--traceback", *arguments) if place == "before" else (*arguments, "--traceback")))
    code, _, err = found
    assert code == 2 and err.startswith("Traceback (most recent call last):") and "in load_tokenizer" in err
    *above, last = err.splitlines()
    assert last.startswith("rlhf: model.path: ") and "its tokenizer does not load" in last
    assert sum(line.startswith("Traceback") for line in above) >= 3
    assert "Traceback" not in rlhf(capsys, *arguments)[2]


def test_a_library_in_rust_that_panics_is_an_error_of_one_line():
    class PanicException(BaseException):
        pass

    PanicException.__module__ = "pyo3_runtime"
    message = "base: its tokenizer does not load: PanicException: called"
    with pytest.raises(ValueError, match=message), foreign_errors("base: its tokenizer does not load"):
        raise PanicException("called `Option::unwrap()` on a `None` value\nnote: run with RUST_BACKTRACE=1")


def test_interrupts_and_a_lack_of_memory_pass_the_boundary():
    for kind in (KeyboardInterrupt, SystemExit, MemoryError, torch.OutOfMemoryError):
        with pytest.raises(kind), foreign_errors("base"):
            raise kind
    assert described(ValueError("one\n\n  two \nthree")) == "ValueError: one two"
    assert len(described(ValueError("x" * 9_999))) < 400
