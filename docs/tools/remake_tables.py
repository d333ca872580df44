"""Make every committed table again from the committed runs and results, and compare it by value with what is committed.

    python docs/tools/remake_tables.py                                # all of them: some minutes on one core
    python docs/tools/remake_tables.py --only 'docs/replication/*'    # those whose names fit
    python docs/tools/remake_tables.py --runs --out BEFORE            # keep them, and what is printed of each kept run
    python docs/tools/remake_tables.py --runs --reference BEFORE      # compare with those instead

The repository is copied, its tables are taken out of the copy, and the commands that the pages name are run there, so
that no table is ever compared with itself. One line says of each table whether it came out the same, where it differs,
or why it cannot be made again. The exit status is 1 if a table differs, is missing, or is not on the lists below.

A table is named by its file. One that stands in a page is the page's name, # and its number on the page; what a cell of
a notebook shows is the notebook's name, # and the cell's index.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from html import unescape
from pathlib import Path

# ------------------------------------------------------------------------------------------- what is run, and for what

PROGRAMS: dict[str, tuple[str, ...]] = {
    "report": ("cli.py", "report"),
    "summary": ("-m", "mini_gpt_pl.report.summary"),
    "calibration": ("-m", "mini_gpt_pl.report.calibration"),
    "glossary": ("-m", "mini_gpt_pl.metrics.glossary", "--markdown"),
    "place": ("-m", "docs.tools.place"),
    "same_steps": ("-m", "docs.tools.same_steps"),
    "two_walks": ("-m", "docs.tools.two_walks"),
    "interventions": ("cli.py", "interventions"),
    "speed": ("-m", "benchmarks.page"),
    "scale": ("-m", "benchmarks.scale", "--show"),
    "notebooks": ("-m", "notebooks.execute"),
    "what_works": ("-m", "docs.tools.what_works"),
}
"""How each command is called, behind `python`. Where a module moves, its line here is all that changes."""

_TABLE = re.compile(r"(?:^\|.*\n)+", re.MULTILINE)
Rows = list[list[str]]
Write = Callable[[str, Path], None]


@dataclass(frozen=True)
class Recipe:
    """One command, and the tables that it makes.

    Args:
        makes: Patterns of the tables' names.
        program: Its name in `PROGRAMS`.
        arguments: What follows it.
        folder: Where it is run, from the repository's root.
        write: Puts what it prints into the copy; None for a command that writes files itself.
        may_fail: A refusal is kept as its table, for a run that has too little for it.
    """

    makes: tuple[str, ...]
    program: str
    arguments: tuple[str, ...] = ()
    folder: str = "."
    write: Write | None = None
    may_fail: Path | None = None


def _into_page(page: str, count: int) -> Write:
    """Replace the first tables of a page by those that were printed, which must be as many."""

    def write(printed: str, root: Path) -> None:
        tables = _TABLE.findall(printed)
        if len(tables) != count:
            raise ValueError(f"{len(tables)} tables were printed, not {count}")
        text = (root / page).read_text(encoding="utf-8")
        new = iter(tables)
        (root / page).write_text(_TABLE.sub(lambda _: next(new), text, count=count), encoding="utf-8")

    return write


def _into_file(name: str) -> Write:
    """Make a file of what was printed."""

    def write(printed: str, root: Path) -> None:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(printed, encoding="utf-8")

    return write


def _excerpt_into(page: str, labels: dict[str, str]) -> Write:
    """Fill a page's first table, which is an excerpt in other words and with fewer digits, from a printed table.

    Args:
        page: Name of the page.
        labels: First cells of the printed table, by those of the page where they differ.
    """

    def write(printed: str, root: Path) -> None:
        rows = {cells[0]: cells for cells in _boxed_rows(printed)}
        text = (root / page).read_text(encoding="utf-8")
        old = _TABLE.search(text)
        if old is None:
            raise ValueError(f"{page} has no table")
        head, rule, *body = old[0].splitlines()
        filled = []
        for line in body:
            label, *cells = _cells(line)
            source = rows.get(labels.get(label, label), [label, *["not printed"] * len(cells)])[1:]
            filled.append(f"| {' | '.join([label, *map(_with_digits_of, cells, source)])} |")
        new = "\n".join([head, rule, *filled]) + "\n"
        (root / page).write_text(text.replace(old[0], new, 1), encoding="utf-8")

    return write


def _boxed_rows(printed: str) -> Rows:
    """Rows of a table as the terminal shows it; a label that was folded is put together again."""
    rows: Rows = []
    for line in printed.splitlines():
        if line.startswith("│"):
            cells = [cell.strip() for cell in line.strip().strip("│").split("│")]
            if rows and not any(cells[1:]):
                rows[-1][0] += f" {cells[0]}"
            else:
                rows.append(cells)
    return rows


def _with_digits_of(shown: str, full: str) -> str:
    """Write a number with the sign, the digits and the unit that stand on the page."""
    page, value = re.fullmatch(r"([-+]?)([\d.]+)(\D*)", shown), re.match(r"[-+]?[\d.]+", full)
    if page is None or value is None:
        return full
    sign, digits, unit = page.groups()
    return f"{float(value[0]):{sign.strip('-')}.{len(digits.partition('.')[2])}f}{unit}"


RECIPES: tuple[Recipe, ...] = (
    Recipe(
        ("docs/replication/report/tables/*",),
        "report",
        ("runs/seeds", "runs/beta2", "runs/optimizers", "runs/reheat", "--out", "report"),
        folder="docs/replication",
    ),
    Recipe(
        ("docs/replication/live/tables/*",),
        "report",
        ("runs/live", "--out", "live"),
        folder="docs/replication",
    ),
    *(
        Recipe(
            (f"docs/replication/controls/tables/{name}.*",),
            "same_steps",
            ("runs/live", "runs/live/seed42", run, "--step", step, "--out", "controls/tables", "--name", name),
            folder="docs/replication",
        )
        for name, run, step in (
            ("builtin", "runs/builtin/seed42", "9000"),
            ("lambda_constant", "runs/controls/lambda_constant", "6000"),
        )
    ),
    Recipe(
        ("docs/replication/experiments/tables/*",),
        "report",
        ("runs/experiments", "--out", "experiments"),
        folder="docs/replication",
    ),
    Recipe(
        ("docs/replication/controls/tables/two_walks.*",),
        "two_walks",
        ("runs/live", "--out", "controls/tables"),
        folder="docs/replication",
    ),
    Recipe(
        ("docs/replication/learning/tables/*",),
        "report",
        ("runs/optimizers_learning", "runs/optimizers/adamw-wd0", "runs/beta2/0.95", "--out", "learning"),
        folder="docs/replication",
    ),
    Recipe(
        ("docs/replication/beta2_p20/tables/*",),
        "report",
        ("runs/beta2_p20", "--out", "beta2_p20"),
        folder="docs/replication",
    ),
    Recipe(
        ("docs/replication/seed42/tables/*",),
        "report",
        ("runs/seeds/seed42", "--out", "seed42"),
        folder="docs/replication",
    ),
    Recipe(
        ("docs/replication/seed271/tables/*",),
        "report",
        ("runs/seeds/seed271", "--out", "seed271"),
        folder="docs/replication",
    ),
    Recipe(
        ("docs/grokking/paper/tables/*",),
        "report",
        ("docs/grokking/runs/grokking_paper", "docs/grokking/runs/grokking_nodecay", "--out", "docs/grokking/paper"),
    ),
    Recipe(
        ("docs/grokking/small/tables/*",),
        "report",
        ("docs/grokking/runs/grokking", "--out", "docs/grokking/small"),
    ),
    *(
        Recipe(
            (f"docs/grokking/{name}/tables/*",),
            "report",
            (f"docs/grokking/runs/grokking_{name}", "--out", f"docs/grokking/{name}"),
        )
        for name in ("slow", "markers", "multitask", "rates")
    ),
    Recipe(
        ("docs/grokking/doses/tables/*",),
        "interventions",
        ("docs/grokking/runs/interventions_doses", "--out", "docs/grokking/doses/tables"),
    ),
    *(
        Recipe(
            (f"docs/grokking/operation_{name}/tables/*",),
            "interventions",
            (
                "docs/grokking/runs/interventions_operations",
                *("--operation", name, "--out", f"docs/grokking/operation_{name}/tables"),
            ),
        )
        for name in ("add", "sub", "mul", "x2_y2")
    ),
    Recipe(("docs/grokking/README.md#*",), "place", ("docs/grokking/README.md",)),
    Recipe(
        ("README.md#1",),
        "summary",
        ("docs/replication/runs/seeds/seed42",),
        write=_excerpt_into(
            "README.md",
            {
                "drift ‖x(T)‖": "drift ||x(T)||",
                "update alignment with the past's v_b, mean": "update alignment, past-only v_b, mean cos",
            },
        ),
    ),
    Recipe(
        tuple(f"docs/findings.md#{number}" for number in range(1, 6)),
        "calibration",
        ("docs/h100_full",),
        write=_into_page("docs/findings.md", 5),
    ),
    Recipe(("docs/metrics.md",), "glossary", write=_into_file("docs/metrics.md")),
    Recipe(("docs/speed.md#*",), "speed"),
    Recipe(("docs/what-works.md",), "what_works"),
    Recipe(
        ("docs/concepts/scale.md#2",),
        "scale",
        ("benchmarks/results/scale.json", "--into", "docs/concepts/scale.md"),
    ),
    Recipe(("notebooks/02_*#*", "notebooks/04_*#*"), "notebooks", ("02", "04")),
    Recipe(("notebooks/05_*#16", "notebooks/05_*#19"), "notebooks", ("05",)),
)
"""In the order in which they are run: a page is filled from files that earlier ones have written."""

_TRAINS = "the notebook trains a model first, and weights are not the same on every processor"
_WORDS = "it is written by hand: words and definitions, which no command prints"
CANNOT: dict[str, str] = {
    "docs/grokking/paper/tables/grokking_overlaps.*": "it takes the snapshots of the runs, and runs are kept without",
    "docs/grokking/seeds/tables/*": "the runs of configs/sweeps/grokking_seeds.yaml are not kept",
    "docs/grokking/interventions/tables/*": "the runs of configs/sweeps/grokking_interventions.yaml are not kept",
    "notebooks/01_*": _TRAINS,
    "notebooks/03_*": _TRAINS,
    "notebooks/05_*#[359]": _TRAINS,
    "notebooks/05_*#14": _TRAINS,
    "notebooks/06_*": _TRAINS,
    "docs/concepts/centred-pca.md#1": "its values are closed forms, which the page derives",
    "docs/concepts/nulls.md#1": "an excerpt by hand of docs/replication/report/tables/runs_geometry and others there",
    "docs/replication/README.md#2": "an excerpt by hand of the tables beside it",
    "docs/findings.md#6": "an excerpt by hand of the tables above it",
    "docs/how-to/own-model.md#2": "an excerpt by hand, in words, of what the example of the page prints",
    **dict.fromkeys(
        (
            "README.md#2",
            "docs/comparison.md#1",
            "docs/concepts/centred-pca.md#2",
            "docs/concepts/commutator.md#1",
            "docs/concepts/fisher.md#1",
            "docs/concepts/scale.md#1",
            "docs/concepts/uncentred-pca.md#1",
            "docs/design.md#[123]",
            "docs/how-to/dashboards.md#[12]",
            "docs/how-to/experiments.md#[12]",
            "docs/how-to/interventions.md#1",
            "docs/how-to/offline-wandb.md#[12]",
            "docs/how-to/own-model.md#[1345]",
            "docs/how-to/own-text.md#1",
            "docs/how-to/resume.md#1",
            "docs/how-to/run-folder.md#1",
            "docs/how-to/tinystories.md#1",
            "docs/how-to/write-a-probe.md#[123]",
            "docs/index.md#1",
            "docs/reference/callbacks.md#1",
            "docs/reference/geometry.md#1",
            "docs/reference/index.md#1",
            "docs/replication/README.md#1",
        ),
        _WORDS,
    ),
}
"""Why a table cannot be made again, by patterns of names. What is listed here is taken from no recipe."""

TOLERANCE = 1e-9
TINY = 1e-12  # below this a number is rounding of a zero
COARSER: dict[str, tuple[float, str]] = {
    "docs/grokking/paper/tables/*.csv": (1e-5, "kept metrics have six digits, and the table was made before"),
    "docs/grokking/small/tables/*.csv": (1e-5, "kept metrics have six digits, and the table was made before"),
}
"""Relative tolerance of numbers where it is not `TOLERANCE`, and the reason; with `--reference` it always is."""

ROOT = Path(__file__).resolve().parents[2]
# Tables are looked for here; what runs logged is what tables are made of.
_PLACES = ("README.md", "docs/*", "notebooks/*.ipynb")
_NO_TABLES = ("docs/*/runs/*", "docs/h100_full/*")
_WHOLE = ("docs/metrics.md", "docs/what-works.md", "*/tables/*.md", "runs/*.md")
_EXTRA = "runs"  # folder of what --runs adds
_INSIDE = ("callbacks", "configs")  # what an installed package has inside, so that the copy is run and nothing else
_MARKED = re.compile(r"(<!-- (?:table )?(?P<name>[\w./-]+) -->\n).*?(<!-- (?:end|/(?P=name)) -->)", re.DOTALL)
_NUMBERS = re.compile(r"\d[\d,]*(?:\.\d+)?(?:[eE][-+]?\d+)?")


# ------------------------------------------------------------------------------------------------- reading tables


def _cells(line: str) -> list[str]:
    """Cut a line of a Markdown table, or keep another line as one cell."""
    if not line.startswith("|"):
        return [line.strip()]
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))]


def _html_rows(text: str) -> Rows:
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)
    rows = [
        re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL) for row in re.findall(r"<tr.*?</tr>", text, re.DOTALL)
    ]
    return [[unescape(re.sub(r"<[^>]+>", "", cell)).strip() for cell in row] for row in rows]


def _shown(output: dict[str, object]) -> Rows:
    """Rows of one output of a notebook's cell: a table, or lines of text; a picture has none."""
    data = output.get("data", {})
    assert isinstance(data, dict)
    if "text/html" in data:
        return _html_rows("".join(data["text/html"]))
    if "image/png" in data:
        return []
    text = output.get("text", data.get("text/plain", []))
    return [[line] for line in "".join(text).splitlines() if line.strip()]  # type: ignore[arg-type]


def tables_in(root: Path, name: str) -> Iterator[tuple[str, Rows]]:
    """Read the tables of one file, with their names.

    Args:
        root: Folder of the repository, of a copy, or of tables that were kept.
        name: Of a CSV, Markdown, text or notebook file in it.
    """
    path = root / name
    if path.suffix == ".csv":
        with path.open(encoding="utf-8", newline="") as file:
            yield name, list(csv.reader(file))
        return
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        for index, cell in enumerate(json.loads(text)["cells"]):
            rows = [row for output in cell.get("outputs", ()) for row in _shown(output)]
            if rows:
                yield f"{name}#{index}", rows
    elif path.suffix == ".txt" or _fits(name, _WHOLE):
        yield name, [_cells(line) for line in text.splitlines() if line.strip()]
    else:
        unfenced = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
        for number, table in enumerate(_TABLE.findall(unfenced + "\n"), 1):
            yield f"{name}#{number}", [_cells(line) for line in table.splitlines()]


def _fits(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def all_tables(root: Path, names: Sequence[str]) -> dict[str, Rows]:
    """Read the tables of all files that may hold one."""
    files = [name for name in names if Path(name).suffix in (".csv", ".md", ".ipynb", ".txt")]
    return {table: rows for name in files for table, rows in tables_in(root, name)}


# ---------------------------------------------------------------------------------------------------- comparing


def difference(old: Rows, new: Rows, relative: float, *, numbers_only: bool = False) -> str | None:
    """Say where two tables differ first, and in how many cells; None where they are the same.

    Args:
        old: Cells by row, as committed or kept.
        new: As made now.
        relative: Tolerance of cells that are numbers; any other cell is compared as text.
        numbers_only: Compare of any other cell the numbers in it alone.
    """
    if len(old) != len(new):
        labels = [row[0] if row else "" for row in old], [row[0] if row else "" for row in new]
        gone, more = (sorted(set(a) - set(b)) for a, b in (labels, labels[::-1]))
        return f"{len(old)} rows before, {len(new)} now; gone: {gone[:5]}, more: {more[:5]}"
    unlike = []
    for number, (before, after) in enumerate(zip(old, new, strict=True)):
        if len(before) != len(after):
            return f"row {number} {before[:1]}: {len(before)} cells before, {len(after)} now"
        for column, (a, b) in enumerate(zip(before, after, strict=True)):
            if not _alike(a, b, relative, numbers_only):
                unlike.append(
                    f"row {number} {before[0]!r}, column {column} {old[0][column:][:1]}: {a!r} before, {b!r} now"
                )
    return f"{unlike[0]} ({len(unlike)} cells differ)" if unlike else None


def _alike(a: str, b: str, relative: float, numbers_only: bool) -> bool:
    if a == b:
        return True
    try:
        return math.isclose(float(a), float(b), rel_tol=relative, abs_tol=TINY)
    except ValueError:
        return numbers_only and _NUMBERS.findall(a) == _NUMBERS.findall(b)


# ------------------------------------------------------------------------------------------------- making them again


def files_of(root: Path) -> list[str]:
    """Names of the repository's files, those included that are not committed yet."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout
    return sorted(name for name in set(listed.split("\0")) if name and (root / name).is_file())


def copy(names: Sequence[str], to: Path, wanted: Sequence[Recipe]) -> None:
    """Copy the repository without the tables that will be made."""
    patterns = [pattern for recipe in wanted for pattern in recipe.makes]
    pages = {pattern.partition("#")[0] for pattern in patterns if "#" in pattern}
    for name in names:
        if "#" not in name and _fits(name, patterns) and recipe_of(name) in wanted:
            continue
        target = to / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, target)
        if name.endswith(".md") and _fits(name, list(pages)):
            target.write_text(_MARKED.sub(r"\1\3", target.read_text(encoding="utf-8")), encoding="utf-8")
        if name.endswith(".ipynb") and _fits(name, list(pages)):
            notebook = json.loads(target.read_text(encoding="utf-8"))
            for cell in notebook["cells"]:
                if "outputs" in cell:
                    cell["outputs"] = []
            target.write_text(json.dumps(notebook), encoding="utf-8")
    for name in _INSIDE:
        inside = to / "mini_gpt_pl" / name
        if (to / name).is_dir() and not inside.exists():
            inside.symlink_to(Path("..", name))


def reason_against(table: str) -> str | None:
    """Why a table cannot be made again; None where it can, or where nobody has said."""
    return next((why for pattern, why in CANNOT.items() if fnmatchcase(table, pattern)), None)


def recipe_of(table: str) -> Recipe | None:
    """Return what makes a table; None where nothing does."""
    if reason_against(table) is not None:
        return None
    return next((recipe for recipe in RECIPES if _fits(table, recipe.makes)), None)


def of_each_run(names: Sequence[str]) -> list[Recipe]:
    """Everything that is printed of each kept run: report, closing table, calibration."""
    recipes = []
    for name in names:
        if not fnmatchcase(name, "docs/*/trajectory.safetensors"):
            continue
        run = name.rpartition("/")[0]
        here = f"{_EXTRA}/{run}"
        refused = [Path(here) / f"{program}_refused.txt" for program in ("report", "summary", "calibration")]
        recipes += [
            Recipe((f"{here}/tables/*",), "report", (run, "--out", here), may_fail=refused[0]),
            Recipe(
                (f"{here}/summary.txt",),
                "summary",
                (run,),
                write=_into_file(f"{here}/summary.txt"),
                may_fail=refused[1],
            ),
            Recipe(
                (f"{here}/calibration.md",),
                "calibration",
                (run,),
                write=_into_file(f"{here}/calibration.md"),
                may_fail=refused[2],
            ),
        ]
    return recipes


def run(recipe: Recipe, root: Path) -> str | None:
    """Run one recipe's command in a copy; a line of what went wrong, None where nothing did."""
    here = {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "COLUMNS": "200", "NO_COLOR": "1"}
    up = [".."] * len(Path(recipe.folder).parts)
    program = [str(Path(*up, word)) if word.endswith(".py") else word for word in PROGRAMS[recipe.program]]
    done = subprocess.run(
        [sys.executable, *program, *recipe.arguments],
        cwd=root / recipe.folder,
        env={**os.environ, **here},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no words"])[-1]
        if recipe.may_fail is None:
            return f"{' '.join(PROGRAMS[recipe.program])} ended with {done.returncode}: {last}"
        _into_file(str(recipe.may_fail))(last + "\n", root)
    elif recipe.write is not None:
        try:
            recipe.write(done.stdout, root)
        except ValueError as error:
            return f"{' '.join(PROGRAMS[recipe.program])}: {error}"
    return None


def remade(recipes: Sequence[Recipe], names: Sequence[str]) -> tuple[dict[str, Rows], dict[str, str]]:
    """Run recipes in a copy of the repository.

    Args:
        recipes: In their order.
        names: Of the repository's files.

    Returns:
        What they made, and what went wrong by the pattern of the tables that are missing for it.
    """
    started, failures = time.monotonic(), {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder).resolve() / "repository"
        copy(names, root, recipes)
        for recipe in recipes:
            if (failed := run(recipe, root)) is not None:
                failures.update(dict.fromkeys(recipe.makes, failed))
            words = " ".join([recipe.program, *recipe.arguments])
            print(f"# {time.monotonic() - started:4.0f} s: {words}", file=sys.stderr)
        written = [path.relative_to(root).as_posix() for path in sorted(root.rglob("*")) if path.is_file()]
        found = all_tables(root, [name for name in written if _may_hold(name) or _of_a_run(name)])
    return {table: rows for table, rows in found.items() if _of_a_run(table) or recipe_of(table) in recipes}, failures


def _may_hold(name: str) -> bool:
    return _fits(name, _PLACES) and not _fits(name, _NO_TABLES)


def _of_a_run(name: str) -> bool:
    return name.startswith(f"{_EXTRA}/")


def _wanted(recipe: Recipe, only: str, before: dict[str, Rows]) -> bool:
    """Whether a recipe makes a table that fits."""
    extra = any(_of_a_run(pattern) and fnmatchcase(pattern, only) for pattern in recipe.makes)
    return extra or any(fnmatchcase(table, only) and recipe_of(table) is recipe for table in before)


def main() -> None:
    """Make the tables, say of each what came of it, and exit with 1 unless all that can be made came out the same."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", metavar="GLOB", help="tables whose names fit; * stands for / too")
    parser.add_argument("--out", type=Path, metavar="DIR", help="keep what was made, to compare with it later")
    parser.add_argument("--reference", type=Path, metavar="DIR", help="compare with these, not with what is committed")
    parser.add_argument("--remade", type=Path, metavar="DIR", help="run nothing: take these for what was made now")
    parser.add_argument(
        "--runs", action="store_true", help="also all that is printed of each kept run, which no page has"
    )
    parser.add_argument("--numbers", action="store_true", help="other words around the same numbers are no difference")
    options = parser.parse_args()
    started = time.monotonic()

    names = files_of(ROOT)
    before = all_tables(ROOT, [name for name in names if _may_hold(name)])
    failures: dict[str, str] = {}
    if options.remade is not None:
        now = _kept(options.remade)
    else:
        recipes = [*RECIPES, *(of_each_run(names) if options.runs else [])]
        now, failures = remade([recipe for recipe in recipes if _wanted(recipe, options.only, before)], names)
    if options.out is not None:
        _keep(now, options.out)
    if options.reference is not None:
        reference = _kept(options.reference)
        before = {table: rows for table, rows in before.items() if recipe_of(table) is None} | reference
    if not options.runs:
        before, now = ({table: rows for table, rows in of.items() if not _of_a_run(table)} for of in (before, now))

    counts = dict.fromkeys(("same", "differs", "cannot", "kept"), 0)
    for table in sorted({*before, *now}):
        if fnmatchcase(table, options.only):
            relative = TOLERANCE if options.reference is not None else _tolerance(table)
            found = _verdict(table, before.get(table), now.get(table), failures, relative, options.numbers)
            if options.reference is None and _of_a_run(table):
                found = "kept", ""
            counts[found[0]] += 1
            print(f"{found[0]:8} {table}{found[1] and ': '}{found[1]}")
    print(
        f"{counts['same']} same, {counts['differs']} differ, {counts['cannot']} cannot be made again, "
        f"{counts['kept']} of single runs; {time.monotonic() - started:.0f} s"
    )
    sys.exit(int(counts["differs"] > 0 or not any(counts.values())))


def _tolerance(table: str) -> float:
    return next((coarse for pattern, (coarse, _) in COARSER.items() if fnmatchcase(table, pattern)), TOLERANCE)


def _verdict(
    table: str, old: Rows | None, new: Rows | None, failures: dict[str, str], relative: float, numbers_only: bool
) -> tuple[str, str]:
    """One of same, differs and cannot, and where or why."""
    if (why := reason_against(table)) is not None:
        return "cannot", why
    if not _of_a_run(table) and recipe_of(table) is None:
        return "differs", "it is on no list: say how it is made, or why it cannot be"
    if new is None:
        return "differs", next(
            (why for pattern, why in failures.items() if fnmatchcase(table, pattern)), "it was not made"
        )
    if old is None:
        return "differs", "it was made, and there was none before"
    where = difference(old, new, relative, numbers_only=numbers_only)
    return ("same", "") if where is None else ("differs", where)


# ------------------------------------------------------------------------------------------------- tables that are kept


def _keep(tables: dict[str, Rows], folder: Path) -> None:
    """Write tables as JSON, a file for each, so that any kind of table is read back as the cells that it was."""
    for table, rows in tables.items():
        file = folder / f"{table}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(rows, ensure_ascii=False, indent=0), encoding="utf-8")


def _kept(folder: Path) -> dict[str, Rows]:
    files = sorted(folder.rglob("*.json"))
    if not files:
        sys.exit(f"{folder} holds no kept tables: make them with --out {folder}")
    return {
        str(file.relative_to(folder)).removesuffix(".json"): json.loads(file.read_text(encoding="utf-8"))
        for file in files
    }


if __name__ == "__main__":
    main()
