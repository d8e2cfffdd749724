"""Every data format, from a file of a different tool to a trained model, without a conversion."""

import csv
import json

import pytest
from transformers import AutoTokenizer

from rlhf_engine.config import load_config
from rlhf_engine.recipes import run_rm, run_sft
from tests.engine.helpers.cli_run import new_model, new_run, write_lines
from tests.engine.helpers.conversations import CHAT


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


DEMONSTRATIONS = {
    "prompt_completion": lambda q, a, _: {"prompt": q, "completion": a},
    "messages": lambda q, a, _: {"messages": [user(q), assistant(a)]},
    "openai": lambda q, a, b: {"messages": [user(q), assistant(b) | {"weight": 0}, user(q), assistant(a)], "tools": []},
    "alpaca": lambda q, a, _: {"instruction": q, "input": "", "output": a},
    "sharegpt": lambda q, a, _: {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]},
}
PAIRS = {
    "preference": lambda q, a, b: {"prompt": q, "chosen": a, "rejected": b},
    "implicit": lambda q, a, b: {"chosen": [user(q), assistant(a)], "rejected": [user(q), assistant(b)]},
    "openai": lambda q, a, b: {
        "input": {"messages": [user(q)]},
        "preferred_output": [assistant(a)],
        "non_preferred_output": [assistant(b)],
    },
    "sharegpt": lambda q, a, b: {
        "conversations": [{"from": "human", "value": q}],
        "chosen": {"from": "gpt", "value": a},
        "rejected": {"from": "gpt", "value": b},
    },
    "alpaca": lambda q, a, b: {"instruction": q, "input": "", "chosen": a, "rejected": b},
}


def write_csv(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows({k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()} for row in rows)
    return path


def write_parquet(path, rows):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


WRITERS = {"jsonl": write_lines, "csv": write_csv, "parquet": write_parquet}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return a function that trains on rows in one format, in one folder with one model that the tests share."""
    folder = tmp_path_factory.mktemp("formats")
    base = new_model(folder / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(base)
    new_run(folder, base)
    sets = ["rollout.max_prompt_tokens=64", "sft.epochs=1", "reward.epochs=1"]

    def train(run, key, row, ending="jsonl"):
        path = WRITERS[ending](folder / f"rows.{ending}", [row(f"q{i}", "yes", "no") for i in range(6)])
        config = load_config(folder / "run.yaml", [*sets, f"data.{key}={path}"])
        return run(config, overwrite=True)

    return train


@pytest.mark.parametrize("name, ending", [*((name, "jsonl") for name in DEMONSTRATIONS), ("alpaca", "csv")])
def test_s2_sft_trains_on_demonstrations_of_every_format(trained, name, ending):
    assert trained(run_sft, "demonstrations", DEMONSTRATIONS[name], ending).best.validation_loss > 0


@pytest.mark.parametrize(
    "name, ending", [*((name, "jsonl") for name in PAIRS), ("openai", "csv"), ("implicit", "parquet")]
)
def test_s3_a_reward_model_trains_on_pairs_of_every_format(trained, name, ending):
    last = trained(run_rm, "comparisons", PAIRS[name], ending)[-1]
    assert 0 <= last.accuracy <= 1


def test_s3_a_pair_gives_the_numbers_of_a_ranking_of_two(trained):
    def ranking(q, a, b):
        return {"prompt": q, "completions": [b, a], "ranking": "B > A"}

    one, other = (trained(run_rm, "comparisons", row)[-1] for row in (PAIRS["preference"], ranking))
    assert one.loss == pytest.approx(other.loss, abs=1e-6) and one.margin == pytest.approx(other.margin, abs=1e-5)
