"""Detection and redaction of personally identifiable information in a text.

Fast regular expressions propose candidates, and a check of the format decides: the Luhn digit for cards, the country's layout
and mod 97 for IBANs, national numbering plans for phones, `ipaddress` for IP addresses. Ambiguous text counts as personal: a
serial number may be a valid phone number. Postal addresses and names without an honorific are not detected, because they need a
language model.
"""

from __future__ import annotations

import ipaddress
import re
from bisect import bisect
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import phonenumbers
from stdnum import iban, luhn

from rlhf_engine.config.hygiene import HONORIFICS

_EMAIL = re.compile(r"(?<![\w.+%-])[\w+%-][\w.+%'-]{0,63}@(?:[\w-]{1,63}\.){1,8}[^\W\d_]{2,24}(?![\w-])")
# Two letters and two digits, then all characters that can belong to an IBAN; the check determines the length. The candidate is
# in a lookahead, so that a false start does not consume a valid IBAN that begins later.
_IBAN = re.compile(r"(?<!\w)(?=([A-Za-z]{2}\d{2}(?:[ -]?[A-Za-z\d]){11,30}))")
# Without separators, or in the groups that are printed on cards, so that a list of small numbers is no candidate. Three digits
# after four groups are the end of a long card number, or the card's verification code.
_CARD = re.compile(
    r"(?<![\w.])((?:[2-6]\d{12,18}|[2-6]\d{3}([ -])\d{4}\2\d{4}\2\d{4}|3\d{3}([ -])\d{6}\3\d{4,5}))(?!\w)(?:([ -]\d{3})(?!\w))?"
)
_IPV4 = re.compile(r"(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?!\w|\.\d)")
_IPV6 = re.compile(
    r"(?<![\w:.])[\da-f]{0,4}(?::[\da-f]{0,4}){2,7}(?:(?<=:)\d{1,3}(?:\.\d{1,3}){3})?(?![\w:])", re.IGNORECASE
)
_PHONE = re.compile(r"\+?\(?\d(?:[^\w\n,;:]{0,3}\d){6,}")
# The most common runs of digits that are not phone numbers. They are skipped because the library is slow.
_DATE_OR_DECIMAL = re.compile(r"\d{4}-\d\d-\d\d(?: \d\d)?|(?=(?:\d\.?){7,9}\Z)\d+\.\d+")
# Initials are part of a name: "Dr. J. R. Smith".
_UPPER, _LETTERS = "[A-ZÀ-ÖØ-Þ]", r"(?:[^\W\d_]|['’-](?=[^\W\d_]))"
_NAME = rf"[ \t]{{1,3}}(?:{_UPPER}{_LETTERS}{{0,30}}\.?[ \t]{{1,3}}){{0,3}}{_UPPER}{_LETTERS}{{1,30}}"
_DIGIT = re.compile(r"\d")
_PHONE_MARGIN = 12  # characters around a candidate that the library reads: adjacent ones, and an extension
_PHONE_TRIES = 100  # false candidates per run of digits after which the library gives up


@dataclass(frozen=True)
class Finding:
    """One piece of personal information in a text."""

    kind: str
    """email, iban, card, ip, phone or name."""
    start: int
    """Index of its first character."""
    end: int
    """Index after its last character."""


class PiiFinder:
    """Finder of personal information in texts.

    A phone number without a country code is parsed as one of each of `phone_regions` in turn. A name is detected after one of
    `honorifics`, with or without a period; an honorific that ends in a period matches only with it.
    """

    def __init__(self, phone_regions: tuple[str, ...] = ("US", "GB"), honorifics: tuple[str, ...] = HONORIFICS) -> None:
        """Compile the patterns; raise ValueError if one of `phone_regions` is not a two-letter code with a numbering plan."""
        unknown = [region for region in phone_regions if region not in phonenumbers.SUPPORTED_REGIONS]
        if unknown:
            raise ValueError(f"phone_regions: got {unknown[0]!r}, expected two-letter country codes such as 'US'")
        # With None the library finds only numbers with a country code; with a region it finds those as well.
        self._regions = phone_regions or (None,)
        # A lookahead for the first letters rejects most positions early, which saves a third of the time.
        first = re.escape("".join({word[0]: "" for word in honorifics}))
        titles = "|".join(_title(word) for word in honorifics)
        self._name = re.compile(rf"(?<!\w)(?=[{first}])(?:{titles}){_NAME}") if honorifics else None

    def find(self, text: str) -> list[Finding]:
        """Return all findings in `text`, ordered and without overlaps; of two that overlap, the more reliable kind is kept."""
        searches: list[tuple[str, Callable[[str], Iterator[tuple[int, int]]]]] = []
        if "@" in text:
            searches.append(("email", _emails))
        if _DIGIT.search(text):
            searches += [("iban", _ibans), ("card", _cards), ("ip", _addresses), ("phone", self._phones)]
        if self._name is not None:
            searches.append(("name", self._names))
        spans: list[tuple[int, int, str]] = []  # sorted by position
        for kind, search in searches:
            for start, end in search(text):
                at = bisect(spans, (start,))
                if (at == 0 or spans[at - 1][1] <= start) and (at == len(spans) or end <= spans[at][0]):
                    spans.insert(at, (start, end, kind))
        return [Finding(kind, start, end) for start, end, kind in spans]

    def _names(self, text: str) -> Iterator[tuple[int, int]]:
        assert self._name is not None
        return (match.span() for match in self._name.finditer(text))

    def _phones(self, text: str) -> Iterator[tuple[int, int]]:
        for candidate in _PHONE.finditer(text):
            if _DATE_OR_DECIMAL.fullmatch(candidate[0]):
                continue
            first = max(0, candidate.start() - _PHONE_MARGIN)
            window = text[first : candidate.end() + _PHONE_MARGIN]
            for region in self._regions:
                matches = list(phonenumbers.PhoneNumberMatcher(window, region, max_tries=_PHONE_TRIES))
                for match in matches:
                    # In "(020 7946 0958)" the parenthesis is not part of the number; in "(020) 7946 0958" it is.
                    bracket = match.raw_string.startswith("(") and ")" not in match.raw_string
                    yield first + match.start + bracket, first + match.end
                if matches:
                    break


def _title(word: str) -> str:
    """Return the pattern of a title; one with a period must not end an abbreviation, as "M." does in "5 P.M. Eastern"."""
    return rf"(?<!\w\.){re.escape(word)}" if word.endswith(".") else rf"{re.escape(word)}\b\.?"


def redact(text: str, findings: list[Finding]) -> str:
    """Return `text` with every finding replaced by a mark such as [EMAIL]; `findings` are ordered as `find` returns them."""
    pieces, at = [], 0
    for finding in findings:
        pieces += [text[at : finding.start], f"[{finding.kind.upper()}]"]
        at = finding.end
    return "".join([*pieces, text[at:]])


def _emails(text: str) -> Iterator[tuple[int, int]]:
    return (match.span() for match in _EMAIL.finditer(text))


def _ibans(text: str) -> Iterator[tuple[int, int]]:
    for match in _IBAN.finditer(text):
        start, candidate = match.start(1), match[1]
        # Words after an IBAN match the pattern as well, so the longest valid prefix is the IBAN.
        for length in range(len(candidate), 14, -1):
            if candidate[length - 1].isalnum() and iban.is_valid(candidate[:length]):
                yield start, start + length
                break


def _cards(text: str) -> Iterator[tuple[int, int]]:
    for match in _CARD.finditer(text):
        for number in filter(None, (match[1], match[4] and match[1] + match[4])):
            if luhn.is_valid(re.sub(r"\D", "", number)):
                yield match.start(), match.start() + len(number)
                break


def _addresses(text: str) -> Iterator[tuple[int, int]]:
    if text.count(".") >= 3:
        yield from (match.span() for match in _IPV4.finditer(text) if _is_address(match[0]))
    if text.count(":") >= 2:
        # A Python slice such as [1::2] is a valid address too; addresses of machines have at least three groups.
        long = (match for match in _IPV6.finditer(text) if sum(map(bool, re.split("[:.]", match[0]))) >= 3)
        yield from (match.span() for match in long if _is_address(match[0]))


def _is_address(text: str) -> bool:
    """Return whether `text` is an IP address of a machine, so not 127.0.0.1, 0.0.0.0, multicast or broadcast."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    return not (address.is_loopback or address.is_unspecified or address.is_multicast or int(address) == 2**32 - 1)
