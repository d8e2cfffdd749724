"""Settings of `rlhf data clean`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rlhf_engine.config.schema import Count, PositiveShare, Section, Seed, Share

_HONORIFICS = (
    "Mr Mrs Ms Miss Mx Dr Prof Professor Rev Reverend Sir Dame Herr Herrn Frau M. Monsieur Madame Mademoiselle Mme Mlle "
    "Señor Señora Señorita Sr. Sra Srta Doña Signor Signora Signorina Sig. Sig.ra Sig.na Dott Dott.ssa Prof.ssa Avv. Ing."
)
HONORIFICS = tuple(_HONORIFICS.split())
"""Titles that precede names in English, German, French, Spanish and Italian."""


@dataclass(frozen=True)
class HygieneConfig(Section):
    """Cleaning of prompts by `rlhf data clean` (InstructGPT, section 3.2); see rlhf_engine/data/hygiene.py."""

    prefix_chars: Count = 128
    """Length of the prefix that identifies duplicates, in characters: of several prompts with the same prefix only the
    first is kept. Shorter prompts are duplicates if they are equal."""
    frame_share: PositiveShare | None = 0.1
    """Share of the prompts from which text of more than prefix_chars characters at their beginning counts as a frame,
    such as an instruction, and is left out of the comparison. Reading the file for it takes as long as parsing it. If
    None, no text does; system messages are always left out."""
    user_limit: Count = 200
    """Maximum number of prompts per user; the first ones are kept. Prompts without a user id are not limited."""
    validation_share: Share = 0.1
    """Fraction of the users whose prompts form the validation split."""
    test_share: Share = 0.1
    """Fraction of the users whose prompts form the test split."""
    split_seed: Seed = 0
    """Seed of the hash that assigns users to splits."""
    pii: Literal["drop", "redact", "keep"] = "drop"
    """Handling of personal information in training prompts: drop removes the prompt, redact replaces the information
    with a mark such as [EMAIL], keep changes nothing."""
    phone_regions: tuple[str, ...] = ("US", "GB")
    """Two-letter codes of the countries whose numbering plans are tried for a phone number without a country code."""
    honorifics: tuple[str, ...] = HONORIFICS
    """Titles that mark the next words as a name, with or without a period after the title. A title that is listed with
    a period matches only with it. If the list is empty, names are not detected."""
    bad_lines: Literal["refuse", "skip"] = "refuse"
    """Handling of a line that is not a valid prompt: refuse stops with an error, skip leaves the line
    out and counts it."""

    def check(self) -> None:
        """Raise ValueError for a malformed honorific, or if the shares leave no users for training."""
        odd = [word for word in self.honorifics if word != word.strip() or not word.rstrip(".")[-1:].isalnum()]
        if odd:
            raise ValueError(
                f"honorifics: got {odd[0]!r}, expected a text without surrounding blanks that ends in a letter or "
                "digit, optionally followed by a period"
            )
        if self.validation_share + self.test_share >= 1.0:
            raise ValueError(
                f"test_share: got {self.test_share} with validation_share {self.validation_share}, expected a sum below 1, so "
                "that users are left for training"
            )
