"""Settings of `rlhf data clean`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rlhf_engine.config.schema import Count, Section, Seed, Share

_HONORIFICS = (
    "Mr Mrs Ms Miss Mx Dr Prof Professor Rev Reverend Sir Dame Herr Herrn Frau M. Monsieur Madame Mademoiselle Mme Mlle "
    "Señor Señora Señorita Sr. Sra Srta Doña Signor Signora Signorina Sig. Sig.ra Sig.na Dott Dott.ssa Prof.ssa Avv. Ing."
)
HONORIFICS = tuple(_HONORIFICS.split())
"""English, German, French, Spanish and Italian."""


@dataclass(frozen=True)
class HygieneConfig(Section):
    """What `rlhf data clean` does to prompts (InstructGPT, section 3.2); see rlhf_engine/data/hygiene.py."""

    prefix_chars: Count = 128
    """Two prompts whose first characters, this many, are the same count as one; shorter ones must be the same."""
    user_limit: Count = 200
    """Most prompts of one user."""
    validation_share: Share = 0.1
    """Share of the users whose prompts are for validation."""
    test_share: Share = 0.1
    """Share of the users whose prompts are for the test."""
    split_seed: Seed = 0
    """Another seed gives another split."""
    pii: Literal["drop", "redact", "keep"] = "drop"
    """Training prompts with personal information are dropped, lose it to a mark such as [EMAIL], or stay."""
    phone_regions: tuple[str, ...] = ("US", "GB")
    """Countries that a phone number without a country code may be of."""
    honorifics: tuple[str, ...] = HONORIFICS
    """What a name follows, a period behind it or not; one that ends in a period has to have it. Without any, names stay."""
    bad_lines: Literal["refuse", "skip"] = "refuse"
    """A line that holds no prompt with a user id stops the run, or is skipped and counted."""

    def check(self) -> None:
        """Something is left to train on, and an honorific is a text."""
        odd = [word for word in self.honorifics if word != word.strip() or not word.rstrip(".")[-1:].isalnum()]
        if odd:
            raise ValueError(
                f"honorifics: got {odd[0]!r}, expected a text without blanks around it that ends in a letter, or in a letter "
                "and a period"
            )
        if self.validation_share + self.test_share >= 1.0:
            raise ValueError(
                f"test_share: got {self.test_share} beside validation_share {self.validation_share}, expected less than 1 "
                "together"
            )
