"""Suggestions for an unknown key: a similar key of any section, or our key for a name that other trainers use."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence


def _optim(name: str) -> tuple[str, ...]:
    return tuple(f"{section}.optim.{name}" for section in ("sft", "reward", "ppo"))


_NAMES: tuple[tuple[tuple[str, ...], str], ...] = (
    (_optim("lr"), "lr learning_rate actor_learning_rate policy_lr actor_lr max_lr"),
    (_optim("weight_decay"), "l2 wd"),
    (_optim("betas"), "beta1 beta2 adam_beta1 adam_beta2 adam_betas"),
    (_optim("eps"), "adam_epsilon adam_eps epsilon_adam"),
    (_optim("warmup_steps"), "warmup warmup_ratio lr_warmup_ratio num_warmup_steps lr_warmup_steps"),
    (_optim("schedule"), "lr_scheduler lr_scheduler_type scheduler lr_schedule scheduler_type"),
    (_optim("final_lr_share"), "min_lr min_lr_ratio lr_min"),
    (
        _optim("max_grad_norm"),
        "clip_grad clip_grad_norm grad_clip grad_clip_norm gradient_clipping max_norm grad_norm_clip",
    ),
    (("sft.epochs", "reward.epochs", "ppo.ppo_epochs"), "epochs epoch num_epochs num_train_epochs max_epochs n_epochs"),
    (("ppo.ppo_epochs",), "num_ppo_epochs noptepochs num_iterations mu"),
    (
        ("sft.batch_size", "reward.batch_size", "ppo.rollout_batch"),
        "batch_size batch train_batch_size global_batch_size per_device_train_batch_size rollout_batch_size",
    ),
    (("ppo.minibatch",), "mini_batch_size minibatch_size num_mini_batches ppo_mini_batch_size train_batch_size"),
    (
        ("sft.microbatch", "reward.microbatch", "ppo.microbatch"),
        "micro_batch micro_batch_size microbatch_size gradient_accumulation_steps grad_accum accumulate_grad_batches "
        "micro_train_batch_size per_device_train_batch_size",
    ),
    (
        ("ppo.updates",),
        "steps max_steps total_steps num_updates num_steps total_episodes num_episodes iterations train_steps",
    ),
    (
        ("ppo.kl_coef",),
        "beta kl_beta kl_coeff init_kl_coef init_kl_coefficient kl_ctl kl_penalty_coef kl_loss_coef kl_weight",
    ),
    (("ppo.kl_target",), "target_kl kl_target_value target"),
    (("ppo.kl_horizon",), "horizon"),
    (("ppo.kl_estimator",), "kl_type kl_penalty kl_estimator_type"),
    (
        ("ppo.cliprange",),
        "clip_range clip_eps eps_clip epsilon clip_ratio clip clip_param clip_epsilon eps_clip_low epsilon_low",
    ),
    (("ppo.cliprange_high",), "clip_range_high epsilon_high clip_ratio_high eps_clip_high clip_higher"),
    (("ppo.dual_clip",), "clip_ratio_c delta"),
    (("ppo.cliprange_value",), "clip_range_value value_clip vf_clip cliprange_vf clip_range_vf vf_clip_param"),
    (
        ("ppo.importance.level",),
        "vllm_importance_sampling_mode rollout_is is_correction_level tis_level rs_level rollout_rs",
    ),
    (
        ("ppo.importance.action",),
        "truncated_importance_sampling_type is_correction_mode is_correction_type tis_mode use_tis",
    ),
    (("ppo.importance.metric",), "is_correction_gating"),
    (
        ("ppo.importance.low",),
        "vllm_importance_sampling_clip_min tis_lower_bound rs_lower_bound truncated_importance_sampling_ratio_min",
    ),
    (
        ("ppo.importance.high",),
        "vllm_importance_sampling_clip_max vllm_importance_sampling_cap tis_upper_bound rs_upper_bound tis_imp_ratio_cap "
        "rollout_is_threshold rollout_rs_threshold truncated_importance_sampling_ratio is_correction_threshold",
    ),
    (("ppo.vf_coef",), "value_coef value_loss_coef vf_loss_coef critic_coef vf_coeff value_loss_weight"),
    (("ppo.value_warmup",), "critic_warmup freezing_actor_steps"),
    (("ppo.entropy_coef",), "ent_coef entropy_coeff entropy_bonus entropy_loss_coef entropy_beta"),
    (("ppo.ptx_coef",), "ptx_weight pretrain_coef ptx_loss_coef"),
    (("ppo.lam",), "lambda lambd gae_lambda gae_lam"),
    (("ppo.lam_alpha",), "length_adaptive_gae_alpha length_adaptive_gae adaptive_lam length_adaptive_lam"),
    (("ppo.value_lam",), "decoupled_gae lam_critic critic_lam lambda_critic critic_lambda critic_lambd value_lambda"),
    (("ppo.gamma",), "discount discount_factor"),
    (("ppo.score_clip",), "reward_clip clip_reward reward_clip_range cliprange_reward"),
    (("ppo.score_scale",), "reward_scale normalize_reward use_score_scaling use_score_norm scale_reward scale_rewards"),
    (("ppo.missing_eos_penalty",), "non_eos_penalty overlong_penalty"),
    (("ppo.whiten_advantages",), "normalize_advantage advantage_normalization norm_adv scale_advantages"),
    (("ppo.aggregation",), "loss_agg_mode loss_type loss_aggregation"),
    (
        ("rollout.max_response_tokens",),
        "max_new_tokens max_completion_length max_length response_length max_tokens generate_max_len max_gen_len "
        "max_response_length max_answer_tokens",
    ),
    (
        ("rollout.max_prompt_tokens",),
        "max_prompt_length prompt_max_len max_prompt_len prompt_length max_seq_len max_seq_length",
    ),
    (("rollout.temperature",), "temp sampling_temperature"),
    (("rollout.stop",), "stop_strings stop_sequences stop_words stop_text"),
    (("rollout.stop_token",), "eos_token stop_token_id stop_token_ids"),
    (("rollout.cache",), "kv_cache cache_implementation use_cache"),
    (
        ("data.prompts",),
        "dataset dataset_name train_file prompt_data train_data train_files prompt_file prompt_dataset",
    ),
    (("data.demonstrations",), "sft_data instruction_data train_dataset sft_dataset"),
    (("data.comparisons",), "preference_data preferences pairs rankings reward_data preference_dataset"),
    (("data.pretrain",), "pretrain_data ptx_data pretraining"),
    (("data.prompt_template",), "template input_template prompt_format chat_template"),
    (("data.validation_share",), "val_share validation_split val_split test_size eval_ratio"),
    (("model.path",), "model_name model_name_or_path base_model pretrained sft_model_path actor_model_path model_path"),
    (("adapter.rank",), "lora_rank lora_r lora_dim lora use_lora use_peft peft r"),
    (("adapter.alpha",), "lora_alpha"),
    (("adapter.targets",), "lora_target_modules target_modules lora_targets"),
    (("adapter.rslora",), "use_rslora"),
    (("adapter.dora",), "use_dora"),
    (("adapter.dropout",), "lora_dropout"),
    (("ppo.reference",), "ref_model ref_policy reference_model ref_model_path"),
    (("model.attention",), "attn_implementation attention_implementation flash_attn use_flash_attention_2 attn"),
    (("reward.path",), "reward_model reward_model_path reward_model_name reward_pretrain rm_path rm"),
    (("reward.function",), "reward_fn reward_func reward_funcs reward_function custom_reward_function score_fn scorer"),
    (("eval.judge",), "judge_model"),
    (("memory.budget",), "gpu_memory max_memory gpu_memory_utilization memory_budget"),
    (("memory.optimizer_state",), "optim_bits offload_optimizer cpu_offload adam_offload optimizer_offload optim"),
    (
        ("memory.gradient_checkpointing",),
        "activation_checkpointing recompute use_gradient_checkpointing checkpoint_activations",
    ),
    (
        ("sft.checkpoint_every", "reward.checkpoint_every", "ppo.checkpoint_every"),
        "save_steps save_every save_freq save_interval checkpoint_interval ckpt_every save_strategy",
    ),
    (("sft.evaluate_every", "reward.evaluate_every"), "eval_steps eval_every evaluation_steps eval_freq eval_interval"),
    (("sft.patience",), "early_stopping_patience early_stopping"),
    (("dtype",), "bf16 fp16 torch_dtype precision mixed_precision half param_dtype"),
    (("compute_dtype",), "amp autocast"),
    (("output_dir",), "output out out_dir output_path save_dir save_path run_dir log_dir logging_dir"),
    (("device",), "gpu cuda devices device_map"),
    (("seed",), "random_seed rng_seed"),
)
"""Our keys, and names that trainers such as TRL, OpenRLHF, verl and DeepSpeed-Chat use for them."""

ALIASES: dict[str, tuple[str, ...]] = {}
"""Name in a different trainer -> our keys."""
for _keys, _words in _NAMES:
    for _word in _words.split():
        ALIASES[_word] = (*ALIASES.get(_word, ()), *_keys)


def hint(path: str, keys: Sequence[str]) -> str:
    """Return what to append to the message for the unknown key `path`: suggestions among `keys`, all dotted."""
    # The comparison is quadratic in the length, and a name of that length resembles no key.
    found = suggestions(path, keys) if len(path) < 200 else []
    shown = [repr(key) for key in found]
    if shown:
        return f"; did you mean {' or '.join(filter(None, (', '.join(shown[:-1]), shown[-1])))}?"
    section = next((f" {part}" for part in [path.split(".")[0]] if part in keys), "")
    return f"; `rlhf config show{section}` lists the keys"


def suggestions(path: str, keys: Sequence[str]) -> list[str]:
    """Return the keys that `path` may mean, those nearest to its section; empty if none is similar."""
    *parents, name = path.split(".")
    for candidates in _candidates(parents, name.lower().replace("-", "_"), keys):
        if candidates:
            near = [_shared(key, parents) for key in candidates]
            return [key for key, shared in zip(candidates, near, strict=True) if shared == max(near)]
    return []


def _candidates(parents: Sequence[str], name: str, keys: Sequence[str]) -> Iterator[list[str]]:
    """Yield groups of keys that `name` in the section `parents` may mean, the most similar ones first; a group may be empty."""
    siblings = [key for key in keys if key.split(".")[:-1] == parents]
    leaves = {key: key.split(".")[-1] for key in keys}
    yield difflib.get_close_matches(".".join([*parents, name]), siblings, n=1, cutoff=0.92)
    yield [key for key in keys if leaves[key] == name or key in ALIASES.get(name, ())]
    near = difflib.get_close_matches(name, [leaves[key] for key in siblings], n=1)
    yield [key for key in siblings if leaves[key] in near]
    near = difflib.get_close_matches(name, leaves.values(), n=1, cutoff=0.8)
    yield [key for key in keys if leaves[key] in near]
    words = difflib.get_close_matches(name, ALIASES, n=1, cutoff=0.85)
    yield [key for word in words for key in ALIASES[word] if key in keys]


def _shared(key: str, parents: Sequence[str]) -> int:
    """Return how many of `parents` a key begins with."""
    parts = key.split(".")
    return next(
        (number for number, parent in enumerate(parents) if parts[number : number + 1] != [parent]), len(parents)
    )
