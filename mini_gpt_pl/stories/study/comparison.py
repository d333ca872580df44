"""Tables over several runs, grouped by what sets them apart: optimizer, beta2, seed, or a reheat."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from mini_gpt_pl.errors import UserError
from mini_gpt_pl.report.calibration import QUANTITIES
from mini_gpt_pl.report.families import OF_OPTIMIZER, families, names, one_beta2, one_of_each_seed
from mini_gpt_pl.report.measures import RecordedPath
from mini_gpt_pl.report.settings import facts, optimizer_label, plain
from mini_gpt_pl.report.sheet import NULLS, Row, Table, beside_nulls, tabulate, word
from mini_gpt_pl.runs.folder import METRICS, Run, require_reportable
from mini_gpt_pl.stories.study.optimizer_tables import optimizers, outcome
from mini_gpt_pl.stories.study.reheat_tables import reheats
from mini_gpt_pl.stories.study.sweep_tables import beta2, seeds

_SHOWN = ("pc1", "pc1_unit", "k95_unit", "cos_theta0", "persistence")


def require_comparable(runs: Sequence[Run]) -> None:
    """Check that runs belong into one report.

    Data seed, optimizer and length may differ; what the geometry is of may not.

    Raises:
        UserError: A run is no reportable one, a folder is named twice, or two runs have other models, tokenizers or
            weight selections.
    """
    for run in runs:
        require_reportable(run)
    seen: dict[Any, Run] = {}
    for run in runs:
        if (same := seen.setdefault(run.path.resolve(), run)) is not run:
            raise UserError(f"the runs {same.path} and {run.path} are the same folder: name it once")
    for run in runs[1:]:
        if differ := _differ(runs[0], run):
            raise UserError(f"the runs {runs[0].path} and {run.path} cannot be compared: {differ}; report them apart")


def _differ(a: Run, b: Run) -> str | None:
    """Say what keeps two runs from being compared; None if nothing does."""
    one, other = facts(a), facts(b)
    if a.task != b.task:
        return f"their tasks are {a.task} and {b.task}"
    for key in ("model", "tokenizer", "context", "modulus"):
        if None not in (one[key], other[key]) and one[key] != other[key]:
            return f"{key} {one[key]} and {other[key]}"
    if a.trajectory.fingerprint != b.trajectory.fingerprint:
        dims = f"{a.trajectory.dim:,} and {b.trajectory.dim:,} values"
        return f"their recorders select different weights ({dims})"
    return None


def comparison_tables(runs: Sequence[Run], bootstrap: int = 200) -> list[Table]:
    """Make every table that at least two of the runs belong to.

    Args:
        runs: All runs of the report.
        bootstrap: Resamples behind the 95 % intervals; 0 for none.

    Raises:
        UserError: The runs do not belong together; see `require_comparable`.
    """
    require_comparable(runs)
    if len(runs) < 2:
        return []
    # Of a run that broke off before it logged anything, nothing can be said here.
    logged = [run for run in runs if (run.path / METRICS).is_file()]
    called = names(runs)
    scratch = [RecordedPath(run, bootstrap, called[run]) for run in logged if run.reheated is None]
    paths = [path for path in scratch if path.moved]
    tables, whole = _overview(paths), _geometry(paths)
    for group in grouped(paths, (*OF_OPTIMIZER, "steps", "seed")):
        kept = one_beta2([path.run for path in group])
        part = [path for path in group if path.run in kept]
        if len({optimizer_label(facts(path.run)) for path in part}) > 1:
            tables += optimizers(part, [path.label for path in group if path not in part])
            whole = [] if len(part) == len(paths) else whole  # its table of whole runs says the same
    tables[1:1] = whole
    for part in grouped(paths, ("beta2", "seed")):
        if len({facts(path.run)["beta2"] for path in part} - {None}) > 1:
            tables += beta2([path for path in part if facts(path.run)["beta2"] is not None])
    for part in grouped(paths, ("seed",)):
        kept = one_of_each_seed([path.run for path in part])
        if len(kept) > 1:
            tables += seeds([path for path in part if path.run in kept])
    return _unique([*tables, *reheats(logged, logged, called)])


def grouped(paths: Sequence[RecordedPath], ignore: Sequence[str]) -> list[list[RecordedPath]]:
    """Gather runs whose configurations agree in everything but some facts, in the order in which they were given."""
    of_run = {path.run: path for path in paths}
    found = families([path.run for path in paths], *ignore)
    return [[of_run[run] for run in group] for group in found if len(group) > 1]


def _overview(paths: Sequence[RecordedPath]) -> list[Table]:
    """All runs: what sets them apart, and how they ended."""
    if len(paths) < 2:
        return []
    found = [facts(path.run) for path in paths]
    # How many steps is told with how it ended.
    apart = [key for key in found[0] if key != "steps" and len({repr(one[key]) for one in found}) > 1]
    runs = [
        {
            "run": word(path.label),
            **{key: word("-" if one[key] is None else plain(one[key])) for key in apart},
            **outcome(path),
        }
        for path, one in zip(paths, found, strict=True)
    ]
    same = None if apart else "They differ in nothing that decides how a run goes."
    return [tabulate("runs", "The runs", runs, [same])]


def _geometry(paths: Sequence[RecordedPath]) -> list[Table]:
    """All runs beside their nulls."""
    rows: list[Row] = []
    for name, path in itertools.product(_SHOWN, paths):
        calibrated = path.calibrated(None)
        assert calibrated is not None
        words, form = QUANTITIES[name]
        rows.append({"quantity": word(words), "run": word(path.label), **beside_nulls(calibrated[name], form)})
    return [tabulate("runs_geometry", "The runs against their nulls", rows, [NULLS])] if len(paths) > 1 else []


def _unique(tables: Sequence[Table]) -> list[Table]:
    """Number tables of one name, so that none overwrites another's file."""
    seen: dict[str, int] = {}
    found = []
    for table in tables:
        seen[table.name] = count = seen.get(table.name, 0) + 1
        renamed = table.name if count == 1 else f"{table.name}_{count}"
        found.append(Table(renamed, table.title, table.frame, table.notes, table.numbers))
    return found
