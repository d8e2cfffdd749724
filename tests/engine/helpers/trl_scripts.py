"""The parts of a script for TRL's PPOTrainer, with tiny local models: tokenizer, models, dataset, settings."""

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

VOCABULARY, PAD, EOS, STOP = 40, 38, 39, 3
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 96,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "bos_token_id": None,
}
SETTINGS = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "seed": 0,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "num_ppo_epochs": 2,
    "response_length": 7,
    "total_episodes": 24,
    "learning_rate": 1e-2,
    "num_sample_generations": 0,
    "save_strategy": "no",
    "disable_tqdm": True,
}


def tokenizer(**settings):
    words = {f"w{i}": i for i in range(VOCABULARY - 2)} | {"<pad>": PAD, "<eos>": EOS}
    words_only = Tokenizer(models.WordLevel(words, unk_token="w0"))
    words_only.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "w0", "padding_side": "left"}
    return PreTrainedTokenizerFast(tokenizer_object=words_only, **special | settings)


def language_model(seed, **changes):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SIZES | changes))


def classifier(seed):
    torch.manual_seed(seed)
    return LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=1))


def prompts(rows=32):
    """Return a dataset of prompts with 2 to 5 tokens."""
    random = torch.Generator().manual_seed(2)
    lengths = torch.randint(2, 6, (rows,), generator=random).tolist()
    return Dataset.from_dict({"input_ids": [torch.randint(0, 38, (n,), generator=random).tolist() for n in lengths]})


def parts(**changes):
    """Return the arguments of a trainer but `args`."""
    return {
        "processing_class": tokenizer(),
        "model": language_model(0),
        "ref_model": language_model(1),
        "reward_model": classifier(2),
        "value_model": classifier(3),
        "train_dataset": prompts(),
    } | changes


def weights(trainer):
    """Return copies of the weights of policy and value model."""
    models = {"policy": trainer.model.policy, "value": trainer.model.value_model}
    return {f"{n}.{k}": v.detach().clone() for n, m in models.items() for k, v in m.state_dict().items()}
