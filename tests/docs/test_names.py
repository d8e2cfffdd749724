"""Settings, files and metrics that README and the pages name exist."""

import re
from dataclasses import fields

import pytest

from rlhf_engine.config.schema import Section
from rlhf_engine.demo.config import DemoRunConfig
from rlhf_kernels import METRICS, TERM_METRICS
from tests.docs.helpers.blocks import ROOT, pages

FOLDERS = ["rlhf_engine", "rlhf_kernels", "benchmarks", "tests", "csrc", "examples", "docs"]
TEXTS = {page: (ROOT / page).read_text(encoding="utf-8") for page in pages()}


def keys_of(section: Section, path: str = "") -> set[str]:
    found = set()
    for item in fields(section):
        value = getattr(section, item.name)
        found |= {path + item.name}
        found |= keys_of(value, f"{path}{item.name}.") if isinstance(value, Section) else set()
    return found


KEYS = keys_of(DemoRunConfig())
SECTIONS = "|".join(sorted({key.partition(".")[0] for key in KEYS if "." in key} - {"model"}))


@pytest.mark.parametrize("page", TEXTS)
def test_settings_and_files_exist(page):
    text = TEXTS[page]
    named = re.findall(rf"`((?:{SECTIONS})\.(?!py\b)[a-z_.0-9]+)", text) + re.findall(r"--set ([a-z_.0-9]+)=", text)
    assert set(named) <= KEYS, f"{page}: {sorted(set(named) - KEYS)}"
    files = re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w/.-]+)`", text)
    missing = [name for name in files if "NAME" not in name and not (ROOT / name).exists()]
    assert not missing, f"{page}: {missing}"


def test_every_metric_of_the_losses_is_explained():
    page = TEXTS["docs/reference/metrics.md"]
    assert all(f"`{name}`" in page for name in METRICS + TERM_METRICS)
