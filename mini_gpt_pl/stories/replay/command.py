"""`mini_gpt_pl replay RUN`."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from mini_gpt_pl.command_line import CommandParser
from mini_gpt_pl.report.summary import table_console
from mini_gpt_pl.runs.folder import REPLAY, Run
from mini_gpt_pl.stories.replay import records, steps
from mini_gpt_pl.stories.replay.measure import Replay, Settings
from mini_gpt_pl.stories.replay.restore import device_of
from mini_gpt_pl.stories.switches import events_of


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        "replay",
        description="Measure gradients, Fisher and logit lens at stored checkpoints of a run, on fixed batches, "
        "against the backbone of the whole run, which exists only afterwards. Goes on where it was broken off.",
    )
    default = Settings()
    parser.add_argument("run", type=Path, help="run folder")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--steps", type=int, nargs="+", metavar="STEP", help="these checkpoints; default: all stored")
    which.add_argument("--every", type=int, metavar="K", help="checkpoints at multiples of K, and the last")
    which.add_argument("--paper", action="store_true", help="the paper's eight: 200, peaks and troughs of p_ood, last")
    parser.add_argument("--batches", type=int, default=default.batches, help="for alignment and bias (%(default)s)")
    parser.add_argument(
        "--fisher_batches", type=int, default=default.fisher_batches, help="for the Fisher (%(default)s)"
    )
    parser.add_argument("--accelerator", choices=("cpu", "cuda", "auto"), default="auto", help="(%(default)s)")
    parser.add_argument("--precision", choices=("32", "bf16"), default=default.precision, help="(%(default)s)")
    parser.add_argument(
        "--lens",
        choices=("all", "events", "none"),
        default=default.lens,
        help="checkpoints for the logit lens: events are peaks and troughs of p_ood, and the last (%(default)s)",
    )
    parser.add_argument(
        "--block",
        type=int,
        default=default.block,
        help="gradients held at a time for the Fisher, 0 for all; fewer take less memory and more time (%(default)s)",
    )
    parser.add_argument("--out", type=Path, help="folder for the records (RUN/replay)")
    parser.add_argument("--overwrite", action="store_true", help="replace records that are there")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="data.OPTION=VALUE", help="for data that has moved"
    )
    return parser


def main(args: Sequence[str]) -> None:
    """Replay checkpoints of one run.

    Args:
        args: Of the command line, behind `replay`.

    Raises:
        UserError: Something in them, or in the run folder, is not as it should be.
    """
    given = _parser().parse_args(list(args))
    settings = Settings(given.batches, given.fisher_batches, given.precision, given.lens, given.block)
    run = Run(given.run)
    out = given.out or run.path / REPLAY
    console = table_console()
    replay = Replay(run, settings, device_of(given.accelerator), given.set)
    wanted = _wanted(given, run, list(replay.stored), console)
    known = {} if given.overwrite else _known(out, replay)
    todo = [step for step in wanted if step not in known]
    if len(todo) < len(wanted):
        console.print(f"{len(wanted) - len(todo)} of {len(wanted)} checkpoints have records already", highlight=False)
    if todo:
        replay.prepare()
    records.make(out)
    if given.overwrite:
        _clear(out)
    known |= _measure(replay, todo, out, console)
    table = records.write_table(out, known)
    _print_table({step: known[step] for step in wanted}, run, console)
    console.print(f"  {out}/\n  {table}", highlight=False, markup=False, soft_wrap=True)


def _wanted(given: argparse.Namespace, run: Run, stored: list[int], console: Console) -> list[int]:
    if given.steps is not None:
        return steps.chosen(stored, given.steps)
    if given.every is not None:
        return steps.every(stored, given.every)
    if given.paper:
        roles = steps.paper(stored, events_of(run), run.trajectory.steps[-1])
        console.print("; ".join(f"{role.replace('_', ' ')} {step}" for role, step in roles.items()), highlight=False)
        return sorted(set(roles.values()))
    return stored


def _known(out: Path, replay: Replay) -> dict[int, records.Record]:
    """Records that are there, of this or another choice of checkpoints."""
    known = records.read_all(out)
    if known:
        records.check(out, known, replay.described, replay.sha256)
    return known


def _clear(out: Path) -> None:
    for file in [*records.files(out), out / records.TABLE]:
        file.unlink(missing_ok=True)


def _measure(replay: Replay, todo: Sequence[int], out: Path, console: Console) -> dict[int, records.Record]:
    """Measure and write, one checkpoint at a time."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    bar = Progress(
        *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, disable=not console.is_terminal
    )
    with bar:
        task = bar.add_task("replay", total=len(todo))
        for step in todo:
            bar.update(task, description=f"step {step}")
            start = time.monotonic()
            records.write(out, replay.measure(step))
            bar.advance(task)
            if not console.is_terminal:
                console.print(f"step {step}: {time.monotonic() - start:.1f} s", highlight=False)
    found = records.read_all(out)
    return {step: found[step] for step in todo}


def _print_table(found: dict[int, records.Record], run: Run, console: Console) -> None:
    table = Table(title=f"{run.path}: gradients against v_b of the whole run, {run.trunk}", title_justify="left")
    for column in (
        "step",
        "p_ood is at a",
        "|cos| / floor",
        "b = <g, v_b>",
        "interference",
        "anisotropy",
        "overlap / floor",
    ):
        table.add_column(column, justify="right")
    for step in sorted(found):
        table.add_row(*records.headline(found[step], run.trunk))
    console.print(table)
    console.print(
        "|cos(g, v_b)| and |<u_1, v_b>| over sqrt(2 / (pi D)), what a random direction gives; interference:\n"
        "cos(g_LM, g_probe); anisotropy: q(v_b) over the mean q across it, 1 by chance, with its standard error;\n"
        "else ± is the standard deviation over batches",
        style="dim",
    )
