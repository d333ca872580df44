"""`mini_gpt_pl replay RUN`."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from mini_gpt_pl.command_line import CommandParser
from mini_gpt_pl.report.summary import table_console
from mini_gpt_pl.runs.folder import REPLAY, Run
from mini_gpt_pl.stories.replay import steps
from mini_gpt_pl.stories.replay.measure import Replay, Settings
from mini_gpt_pl.stories.replay.records import Line, Record, Records, lines
from mini_gpt_pl.stories.stored import add_options, device_of
from mini_gpt_pl.stories.switches import events_of

_HEADS = ("step", "p_ood is at a", "|cos| / floor", "b = <g, v_b>", "interference", "anisotropy", "overlap / floor")
_LEGEND = """\
|cos(g, v_b)| and |<u_1, v_b>| over sqrt(2 / (pi D)), what a random direction gives; interference:
cos(g_LM, g_probe); anisotropy: q(v_b) over the mean q across it, 1 by chance, with its standard error;
else ± is the standard deviation over batches"""


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
    add_options(parser)
    return parser


def main(args: Sequence[str]) -> None:
    """Replay checkpoints of one run.

    Args:
        args: Of the command line, behind `replay`.

    Raises:
        UserError: Something in them, or in the run folder, is not as it should be.
    """
    options = _parser().parse_args(list(args))
    settings = Settings(options.batches, options.fisher_batches, options.precision, options.lens, options.block)
    run, console = Run(options.run), table_console()
    records = Records(options.out or run.path / REPLAY)
    replay = Replay(run, settings, device_of(options.accelerator), options.set)
    wanted = _wanted(options, replay, console)
    measured = {} if options.overwrite else records.read_alike(replay.described, replay.sha256)
    todo = [step for step in wanted if step not in measured]
    if len(todo) < len(wanted):
        console.print(f"{len(wanted) - len(todo)} of {len(wanted)} checkpoints have records already", highlight=False)
    if todo:
        replay.prepare()
    records.make(empty=options.overwrite)
    for step in track(todo, "replay", console=console, disable=not console.is_terminal):
        start = time.monotonic()
        records.write(replay.measure(step))
        console.print(f"step {step}: {time.monotonic() - start:.1f} s", highlight=False)
    measured = records.read()  # as they are written
    records.write_table(lines(measured), Line._fields)
    table = Table(title=f"{run.path}: gradients against v_b of the whole run, {run.trunk}", title_justify="left")
    for head in _HEADS:
        table.add_column(head, justify="right")
    for step in wanted:
        table.add_row(*_cells(measured[step], run.trunk))
    console.print(table)
    console.print(_LEGEND, style="dim")
    console.print(f"  {records.folder}/\n  {records.table}", highlight=False, markup=False, soft_wrap=True)


def _wanted(options: argparse.Namespace, replay: Replay, console: Console) -> list[int]:
    stored = list(replay.files)
    if options.steps is not None:
        return steps.chosen(stored, options.steps)
    if options.every is not None:
        return steps.every(stored, options.every)
    if not options.paper:
        return stored
    roles = steps.paper(stored, events_of(replay.run), replay.run.trajectory.steps[-1])
    console.print("; ".join(f"{role.replace('_', ' ')} {step}" for role, step in roles.items()), highlight=False)
    return sorted(set(roles.values()))


def _cells(record: Record, whole: str) -> list[str]:
    """A record's line of the closing table: the whole selection's numbers beside what chance gives."""
    floor, curvature = record["noise_floor"][whole], record["fisher"].get(whole)
    aligned = [value and value / floor for value in record["gradient"]["combined"][whole]["abs_cos"]]
    cells = [str(record["step"]), record["event"] or "", _plus_minus(aligned, ".1f")]
    cells += [_plus_minus(record["bias"][whole], ".1e"), _plus_minus(record["interference"][whole], ".3f")]
    if curvature is None:
        return [*cells, "-", "-"]
    return [*cells, _plus_minus(curvature["anisotropy"], ".1f"), f"{curvature['overlap'] / floor:.1f}"]


def _plus_minus(pair: Sequence[float | None], form: str) -> str:
    value, spread = ("-" if number is None else f"{number:{form}}" for number in pair)
    return value if spread == "-" else f"{value} ± {spread}"
