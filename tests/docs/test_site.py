"""The documentation builds as a site without a warning, with every page, and fetches nothing from elsewhere."""

from __future__ import annotations

import html
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import iou_refiner
from tests.kit.needs import needs_package
from tests.kit.paths import ROOT

INSTALL = "pip install -e '.[docs]'"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for package in ("mkdocs", "material", "mkdocstrings"):
        needs_package(package, install=INSTALL)
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def pages(site: Path) -> dict[str, str]:
    return {str(path.relative_to(site)): path.read_text() for path in site.rglob("*.html")}


def test_every_document_is_a_page_of_the_navigation(site: Path):
    nav = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2]
    for path in sorted((ROOT / "docs").glob("*.md")):
        assert f": {path.name}\n" in nav + "\n", f"{path.name} is not in the nav of mkdocs.yml"
        assert (site / "index.html" if path.stem == "index" else site / path.stem / "index.html").is_file()


def test_the_reference_has_every_public_name(site: Path):
    reference = pages(site)["reference/index.html"]
    named = set(re.findall(r'<h3 id="iou_refiner[\w.]*\.(\w+)"', reference))
    assert set(iou_refiner.__all__) - {"__version__"} <= named
    assert re.findall(r":\w+:<code>|<code>~", reference) == []


def test_nothing_is_fetched_from_elsewhere(site: Path):
    for name, text in pages(site).items():
        fetched = re.findall(r'<(?:script|link|img|iframe)\b[^>]*?(?:src|href)="(https?:[^"]+)"', text)
        assert fetched == [], name


def test_links_lead_somewhere(site: Path):
    """Links and their anchors, of every page, files outside of docs/ being named and not linked."""
    every = pages(site)
    for name, text in every.items():
        for target in re.findall(r'<a\b[^>]*?href="([^"]+)"', text):
            path, _, anchor = html.unescape(target).partition("#")
            if re.match(r"\w+:", path) or path.startswith("/") or "404" in name:
                continue
            where = (site / name).parent / path if path else site / name
            where = where / "index.html" if where.is_dir() else where
            assert where.exists(), f"{name} links to {target}"
            if anchor and where.suffix == ".html":
                there = every[str(where.resolve().relative_to(site.resolve()))]
                assert f'id="{anchor}"' in there or anchor == "__skip", f"{name} links to {target}"
