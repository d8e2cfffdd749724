"""Record the results of tiny runs, so that two commits can be compared number by number.

    python -m benchmarks.same_numbers record FOLDER    # runs everything through `rlhf`, keeps weights and metrics
    python -m benchmarks.same_numbers compare A B      # one line per case; exit code 1 beyond the allowed difference

`record` creates its model, tokenizer and data and calls only the command line, so this file works with any commit: copy it to
that commit's `benchmarks` folder, or run it with PYTHONPATH set to that commit's checkout.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rlhf_engine.cli import main

ALLOWED = 1e-6
"""Largest allowed difference of a weight or a metric, relative to max(1, largest absolute value of its tensor)."""

UNTIMED = ("seconds", "per_second", "_mb")
"""Parts of the names of metrics that depend on the machine and are not compared."""

WORDS = ["yes", "no", "maybe", "so", "I", "do", "not", "know", "the", "sky", "is", "blue", "and", "grass", "green"]
PPO = (
    "ppo.updates=3",
    "ppo.rollout_batch=16",
    "ppo.minibatch=8",
    "ppo.microbatch=4",
    "ppo.ppo_epochs=2",
    "ppo.optim.lr=1e-3",
)
CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    "sft": ("sft", ()),
    "sft-tokens": ("sft", ("sft.microbatch_tokens=24",)),
    "sft-bf16": ("sft", ("dtype=bfloat16",)),
    "rm": ("rm", ()),
    "head": ("ppo", ()),
    "backbone": ("ppo", ("ppo.value_model=backbone",)),
    "zero-head": ("ppo", ("ppo.value_init=zero",)),
    "ema": ("ppo", ("ppo.ema_decay=0.9",)),
    "adaptive": ("ppo", ("ppo.kl_control=adaptive", "ppo.kl_target=0.5", "ppo.kl_horizon=100")),
    "kl-penalty": ("ppo", ("ppo.objective=kl_penalty", "ppo.old_kl_coef=1.0", "ppo.old_kl_target=0.01")),
    "ptx": ("ppo", ("ppo.ptx_coef=0.5",)),
    "paged": ("ppo", ("rollout.cache=paged",)),
    "slots": ("ppo", ("rollout.cache=slots", "rollout.batch_size=3")),
    "tokens": ("ppo", ("ppo.microbatch=16", "ppo.microbatch_tokens=40")),
    "bf16": ("ppo", ("dtype=bfloat16",)),
    "bf16-products": ("ppo", ("compute_dtype=bfloat16",)),
    "eager": ("ppo", ("model.attention=eager",)),
    "trpo": ("ppo", ("ppo.objective=trpo", "model.attention=eager")),
    "reinforce": ("ppo", ("ppo.preset=reinforce", "ppo.ppo_epochs=1", "ppo.minibatch=16")),
    "rescored": ("ppo", ("ppo.old_logprobs=rescored", "ppo.importance_cap=2.0", "rollout.top_k=20")),
    "warmup": ("ppo", ("ppo.value_warmup=1",)),
    "host": ("ppo", ("memory.optimizer_state=host", "memory.gradient_checkpointing=true")),
    "scaled": ("ppo", ("ppo.score_scale=running", "ppo.missing_eos_penalty=1.0", "ppo.whiten_rewards=true")),
    "whitening": ("ppo", ("ppo.whiten_scope=minibatch", "ppo.entropy_coef=0.01", "ppo.aggregation=seq_mean_token_sum")),
    "penalty": ("ppo", ("rollout.repetition_penalty=1.3", "rollout.stop=['sky']")),
}  # fmt: skip
"""Name -> command, overrides."""


def record(folder: Path) -> None:
    """Run every case into `folder`."""
    folder.mkdir(parents=True)
    make_inputs(folder)
    base = {"model.path": folder / "model", "reward.path": folder / "rm" / "rm"}
    for name, (command, overrides) in sorted(CASES.items(), key=lambda case: case[1][0] == "ppo"):
        settings = {"output_dir": folder / name, **base} if command == "ppo" else {"output_dir": folder / name}
        sets = [f"{key}={value}" for key, value in settings.items()] + [*(PPO if command == "ppo" else ()), *overrides]
        run(command, folder, sets)
    again = [f"output_dir={folder / 'resumed'}", *(f"{key}={value}" for key, value in base.items()), *PPO]
    run("ppo", folder, [*again, "ppo.updates=2"])
    run("ppo", folder, again, "--resume")


def run(command: str, folder: Path, sets: list[str], *flags: str) -> None:
    """Run one `rlhf` command in this process on one thread."""
    options = [part for one in sets for part in ("--set", one)]
    torch.set_num_threads(1)
    try:
        main([command, "--config", str(folder / "run.yaml"), *options, *flags])
    except SystemExit as end:
        if end.code:
            raise SystemExit(f"{command} {sets}: exit code {end.code}") from None


def make_inputs(folder: Path) -> None:
    """Write a model, its tokenizer, three data files, a text file and the config."""
    text = [" ".join(WORDS[n % len(WORDS) :] + WORDS[: n % 5]) for n in range(40)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<eos>", "<pad>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(text, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")
    fast.save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=128, initializer_range=0.1, bos_token_id=None, eos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    answers = [" ".join(WORDS[n : n + 1 + n % 4]) for n in range(8)]
    lines = {
        "demonstrations": [{"prompt": f"{WORDS[n % 5]} q{n}", "response": answers[n % 8]} for n in range(16)],
        "comparisons": [
            {"prompt": f"q{n}", "completions": answers[: 3 + n % 4], "ranking": list(range(1, 4 + n % 4))} for n in range(8)
        ],
        "prompts": [{"prompt": f"{'so ' * (n % 3)}q{n}", "user_id": f"u{n}", "split": "train"} for n in range(24)],
    }  # fmt: skip
    for name, records in lines.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    (folder / "pretrain.txt").write_text("\n\n".join(text))
    data = {name: str(folder / f"{name}.jsonl") for name in lines} | {"pretrain": str(folder / "pretrain.txt")}
    optim = {"lr": 1e-3}
    (folder / "run.yaml").write_text(json.dumps({
        "model": {"path": str(folder / "model")}, "data": data | {"validation_share": 0.25},
        "sft": {"epochs": 3, "batch_size": 4, "optim": optim}, "reward": {"batch_size": 2, "epochs": 2, "optim": optim},
        "rollout": {"max_prompt_tokens": 12, "max_response_tokens": 10},
    }))  # fmt: skip


def compare(first: Path, second: Path) -> int:
    """Print the largest difference of every case and return the exit code."""
    worst = 0.0
    for name in [*CASES, "resumed"]:
        difference, where = largest_difference(first / name, second / name)
        same = "the same bits" if difference == 0.0 else f"{difference:.3g} in {where}"
        print(f"{name:22} {same}")
        worst = max(worst, difference)
    print(f"largest difference {worst:.3g} (at most {ALLOWED:g} allowed)")
    return int(worst > ALLOWED)


def largest_difference(first: Path, second: Path) -> tuple[float, str]:
    """Return the largest relative difference of two runs and the name of the tensor or metric that has it.

    The difference is infinite if names or shapes differ, or if a difference is NaN.
    """
    worst, where = 0.0, ""
    theirs, ours = contents(first), contents(second)
    if theirs.keys() != ours.keys():
        return float("inf"), f"{sorted(theirs.keys() ^ ours.keys())[:4]}"
    for key, value in theirs.items():
        if value.shape != ours[key].shape:
            return float("inf"), f"{key}: shapes {tuple(value.shape)} and {tuple(ours[key].shape)}"
        a, b = value.double(), ours[key].double()
        scale = max(1.0, float(a.abs().max())) if a.numel() else 1.0
        difference = float((a - b).abs().max()) / scale if a.numel() else 0.0
        if difference != difference or difference > worst:
            worst, where = (float("inf") if difference != difference else difference), key
    return worst, where


def contents(folder: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of every safetensors file, and every metric of every step except times and memory."""
    found = {}
    for path in sorted(folder.rglob("*.safetensors")):
        for name, tensor in load_file(path).items():
            found[f"{path.relative_to(folder)}:{name}"] = tensor
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        for name, value in row.items():
            if isinstance(value, int | float) and not any(part in name for part in UNTIMED):
                found[f"{row['stage']} {row['step']} {name}"] = torch.tensor(float(value), dtype=torch.float64)
    return found


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["record", folder]:
            record(Path(folder).resolve())
        case ["compare", first, second]:
            sys.exit(compare(Path(first), Path(second)))
        case _:
            sys.exit(__doc__)
