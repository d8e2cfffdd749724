"""A user's reward function: the prompts that it receives, and prompts with equal tokens."""

import json

import pytest

from rlhf_engine.model.pretrained import load_tokenizer
from tests.engine.helpers.cli_run import new_model, new_run, read_lines, rlhf, write_lines
from tests.engine.helpers.conversations import CHAT

REWARD = """
import json

def record(prompts, answers):
    with open({path!r}, "a") as file:
        file.write("".join(json.dumps(prompt) + "\\n" for prompt in prompts))
    return [0.0] * len(answers)
"""


@pytest.fixture
def run(tmp_path):
    """Return the folder of a tiny run whose reward function writes its prompts to `asked.jsonl`."""
    model = new_model(tmp_path / "model")
    tokenizer = load_tokenizer(model)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(model)
    (tmp_path / "rewards.py").write_text(REWARD.format(path=str(tmp_path / "asked.jsonl")))
    return new_run(tmp_path, model)


def ppo(run, capsys, prompts, *sets):
    """Run `rlhf ppo` on these prompts with the function as the reward."""
    write_lines(run / "prompts.jsonl", [{"user_id": f"u{i}", **prompt} for i, prompt in enumerate(prompts)])
    options = (f"reward.function={run / 'rewards.py'}:record", "ppo.value_init=zero", "rollout.max_prompt_tokens=64")
    return rlhf(capsys, "ppo", "--config", run / "run.yaml", sets=(*options, *sets))


def test_s6_a_reward_function_gets_plain_text_and_plain_messages(run, capsys):
    prompts = [{"prompt": "q"}, {"messages": [{"role": "user", "content": "one"}]}]
    assert ppo(run, capsys, prompts)[0] == 0
    asked = [json.dumps(prompt) for prompt in read_lines(run / "asked.jsonl")]
    assert set(asked) == {json.dumps("q"), json.dumps(prompts[1]["messages"])}


def test_s6_prompts_with_equal_tokens_need_the_same_text(run, capsys):
    """Otherwise the function would get one prompt with a response to the other."""
    prompts = [
        {"prompt": "first words " * 9 + "and then yes"},
        {"prompt": "q"},
        {"prompt": "other " * 30 + "and then yes"},
    ]
    cut = ("rollout.max_prompt_tokens=8", "data.long_prompts=truncate")
    code, _, shown = ppo(run, capsys, prompts, *cut)
    assert code == 2 and f"{run / 'prompts.jsonl'}:3: prompt: has the same tokens as the prompt of line 1" in shown
    assert not (run / "asked.jsonl").exists()
    assert ppo(run, capsys, [prompts[0], prompts[1], prompts[0]], *cut)[0] == 0
