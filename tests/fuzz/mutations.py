"""Seeded mutations of valid files: of bytes, of JSON values, and of YAML texts."""

from __future__ import annotations

import json
from random import Random
from typing import Any, NamedTuple


class Raw(NamedTuple):
    """Text that `json_bytes` writes as it is, for values that JSON or Python does not have."""

    text: str


class Pairs(NamedTuple):
    """A JSON object as (name, value) pairs, of which two may have the same name."""

    items: list[tuple[str, Any]]


def nested(depth: int, opening: str = "[", closing: str = "]") -> str:
    return opening * depth + closing * depth


CHUNKS = (
    b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\r", b"\n", b"\n\n", b"\xe2\x80\xa8",
    b"\x1f\x8b\x08\x00", b"\x80",
    b'"', b"{", b"}", b"[", b"]", b",", b":", b"\\", b"\\u0000", b"\\ud800", b"NaN", b"-", b"1e999", b"null", b"true",
    b"9" * 5_000, b"[" * 3_000, b'{"a":' * 3_000, b"\x7f" * 64, b"%s%n", b"../../../etc/passwd", "é漢🙂".encode(),
)  # fmt: skip
"""Bytes that `damage_bytes` inserts."""

VALUES = (
    None, True, False, 0, -1, 1, 2, 3, 7, 255, 65_536, 2**31, 2**32, 2**63, -(2**63), 2**64, 10**9, 10**30, 0.0,
    -0.0, 0.5,
    1e-45, 1e-300, 1e30, 1e308, -1e308, "", " ", "x", "\x00", "a\x00b", "0", "nan", "null", "true", "None",
    "{prompt}", "{{ x }}",
    "\ud800", "\udfff\ud800", "\u2028", "\ufeff", "e\u0301", "../..", "/", "/dev/null", ".", "~", "a" * 300,
    "漢" * 5_000,
    [], [[]], [None], {}, [1, 2], ["a", "a"], {"": 0}, {"a": {"b": [1]}},
    Raw("NaN"), Raw("Infinity"), Raw("-Infinity"), Raw("1e999"), Raw("-1e999"), Raw("9" * 400), Raw("9" * 5_000),
    Raw("-" + "9" * 30 + "." + "9" * 30), Raw("01"), Raw("+1"), Raw(".5"), Raw("0x10"), Raw("'a'"), Raw("\"\\x\""),
    Raw(nested(40)), Raw(nested(900)), Raw(nested(100_000)), Raw(nested(2_000, '{"a":', "}")),
    Raw("[" + "1," * 5_000 + "1]"),
    Raw('"' + "y" * 200_000 + '"'),
)  # fmt: skip
"""Values that `damage_json` writes in place of others."""


def json_bytes(value: Any) -> bytes:
    """Return JSON with `Raw` texts and the duplicate names of `Pairs`; lone surrogates are written as UTF-8 or escaped."""
    return _json(value).encode("utf-8", "surrogatepass")


def _json(value: Any) -> str:
    if isinstance(value, Raw):
        return value.text
    items = value.items if isinstance(value, Pairs) else list(value.items()) if isinstance(value, dict) else None
    if items is not None:
        return "{" + ", ".join(f"{json.dumps(str(name))}: {_json(one)}" for name, one in items) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_json, value)) + "]"
    return json.dumps(value)


def damage_bytes(random: Random, content: bytes) -> bytes:
    """Return `content` with one to three changes of its bytes."""
    for _ in range(random.choice((1, 1, 2, 3))):
        content = _changed_bytes(random, content)
    return content


def _changed_bytes(random: Random, content: bytes) -> bytes:
    at = random.randrange(len(content) + 1)
    end = min(len(content), at + random.choice((1, 2, 8, 64, len(content))))
    kind = random.randrange(8)
    if kind == 0 and at < len(content):
        return content[:at] + bytes([content[at] ^ (1 << random.randrange(8))]) + content[at + 1 :]
    if kind == 1 and at < len(content):
        return content[:at] + random.randbytes(1) + content[at + 1 :]
    if kind == 2:
        return content[:at]
    if kind == 3:
        return content[:at] + content[end:]
    if kind == 4:
        return content[:end] + content[at:]
    if kind == 5:
        return content[:at] + random.randbytes(end - at) + content[end:]
    if kind == 6:
        return content[:at] + b"\0" * (end - at) + content[end:]
    return content[:at] + random.choice(CHUNKS) + content[at:]


def damage_json(random: Random, value: Any, names: tuple[str, ...] = ()) -> Any:
    """Return a copy of a JSON value with one to three changes; `names` are further names of fields that exist."""
    for _ in range(random.choice((1, 1, 2, 3))):
        value = _changed(random, value, names)
    return value


def _changed(random: Random, value: Any, names: tuple[str, ...]) -> Any:
    inside = isinstance(value, dict | list) and len(value) and random.random() < 0.85
    if not inside:
        return random.choice(VALUES)
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = random.choice(keys)
    if isinstance(value[key], dict | list) and len(value[key]) and random.random() < 0.7:
        new = _changed(random, value[key], names)
        return value | {key: new} if isinstance(value, dict) else [*value[:key], new, *value[key + 1 :]]
    return _changed_entry(random, value, key, names)


def _changed_entry(random: Random, value: Any, key: Any, names: tuple[str, ...]) -> Any:
    new = random.choice((random.choice(VALUES), _near(random, value[key])))
    if isinstance(value, list):
        edits = (
            [*value[:key], new, *value[key + 1 :]], [*value[:key], *value[key + 1 :]], [*value, value[key]],
            [*value[:key], new, *value[key:]], value * 50,
        )  # fmt: skip
        return random.choice(edits)
    rest = {name: one for name, one in value.items() if name != key}
    other = random.choice((*names, *value, "a", "", "\ud800", "__class__", "x" * 300))
    edits = (
        value | {key: new}, value | {key: new}, value | {key: new}, rest, rest | {other: value[key]},
        value | {other: new},
        Pairs([*value.items(), (key, new)]), Pairs([(key, new), *value.items()]),
        value | {key: value[random.choice(list(value))]},
    )  # fmt: skip
    return random.choice(edits)


def _near(random: Random, value: Any) -> Any:
    """Return a value that resembles `value`: a wrong type, a neighbouring or negative number, a longer or shorter text."""
    if isinstance(value, bool) or value is None:
        return random.choice((not value, int(bool(value)), str(value)))
    if isinstance(value, int | float):
        return random.choice((-value, value + 1, value - 1, value * 1_000, value / 2, str(value), [value], bool(value)))
    if isinstance(value, str):
        cut = random.randrange(len(value) + 1)
        return random.choice(
            (value[:cut], value + value, value[::-1], value.upper(), [value], {value: value}, value + "\0")
        )
    return random.choice((None, [value], {"a": value}))


YAML_VALUES = (
    "", "~", "null", "yes", "on", "0", "-1", "1e-5", "1e999", ".nan", ".inf", "-.inf", "0x", "0b2", "0o9", "1_000",
    "1:60:60", "1:2.5",
    "9" * 5_000, "." * 2_000, "2001-99-99", "2001-01-01", "2001-01-01T00:00:00+99:99", "!!binary x", "!!binary ''",
    "!!bool x",
    "!!int x", "!!float ''", "!!timestamp 2001-13-01", "!!set {a, b}", "!!omap [a: 1]", "!!pairs [a: 1]", "!!null x",
    "!!str", "!x y",
    "!!python/object/apply:os.system [true]", "!!python/name:os.system", "!<tag:yaml.org,2002:int> 3.5", "&a [*a]",
    "&a {b: *a}",
    "*none", "*", "&", "[", "{", "]", "}", "'", '"', '"\\x"', '"\\ud800"', '"\\0"', '"\\U00110000"', "|", ">",
    "|9\n  a", "@", "`", "%",
    "- a", "? a", ": b", "[a, b", "{a: b", "[[]]", "[null]", "{}", "[]", "<<: {a: 1}", "<<: 3", "'a'", "'{prompt}'",
    "a: b", "#",
    nested(30), nested(5_000), nested(300, "{a: ", "}"), "[" + "a, " * 30_000 + "a]", "x" * 150_000, "\\", "\t",
    "\u2028", "\x07",
    "é漢🙂", "[&x [1, 1], *x, *x]", "=", "! ''", "!!map []", "!!seq {}", "? [a]: b", "1.", "+.e1", "1e", "0.0.0",
    "123456789012345678901234",
)  # fmt: skip
"""Values that `damage_yaml` and overrides have in place of others."""

_BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
_BOMB_OF_MAPS = "a: &a {x: 1}\n" + "".join(
    f"{name}: &{name} {{<<: [{', '.join([f'*{before}'] * 10)}]}}\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
YAML_LINES = (
    "---\n", "--- a\n", "...\n", "%YAML 9.9\n", "%TAG ! x\n", "\t", "? a\n: b\n", "? [a, b]\n: c\n", "<<: *a\n",
    "<<: {seed: 3}\n",
    "seed: 1\nseed: 2\n", "- a\n", "a\n", ": \n", "\x00\n", "\ufeff", "&a a: *a\n", "? &a [*a]\n: 1\n", _BOMB,
    _BOMB_OF_MAPS,
    "null: 1\n", "1: 2\n", "true: 1\n", "1.5: x\n", "{a: 1}: 2\n", "[]: 2\n", "'': 1\n", "ppo.kl_coef: 1\n", "# c\n",
    "!!str : x\n",
    "? |\n  a\n: b\n", "x" * 2_000 + ": 1\n", "ppo: &p {optim: *p}\n",
)  # fmt: skip
"""Lines that `damage_yaml` inserts."""


def damage_yaml(random: Random, text: str) -> bytes:
    """Return a YAML text with one to three changes of its lines, values or bytes."""
    for _ in range(random.choice((1, 1, 2, 3))):
        text = _changed_yaml(random, text)
    content = text.encode("utf-8", "surrogatepass")
    return damage_bytes(random, content) if random.random() < 0.25 else content


def _changed_yaml(random: Random, text: str) -> str:
    lines = text.splitlines(keepends=True) or [""]
    at = random.randrange(len(lines))
    line, kind = lines[at], random.randrange(8)
    name = line.partition(":")[0]
    if kind <= 2:
        lines[at] = f"{name}: {random.choice(YAML_VALUES)}\n"
    elif kind == 3:
        lines.insert(at, random.choice(YAML_LINES))
    elif kind == 4:
        lines[at] = random.choice(("", " " + line, "\t" + line, line.lstrip(), line * 2, line.rstrip("\n")))
    elif kind == 5:
        other = random.randrange(len(lines))
        lines[at], lines[other] = lines[other], lines[at]
    elif kind == 6:
        lines[at] = random.choice(
            (name + "\n", f"{name}:\n", f"{name}x:{line.partition(':')[2]}", line.replace(": ", ":"))
        )
    else:
        lines[at] = f"{name}: {_number(random)}\n"
    return "".join(lines)


def _number(random: Random) -> str:
    """Return a number that may be in or out of a setting's range, in one of YAML's forms."""
    value = random.choice((random.uniform(-2, 2), random.randrange(-3, 300), 10.0 ** random.randrange(-30, 30)))
    return random.choice((repr(value), f"{value:e}", f"'{value}'", f"+{abs(value)}", f"[{value}]"))
