"""Hostile and damaged YAML and `--set` values: refused in one short message, quickly, and without an exception of PyYAML."""

import math
import random
import time

import pytest
import yaml

from rlhf_engine.config import RunConfig, load_config
from rlhf_engine.config.yaml_text import MAX_BYTES, MAX_DEPTH, MAX_NODES, parse_yaml

BOMB = "a0: &a0 [x, x, x]\n" + "".join(f"a{n}: &a{n} [{f'*a{n - 1}, ' * 9}]\n" for n in range(1, 12))
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}\n" for n in range(1, 25))
SLOW = {
    "aliases that expand to 3 * 9**11 values": (BOMB, "values with all aliases replaced"),
    "merges that expand to 2**24 values": (MERGES, "values with all aliases replaced"),
    "a value within itself": ("a: &a {b: [*a]}", "an alias of a value that contains it"),
    "deep lists": ("[" * 90_000, "levels of lists and mappings"),
    "deep mappings": ("{a: " * 20_000, "levels of lists and mappings"),
    "deep blocks": ("- " * 40_000, "levels of lists and mappings"),
    "a long list": ("[" + "1," * 40_000 + "]", "more than 20,000 values"),
    "a long text": ("a" * (MAX_BYTES + 1), "at most 100,000 bytes"),
    "a long integer": ("a: " + "9" * 5_000, "a number of 5,000 characters"),
    "a long integer in base 60": ("a: 1" + ":59" * 30_000, "a number of 90,001 characters"),
    "a long hexadecimal number": ("a: 0x" + "f" * 50_000, "a number of 50,002 characters"),
}
TAGS = {
    "!!bool x": "KeyError",
    '!!int ""': "IndexError",
    "!!timestamp x": "AttributeError",
    "2023-99-99": "month",
    "0b_": "invalid literal",
    "{[a]: 1}": "unhashable",
    "!!python/object/apply:os.system [x]": "could not determine a constructor",
    "--- a\n--- b": "a single document",
}


@pytest.mark.parametrize("name", SLOW)
def test_a_text_beyond_the_bounds_is_refused_quickly(name):
    text, message = SLOW[name]
    begun = time.perf_counter()
    with pytest.raises(ValueError) as refused:
        parse_yaml(text)
    assert message in str(refused.value) and len(str(refused.value)) < 500
    assert time.perf_counter() - begun < 5.0


@pytest.mark.parametrize("text", TAGS)
def test_no_exception_of_the_parser_leaves_it(text):
    with pytest.raises(ValueError, match="not valid YAML") as refused:
        parse_yaml(text)
    assert TAGS[text] in str(refused.value)


def test_texts_within_the_bounds_are_read():
    nested = "[" * (MAX_DEPTH - 1) + "1" + "]" * (MAX_DEPTH - 1)
    assert len(parse_yaml("[" + "1," * (MAX_NODES - 1) + "]")) == MAX_NODES - 1
    assert parse_yaml("a: " + "9" * 1_000) == {"a": int("9" * 1_000)}
    assert str(parse_yaml(nested)) == nested
    assert parse_yaml("a: &x {lr: 1e-5}\nb: {<<: *x, n: 1}\nc: [*x, *x]") == {
        "a": {"lr": 1e-5},
        "b": {"lr": 1e-5, "n": 1},
        "c": [{"lr": 1e-5}, {"lr": 1e-5}],
    }


@pytest.mark.parametrize(
    "override, message",
    [
        ("a." * 50_000 + "b=1", "got 50000 sections"),
        ("x" * 50_000 + "=1", "unknown key"),
        ("ppo." + "x" * 50_000 + "=1", "unknown key"),
        ("ppo.kl_coef=" + "x" * 50_000, "expected float"),
        ("ppo=" + "x" * 50_000, "expected a mapping"),
        ("rollout.stop=[" + "[]," * 1_000 + "]", "expected str"),
        ("seed=" + "9" * 900, "an integer of 2990 bits"),
        ("x" * 50_000, "expected section.key=value"),
    ],
)
def test_a_message_never_repeats_a_long_value(override, message):
    with pytest.raises(ValueError) as refused:
        load_config(None, [override])
    assert message in str(refused.value) and len(str(refused.value)) < 1_500


@pytest.mark.parametrize(
    "key", ["model.path", "output_dir", "data.prompt_template", "reward.function", "memory.budget"]
)
@pytest.mark.parametrize("text, shown", [('"a\\0b"', "'\\x00'"), ('"a\\ud800b"', "'\\ud800'")])
def test_a_text_that_no_file_name_can_hold_is_refused_with_its_key(key, text, shown):
    with pytest.raises(ValueError) as refused:
        load_config(None, [f"{key}={text}"])
    assert f"{key}: got a text with the character {shown}" in str(refused.value)


def floats(tree, prefix=""):
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from floats(value, f"{prefix}{name}.")
        elif isinstance(value, float):
            yield prefix + name


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf", "1e999"])
@pytest.mark.parametrize("key", [*floats(RunConfig().to_dict()), "ppo.missing_eos_score", "ppo.optim.betas"])
def test_no_float_may_be_infinite(key, value):
    given = f"[{value}, 0.9]" if key.endswith("betas") else value
    with pytest.raises(ValueError, match="finite"):
        load_config(None, [f"{key}={given}"])


PIECES = (
    *(
        "&a ",
        "*a",
        "<<: ",
        "!!bool ",
        "!!int ",
        "!!float ",
        "!!timestamp ",
        "!!binary ",
        "!!set ",
        "!!omap ",
        "!!pairs ",
    ),
    *(
        "? ",
        "- ",
        "[",
        "]",
        "{",
        "}",
        ": ",
        "|\n",
        ">\n",
        "%YAML 1.1\n",
        "---\n",
        "...\n",
        "\t",
        "\0",
        "\x85",
        "'",
        '"',
    ),
    *(
        "2023-99-99",
        "0b_",
        "1:60:60",
        "0x_",
        ".nan",
        ".inf",
        "9" * 5_000,
        "1e999",
        "#",
        "\r",
        "\ufeff",
        "!",
        "!<",
        "0o8",
    ),
    *("null", "{}: 1", "[1]: 2", "ppo: ", '"\\0"', '"\\ud800"', "\n", "  "),
)


def mutated(text, rng):
    for _ in range(rng.randint(1, 6)):
        place = rng.randrange(len(text) + 1)
        text = rng.choice(
            (
                text[:place] + rng.choice(PIECES) + text[place:],
                text[:place] + text[place + rng.randint(1, 30) :],
                text[:place] + chr(rng.randrange(0x250)) + text[place + 1 :],
                text[:place] + text[rng.randrange(len(text) + 1) :][:40] + text[place:],
            )
        )
    return text


def test_damaged_files_and_overrides_are_read_or_refused_in_a_short_message(tmp_path):
    """Every seed damages a config; a failure names the seed."""
    texts = [
        yaml.safe_dump(RunConfig().to_dict()["ppo"]),
        "seed: 1\nppo: {optim: {lr: 1e-5}}\nrollout:\n  stop: [a, b]\n",
    ]
    path, refused = tmp_path / "run.yaml", 0
    for seed in range(400):
        rng = random.Random(seed)
        text = mutated(texts[seed % 10 > 0], rng)
        try:
            if rng.random() < 0.5:
                path.write_text(text)
                found = load_config(path)
            else:
                key = rng.choice(("ppo.optim.lr", "rollout.stop", "seed", "output_dir", "ppo", "a..b", "", ".", "data"))
                found = load_config(None, [f"{key}={text[rng.randrange(len(text)) :][:60]}"])
            assert all(math.isfinite(value) for value in found.to_dict()["ppo"]["optim"]["betas"]), seed
        except ValueError as error:
            refused += 1
            assert len(str(error)) < 1_500, seed
        except Exception as error:
            pytest.fail(f"seed {seed}: {type(error).__name__}: {error}")
    assert refused > 200
