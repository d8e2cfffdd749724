"""The calls of TRL's example script for PPO, with our import in place of TRL's, on tiny local models."""

import pytest
from accelerate import PartialState
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    HfArgumentParser,
)

from rlhf_engine.compat.trl import PPOConfig, PPOTrainer
from tests.engine.helpers.trl_scripts import classifier, language_model, tokenizer

trl = pytest.importorskip("trl", reason="needs trl, whose other parts the script uses")

LINE = (
    "--dataset_name prompts --dataset_train_split train --output_dir {0}/run --model_name_or_path {0}/policy "
    "--sft_model_path {0}/policy --reward_model_path {0}/reward --per_device_train_batch_size 4 "
    "--gradient_accumulation_steps 2 --num_ppo_epochs 1 --total_episodes 16 --local_rollout_forward_batch_size 4 "
    "--response_length 5 --missing_eos_penalty 1.0 --stop_token eos --learning_rate 3e-6 --eval_strategy steps "
    "--eval_steps 100 --per_device_eval_batch_size 4 --use_cpu --disable_tqdm True {1}"
)


@pytest.mark.parametrize(
    "adapter", ["", "--use_peft --lora_r 2 --lora_target_modules q_proj v_proj"], ids=["full", "peft"]
)
def test_the_script(tmp_path, capsys, adapter):
    for model, name in ((language_model(0), "policy"), (classifier(1), "reward")):
        model.save_pretrained(tmp_path / name)
        tokenizer(pad_token=None).save_pretrained(tmp_path / name)
    parser = HfArgumentParser((trl.ScriptArguments, PPOConfig, trl.ModelConfig))
    _, settings, chosen = parser.parse_args_into_dataclasses(LINE.format(tmp_path, adapter).split())

    words = AutoTokenizer.from_pretrained(chosen.model_name_or_path, padding_side="left")
    words.add_special_tokens({"pad_token": "[PAD]"})
    value, reward = (
        AutoModelForSequenceClassification.from_pretrained(settings.reward_model_path, num_labels=1, dtype="float32")
        for _ in range(2)
    )
    policy = AutoModelForCausalLM.from_pretrained(settings.sft_model_path, dtype="float32")
    peft_config = trl.get_peft_config(chosen)
    reference = AutoModelForCausalLM.from_pretrained(settings.sft_model_path) if peft_config is None else None

    texts = Dataset.from_dict({"prompt": [f"w{n % 30} w{n % 7} w5" for n in range(24)]})
    with PartialState().local_main_process_first():
        data = texts.map(
            lambda rows: {"input_ids": words(rows["prompt"], padding=False)["input_ids"]},
            batched=True,
            remove_columns=texts.column_names,
            num_proc=settings.dataset_num_proc,
        )
    trainer = PPOTrainer(
        args=settings,
        processing_class=words,
        model=policy,
        ref_model=reference,
        reward_model=reward,
        value_model=value,
        train_dataset=data.select(range(16)),
        eval_dataset=data.select(range(16, 24)),
        peft_config=peft_config,
    )
    trainer.train()
    trainer.save_model(settings.output_dir)
    trainer.generate_completions()
    assert trainer.state.episode == 16 and "query" in capsys.readouterr().out
    assert (tmp_path / "run" / ("adapter_config.json" if adapter else "model.safetensors")).is_file()
