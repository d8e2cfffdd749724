"""Generated parts are current, README is one page, and relative links lead to files."""

import re

import pytest

from docs.generate import FILES, PAGES, PARTS, ROOT, generated

TEXTS = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in PAGES}
WITH_PARTS = [page for page, text in TEXTS.items() if "<!-- begin " in text]


@pytest.mark.parametrize("page", WITH_PARTS)
def test_generated_parts_are_current(page):
    assert generated(TEXTS[page]) == TEXTS[page], f"{page} is stale; run python -m docs.generate"


@pytest.mark.parametrize("name", FILES)
def test_generated_files_are_current(name):
    assert FILES[name]() == (ROOT / name).read_text(encoding="utf-8"), f"{name} is stale; run python -m docs.generate"


def test_every_generated_part_is_on_a_page():
    named = {name for text in TEXTS.values() for name in re.findall(r"<!-- begin (.+?) -->", text)}
    assert named - {name for name in named if name.startswith("$ rlhf ")} == set(PARTS)


def test_readme_is_one_page():
    text = TEXTS["README.md"]
    assert text.count("\n") <= 200 and len(text.split()) <= 1500
    assert text.count("**no**") >= 2, "the misses are in the table"
    assert not re.search(r"\b[0-9a-f]{7,40}\b", re.sub(r"\d+", "", text)), "a commit hash"


@pytest.mark.parametrize("page", TEXTS)
def test_relative_links_lead_to_files(page):
    text = re.sub(r"^```.*?^```", "", TEXTS[page], flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)#:\s]+)(?:#[\w-]+)?\)", text):
        assert ((ROOT / page).parent / target).exists(), f"{page}: {target}"


def test_pictures_of_pages_are_results():
    for page, text in TEXTS.items():
        for target in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text):
            assert "benchmarks/results/" in target, f"{page}: {target}"
