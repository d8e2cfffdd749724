"""Judges, which decide which of two answers to a prompt is better: a reward model, a user's function, or a server (`served`).

Legend: M pairs of answers, each with its prompt.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_engine.config.http import HttpConfig
from rlhf_engine.data import Codec
from rlhf_engine.data.records import Prompt, plain
from rlhf_engine.evaluate.served import SERVED, ServedJudge
from rlhf_engine.evaluate.win_rate import score_preferences
from rlhf_engine.model.pretrained import load_tokenizer, max_positions
from rlhf_engine.model.reward_model import RewardModel
from rlhf_engine.rewards.calls import ask, number, shown_prompt
from rlhf_engine.rewards.user_code import SampleError, import_function
from rlhf_engine.supervised.reward_model import score_examples

Prompts = Sequence[Prompt]
Texts = Sequence[str]

_FUNCTION = re.compile(r"(.+\.py|[A-Za-z_][\w.]*):[A-Za-z_]\w*")
_NO_LIMIT = 2**31


class Judge(Protocol):
    """Interface of a judge, which compares M pairs of answers per call."""

    def compare(self, prompts: Prompts, first: Texts, second: Texts) -> Tensor:
        """Return (M,) float64: 1 where the first answer is better, 0 where the second one is, 1/2 for a tie."""
        ...


class RewardJudge:
    """Reward model with its own tokenizer: the answer with the higher score is better, scores within `margin` are a tie."""

    def __init__(self, model: RewardModel, codec: Codec, margin: float = 0.0) -> None:
        self.model, self.codec, self.margin = model, codec, margin

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        prompt_template: str,
        margin: float = 0.0,
        trust_remote_code: bool = False,
        codec_settings: Callable[[PreTrainedTokenizerBase], dict[str, Any]] = lambda tokenizer: {},
        **placement: Any,
    ) -> RewardJudge:
        """Load a judge from a reward model's folder. `codec_settings` returns further arguments of its codec.

        Raises:
            ValueError: something is missing in the folder; the message names it.
        """
        model = RewardModel.load(folder, trust_remote_code=trust_remote_code, **placement)
        tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
        limit = max_positions(model.trunk)
        longest = _NO_LIMIT if limit is None else limit
        lengths = (longest, longest, limit)
        return cls(model, Codec(tokenizer, prompt_template, *lengths, **codec_settings(tokenizer)), margin)

    def compare(self, prompts: Prompts, first: Texts, second: Texts) -> Tensor:
        """Compare answers by their scores; see `Judge`."""
        return score_preferences(self.scores(prompts, first) - self.scores(prompts, second), self.margin)

    def scores(self, prompts: Prompts, answers: Texts) -> Tensor:
        """Return (M,) float64 scores.

        Raises:
            ValueError: a sample is too long for the model, or its score is not finite; the message names the sample.
        """
        examples = []
        for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            try:
                examples.append(self.codec.join(self.codec.encode_prompt(prompt), answer))
            except ValueError as error:
                raise ValueError(f"judge: sample {index}: {error}") from None
        scores = score_examples(self.model, examples, self.codec.pad_id).double()
        if not scores.isfinite().all():
            index = int((~scores.isfinite()).nonzero()[0])
            raise ValueError(f"judge: sample {index}: got the score {float(scores[index])}, expected a finite number")
        return scores


class FunctionJudge:
    """A Python function `judge(prompts, answers_a, answers_b)` on lists of equal length.

    Prompts and answers are strings; a prompt that is a conversation is a list of objects with role and content.

    The function returns either one number per pair, the preference for A in [0, 1] with 1/2 for a tie, or two lists of
    scores, one for the answers A and one for the answers B. Tensors and arrays may replace lists.
    """

    def __init__(
        self, function: Callable[..., Any], name: str = "judge", *, batch: int = 64, margin: float = 0.0
    ) -> None:
        self.function, self.name, self.batch, self.margin = function, name, batch, margin

    @classmethod
    def load(cls, name: str, *, batch: int = 64, margin: float = 0.0) -> FunctionJudge:
        """Load a judge from `module:function` or `file.py:function`.

        Raises:
            ValueError: there is no such function.
        """
        return cls(import_function(name, "judge"), name, batch=batch, margin=margin)

    def compare(self, prompts: Prompts, first: Texts, second: Texts) -> Tensor:
        """Compare answers with the function, `batch` pairs per call; see `Judge`.

        Raises:
            ValueError: the function raises, or returns something other than the numbers described above; the message names
                the first such sample, or the samples of the call.
        """
        parts = [torch.empty(0, dtype=torch.float64)]
        for start in range(0, len(prompts), self.batch):
            stop = min(start + self.batch, len(prompts))
            asked = [plain(prompt) for prompt in prompts[start:stop]]
            parts.append(self._ask(start, [asked, list(first[start:stop]), list(second[start:stop])]))
        return torch.cat(parts)

    def _ask(self, start: int, texts: list[list[Any]]) -> Tensor:
        size = len(texts[0])
        samples = f"sample {start}" if size == 1 else f"samples {start} to {start + size - 1}"
        try:
            returned = ask(self.function, texts, f"judge {self.name}: {samples}")
        except SampleError as error:
            shown = shown_prompt(texts[0][error.row])
            raise ValueError(
                f"judge {self.name}: sample {start + error.row}: {error}; prompt: {shown}"
            ) from error.__cause__
        returned = returned if isinstance(returned, list) else [returned]
        scored = len(returned) == 2 and all(isinstance(column, list) for column in returned)
        columns = returned if scored else [returned]
        numbers = torch.stack([self._numbers(column, start, size) for column in columns])
        if scored:
            return score_preferences(numbers[0] - numbers[1], self.margin)
        outside = ((numbers[0] < 0) | (numbers[0] > 1)).nonzero()
        if len(outside):
            index = int(outside[0])
            raise ValueError(
                f"judge {self.name}: sample {start + index}: got the preference {float(numbers[0, index])}, expected one in "
                "[0, 1]; return scores as two lists"
            )
        return numbers[0]

    def _numbers(self, column: list[Any], start: int, size: int) -> Tensor:
        if len(column) != size:
            raise ValueError(
                f"judge {self.name}: samples {start} to {start + size - 1}: got {len(column)} values, expected {size}, one "
                "per pair"
            )
        numbers = [number(value) for value in column]
        for index, (found, value) in enumerate(zip(numbers, column, strict=True)):
            if found is None or not math.isfinite(found):
                raise ValueError(f"judge {self.name}: sample {start + index}: got {value!r}, expected a finite number")
        return torch.tensor(numbers, dtype=torch.float64)


def load_judge(
    name: str,
    *,
    prompt_template: str,
    batch: int = 64,
    margin: float = 0.0,
    http: HttpConfig | None = None,
    cache: Path | None = None,
    **settings: Any,
) -> RewardJudge | FunctionJudge | ServedJudge:
    """Return the judge `name` of a config: `module:function`, `file.py:function`, `openai:URL#MODEL`, or a folder.

    A folder is that of a reward model. `http` and `cache` are the limits of requests and the file of earlier answers, and
    `settings` those of `RewardJudge.load`.
    """
    if name.startswith(SERVED):
        return ServedJudge.load(name, http or HttpConfig(), cache)
    if _FUNCTION.fullmatch(name) and not Path(name).exists():
        return FunctionJudge.load(name, batch=batch, margin=margin)
    try:
        return RewardJudge.load(name, prompt_template=prompt_template, margin=margin, **settings)
    except ValueError as error:
        raise ValueError(f"judge: {error}") from None


def rank(judge: Judge, prompts: Prompts, completions: Sequence[Texts]) -> list[tuple[float, ...]]:
    """Return the ranks of each prompt's completions. A rank is the number of wins fewer than the best one has (0: the best).

    All pairs of completions are compared (Copeland's method). For a judge with scores the ranks have the order of the scores.
    """
    games = [(row, i, j) for row, texts in enumerate(completions) for i in range(len(texts)) for j in range(i)]
    preferences = _play(judge, prompts, completions, games).tolist()
    wins = [[0.0] * len(texts) for texts in completions]
    for (row, i, j), preference in zip(games, preferences, strict=True):
        wins[row][i] += preference
        wins[row][j] += 1.0 - preference
    return [tuple(max(won) - one for one in won) for won in wins]


def _play(
    judge: Judge, prompts: Prompts, completions: Sequence[Texts], games: Sequence[tuple[int, int, int]]
) -> Tensor:  # (games,) float64
    """Return the preferences of the comparisons (row, one, other); a reward model reads every completion only once."""
    if not isinstance(judge, RewardJudge):
        return judge.compare(
            [prompts[row] for row, _, _ in games],
            [completions[row][i] for row, i, _ in games],
            [completions[row][j] for row, _, j in games],
        )
    every = ((row, i) for row, texts in enumerate(completions) for i in range(len(texts)))
    places = {place: number for number, place in enumerate(every)}
    scores = judge.scores([prompts[row] for row, _ in places], [completions[row][i] for row, i in places])
    first = scores[torch.tensor([places[row, i] for row, i, _ in games])]
    return score_preferences(first - scores[torch.tensor([places[row, j] for row, _, j in games])], judge.margin)
