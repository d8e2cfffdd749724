"""TRL's GRPOTrainer with the fused head, added by a mixin. Requires trl 1.12 or 1.16 (`make test-peers` installs it)."""

from __future__ import annotations

import tempfile

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from trl import GRPOConfig, GRPOTrainer

from rlhf_kernels.integrations.trl import GRPOMixin

VOCABULARY, LIKED = 32, 7


class Trainer(GRPOMixin, GRPOTrainer):
    """GRPOTrainer with the fused head."""


def liked(completion_ids, **_):
    return [sum(i == LIKED for i in ids) / len(ids) for ids in completion_ids]


def train(steps: int = 30) -> list[float]:
    """Train a policy and return the mean reward of each step's completions."""
    set_seed(0)
    words = {f"w{i}": i for i in range(VOCABULARY - 2)} | {"<pad>": VOCABULARY - 2, "<eos>": VOCABULARY - 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=32, **sizes)),
            reward_funcs=liked,
            args=GRPOConfig(
                output_dir=folder,
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                per_device_train_batch_size=32,
                num_generations=8,
                max_completion_length=8,
                learning_rate=2e-2,
                max_steps=steps,
                logging_steps=1,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list([{"prompt": f"w{i} w{i + 1}"} for i in range(16)]),
            processing_class=PreTrainedTokenizerFast(
                tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left"
            ),
        )
        trainer.train()
    return [line["reward"] for line in trainer.state.log_history if "reward" in line]


if __name__ == "__main__":
    history = train()
    print(f"mean reward {history[0]:.2f} -> {history[-1]:.2f}")
