"""The documentation is built without a warning, opens offline, and names what is there."""

from __future__ import annotations

import html
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import forcetune
from forcetune.backbones.registry import list_models
from forcetune.config import RunConfig, load_config

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"


class _Page(HTMLParser):
    """Addresses that a page loads or links, and the anchors that it has."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.anchors: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: text or "" for name, text in attrs}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        if tag in ("script", "img", "source", "iframe") and "src" in values:
            self.loads.append(values["src"])
        if tag == "link" and "href" in values and values.get("rel") not in ("canonical", "prev", "next"):
            self.loads.append(values["href"])
        if tag == "a" and "href" in values:
            self.links.append(values["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for package in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(package, reason="pip install 'forcetune[docs]'")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr[-3000:]
    return folder


@pytest.mark.slow
def test_no_page_has_a_dead_link_or_needs_a_network(site: Path) -> None:
    pages = {}
    for path in sorted(site.rglob("*.html")):
        pages[path.resolve()] = page = _Page()
        page.feed(path.read_text(encoding="utf-8"))
    assert len(pages) > 20
    for path, page in pages.items():
        for address in page.loads:
            assert not urlsplit(address).scheme or address.startswith("data:"), f"{path.name} loads {address}"
        for address in [*page.loads, *page.links]:
            parts = urlsplit(address)
            if parts.scheme or path.name == "404.html":
                continue
            target = path if not parts.path else (path.parent / unquote(parts.path)).resolve()
            target = target / "index.html" if target.is_dir() else target
            assert target.is_file(), f"{path.name}: {address}"
            if parts.fragment and target.suffix == ".html":
                assert unquote(parts.fragment) in pages[target].anchors, f"{path.name}: {address}"


@pytest.mark.slow
def test_generated_tables_and_search_are_there(site: Path) -> None:
    models = (site / "models.html").read_text(encoding="utf-8")
    assert all(f"<code>{model.name}</code>" in models for model in list_models())
    options = (site / "options.html").read_text(encoding="utf-8")
    for name, section in RunConfig.model_fields.items():
        assert isinstance(section.annotation, type)
        for field in section.annotation.model_fields:
            assert f"<code>{name}.{field}" in options, f"{name}.{field}"
    # the defaults on the page, read as settings, are those of the configuration
    cells = re.findall(r"<td><code>([\w.]+)</code></td>\s*<td><code>(.*?)</code></td>", options)
    assert len(cells) > 100
    shown = load_config(
        settings=["data.train=[train.xyz]", *(f"{name}={html.unescape(value)}" for name, value in cells)]
    )
    assert shown.model_dump() == load_config(settings=["data.train=[train.xyz]"]).model_dump()
    # offline, the index of the search is a script
    assert "forgetting" in (site / "search" / "search_index.js").read_text(encoding="utf-8").lower()
    assert not list(site.rglob("*.py"))


def test_every_public_name_is_in_the_reference() -> None:
    listed = set(
        re.findall(r"^::: forcetune\.([A-Za-z_]+)$", (DOCS / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
    )
    unlisted = set(forcetune.__all__) - listed - {"__version__", "METHODS", "Demo", "demo_file", "Frozen"}
    assert not unlisted
    assert listed <= {*forcetune.__all__, "adapters"}


def test_every_command_is_in_the_table() -> None:
    from forcetune.cli import app

    text = (DOCS / "commands.md").read_text(encoding="utf-8")
    for command in app.registered_commands:
        assert command.callback is not None
        assert f"forcetune {command.name or command.callback.__name__}" in text


def test_files_and_scripts_that_pages_name_exist() -> None:
    for page in [ROOT / "README.md", *DOCS.rglob("*.md")]:
        text = page.read_text(encoding="utf-8")
        for name in re.findall(r"`((?:examples|benchmarks|recipes|tests|docs|src)/[\w./-]+)`", text):
            assert (ROOT / name).exists(), f"{page.name} names {name}"


def test_notebooks_are_executed_and_small() -> None:
    notebooks = sorted((DOCS / "tutorials").glob("*.ipynb"))
    assert notebooks
    for path in notebooks:
        assert path.stat().st_size < 300_000, path
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        outputs = [output for cell in cells for output in cell.get("outputs", [])]
        assert any("image/png" in output.get("data", {}) for output in outputs), path
        assert not any(output["output_type"] == "error" for output in outputs), path
        assert not any(output.get("name") == "stderr" for output in outputs), path
        for cell in cells:
            kinds = [output["output_type"] for output in cell.get("outputs", [])]
            assert not any(pair == ("stream", "stream") for pair in pairwise(kinds)), path
        script = path.with_suffix(".py").read_text(encoding="utf-8")
        for cell in cells:
            assert cell["cell_type"] != "code" or "".join(cell["source"]) in script, path


def test_every_tutorial_is_executed_and_listed() -> None:
    names = {path.stem for path in (DOCS / "tutorials").glob("*.py")} - {"build"}
    assert names == {path.stem for path in (DOCS / "tutorials").glob("*.ipynb")}
    listings = [ROOT / "README.md", ROOT / "mkdocs.yml", DOCS / "index.md"]
    for name in names:
        page = (DOCS / "tutorials" / f"{name}.md").read_text(encoding="utf-8")
        pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", page)
        assert pictures and all((DOCS / "tutorials" / picture).is_file() for picture in pictures), name
        for listing in listings:
            assert f"tutorials/{name}.md" in listing.read_text(encoding="utf-8"), f"{listing.name} lacks {name}"
