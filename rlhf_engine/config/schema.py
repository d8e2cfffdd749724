"""Base of config sections: checks of types, ranges and key names that do not depend on the options.

A section is a frozen dataclass whose annotations give the allowed values of each field (`Annotated[float, Range(...)]`,
`Literal`, `T | None`, `tuple[...]`, a nested section). It is checked on construction, so that a mistake gives the same message
in Python, in a YAML file and on the command line.
"""

from __future__ import annotations

import difflib
import math
import types
from dataclasses import Field, dataclass, fields, is_dataclass
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, Union, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Range:
    """Bounds of a finite number; a bound that is None does not apply."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None

    def __contains__(self, value: float) -> bool:
        return (
            abs(value) < math.inf  # False for NaN; isfinite raises for an int that no float holds
            and (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
        )

    def __str__(self) -> str:
        bounds = (("at least", self.at_least), ("above", self.above), ("at most", self.at_most))
        return " and ".join(f"{words} {bound:g}" for words, bound in bounds if bound is not None)


@dataclass(frozen=True)
class OfDigits:
    """Marks a text that may consist of digits only, such as `900000000`, which YAML parses as a number."""

    def __str__(self) -> str:
        return "or a whole number"


Text = Annotated[str, OfDigits()]
Variables = dict[str, object]
"""Names and values that the project does not define, such as the variables of a chat template."""
Count = Annotated[int, Range(at_least=1)]
WholeNumber = Annotated[int, Range(at_least=0)]
Positive = Annotated[float, Range(above=0.0)]
NonNegative = Annotated[float, Range(at_least=0.0)]
Share = Annotated[float, Range(at_least=0.0, at_most=1.0)]
LearningRate = Annotated[float, Range(above=0.0, at_most=1.0)]
Seed = Annotated[int, Range(at_least=0, at_most=2**32 - 1)]
PositiveShare = Annotated[float, Range(above=0.0, at_most=1.0)]


@cache
def _hints(section: type) -> dict[str, Any]:
    """Return the types of a section's fields; evaluating the annotations takes most of the time of a construction."""
    return get_type_hints(section, include_extras=True)


class Section:
    """Base of every config section; checks and converts the fields on construction."""

    if TYPE_CHECKING:  # every section is a dataclass
        __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    def __post_init__(self) -> None:
        hints = _hints(type(self))
        for item in fields(self):
            value = convert(hints[item.name], getattr(self, item.name), item.name)
            object.__setattr__(self, item.name, value)
        self.check()

    def check(self) -> None:
        """Raise ValueError if a rule that involves several fields is violated; overridden by sections that have one."""

    @classmethod
    def from_dict(cls, given: dict[str, Any], key: str = "") -> Self:
        """Build the section from nested dictionaries; `key` is its dotted path in messages.

        A key that is absent from a nested section has the default of that section in this class, as if the nested section were
        absent.

        Raises:
            ValueError: an unknown key (the message names a similar one), a wrong type or a value out of range.
        """
        if not isinstance(given, dict):
            raise ValueError(f"{key or 'config'}: got {_describe(given)}, expected a mapping of keys to values")
        hints = _hints(cls)
        known = [item.name for item in fields(cls)]
        values = {}
        for name, value in given.items():
            path = f"{key}.{name}" if key else str(name)
            if name not in known:
                raise UnknownKeyError(path, str(name), known)
            if is_dataclass(hints[name]) and isinstance(value, dict):
                value = _own_defaults(cls, name, hints[name]) | value
            values[name] = convert(hints[name], value, path)
        try:
            return cls(**values)
        except ValueError as error:
            raise ValueError(f"{key}: {error}" if key else str(error)) from None

    @classmethod
    def keys(cls, prefix: str = "") -> list[str]:
        """Return the dotted keys of all fields and nested sections."""
        found: list[str] = []
        for name, hint in _hints(cls).items():
            if name in cls.__dataclass_fields__:
                nested = isinstance(hint, type) and issubclass(hint, Section)
                found += [prefix + name, *(hint.keys(f"{prefix}{name}.") if nested else ())]
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return nested dictionaries and lists of plain values, ready for YAML or JSON."""
        return {item.name: _plain(getattr(self, item.name)) for item in fields(self)}


def _own_defaults(section: type[Section], name: str, inner: type[Section]) -> dict[str, Any]:
    """Return the defaults of field `name` of `section` that differ from those of its class `inner`, as PPO's optimizer has."""
    factory: Any = next(item.default_factory for item in fields(section) if item.name == name)
    here, usual = factory(), inner()
    pairs = ((item.name, getattr(here, item.name), getattr(usual, item.name)) for item in fields(inner))
    return {field: value for field, value, other in pairs if value != other}


class UnknownKeyError(ValueError):
    """An unknown key at the dotted `path`."""

    def __init__(self, path: str, name: str, known: list[str]) -> None:
        super().__init__(unknown_key_message(path, name, known))
        self.path = path


def unknown_key_message(path: str, name: str, known: list[str]) -> str:
    """Return the message for the unknown key `name` at the dotted `path`, with the nearest of `known` if one is similar."""
    # The comparison is quadratic in the length, and a name of that length resembles no key.
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5) if len(name) < 100 else []
    section, dot, _ = path.rpartition(".")
    lists = f"; `rlhf config show{' ' * bool(section)}{section}` lists the keys"
    hint = f"; did you mean '{section}{dot}{near[0]}'?" if near else lists
    return f"unknown key {shortened(repr(path), 200)}{hint}"


def convert(hint: Any, value: Any, key: str) -> Any:
    """Convert `value` to the annotation `hint` (int to float, list to tuple, dict to section).

    Raises:
        ValueError: `value` does not fit the annotation.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated and isinstance(arguments[1], OfDigits):
        if type(value) not in (int, str):
            raise ValueError(f"{key}: got {_describe(value)}, expected a text or a whole number")
        _check_plain(value, key)
        return str(value)
    if origin is Annotated:
        finite = not isinstance(value, float) or math.isfinite(value)  # otherwise the message has the bounds
        return _in_range(convert(arguments[0], value, key) if finite else value, arguments[1], key)
    if origin in (Union, types.UnionType):
        return _optional(arguments, value, key)
    if origin is Literal:
        # `True == 1`, so the type counts as well.
        if not any(value == choice and type(value) is type(choice) for choice in arguments):
            raise ValueError(f"{key}: got {_describe(value)}, expected one of {', '.join(map(repr, arguments))}")
        return value
    if origin is tuple:
        return _tuple(arguments, value, key)
    if origin is dict:
        return _mapping(value, key)
    if isinstance(hint, type) and issubclass(hint, Section):
        return value if isinstance(value, hint) else hint.from_dict(value, key)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return _to_float(value, key)
    if isinstance(value, hint) and not (isinstance(value, bool) and hint is not bool):
        _check_plain(value, key)
        return value
    raise ValueError(f"{key}: got {_describe(value)}, expected {hint.__name__}")


def _check_plain(value: Any, key: str) -> None:
    """Raise ValueError for a text that no file name and no UTF-8 file can hold, and for a float that is not finite."""
    if isinstance(value, str):
        bad = next((char for char in value if char == "\0" or "\ud800" <= char <= "\udfff"), None)
        if bad is not None:
            raise ValueError(f"{key}: got a text with the character {bad!a}, expected text without it")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{key}: got {value!r}, expected a finite number")


def _to_float(value: int, key: str) -> float:
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{key}: got an integer of {value.bit_length()} bits, expected a float") from None


def _in_range(value: Any, bounds: Range, key: str) -> Any:
    if value not in bounds:
        raise ValueError(f"{key}: got {_shown(value)}, expected a finite number {bounds}")
    return value


def _optional(arguments: tuple[Any, ...], value: Any, key: str) -> Any:
    inner = [argument for argument in arguments if argument is not types.NoneType]
    assert len(inner) == 1, f"{key}: a config field may be one type or that type and None"
    return None if value is None else convert(inner[0], value, key)


def _tuple(arguments: tuple[Any, ...], value: Any, key: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise ValueError(f"{key}: got {_describe(value)}, expected a list")
    if arguments[-1] is Ellipsis:
        arguments = (arguments[0],) * len(value)
    if len(value) != len(arguments):
        raise ValueError(f"{key}: got {len(value)} values, expected {len(arguments)}")
    return tuple(
        convert(hint, item, f"{key}[{index}]") for index, (hint, item) in enumerate(zip(arguments, value, strict=True))
    )


def _mapping(value: Any, key: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{key}: got {_describe(value)}, expected a mapping of names to values")
    for name in value:
        if not isinstance(name, str):
            raise ValueError(f"{key}: got the name {_describe(name)}, expected a text")
    return dict(value)


def _describe(value: Any) -> str:
    return "null" if value is None else f"{_shown(value)} ({type(value).__name__})"


def _shown(value: Any) -> str:
    if isinstance(value, int) and value.bit_length() > 1_000:
        return f"an integer of {value.bit_length()} bits"  # Python does not convert the longest ones to decimal digits
    return shortened(repr(value), 200)


def shortened(text: str, limit: int) -> str:
    """Return `text` with its middle replaced by the number of characters left out, if it is longer than `limit`."""
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]} ... ({len(text) - 2 * half:,} characters left out) ... {text[-half:]}"


def _plain(value: Any) -> Any:
    if isinstance(value, Section):
        return value.to_dict()
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
