"""The documentation site: it builds strictly, its links lead somewhere, and no page asks another host for anything."""

from __future__ import annotations

import importlib.util
import json
import os
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cached_property
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

import mini_gpt_pl.geometry
from mini_gpt_pl import callbacks

pytest.importorskip("mkdocs", reason="the site takes the extra `docs`")

ROOT = Path(__file__).parents[2]
# Attributes by which a page fetches something as it opens, by tag.
FETCHED = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src", "video": "src"}


class Html(HTMLParser):
    """Anchors and links of one page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.ids: set[str] = set()
        self.links: list[tuple[str, str]] = []
        self.classes: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.ids.update(found[name] for name in ("id", "name") if name in found)
        self.classes.update(found.get("class", "").split())
        target = found.get("href" if tag == "a" else FETCHED.get(tag, ""))
        if target:
            self.links.append((tag, target))


class Site:
    """A built site."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @cached_property
    def pages(self) -> dict[Path, Html]:
        return {path.resolve(): Html(path) for path in sorted(self.root.rglob("*.html"))}

    def broken(self, page: Html, target: str) -> bool:
        """Whether a link of a page leads to no file of the site, or to no anchor of a page."""
        parts = urlsplit(target)
        if parts.scheme or parts.netloc:
            return False
        path = unquote(parts.path)
        base = self.root if path.startswith("/") else page.path.parent
        file = (base / path.lstrip("/")).resolve() if path else page.path.resolve()
        file = file / "index.html" if file.is_dir() else file
        if file in self.pages and parts.fragment:
            return unquote(parts.fragment) not in self.pages[file].ids | {"__toc", ""}
        return not file.is_file()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """The site as `mkdocs build --strict` writes it, with a proxy that leads nowhere."""
    root = tmp_path_factory.mktemp("site")
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(root)],
        cwd=ROOT,
        env={**os.environ, **nowhere, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    return Site(root)


# ------------------------------------------------------------------------------------------------ the built site


def test_every_internal_link_anchor_and_picture_is_there(site: Site) -> None:
    links = [(page, tag, target) for page in site.pages.values() for tag, target in page.links]
    assert len(site.pages) > 30 and len(links) > 2000
    assert any(tag == "img" for _, tag, _ in links)
    broken = {(str(page.path.relative_to(site.root)), target) for page, _, target in links if site.broken(page, target)}
    assert sorted(broken) == []


def test_the_check_of_links_finds_what_is_broken(site: Site) -> None:
    home = site.pages[(site.root / "index.html").resolve()]
    for target in ("nowhere.html", "#no-such-heading", "metrics.html#no-such-metric", "figures/none.png"):
        assert site.broken(home, target), target
    for target in ("metrics.html#backbonegrouppc1", "https://arxiv.org/abs/2602.23696", "reference/geometry.html"):
        assert not site.broken(home, target), target


def test_no_page_asks_another_host_for_anything(site: Site) -> None:
    asked = [
        (page.path.name, target)
        for page in site.pages.values()
        for tag, target in page.links
        if tag != "a" and urlsplit(target).netloc
    ]
    assert asked == []
    styles = [style.read_text(encoding="utf-8") for style in site.root.rglob("*.css")]
    assert styles and not any(re.search(r"(url\(|@import )[\"']?(https?:)?//", style) for style in styles)
    # The theme would fetch a drawing library for these.
    assert not any("mermaid" in page.classes for page in site.pages.values())


def _modules(package: ModuleType) -> Iterator[str]:
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if not module.ispkg and ".kernels" not in module.name:
            yield module.name


@pytest.mark.parametrize(("package", "page"), [(callbacks, "callbacks"), (mini_gpt_pl.geometry, "geometry")])
def test_every_public_module_is_in_the_reference(site: Site, package: ModuleType, page: str) -> None:
    ids = site.pages[(site.root / f"reference/{page}.html").resolve()].ids
    names = list(_modules(package))
    assert len(names) > 8
    assert [name for name in names if name not in ids] == []


def test_every_exported_callback_is_in_the_reference(site: Site) -> None:
    ids = set().union(*(page.ids for file, page in site.pages.items() if "reference" in file.parts))
    for name in callbacks.__all__:
        assert f"{getattr(callbacks, name).__module__}.{name}" in ids, name


def test_examples_are_code_and_not_quotations(site: Site) -> None:
    page = (site.root / "reference/callbacks.html").read_text(encoding="utf-8")
    assert page.count("<summary>Example") + page.count("Examples:") > 5
    assert "<blockquote>" not in page


def test_notebooks_are_pages_with_their_pictures(site: Site) -> None:
    drawn = 0
    for notebook in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb")):
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        outputs = [output for cell in cells for output in cell.get("outputs", ())]
        pictures = sum("image/png" in output.get("data", {}) for output in outputs)
        page = site.pages[(site.root / f"notebooks/{notebook.stem}.html").resolve()]
        assert sum(tag == "img" and notebook.stem in target for tag, target in page.links) == pictures, notebook.name
        drawn += pictures
    assert drawn > 5


# -------------------------------------------------------------------------------------------- as GitHub shows it


def _written() -> list[Path]:
    outside = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")]
    return sorted(path for path in [*outside, *(ROOT / "docs").rglob("*.md")] if path.is_file())


@pytest.mark.parametrize("page", _written(), ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_hold_in_the_repository_too(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    targets = [target for target in re.findall(r"\]\(([^()\s#]+)", text) if not re.match(r"[a-z]+:", target)]
    assert [target for target in targets if not (page.parent / unquote(target)).exists()] == []


# -------------------------------------------------------------------------------------------------- the hooks


@pytest.fixture(scope="module")
def hooks() -> Any:
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "docs/hooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class _Files:
    """Pages that the site has."""

    def __init__(self, *uris: str) -> None:
        self.uris = uris

    def get_file_from_path(self, uri: str) -> str | None:
        return uri if uri in self.uris else None


@pytest.mark.parametrize(
    ("link", "shown"),
    [
        ("[home](../../README.md)", "[home](../index.md)"),
        ("[a run](../../README.md#commands)", "[a run](../index.md#commands)"),
        ("[tour](../../notebooks/01_quick_tour.ipynb)", "[tour](../notebooks/01_quick_tour.md)"),
        ("[`tables`](../replication/seed42/tables)", "[`tables`](../replication/seed42/tables/index.md)"),
        ("[one](../replication/seed42/tables/windows.md)", "[one](../replication/seed42/tables/index.md)"),
        ("[the command line](../../cli.py)", "the command line (`cli.py`)"),
        ("[`cli.py`](../../cli.py)", "`cli.py`"),
        ("[gone](../../nowhere.py)", "[gone](../../nowhere.py)"),  # for --strict to find
        ("[far](https://arxiv.org)", "[far](https://arxiv.org)"),
        ("[here](#there)", "[here](#there)"),
    ],
)
def test_links_out_of_the_site(hooks: Any, link: str, shown: str) -> None:
    files = _Files("index.md", "notebooks/01_quick_tour.md", "replication/seed42/tables/index.md")
    assert hooks._LINK.sub(lambda m: hooks._relinked(m, "how-to/x.md", "docs/how-to", files), link) == shown


@pytest.mark.parametrize(
    ("output", "shown"),
    [
        ({"output_type": "stream", "text": ["a\n", "\x1b[31mb\x1b[0m\n"]}, "``` {.text .output}\na\nb\n```"),
        ({"data": {"text/plain": ["0.81"]}}, "``` {.text .output}\n0.81\n```"),
        (
            {"data": {"text/html": ['<style scoped>\n a\n</style>\n<table border="1" class="dataframe">', "</table>"]}},
            '<div class="output">\n<table></table>\n</div>',
        ),
        ({"data": {"image/png": "aGk=", "text/plain": ["<Figure size 600x400>"]}}, "![Figure size 600x400](n.png)"),
    ],
)
def test_outputs_of_a_notebook(hooks: Any, output: dict[str, Any], shown: str) -> None:
    text, picture = hooks._shown(output, "n.png")
    assert text == shown
    assert picture == (b"hi" if "image/png" in output.get("data", {}) else b"")
