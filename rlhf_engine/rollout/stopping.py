"""Why a response ended, and the texts at which it does.

Which tokens spell a text is not unique, and a text may begin within one token and end within another, so the texts are looked
for in what the last tokens decode to together.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from transformers import PreTrainedTokenizerBase

LENGTH, EOS, STOP_STRING, STOP_TOKEN = range(4)
STOP_REASONS = ("length", "eos", "stop_string", "stop_token")
"""Names of the numbers in `Rollout.stop_reason`."""
_MARGIN = 4
"""Tokens read in front of the longest text: as many bytes may be missing from a letter that a window cuts."""


class StopStrings:
    """Finds stop strings in responses of at most `tokens` tokens. ValueError for one that none of them can contain."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str], tokens: int | None = None) -> None:
        self.tokenizer, self.stops = tokenizer, tuple(stops)
        for index, stop in enumerate(self.stops):
            if not stop:
                raise ValueError(f"rollout.stop[{index}]: got an empty text, expected one with letters")
            if not self._possible(stop):
                raise ValueError(
                    f"rollout.stop[{index}]: got {stop!r}, which the tokenizer reads and writes as "
                    f"{self._text(self._ids(stop))!r}, expected a text that its tokens can spell"
                )
        if tokens is not None:
            self._check_lengths(tokens)
        # A token that shows at all writes one byte or more.
        self.reach = max(len(stop.encode()) for stop in self.stops) + _MARGIN
        self._shows = lru_cache(maxsize=None)(lambda token: bool(self._text([token])))

    def found(self, ids: Sequence[int]) -> bool:
        """Whether the last token of a response completes one of the texts, given that none came before."""
        first, left = len(ids), self.reach
        while first > 0 and left > 0:
            first -= 1
            left -= self._shows(ids[first])
        # A letter whose bytes are not all there yet is no letter.
        text = self._text(ids[first:]).rstrip("\ufffd")
        return any(stop in text for stop in self.stops)

    def _check_lengths(self, tokens: int) -> None:
        # A token's name has a letter for each of its text, or for each byte of it; words may come with a space between them.
        # Special tokens spell nothing.
        special = {token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        room = tokens * (1 + max((len(name) for name in self.tokenizer.get_vocab() if name not in special), default=0))
        for index, stop in enumerate(self.stops):
            if len(stop) > room:
                raise ValueError(
                    f"rollout.stop[{index}]: got a text of {len(stop)} letters, expected at most {room}, the most that the "
                    f"{tokens} tokens of rollout.max_response_tokens can spell"
                )

    def _possible(self, stop: str) -> bool:
        # Between letters too, because some tokenizers drop a space in front of a text.
        return any(stop in self._text(self._ids(text)) for text in (stop, f"a{stop}a"))

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def _text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)
