"""Put the tables of a report into a page of Markdown, so that what the page says is what was computed.

python -m docs.tools.place docs/grokking/README.md           # puts them in
python -m docs.tools.place docs/grokking/README.md --check   # says whether they are there

A table stands between two comments, the first with its file, seen from the page and without suffix:
`<!-- table report/tables/runs -->` and `<!-- end -->`. A place whose table has not been written is empty.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from mini_gpt_pl.command_line import one_line_errors
from mini_gpt_pl.errors import UserError

_PLACE = re.compile(r"<!-- table (?P<name>[\w./-]+) -->\n.*?<!-- end -->", re.DOTALL)


def filled(page: str, folder: Path) -> str:
    """Return a page with the present tables in their places.

    Args:
        page: Markdown.
        folder: That the names of tables are relative to.

    Raises:
        UserError: A place has no end.
    """
    if page.count("<!-- table ") != len(_PLACE.findall(page)):
        raise UserError("a table's place has no end: close each <!-- table NAME --> with <!-- end -->")

    def fill(place: re.Match[str]) -> str:
        file = folder / f"{place['name']}.md"
        # Its title is the page's affair.
        body = file.read_text(encoding="utf-8").partition("\n")[2].strip() if file.is_file() else ""
        return "\n".join([f"<!-- table {place['name']} -->", *(["", body, ""] if body else []), "<!-- end -->"])

    return _PLACE.sub(fill, page)


def main(args: Sequence[str] | None = None) -> None:
    """Fill a page, or say whether it is as it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path, help="Markdown file")
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if something would change")
    options = parser.parse_args(args)
    with one_line_errors():
        if not options.page.is_file():
            raise UserError(f"there is no page {options.page}: give a Markdown file")
        page = options.page.read_text(encoding="utf-8")
        new = filled(page, options.page.parent)
    if options.check:
        raise SystemExit(int(new != page))
    options.page.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
