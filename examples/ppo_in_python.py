"""Three PPO updates through the Python API: a policy, prompts, and a reward that is a Python function."""

from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import LlamaConfig, LlamaForCausalLM

import rlhf_engine as rlhf

TEXTS = ["What is the sky? It is blue.", "What is grass? It is green.", "What is snow? It is white."]


def make_model(folder: Path) -> None:
    """Save a random model and its tokenizer; use the folder of your own causal LM instead."""
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=300, **shape)).save_pretrained(folder)
    rlhf.train_tokenizer(TEXTS, 300).save_pretrained(folder)


def shorter_is_better(prompts: list[str], responses: list[str]) -> list[float]:
    """Return one number per response."""
    return [-len(response) / 10 for response in responses]


def train(folder: Path) -> list[dict[str, float]]:
    """Run three updates; return the log of each."""
    policy, codec = rlhf.load_policy(folder), rlhf.Codec(rlhf.load_tokenizer(folder))
    prompts = [codec.encode_prompt(text.partition("?")[0] + "?") for text in TEXTS]
    ppo = rlhf.PPOConfig(updates=3, rollout_batch=16, minibatch=8, microbatch=8, optim=rlhf.OptimConfig(lr=1e-3))
    config = rlhf.RunConfig(ppo=ppo, rollout=rlhf.RolloutConfig(max_prompt_tokens=32, max_response_tokens=16))
    reward = rlhf.text_reward(shorter_is_better, codec)
    trainer = rlhf.build_trainer(policy, None, reward, prompts, config, codec=codec)
    return [trainer.step() for _ in range(ppo.updates)]


if __name__ == "__main__":
    with TemporaryDirectory() as name:
        make_model(Path(name))
        for log in train(Path(name)):
            print(f"score {log['score_mean']:.2f}, KL {log['kl']:.3f}, {log['tokens_per_second']:.0f} tokens/s")
