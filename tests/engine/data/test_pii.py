"""Detection of personal information: findings, false candidates, and redaction."""

import time

import pytest

from rlhf_engine.data.pii import PiiFinder, redact

FINDER = PiiFinder()


def found(text, finder=FINDER):
    return [(finding.kind, text[finding.start : finding.end]) for finding in finder.find(text)]


@pytest.mark.parametrize(
    "kind, text",
    [
        ("email", "joe@example.com"),
        ("email", "joe.o'neil+x_1@mail.example.co.uk"),
        ("phone", "(415) 555-0132"),
        ("phone", "415-555-0132"),
        ("phone", "415.555.0132"),
        ("phone", "4155550132"),
        ("phone", "+44 20 7946 0958"),
        ("phone", "020 7946 0958"),
        ("phone", "+4930123456"),
        ("card", "4111111111111111"),
        ("card", "4111 1111 1111 1111"),
        ("card", "5500-0000-0000-0004"),
        ("card", "3782 822463 10005"),
        ("iban", "DE89370400440532013000"),
        ("iban", "DE89 3704 0044 0532 0130 00"),
        ("iban", "gb29 nwbk 6016 1331 9268 19"),
        ("ip", "203.0.113.7"),
        ("ip", "2001:db8::8a2e:370:7334"),
        ("ip", "2001:0db8:0000:0000:0000:ff00:0042:8329"),
        ("name", "Mr Smith"),
        ("name", "Dr. J. R. Smith"),
        ("name", "Mrs. O'Neil-Jones"),
        ("name", "Frau Müller"),
        ("name", "Prof. Ada Lovelace"),
        ("name", "Prof.ssa Anna Bianchi"),
        ("name", "Sig.ra Rossi"),
        ("name", "Dott. Mario Verdi"),
        ("name", "M. Dupont"),
        ("name", "Mlle Léa"),
        ("name", "Srta. García"),
        ("name", "Sr. García"),
    ],
)
def test_s19_pii_is_found_in_every_context(kind, text):
    for before, after in [("", ""), ("see ", " today"), ("(", ")"), ('"', '".'), ("one, ", ", two"), ("to: ", "\n")]:
        assert found(before + text + after) == [(kind, text)], (before, after)


@pytest.mark.parametrize(
    "text",
    [
        "4111 1111 1111 1112",  # Luhn
        "1111111111111117",  # the Luhn digit is right, but no issuer begins with 1
        "0.4111111111111111",
        "DE88 3704 0044 0532 0130 00",  # mod 97
        "XX89 3704 0044 0532 0130 00",
        "127.0.0.1 and 0.0.0.0 and ::1",
        "300.1.1.1 or 1.2.3 or v1.2.3.4.5",
        "at 12:30:45, x[1::2], std::vector",
        "2023-11-20 12:30:11, 1914-1918, 12345.678, 3.14159265358979",
        "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16",
        "10 15 20 25 30 35 40 45 50",
        "ISBN 978-0-306-40615-7",
        "555-0132",  # no number of the default regions
        "(123) 456-7890",  # no such area code
        "@home, a@b, me @ example.com",
        "Miss you, mr x, drSmith, Dr. of, the Mr, Type M Screws, Donna Summer",
        "5 P.M. Eastern, 10 A.M. Pacific, a Sr Developer at Ing Bank, Don Juan",
    ],
)
def test_s19_similar_text_is_not_pii(text):
    assert found(text) == []


def test_s19_honorifics_are_a_setting():
    text = "Pan Novák and Mr Smith"
    assert found(text) == [("name", "Mr Smith")]
    finder = PiiFinder(honorifics=("Pan", "Paní"))
    assert [text[one.start : one.end] for one in finder.find(text)] == ["Pan Novák"]
    assert PiiFinder(honorifics=()).find(text) == []


def test_s19_the_country_of_a_phone_number_is_a_setting():
    german = PiiFinder(("DE",))
    assert found("030 901820", german) == [("phone", "030 901820")]
    assert found("415-555-0132", german) == []
    assert found("415-555-0132 or +1 415-555-0132", PiiFinder(())) == [("phone", "+1 415-555-0132")]
    with pytest.raises(ValueError, match="phone_regions: got 'XY'"):
        PiiFinder(("US", "XY"))


def test_s19_text_after_a_number_is_not_part_of_it():
    assert found("4111 1111 1111 1111 123") == [("card", "4111 1111 1111 1111")]
    assert found("22 4111 1111 1111 1111 12/25") == [("card", "4111 1111 1111 1111")]
    assert found("DE89 3704 0044 0532 0130 00 from 2019") == [("iban", "DE89 3704 0044 0532 0130 00")]
    assert found("ab12 DE89 3704 0044 0532 0130 00") == [("iban", "DE89 3704 0044 0532 0130 00")]


def test_s19_of_overlapping_findings_the_more_reliable_is_kept():
    assert found("me@example.Mr Smith") == [("email", "me@example.Mr")]
    assert found("4155550132@example.com") == [("email", "4155550132@example.com")]
    assert found("Mr Al4155550132@example.com, Dr. Smith") == [
        ("email", "Al4155550132@example.com"),
        ("name", "Dr. Smith"),
    ]


def test_s19_redaction_replaces_findings_with_marks():
    text = "Dr. Smith (joe@example.com, 415-555-0132) paid with 4111 1111 1111 1111."
    assert redact(text, FINDER.find(text)) == "[NAME] ([EMAIL], [PHONE]) paid with [CARD]."
    assert redact("nothing here", FINDER.find("nothing here")) == "nothing here"


@pytest.mark.parametrize(
    "piece", ["1", "1 ", "1.", "a@", "a:", "Mr ", "Mr A. ", "ab12 ", "4111 ", "+1 (415) 555 ", "GB29NWBK", "a.b-c%"]
)
def test_s19_repeated_text_does_not_take_quadratic_time(piece):
    started = time.process_time()
    FINDER.find(piece * (20_000 // len(piece)))
    assert time.process_time() - started < 5  # at most half a second; quadratic time would be minutes


def test_s19_many_findings_do_not_take_quadratic_time():
    started = time.process_time()
    assert len(FINDER.find("a@b.co " * 20_000)) == 20_000
    assert time.process_time() - started < 5
