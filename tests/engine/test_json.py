"""JSON that is nested deeply, which Python's parser refuses with an error in the middle of its recursion."""

import json

import pytest

from rlhf_engine.files import parse_json


@pytest.mark.parametrize("form", ["[{}]", '{{"a": {}}}', '[0, {{"a\\\\": {}}}]'])
def test_nesting_is_refused_from_a_fixed_depth_on(form):
    inside, levels = "0", form.count("[") + form.count("{{")
    for _ in range(400 // levels):
        inside = form.format(inside)
    assert parse_json(inside) == json.loads(inside)
    for text in (f"[{inside}]", f"[{inside}]".encode(), form.format(inside)):
        with pytest.raises(ValueError, match="nested too deeply, more than 400 levels"):
            parse_json(text)


def test_brackets_within_strings_are_not_nesting():
    for text in ("[" * 2_000, '"{' * 2_000, "\\" * 3 + "[" * 500 + '"', "é[" * 500):
        value = {"text": text, "list": [[]] * 1_000}
        assert parse_json(json.dumps(value)) == value
        assert parse_json(json.dumps(value, ensure_ascii=False).encode()) == value
