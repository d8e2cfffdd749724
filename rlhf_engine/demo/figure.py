"""The paper's figure in miniature (Ouyang et al. 2022, figure 1): win rates of every stage over the size of the model.

Every model is compared with one fixed baseline, the SFT model of the largest size, on the demo's test prompts by the demo's
judge. An interrupted run continues after its last finished step.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from rlhf_engine.config import RunConfig, load_config, refuse_overrides
from rlhf_engine.data import PromptRecord, read_demonstrations, read_prompts
from rlhf_engine.data.records import text_of
from rlhf_engine.demo.config import DemoRunConfig
from rlhf_engine.demo.judge import score
from rlhf_engine.demo.run import CONFIG, DATA, DECIDED, POSITIONS, make_base, starting_from, with_shipped_data
from rlhf_engine.evaluate import WinRate, perplexity, read_documents, win_rate
from rlhf_engine.files import with_new_file, write_json
from rlhf_engine.plots import plot_win_rate_lines
from rlhf_engine.recipes import run_ppo, run_rm, run_sft
from rlhf_engine.recipes.generate import Answerer, answer_all
from rlhf_engine.recipes.loading import given
from rlhf_engine.recipes.starting import continued
from rlhf_engine.recipes.steps import Steps

QUICK = (
    "figure.widths=[16, 32]",
    "figure.head_size=8",
    "figure.shots=1",
    "figure.samples=1",
    "figure.prompts=12",
    "demo.vocab_size=600",
    "demo.layers=1",
    "demo.pretrain.epochs=1",
    "demo.pretrain.batch_size=256",
    "sft.epochs=1",
    "sft.batch_size=256",
    "data.max_response_tokens=200",
    "reward.batch_size=128",
    "rollout.max_response_tokens=16",
    "ppo.updates=1",
    "ppo.rollout_batch=8",
    "ppo.minibatch=8",
    "ppo.microbatch=8",
)
"""Overrides that shorten every stage to a few steps: they check that everything runs, the results mean nothing."""

CONTESTANTS = ("base", "base, prompted", "SFT", "PPO", "PPO-ptx")
_FOLDERS = {"base": "base", "base, prompted": "base", "SFT": "sft", "PPO": "ppo", "PPO-ptx": "ptx/ppo"}
_MAY_CHANGE = frozenset({"output_dir", "device", *(f"{stage}.checkpoint_every" for stage in ("sft", "reward", "ppo"))})
_DECIDED = (
    *(f"demo.{name}" for name in ("hidden_size", "intermediate_size", "heads", "samples", "opponents")),
    *(*DECIDED, "data.pretrain", "ppo.ptx_coef"),
)
_SEED = 400
_BETWEEN = "\n\n"
"""Separator of few-shot examples; it also ends a response to a few-shot prompt."""


@dataclass(frozen=True)
class Result:
    """Results of one contestant at one size."""

    width: int
    """Hidden size."""
    parameters: int
    """Number of parameters."""
    marks: list[list[float]]
    """The judge's marks: per prompt, a list with one mark per response."""
    ended: float
    """Share of responses that ended before the token limit."""
    perplexity: float
    """Perplexity on documents that pretraining held out."""
    seconds: float
    """Seconds for sampling and judging."""


def run_figure(
    output: str | Path,
    seed: int = 0,
    overrides: tuple[str, ...] = (),
    *,
    quick: bool = False,
    say: Callable[[str], object] = print,
) -> str:
    """Train and judge everything; write figure.png, figure.json and figure.md into `output`; return the table."""
    refuse_overrides(overrides, _DECIDED, "the figure, by its options --seed and --output or by the section figure,")
    root = Path(output)
    config, steps, held_out = prepare(root, seed, (*(QUICK if quick else ()), *overrides))
    baseline_width = config.figure.widths[-1]
    results: dict[str, list[Result]] = {name: [] for name in CONTESTANTS}
    for width in config.figure.widths:
        sized = at_width(config, width)
        train(sized, {"ptx": config.figure.ptx_coef}, steps, say)
        for index, name in enumerate(CONTESTANTS):
            judged = do_once(
                steps, f"{width}: {name}", partial(judge, sized, name, _FOLDERS[name], index, held_out), say
            )
            results[name].append(Result(**judged))
    sized = at_width(config, baseline_width)
    baseline = Result(
        **do_once(steps, "baseline", partial(judge, sized, "SFT", "sft", len(CONTESTANTS), held_out), say)
    )
    return _report(root, config, results, baseline, seconds_of(steps))


def prepare(root: Path, seed: int, overrides: tuple[str, ...]) -> tuple[DemoRunConfig, Steps, Path]:
    """Return the config of a figure in `root`, its finished steps, and the file of held-out text."""
    config = with_shipped_data(load_config(CONFIG, overrides, kind=DemoRunConfig), root, seed)
    root.mkdir(parents=True, exist_ok=True)
    steps = Steps(root / "state.json", config, _MAY_CHANGE)
    held_out, rest = split_text(root)
    return replace(config, data=replace(config.data, pretrain=str(rest))), steps, held_out


def train(config: DemoRunConfig, ptx: dict[str, float], steps: Steps, say: Callable[[str], object]) -> None:
    """Train base, SFT, reward model and PPO of one size, and PPO-ptx with each coefficient of `ptx` (folder -> coefficient)."""
    root, width = Path(config.output_dir), config.demo.hidden_size
    sft = starting_from(config, root / "sft")
    ppo = replace(sft, reward=replace(config.reward, path=str(root / "rm")))
    stages: dict[str, Callable[[], object]] = {
        "pretrain": lambda: make_base(config),
        "sft": lambda: run_sft(starting_from(config, root / "base"), **continued(root / "sft.checkpoint")),
        "reward model": lambda: run_rm(sft, **continued(root / "rm.checkpoint")),
        "ppo": lambda: run_ppo(ppo, **continued(root / "ppo")),
    }
    for folder, coef in ptx.items():
        mixed = replace(ppo, ppo=replace(ppo.ppo, ptx_coef=coef), output_dir=str(root / folder))
        stages[f"ppo-{folder}"] = partial(_train_ptx, mixed)
    for name, run in stages.items():
        do_once(steps, f"{width}: train {name}", partial(timed, run), say)


def _train_ptx(config: RunConfig) -> object:
    return run_ppo(config, **continued(Path(config.output_dir) / "ppo"))


def timed(run: Callable[[], object]) -> dict[str, float]:
    """Call `run` and return the seconds that it took, as the result of a step."""
    start = time.perf_counter()
    run()
    return {"seconds": time.perf_counter() - start}


def do_once(steps: Steps, name: str, run: Callable[[], dict[str, Any]], say: Callable[[str], object]) -> dict[str, Any]:
    """Run a step unless it is finished; return its result. `say` is called at its start and its end."""
    if name in steps:
        return steps.once(name, run)
    say(f"{name} ...")
    result = steps.once(name, run)
    say(f"{name}: {result['seconds']:.0f} s")
    return result


def seconds_of(steps: Steps) -> float:
    """Return the seconds of all finished steps."""
    return sum(result["seconds"] for result in steps.results.values())


def at_width(config: DemoRunConfig, width: int) -> DemoRunConfig:
    """Return the config of the models of one size; feed-forward layers are 11/4 as wide as the hidden state."""
    heads = width // config.figure.head_size
    demo = replace(config.demo, hidden_size=width, intermediate_size=width * 11 // 4, heads=heads)
    return replace(config, demo=demo, output_dir=str(Path(config.output_dir) / f"width_{width}"))


def judge(config: DemoRunConfig, name: str, model: str, index: int, held_out: Path) -> dict[str, Any]:
    """Sample and judge responses of the model in folder `model`; `index` gives each contestant separate random numbers."""
    start = time.perf_counter()
    setting, prefix = config.figure, ""
    if name == "base, prompted":
        prefix = few_shot_prefix(config)
        room = POSITIONS - config.rollout.max_response_tokens
        config = replace(config, rollout=replace(config.rollout, max_prompt_tokens=room))
    folder = Path(config.output_dir) / model
    seed = config.seed * 1_000 + _SEED + index
    answerer = Answerer(config, str(folder), seed=seed, prefix=prefix, stop=_BETWEEN if prefix else None)
    path = given(config.data.prompts, "data.prompts")
    records: list[PromptRecord] = list(read_prompts(path, "test"))[: setting.prompts]
    said = [answers for _, answers in answer_all(answerer, path, records, setting.samples)]
    marks = [
        [score(text_of(record.prompt), text) for text in answers.texts]
        for record, answers in zip(records, said, strict=True)
    ]
    ends = [end for answers in said for end in answers.ended]
    documents = read_documents(held_out, answerer.codec, config.output_dir)
    result = Result(
        width=config.demo.hidden_size,
        parameters=sum(parameter.numel() for parameter in answerer.actor.model.parameters()),
        marks=marks,
        ended=sum(ends) / len(ends),
        perplexity=perplexity(answerer.actor, documents, pad_id=answerer.codec.pad_id),
        seconds=time.perf_counter() - start,
    )
    return asdict(result)


def few_shot_prefix(config: DemoRunConfig) -> str:
    """Return short demonstrations, drawn by the seed, in the prompt template of the config."""
    path = given(config.data.demonstrations, "data.demonstrations")
    short = [record for record in read_demonstrations(path) if len(record.response) < 100]
    chosen = Random(config.seed).sample(short, config.figure.shots)
    frame = config.data.prompt_template
    return "".join(frame.replace("{prompt}", text_of(one.prompt)) + one.response + _BETWEEN for one in chosen)


def split_text(root: Path) -> tuple[Path, Path]:
    """Write the documents that `make_base` holds out, and the others, to two files; return their paths."""
    documents = (DATA / "pretrain.txt").read_text(encoding="utf-8").strip().split("\n\n")
    count = len(documents) // 20
    paths = root / "held_out.txt", root / "pretrain.txt"
    for path, part in zip(paths, (documents[:count], documents[count:]), strict=True):
        text = "\n\n".join(part) + "\n"
        with_new_file(path, lambda new, text=text: new.write_text(text, encoding="utf-8"))
    return paths


def _report(
    root: Path, config: DemoRunConfig, results: dict[str, list[Result]], baseline: Result, seconds: float
) -> str:
    rates = {
        name: [win_rate(one.marks, baseline.marks, seed=config.seed) for one in of_size]
        for name, of_size in results.items()
    }
    table = _table(results, rates, baseline, seconds)
    numbers = {
        "seed": config.seed,
        "prompts": len(baseline.marks),
        "seconds": seconds,
        "contestants": {
            name: [
                {key: value for key, value in asdict(one).items() if key != "marks"} | {"win_rate": asdict(rate)}
                for one, rate in zip(results[name], rates[name], strict=True)
            ]
            for name in results
        },
    }
    with_new_file(root / "figure.json", lambda new: write_json(new, numbers))
    with_new_file(root / "figure.md", lambda new: new.write_text(table + "\n", encoding="utf-8"))
    lines = {
        name: [(float(one.parameters), rate) for one, rate in zip(results[name], rates[name], strict=True)]
        for name in results
    }
    plot_win_rate_lines(
        lines,
        root / "figure.png",
        x_label="parameters",
        baseline=f"SFT, {baseline.parameters:,} parameters",
        log_x=True,
    )
    return table


def _table(results: dict[str, list[Result]], rates: dict[str, list[WinRate]], baseline: Result, seconds: float) -> str:
    sizes = [f"{one.parameters:,}" for one in next(iter(results.values()))]
    lines = [
        f"Win rate over the SFT model of {baseline.parameters:,} parameters by the judge, {len(baseline.marks)} held-out "
        f"prompts, and perplexity on held-out text ({seconds:.0f} s in all):",
        "",
        f"| | {' | '.join(f'{size} parameters | perplexity' for size in sizes)} |",
        "|---" * (1 + 2 * len(sizes)) + "|",
    ]
    for name, of_size in results.items():
        cells = [f"{rate} | {one.perplexity:.2f}" for rate, one in zip(rates[name], of_size, strict=True)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)
