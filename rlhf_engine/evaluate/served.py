"""A language model as judge, on a server with the API of OpenAI, such as that of vLLM."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_engine.config.http import HttpConfig
from rlhf_engine.config.schema import shortened
from rlhf_engine.data.records import Prompt
from rlhf_engine.rewards.served import Server, ServerError, check_url

SERVED = "openai:"
"""Beginning of the name of such a judge: `openai:URL#MODEL`."""

_SYSTEM = (
    "You compare two responses to the same request. Judge how well each one does what the request asks: whether it is "
    "correct, complete and clear. Their length and their order do not count. You may reason first. End with one of "
    "[[A]] (response A is better), [[B]] (response B is better) and [[C]] (both are equally good)."
)
_QUESTION = "Request:\n{prompt}\n\nResponse A:\n{first}\n\nResponse B:\n{second}"
_VERDICT = re.compile(r"\[\[\s*([ABC])\s*\]\]")
_PREFERENCES = {"A": 1.0, "B": 0.0, "C": 0.5}


class ServedJudge:
    """A model that is asked for every pair in both orders, so that a preference for a place cancels.

    A preference is the mean of both verdicts: 1, 1/2 or 0, and 3/4 or 1/4 if one of them is a tie.
    """

    def __init__(self, server: Server, model: str) -> None:
        self.server, self.model = server, model

    @classmethod
    def load(cls, name: str, settings: HttpConfig, cache: Path | None) -> ServedJudge:
        """Return the judge `openai:URL#MODEL`; nothing is sent.

        Raises:
            ValueError: the name has a different form.
        """
        url, mark, model = name.removeprefix(SERVED).rpartition("#")
        if not mark or not model:
            raise ValueError(
                f"judge: got {name!r}, expected openai:URL#MODEL, such as openai:http://localhost:8000/v1#qwen"
            )
        try:
            check_url(url)
        except ValueError as error:
            raise ValueError(f"judge: {error}") from None
        return cls(Server(f"{url.rstrip('/')}/chat/completions", settings, cache), model)

    def compare(self, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str]) -> Tensor:
        """Compare answers with two requests per pair; see `Judge`.

        Raises:
            ValueError: the server fails, or its answer has no verdict, in every attempt; the message names the sample.
        """
        bodies = [
            self._body(prompt, *answers)
            for prompt, one, other in zip(prompts, first, second, strict=True)
            for answers in ((one, other), (other, one))
        ]
        try:
            verdicts = self.server.ask_all(bodies, verdict)
        except ServerError as error:
            raise ValueError(f"judge {self.model}: sample {error.index // 2}: {error}") from error.__cause__
        both = torch.tensor(verdicts, dtype=torch.float64).reshape(-1, 2)
        return (both[:, 0] + 1.0 - both[:, 1]) / 2.0

    def _body(self, prompt: Prompt, first: str, second: str) -> dict[str, Any]:
        text = prompt if isinstance(prompt, str) else "\n".join(f"{turn.role}: {turn.content}" for turn in prompt)
        question = _QUESTION.format(prompt=text, first=first, second=second)
        messages = [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": question}]
        return {"model": self.model, "messages": messages, "temperature": 0.0}


def verdict(answer: Any) -> float:
    """Return the preference for A in the answer of a server; raise ValueError without one."""
    try:
        reply = answer["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        reply = None
    if not isinstance(reply, str):
        raise ValueError(f"got {shortened(repr(answer), 200)}, expected an answer with choices[0].message.content")
    found = _VERDICT.findall(reply)
    if not found:
        raise ValueError(
            f"got the reply {shortened(repr(reply), 200)}, expected one that ends with [[A]], [[B]] or [[C]]"
        )
    return _PREFERENCES[found[-1]]
