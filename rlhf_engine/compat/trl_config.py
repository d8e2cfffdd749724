"""TRL's `PPOConfig` (1.12.0): the same fields and defaults, checked when they are set.

A field is supported, or a value other than its default raises by name. `transformers.TrainingArguments` has the fields that all
trainers of transformers share, and makes the class usable with `HfArgumentParser`.
"""

from __future__ import annotations

import difflib
import functools
from dataclasses import MISSING, Field, dataclass, field, fields
from importlib.util import find_spec
from typing import Any, Literal, TypeVar

from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

Config = TypeVar("Config")

_OPTIMIZERS = {"adamw_torch": "resident", "adamw_torch_fused": "resident", "adamw_torch_8bit": "8bit"}
"""`optim` -> the optimizer state of the engine."""

_SHARED = frozenset(
    [
        "output_dir",
        "per_device_train_batch_size",
        "num_train_epochs",
        "learning_rate",
        "lr_scheduler_type",
        "lr_scheduler_kwargs",
        "warmup_steps",
        "optim",
        "weight_decay",
        "adam_beta1",
        "adam_beta2",
        "adam_epsilon",
        "gradient_accumulation_steps",
        "bf16",
        "activation_checkpointing",
        "gradient_checkpointing",
        "logging_strategy",
        "logging_steps",
        "logging_first_step",
        "report_to",
        "run_name",
        "project",
        "trackio_space_id",
        "trackio_bucket_id",
        "trackio_static_space_id",
        "disable_tqdm",
        "eval_strategy",
        "eval_steps",
        "eval_delay",
        "per_device_eval_batch_size",
        "save_strategy",
        "save_steps",
        "save_total_limit",
        "seed",
        "use_cpu",
        "do_train",
        "do_eval",
        "do_predict",
        "resume_from_checkpoint",
    ]
)
"""Supported fields of `TrainingArguments`."""

_FIXED = {
    "remove_unused_columns": (True, False),
    "dataloader_drop_last": (False, True),
    "ds3_gather_for_generation": (True,),
    "push_to_hub": (False,),
    "include_num_input_tokens_seen": ("no", False),  # HfArgumentParser passes its default as False
}
"""Fields of which these values describe what the trainer does: columns are left to the collator, short batches are dropped."""

_COMPUTED = [
    "world_size",
    "num_total_batches",
    "micro_batch_size",
    "local_batch_size",
    "batch_size",
    "local_mini_batch_size",
    "mini_batch_size",
]
"""Fields that `PPOTrainer` sets, as TRL's does."""

_ADVICE = {
    "max_steps": "set total_episodes",
    "max_grad_norm": "TRL's PPOTrainer does not clip gradients, and neither does this one",
    "fp16": "set bf16",
    "gradient_checkpointing_kwargs": "layers are recomputed without reentrant autograd",
    "activation_checkpointing_kwargs": "layers are recomputed without reentrant autograd",
    "push_to_hub": "upload the folder of save_model with huggingface_hub",
    "model_adapter_name": "pass a model with one adapter, or peft_config",
    "ref_adapter_name": "pass ref_model",
    "deepspeed": "the engine runs in one process",
    "fsdp": "the engine runs in one process",
}


def _named_errors(cls: type[Config]) -> type[Config]:
    """Make the constructor name an unknown field and the nearest known one."""
    init, names = cls.__init__, [one.name for one in fields(cls)]  # pyright: ignore[reportArgumentType]

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **settings: Any) -> None:
        for name in settings:
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1)
                raise TypeError(
                    f"{cls.__name__}: unknown field {name!r}" + (f"; did you mean {near[0]!r}?" if near else "")
                )
        init(self, *args, **settings)

    cls.__init__ = checked
    return cls


@_named_errors
@dataclass
class PPOConfig(TrainingArguments):
    """Settings of `rlhf_engine.compat.trl.PPOTrainer`, under the names and with the defaults of TRL 1.12.0's `PPOConfig`.

    docs/guides/trl.md has a table of the fields.

    Raises:
        TypeError: an unknown field; the message has the nearest name.
        ValueError: a field that is not supported and not at its default, or a value outside of a field's range.
    """

    learning_rate: float = field(default=3e-6, metadata={"help": "Initial learning rate of AdamW."})
    logging_steps: float = field(default=10, metadata={"help": "Read by callbacks. Every update is logged, as in TRL."})
    gradient_checkpointing: bool | None = field(
        default=True, metadata={"help": "Recompute the layers of policy and value model in the backward pass."}
    )
    bf16: bool | None = field(
        default=None, metadata={"help": "Compute matrix products in bfloat16. If None, True, as in TRL."}
    )
    dataset_num_proc: int | None = field(
        default=None, metadata={"help": "Number of processes with which a script prepares its dataset."}
    )
    num_mini_batches: int = field(default=1, metadata={"help": "Number of minibatches of a batch."})
    total_episodes: int | None = field(
        default=None,
        metadata={"help": "Number of responses to sample. If None, num_train_epochs passes over the dataset."},
    )
    local_rollout_forward_batch_size: int = field(
        default=64, metadata={"help": "Number of sequences that are sampled and scored together."}
    )
    num_sample_generations: int = field(
        default=10, metadata={"help": "Number of times that samples of the evaluation dataset are printed."}
    )
    response_length: int = field(default=53, metadata={"help": "Maximum number of tokens of a response."})
    stop_token: Literal["eos"] | None = field(
        default=None, metadata={"help": "'eos': the tokenizer's EOS ends a response. Excludes stop_token_id."}
    )
    stop_token_id: int | None = field(
        default=None,
        metadata={"help": "The id that ends a response. Excludes stop_token. If neither is set, none does."},
    )
    temperature: float = field(default=0.7, metadata={"help": "Sampling temperature."})
    missing_eos_penalty: float | None = field(
        default=None, metadata={"help": "Positive number that is subtracted from the score of a response without EOS."}
    )
    sft_model_path: str = field(default="EleutherAI/pythia-160m", metadata={"help": "Path of the policy, for scripts."})
    reward_model_path: str = field(
        default="EleutherAI/pythia-160m", metadata={"help": "Path of the reward model, for scripts."}
    )
    world_size: int | None = field(default=None, metadata={"help": "Computed by PPOTrainer."})
    num_total_batches: int | None = field(default=None, metadata={"help": "Computed by PPOTrainer."})
    micro_batch_size: int | None = field(default=None, metadata={"help": "Computed by PPOTrainer."})
    local_batch_size: int | None = field(default=None, metadata={"help": "Computed by PPOTrainer."})
    batch_size: int | None = field(default=None, metadata={"help": "Computed by PPOTrainer."})
    local_mini_batch_size: int | None = field(default=None, metadata={"help": "Computed by PPOTrainer."})
    mini_batch_size: int | None = field(default=None, metadata={"help": "Computed by PPOTrainer."})
    push_to_hub: bool = field(default=False, metadata={"help": "Not supported."})
    model_adapter_name: str | None = field(default=None, metadata={"help": "Not supported."})
    ref_adapter_name: str | None = field(default=None, metadata={"help": "Not supported."})
    num_ppo_epochs: int = field(default=4, metadata={"help": "Number of passes over a batch."})
    whiten_rewards: bool = field(default=False, metadata={"help": "Divide the rewards by their standard deviation."})
    kl_coef: float = field(default=0.05, metadata={"help": "Coefficient of the KL penalty."})
    kl_estimator: Literal["k1", "k3"] = field(default="k1", metadata={"help": "Estimator of the KL penalty."})
    cliprange: float = field(default=0.2, metadata={"help": "Clip range of the policy's ratio."})
    vf_coef: float = field(default=0.1, metadata={"help": "Coefficient of the value loss."})
    cliprange_value: float = field(default=0.2, metadata={"help": "Clip range of the values."})
    gamma: float = field(default=1.0, metadata={"help": "Discount factor."})
    lam: float = field(default=0.95, metadata={"help": "Lambda of GAE."})
    ds3_gather_for_generation: bool = field(default=True, metadata={"help": "Not supported."})

    def __post_init__(self) -> None:
        """Check all fields, then convert those of `TrainingArguments`."""
        if find_spec("accelerate") is None:
            raise ImportError("PPOConfig: transformers needs accelerate for it; install rlhf-kernels[trl]")
        self._refuse_unsupported()
        self._check_numbers()
        self._check_choices()
        if self.bf16 is None:
            self.bf16 = True
        if getattr(self, "activation_checkpointing", True) is None:  # transformers' name for it since 5.20
            self.activation_checkpointing = self.gradient_checkpointing
        super().__post_init__()

    @property
    def optimizer_state(self) -> Literal["resident", "8bit"]:
        """Where and how the moments are stored."""
        return "8bit" if _OPTIMIZERS[OptimizerNames(self.optim).value] == "8bit" else "resident"

    @property
    def sampling_temperature(self) -> float:
        """Divisor of the logits in sampling and in every log-prob: TRL adds 1e-7 to the temperature."""
        return self.temperature + 1e-7

    def _refuse_unsupported(self) -> None:
        ours = set(PPOConfig.__annotations__) - _FIXED.keys() - set(_COMPUTED)
        supported = (ours | _SHARED) - {"model_adapter_name", "ref_adapter_name"}
        for one in fields(self):
            value = getattr(self, one.name)
            if one.name in _FIXED:
                if value not in _FIXED[one.name]:
                    self._refuse(one, value)
            elif one.name in _COMPUTED:
                if value is not None:
                    raise ValueError(f"{one.name}: got {value!r}; PPOTrainer computes it, so leave it out")
            elif one.name not in supported and value != _default(one) and (value or _default(one)):
                self._refuse(one, value)  # nothing, False and an empty list all turn a setting off

    @staticmethod
    def _refuse(one: Field[Any], value: object) -> None:
        advice = _ADVICE.get(one.name, "leave it out")
        raise ValueError(f"{one.name}: got {value!r}, which is not supported, expected {_default(one)!r}; {advice}")

    def _check_numbers(self) -> None:
        counts = (
            "per_device_train_batch_size gradient_accumulation_steps num_mini_batches num_ppo_epochs response_length "
            "local_rollout_forward_batch_size per_device_eval_batch_size total_episodes"
        )
        for name in counts.split():
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name}: got {value!r}, expected a whole number of at least 1")
        for name, low, high, open_end in (
            ("temperature", 0.0, None, True),
            ("missing_eos_penalty", 0.0, None, True),
            ("cliprange", 0.0, None, True),
            ("cliprange_value", 0.0, None, True),
            ("kl_coef", 0.0, None, False),
            ("vf_coef", 0.0, None, False),
            ("num_sample_generations", 0, None, False),
            ("gamma", 0.0, 1.0, False),
            ("lam", 0.0, 1.0, False),
        ):
            value = getattr(self, name)
            if value is None:
                continue
            inside = value > low if open_end else value >= low
            if not inside or (high is not None and value > high):
                bound = (
                    f"above {low:g}" if open_end else f"at least {low:g}" if high is None else f"{low:g} to {high:g}"
                )
                raise ValueError(f"{name}: got {value!r}, expected {bound}")

    def _check_choices(self) -> None:
        allowed = {
            "kl_estimator": ("k1", "k3"),
            "stop_token": (None, "eos"),
            "optim": tuple(_OPTIMIZERS),
            "save_strategy": ("no", "steps"),
            "eval_strategy": ("no", "steps"),
        }
        for name, choices in allowed.items():
            value = getattr(self, name)
            value = getattr(value, "value", value)
            if value not in choices:
                raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(map(repr, choices))}")
        schedule = getattr(self.lr_scheduler_type, "value", self.lr_scheduler_type)
        if schedule in ("reduce_lr_on_plateau", "greedy"):
            raise ValueError(
                f"lr_scheduler_type: got {schedule!r}, expected one that reads no metric, such as 'linear'"
            )
        if self.stop_token is not None and self.stop_token_id is not None:
            raise ValueError("stop_token and stop_token_id are both set; set one of them")


def _default(one: Field[Any]) -> Any:
    return one.default if one.default_factory is MISSING else one.default_factory()
