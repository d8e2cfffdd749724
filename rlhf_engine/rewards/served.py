"""Scores and judgments of servers: HTTP requests with a time limit, retries, a rate limit and a cache."""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx2
import torch
from torch import Tensor

from rlhf_engine.config.http import HttpConfig
from rlhf_engine.config.schema import shortened
from rlhf_engine.data import Codec, PlainPrompt
from rlhf_engine.files import parse_json
from rlhf_engine.rewards.awaiting import awaited
from rlhf_engine.rewards.calls import number
from rlhf_engine.rewards.functions import response_texts
from rlhf_engine.rewards.scaling import RewardFunction
from rlhf_engine.rollout import Rollout

CACHE = "http_cache.sqlite"
"""File in the output folder with the answers of servers."""
LONGEST_WAIT = 60.0
"""Maximum seconds before a request is repeated, unless the server asks for more."""
_AGAIN = frozenset((408, 425, 429, *range(500, 600)))
"""Status codes after which the same request may succeed."""
_SHOWN = 200
"""Characters of an answer in an error message."""

Value = TypeVar("Value")


class ServerError(ValueError):
    """A request, number `index` of a call, that failed in every attempt."""

    def __init__(self, index: int, what: str) -> None:
        super().__init__(what)
        self.index = index


class _Failed(Exception):
    """A failed attempt; `after` are the seconds that the server asks to wait, None if a repetition cannot succeed."""

    def __init__(self, what: str, after: float | None = 0.0) -> None:
        super().__init__(what)
        self.after = after


@dataclass(frozen=True)
class Server:
    """A server that answers POST requests with JSON.

    `cache` is the file with earlier answers, None keeps none.

    Raises:
        ValueError: `url` is not that of a server.
    """

    url: str
    settings: HttpConfig = field(default_factory=HttpConfig)
    cache: Path | None = None

    def __post_init__(self) -> None:
        check_url(self.url)

    def ask_all(self, bodies: Sequence[Mapping[str, Any]], read: Callable[[Any], Value]) -> list[Value]:
        """Return `read(answer)` for each request, with at most `concurrency` requests at once.

        `read` raises ValueError for an answer that it cannot read; the request is then repeated.

        Raises:
            ServerError: for the first request that failed in every attempt.
        """
        return awaited(_Requests(self, read).all(bodies)) if bodies else []


class _Requests:
    """The requests of one call."""

    def __init__(self, server: Server, read: Callable[[Any], Any]) -> None:
        self.server, self.settings, self.read = server, server.settings, read
        self.next = 0.0
        """Time at which the rate limit allows the next request."""

    async def all(self, bodies: Sequence[Mapping[str, Any]]) -> list[Any]:
        """Send all requests and return what was read of their answers."""
        key = os.environ.get(self.settings.key_variable, "")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.free = asyncio.Semaphore(self.settings.concurrency)
        with closing(_Cache(self.server.cache)) as self.cache:
            async with httpx2.AsyncClient(headers=headers, timeout=None, follow_redirects=True) as self.client:
                tasks = [asyncio.create_task(self._one(index, body)) for index, body in enumerate(bodies)]
                try:
                    return await asyncio.gather(*tasks)
                finally:
                    for task in tasks:
                        task.cancel()

    async def _one(self, index: int, body: Mapping[str, Any]) -> Any:
        key = sha256(json.dumps([self.server.url, body], sort_keys=True).encode()).hexdigest()
        known = self.cache.get(key)
        if known is not None:
            return self.read(known)
        async with self.free:
            for count, wait in enumerate(_waits(self.settings), start=1):
                try:
                    answer = await self._attempt(body)
                    value = self._read(answer)
                except _Failed as failed:
                    if wait is None or failed.after is None:
                        times = f", in each of {count} attempts" if count > 1 else ""
                        raise ServerError(index, f"{self.server.url}: {failed}{times}") from failed.__cause__
                    await asyncio.sleep(max(wait, failed.after))
                    continue
                self.cache.put(key, answer)
                return value
        raise AssertionError("the last attempt returns or raises")

    async def _attempt(self, body: Mapping[str, Any]) -> Any:
        await self._turn()
        try:
            async with asyncio.timeout(self.settings.timeout):
                answer = await self.client.post(self.server.url, json=body)
        except TimeoutError as error:
            limit = f"{self.settings.timeout:g}"
            raise _Failed(f"no answer in {limit} s; raise http.timeout or lower http.concurrency") from error
        except (httpx2.TransportError, httpx2.TooManyRedirects, httpx2.DecodingError) as error:
            what = str(error) or type(error).__name__
            raise _Failed(f"no connection ({what}); start the server, or correct the URL") from error
        if answer.status_code != 200:
            after = _seconds(answer.headers.get("Retry-After", "")) if answer.status_code in _AGAIN else None
            raise _Failed(f"status {answer.status_code}: {shortened(answer.text, _SHOWN)}", after)
        try:
            return parse_json(answer.content)
        except ValueError as error:
            raise _Failed(f"the answer is not JSON: {shortened(answer.text, _SHOWN)}") from error

    def _read(self, answer: Any) -> Any:
        try:
            return self.read(answer)
        except ValueError as error:
            raise _Failed(str(error)) from error

    async def _turn(self) -> None:
        """Wait until the rate limit allows a request."""
        if self.settings.requests_per_second:
            now = time.monotonic()
            turn = max(now, self.next)
            self.next = turn + 1.0 / self.settings.requests_per_second
            await asyncio.sleep(turn - now)


def _waits(settings: HttpConfig) -> Iterator[float | None]:
    """Yield the seconds to wait after each attempt; None after the last one."""
    for repeated in range(settings.retries):
        yield min(settings.wait * 2.0**repeated, LONGEST_WAIT)
    yield None


def _seconds(text: str) -> float:
    """Return the seconds of a Retry-After header; 0 for a date and for text that is no number."""
    return float(text) if text.isdecimal() else 0.0


class _Cache:
    """Answers by the hash of their request, in an SQLite file; without a file, nothing is kept."""

    def __init__(self, path: Path | None) -> None:
        self.file = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self.file = sqlite3.connect(path, isolation_level=None)
                self.file.execute("CREATE TABLE IF NOT EXISTS answers (request TEXT PRIMARY KEY, answer TEXT)")
            except sqlite3.DatabaseError as error:
                raise ValueError(f"{path}: not a cache of answers ({error}); delete it") from None

    def get(self, key: str) -> Any:
        if self.file is None:
            return None
        found = self.file.execute("SELECT answer FROM answers WHERE request = ?", (key,)).fetchone()
        return None if found is None else json.loads(found[0])

    def put(self, key: str, answer: Any) -> None:
        if self.file is not None:
            self.file.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (key, json.dumps(answer)))

    def close(self) -> None:
        if self.file is not None:
            self.file.close()


def check_url(url: str) -> None:
    """Raise ValueError unless `url` is one of http or https with a host."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"got {url!r}, expected a URL such as http://localhost:8000/score")


def served_reward(
    server: Server,
    codec: Codec,
    *,
    prompt_of: Callable[[Sequence[int]], PlainPrompt],
    columns_of: Callable[[Sequence[int]], Mapping[str, Any]],
    columns: Sequence[str] = (),
) -> RewardFunction:
    """Return a reward that asks a server for scores.

    A request is `{"prompts": [...], "responses": [...], "columns": {name: [...]}}` with at most `http.batch` responses, and its
    answer `{"scores": [...]}` with one finite number per response. Prompts are texts, or lists of messages. `columns_of`
    returns the `columns` of the record for the token ids of its prompt.
    The returned reward raises ValueError if the server fails in every attempt.
    """
    size = server.settings.batch

    def scores(rollout: Rollout) -> Tensor:
        ids, responses = rollout.prompts(), response_texts(rollout, codec)
        rows = [columns_of(prompt) for prompt in ids]
        parts = [slice(start, start + size) for start in range(0, len(ids), size)]
        bodies = [
            {
                "prompts": [prompt_of(prompt) for prompt in ids[part]],
                "responses": responses[part],
                "columns": {name: [row.get(name) for row in rows[part]] for name in columns},
            }
            for part in parts
        ]
        try:
            found = server.ask_all(bodies, _scores_of)
        except ServerError as error:
            part = parts[error.index]
            last = min(part.stop, len(ids)) - 1
            raise ValueError(f"reward.url: responses {part.start} to {last}: {error}") from error.__cause__
        counts = [len(body["responses"]) for body in bodies]
        for part, values, count in zip(parts, found, counts, strict=True):
            if len(values) != count:
                raise ValueError(
                    f"reward.url: responses {part.start} to {part.start + count - 1}: {server.url}: got {len(values)} scores, "
                    f"expected {count}, one per response"
                )
        return torch.tensor([value for values in found for value in values], dtype=torch.float32)

    return scores


def _scores_of(answer: Any) -> list[float]:
    given = answer.get("scores") if isinstance(answer, dict) else None
    if not isinstance(given, list):
        raise ValueError(f"got {shortened(repr(answer), _SHOWN)}, expected an object with scores, a list of numbers")
    found = [number(value) for value in given]
    for value, one in zip(given, found, strict=True):
        if one is None or one != one or abs(one) == float("inf"):
            raise ValueError(f"got the score {value!r}, expected a finite number")
    return [one for one in found if one is not None]
