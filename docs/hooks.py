"""Hooks of the documentation site: pages made of files outside docs/, and links that leave it.

What is written for GitHub stays as it is: a link from a page to a file of the repository becomes a link to that file's
page where the site has one, and plain text where it has none. A link to nothing is left alone, for --strict to find.
"""

from __future__ import annotations

import base64
import importlib.util
import json
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
# Files of the repository's root, and their pages.
_PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md"}
_LINK = re.compile(r"(?P<image>!?)\[(?P<text>(?:[^\[\]]|\[[^\]]*\])*)\]\((?P<target>[^()\s#]+)(?P<anchor>#[^()\s]*)?\)")
_FENCED = re.compile(r"(^```.*?^```[ \t]*$)", re.MULTILINE | re.DOTALL)
_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")
# What pandas puts on its tables: without it they look like the page's own.
_DRESS = re.compile(
    r'<style scoped>.*?</style>\n?| border="1"| class="dataframe"| style="text-align: right;"', re.DOTALL
)

# Where in the repository a generated page comes from, as links in it are relative to that.
_origins: dict[str, str] = {}


def on_startup(**kwargs: Any) -> None:
    """Lay the package out as it is installed, where the reference is read from."""
    spec = importlib.util.spec_from_file_location("house", ROOT / "docs" / "tools" / "house.py")
    assert spec is not None and spec.loader is not None
    house = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(house)
    house.build()


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the notebooks, the list of changes and one page for each folder of tables."""
    for notebook in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb")):
        _add_notebook(files, config, notebook)
    changes = ROOT / "CHANGELOG.md"
    if changes.is_file():
        _add(files, config, "changelog.md", changes.read_text(encoding="utf-8"), origin="")
    for study in ("replication", "grokking"):
        for folder in sorted((ROOT / "docs" / study).glob("*/tables")):
            _add_tables(files, config, folder)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links to files of the repository lead to their pages, outside of fenced code."""
    here = page.file.src_uri
    if page.parent is None:
        page.meta.setdefault("hide", ["navigation"])  # a section of one page needs no list of its pages
    origin = _origins.get(here, posixpath.join("docs", posixpath.dirname(here)))
    parts = _FENCED.split(markdown)
    parts[::2] = [_LINK.sub(lambda link: _relinked(link, here, origin, files), part) for part in parts[::2]]
    return "".join(parts)


def _add(files: Files, config: MkDocsConfig, uri: str, content: str | bytes, origin: str) -> None:
    _origins[uri] = origin
    files.append(File.generated(config, uri, content=content))


# ---------------------------------------------------------------------------------------------------- links


def _relinked(link: re.Match[str], here: str, origin: str, files: Files) -> str:
    target = link["target"]
    if re.match(r"[a-z]+:|/", target):
        return link[0]
    path = posixpath.normpath(posixpath.join(origin, target))
    if not (ROOT / path).exists():
        return link[0]
    uri = _page_of(path, files)
    if uri is not None:
        there = posixpath.relpath(uri, posixpath.dirname(here) or ".")
        return f"{link['image']}[{link['text']}]({there}{link['anchor'] or ''})"
    text = link["text"]
    named = posixpath.basename(path) in text
    return text if named else f"{text} (`{path}`)"


def _page_of(path: str, files: Files) -> str | None:
    """The site's file for a file or folder of the repository."""
    inside = path.removeprefix("docs/")
    candidates = [_PAGES.get(path), re.sub(r"\.ipynb$", ".md", path)]
    if inside != path:
        candidates = [inside, f"{inside}/index.md", f"{inside}/README.md", f"{posixpath.dirname(inside)}/index.md"]
        if not inside.endswith("tables") and "/tables/" not in inside:
            candidates.pop()  # only a folder of tables is one page
    return next((uri for uri in candidates if uri is not None and files.get_file_from_path(uri) is not None), None)


# ---------------------------------------------------------------------------------------------------- tables


def _add_tables(files: Files, config: MkDocsConfig, folder: Path) -> None:
    """One page of all tables in a folder, in place of a page for each."""
    origin = folder.relative_to(ROOT).as_posix()
    lines = [f"# Tables: {folder.parent.name}", ""]
    for table in sorted(folder.glob("*.md")):
        file = files.get_file_from_path(table.relative_to(ROOT / "docs").as_posix())
        if file is not None:
            files.remove(file)
        title, _, rest = table.read_text(encoding="utf-8").strip().partition("\n")
        lines += [title, "", f"`{table.name}`, and as `.csv`", rest, ""]
    _add(files, config, f"{origin.removeprefix('docs/')}/index.md", "\n".join(lines), origin)


# ------------------------------------------------------------------------------------------------- notebooks


def _add_notebook(files: Files, config: MkDocsConfig, notebook: Path) -> None:
    """A page of a notebook's cells and committed outputs; its pictures become files beside it."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    lines = []
    for number, cell in enumerate(cells):
        source = "".join(cell["source"]).strip()
        if source:
            lines += [source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```", ""]
        for position, output in enumerate(cell.get("outputs", ())):
            name = f"{notebook.stem}/{number}-{position}.png"
            text, picture = _shown(output, name)
            lines += [text, ""]
            if picture:
                _add(files, config, f"notebooks/{name}", picture, "notebooks")
    where = f"*This page is `notebooks/{notebook.name}` of the repository, as it was last executed.*"
    page = re.sub(r"(\A# .*$)", rf"\1\n\n{where}", "\n".join(lines), count=1, flags=re.MULTILINE)
    _add(files, config, f"notebooks/{notebook.stem}.md", page, "notebooks")


def _shown(output: dict[str, Any], name: str) -> tuple[str, bytes]:
    """Markdown of one output, and the picture that it refers to."""
    data = output.get("data", {})
    if "image/png" in data:
        alternative = re.sub(r"[^\w .,-]", " ", "".join(data.get("text/plain", "figure"))).strip()
        return f"![{alternative}]({name})", base64.b64decode("".join(data["image/png"]))
    if "text/html" in data:
        return f'<div class="output">\n{_DRESS.sub("", "".join(data["text/html"]))}\n</div>', b""
    if "text/markdown" in data:
        return "".join(data["text/markdown"]), b""
    text = "".join(_texts(output)).rstrip()
    return (f"``` {{.text .output}}\n{_ESCAPES.sub('', text)}\n```" if text else ""), b""


def _texts(output: dict[str, Any]) -> Iterator[str]:
    yield from output.get("text", ())
    yield from output.get("data", {}).get("text/plain", ())
    yield from output.get("traceback", ())
