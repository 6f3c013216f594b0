"""The documentation as a site: it builds without a warning, asks nobody else for anything, and leaves no page out."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PICTURES = ROOT / "docs" / "img"
LINK = re.compile(r"\[[^\]]+\]\((?:https://[^)\s]+|[a-z-]+\.md(?:#[a-z0-9-]+)?)\)")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    ended = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=100)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return folder


def test_nothing_is_asked_of_another_host(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 10
    for page in pages:
        foreign = re.findall(
            r"""<(?:script|link|img|iframe|source)\b[^>]*\b(?:src|href)=["']?(?:https?:)?//[^"' >]+""", page.read_text()
        )
        assert foreign == [], page.name
    for style in site.rglob("*.css"):
        assert not re.search(r"url\(\s*[\"']?(?:https?:)?//|@import", style.read_text()), style.name


def test_every_page_can_be_reached(site: Path) -> None:
    navigation = (ROOT / "mkdocs.yml").read_text()
    for page in sorted((ROOT / "docs").glob("*.md")):
        assert f" {page.name}\n" in navigation, f"mkdocs.yml does not lead to {page.name}"


def test_the_reference_has_every_route_of_the_schema(site: Path) -> None:
    page = re.sub(r"<[^>]+>", "", (site / "reference.html").read_text())
    for route in ("POST /v1/chat/completions", "POST /v1/sessions/{session_id}/fork", "GET /v1/diagnosis", "GET /metrics"):
        assert route in page
    assert page.count("Answers 2") > 25


def test_every_picture_is_small_and_is_shown() -> None:
    pages = "".join(page.read_text() for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
    for picture in PICTURES.glob("*.png"):
        assert picture.stat().st_size < 240_000, picture.name
        assert f"img/{picture.name}" in pages, f"{picture.name} is shown nowhere"


def test_every_cell_of_the_comparison_has_its_source() -> None:
    rows = [line for line in (ROOT / "docs" / "comparison.md").read_text().splitlines() if line.startswith("| ")]
    compared = [row.strip("|").split("|") for row in rows]
    headings = [row for row in compared if not row[0].strip()]
    assert len(headings) == 3
    systems = {row[0].strip(" *") for row in compared if row[0].strip() and len(row) > 2}
    assert systems == {
        *("pasture", "llama-server", "llama-cpp-python's server", "Ollama", "vLLM with LMCache", "SGLang", "Mooncake", "Dynamo")
    }
    for name, *cells in compared:
        if name.strip():
            for cell in cells:
                assert LINK.search(cell), f"{name.strip()}: “{cell.strip()}” has no source"
