"""Round trip of generated texts and sampled ids through every kind of tokenizer: `python -m tests.engine.data.round_trip`.

`Codec.truncated` must count a text whose ids decode to a different one, and `Codec.text_differs` must report ids whose text has
other ids.
"""

from __future__ import annotations

import argparse
import random
import sys
from dataclasses import dataclass

from rlhf_engine.data import Codec
from tests.engine.helpers.tokenizers import KINDS, text_of


@dataclass
class Found:
    """Numbers of one tokenizer."""

    texts: int = 0
    exact: int = 0
    """Texts that are equal after encoding and decoding."""
    reported: int = 0
    """Texts or ids with a difference that the codec reports."""
    silent: int = 0
    """Differences that it does not report."""


def round_trip(kind: str, count: int, seed: int = 0) -> Found:
    """Encode and decode `count` texts, and decode and encode as many random responses."""
    tokenizer = KINDS[kind]()
    codec, rng, found = Codec(tokenizer, max_response_tokens=10**6), random.Random(seed), Found()
    ids_of_tokens = sorted(tokenizer.get_vocab().values())
    for _ in range(count):
        text, before = text_of(rng, tokenizer), codec.truncated.inexact
        ids = codec.encode_response(text)
        reported = codec.truncated.inexact > before
        found.texts += 1
        found.exact += codec.decode_response(ids) == text
        found.reported += reported
        # The ids of a text, if they spell it, are those of their text.
        found.silent += reported == (codec.decode_response(ids) == text) or (not reported and codec.text_differs(ids))
        sampled = [*rng.choices(ids_of_tokens, k=rng.randint(0, 12)), codec.eos_id]
        content = codec.content(sampled)
        same = codec.encode_content(codec.decode_response(sampled)) == content
        found.reported += not same
        found.silent += same == codec.text_differs(sampled)
    return found


def main() -> int:
    """Print a table of all tokenizers; return 1 if a difference is not reported."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--texts", type=int, default=20_000)
    count, silent = parser.parse_args().texts, 0
    for kind in KINDS:
        found = round_trip(kind, count)
        silent += found.silent
        print(f"{kind:20} {found.exact} of {found.texts} exact, {found.reported} reported, {found.silent} not reported")
    return int(silent > 0)


if __name__ == "__main__":
    sys.exit(main())
