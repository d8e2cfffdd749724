"""The site builds without a warning, and its pages load nothing from a network."""

import re
import subprocess
import sys

import pytest

from tests.docs.helpers.blocks import ROOT

LOADED = re.compile(
    r"<(?:script|img|iframe|source)[^>]*\ssrc=\"?https?:|<link[^>]*rel=\"?(?:stylesheet|preload|icon)[^>]*https?:"
)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    for module in ("mkdocs", "material", "mkdocstrings", "latex2mathml"):
        pytest.importorskip(module, reason="needs the extra docs; make docs builds the site")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert not built.returncode, built.stderr
    return folder


def test_pages_load_nothing_from_a_network(site):
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        found = LOADED.search(page.read_text(encoding="utf-8"))
        assert found is None, f"{page.relative_to(site)}: {found[0]}"


def test_equations_and_pictures_are_in_the_pages(site):
    assert "<math" in (site / "index.html").read_text(encoding="utf-8")
    assert "not_run" not in (site / "install.html").read_text(encoding="utf-8")
    for page in site.rglob("*.html"):
        for target in re.findall(r'<img [^>]*src="([^"]+)"', page.read_text(encoding="utf-8")):
            assert (page.parent / target).is_file(), f"{page.relative_to(site)}: {target}"
