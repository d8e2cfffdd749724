"""Reasons why a response ends, and the search for stop strings.

Different token sequences can spell the same text, and a stop string may begin and end in the middle of tokens. The search
therefore decodes the last tokens together and looks for the stop strings in that text.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import lru_cache

from transformers import PreTrainedTokenizerBase

from rlhf_engine.data.special_tokens import exact_text, silent_ids, special_tokens, token_id

LENGTH, EOS, STOP_STRING, STOP_TOKEN = range(4)
STOP_REASONS = ("length", "eos", "stop_string", "stop_token")
"""Name of each value of `Rollout.stop_reason`."""
_MARGIN = 4
"""Tokens decoded in addition to the longest stop string: the window may cut a character, which has up to 4 bytes."""


def stop_tokens(tokenizer: PreTrainedTokenizerBase, stops: Sequence[str]) -> dict[str, int]:
    """Return the ids of those stop strings that are special tokens."""
    special = special_tokens(tokenizer)
    return {stop: token_id(tokenizer, stop) for stop in stops if stop in special}


class StopStrings:
    """Search for stop strings in responses of at most `tokens` tokens, except those in `special`, which are tokens.

    Raises:
        ValueError: for a stop string that no response can contain.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stops: Sequence[str],
        tokens: int | None = None,
        special: Collection[str] = (),
    ) -> None:
        self.tokenizer, self.stops = tokenizer, tuple(stops)
        self.silent = silent_ids(tokenizer)
        if tokenizer.unk_token is not None:
            self.silent |= {token_id(tokenizer, str(tokenizer.unk_token))}
        for index, stop in enumerate(self.stops):
            if stop in special:
                continue
            if not stop:
                raise ValueError(f"rollout.stop[{index}]: got an empty text, expected at least one character")
            if not self._possible(stop):
                raise ValueError(
                    f"rollout.stop[{index}]: got {stop!r}, which the tokenizer encodes and decodes to "
                    f"{self._text(self._ids(stop))!r}, expected a text that its tokens can spell"
                )
        if tokens is not None:
            self._check_lengths(tokens)
        self.stops = tuple(stop for stop in self.stops if stop not in special)
        # Every token that decodes to text adds at least one byte.
        self.reach = max(len(stop.encode()) for stop in self.stops) + _MARGIN
        self._shows = lru_cache(maxsize=None)(lambda token: bool(self._text([token])))

    def found(self, ids: Sequence[int]) -> bool:
        """Return whether the last token of a response completes a stop string, if none was complete before it."""
        first, left = len(ids), self.reach
        while first > 0 and left > 0:
            first -= 1
            left -= self._shows(ids[first])
        # A character whose bytes are incomplete decodes to U+FFFD.
        text = self._text(ids[first:]).rstrip("\ufffd")
        return any(stop in text for stop in self.stops)

    def _check_lengths(self, tokens: int) -> None:
        # A token's name has one character per character or byte of its text, and decoding may add a space between words.
        names = (len(name) for name, token in self.tokenizer.get_vocab().items() if token not in self.silent)
        room = tokens * (1 + max(names, default=0))
        for index, stop in enumerate(self.stops):
            if len(stop) > room:
                raise ValueError(
                    f"rollout.stop[{index}]: got a text of {len(stop)} characters, expected at most {room}, the most that the "
                    f"{tokens} tokens of rollout.max_response_tokens can spell"
                )

    def _possible(self, stop: str) -> bool:
        # Test it between letters too, because some tokenizers drop a space at the start of a text.
        return any(stop in self._text(self._ids(text)) for text in (stop, f"a{stop}a"))

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def _text(self, ids: Sequence[int]) -> str:
        return exact_text(self.tokenizer, ids, self.silent)
