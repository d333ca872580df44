"""The command `sweep`: every point of a grid file, once."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from mini_gpt_pl.command_line import CommandParser
from mini_gpt_pl.errors import UserError, did_you_mean
from mini_gpt_pl.report import page
from mini_gpt_pl.sweep.grid import PROGRAM, Sweep, folder_name, read_sweep
from mini_gpt_pl.sweep.local import run_all, slots, visible_devices
from mini_gpt_pl.sweep.points import Call, PointRun
from mini_gpt_pl.sweep.progress import Display, counts, table
from mini_gpt_pl.sweep.remote import create_wandb, run_agent, submit

_EPILOG = """\
What follows -- is added to the command of every run and wins over the file, as in
  mini_gpt_pl sweep configs/sweeps/beta2.yaml --root runs/beta2 -- --data.tokenizer gpt2.tiktoken

Finished and diverged points are passed over, points that broke off are resumed from their last checkpoint, failed ones
are tried again: the same command takes a sweep up wherever it stopped. ROOT/POINT is the run folder of a point and
ROOT/POINT.log what it printed.
"""


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        "sweep",
        elsewhere="options of the runs go behind --",
        description="Run every point of a grid file in W&B's sweep format, once.",
        epilog=_EPILOG,
    )
    add = parser.add_argument
    add("file", type=Path, help="the sweep file")
    add("--root", type=Path, help="folder of the runs, one folder a point (default: runs/sweeps/NAME)")
    add("--launcher", choices=("local", "wandb", "slurm"), default="local", help="who runs the points")
    add("--jobs", type=int, help="runs at a time on this machine (default: one a GPU, or one)")
    add("--retry_diverged", action="store_true", help="run diverged points again, from the start")
    add("--dry_run", action="store_true", help="list points, folders, states and commands, and run nothing")
    add("--report", type=Path, metavar="DIR", help="once every point has ended, write the report on ROOT there")
    add("--point", help="run this one point only: its name, or its parameters as JSON")
    add("--agent", action="store_true", help="with --launcher wandb: work on the sweep here, at once")
    add("--slurm", nargs="+", default=[], metavar="KEY=VALUE", help="of the jobs: partition=gpu gpus=1 time=8:00:00")
    add("--program", nargs="+", default=PROGRAM, help=argparse.SUPPRESS)  # for the tests
    return parser


def main(args: Sequence[str]) -> None:
    """Run a sweep.

    Args:
        args: The command line behind `sweep`.

    Raises:
        UserError: The file, an option or a run folder is not as it should be; nothing has been run.
        SystemExit: With status 1 if a point failed, 130 if the sweep was interrupted.
    """
    border = list(args).index("--") if "--" in args else len(args)
    options, extras = _parser().parse_args(args[:border]), tuple(args[border + 1 :])
    _check_options(options)
    sweep = replace(read_sweep(options.file), program=tuple(options.program))
    _check_extras(sweep, extras)
    # Those that hold for a point run elsewhere too.
    passed_on = ["--retry_diverged"] if options.retry_diverged else []
    passed_on += ["--program", *options.program] if options.program != PROGRAM else []
    call = Call(sweep, options.root or Path("runs/sweeps") / folder_name(sweep.name), extras, tuple(passed_on))
    runs = call.runs if options.point is None else [_find(call.runs, options.point)]
    console = Console(markup=False, width=None if sys.stdout.isatty() else 120)
    if options.dry_run:
        _list(runs, options.retry_diverged, console)
        return
    if conflict := next(filter(None, (run.conflict() for run in runs)), None):
        raise UserError(conflict)
    if options.launcher == "wandb":
        identifier, agent = create_wandb(call)
        console.print(f"start agents, on any machine that sees {call.root}, with: {agent}", soft_wrap=True)
        if options.agent:
            run_agent(call, identifier)
        return
    todo = [run for run in runs if _to_run(run, options.retry_diverged)]
    states = counts(run.state for run in runs)
    console.print(f"{_points(len(runs))} below {call.root} ({states}): {len(todo)} to run", soft_wrap=True)
    if options.launcher == "local":
        _run_here(options, call, runs, todo, console)
        return
    for run, job in zip(todo, submit(call, todo, options.slurm) if todo else [], strict=True):
        console.print(f"job {job}: {run.name}", soft_wrap=True)
    console.print("submitting again is safe: a point that a job has run, or is running, is passed over by the next")


def _run_here(
    options: argparse.Namespace, call: Call, runs: list[PointRun], todo: list[PointRun], console: Console
) -> None:
    # An agent or a scheduler has already shared out the machine.
    alone = options.point is not None and options.jobs is None
    places = [{}] if alone else slots(options.jobs, visible_devices())
    try:
        with Display(console, len(todo)) as display:
            failed = run_all(todo, places, display, retry_diverged=options.retry_diverged)
    except KeyboardInterrupt:
        print("mini_gpt_pl: interrupted: the runs were stopped; the same command goes on from there", file=sys.stderr)
        raise SystemExit(130) from None
    if options.point is None:
        console.print(table(runs, call.sweep.name))
    if failed:
        first, record = failed[0], failed[0].record
        reason = record.failure if record else ""
        more = f" and {len(failed) - 1} more" if len(failed) > 1 else ""
        logs = f"{first.log}" if len(failed) == 1 else f"{call.root}/POINT.log"
        print(
            f"mini_gpt_pl: error: {len(failed)} of {len(todo)} runs failed: {first.name} ({reason}){more}; see "
            f"{logs}, and repeat the command to try again",
            file=sys.stderr,
        )
        raise SystemExit(1)
    if options.report is None:
        return
    if waiting := [run for run in runs if run.state not in ("finished", "diverged")]:
        line = f"no report yet: {_points(len(waiting))} of another process not ended, such as {waiting[0].name}"
        console.print(line, soft_wrap=True)
        return
    page.main([str(call.root), "--out", str(options.report)])


def _points(n: int) -> str:
    return f"{n} point{'' if n == 1 else 's'}"


def _check_options(options: argparse.Namespace) -> None:
    if options.jobs is not None and options.jobs < 1:
        raise UserError("--jobs must be 1 or more")
    for option, launcher in (("jobs", "local"), ("report", "local"), ("agent", "wandb"), ("slurm", "slurm")):
        if getattr(options, option) and options.launcher != launcher:
            raise UserError(f"--{option} belongs to --launcher {launcher}, not {options.launcher}")
    if options.report is not None and options.point is not None:
        raise UserError("--report is of all points: leave --point out")
    if options.report is not None and options.report.exists() and not options.report.is_dir():
        raise UserError(f"--report {options.report} is a file: give a folder")


def _check_extras(sweep: Sweep, extras: Sequence[str]) -> None:
    named = {word.split("=", 1)[0].lstrip("-") for word in extras if word.startswith("-")}
    own = {"run_dir", "overwrite"} | ({"ckpt_path"} if "fit" in sweep.command else set())
    for key in sorted(named & own - set(sweep.values)):
        raise UserError(f"-- --{key}: the sweep gives each run its own; choose their folder with --root")
    for key in sorted(named & set(sweep.values) - {"config", "c"}):
        raise UserError(f"-- --{key} would override the parameter {key} of {sweep.path}: change it there")


def _find(runs: Sequence[PointRun], wanted: str) -> PointRun:
    """Return the point of a name, or of parameters as an agent hands them out."""
    if not wanted.lstrip().startswith("{"):
        fitting = [run for run in runs if run.name == wanted]
    else:
        try:
            parameters: dict[str, Any] = json.loads(wanted)
        except ValueError as error:
            raise UserError(f"--point {wanted}: no valid JSON ({error})") from None
        fitting = [run for run in runs if _same(run.wanted.parameters, parameters)]
    if fitting:
        return fitting[0]
    hint = did_you_mean(wanted, [run.name for run in runs], "list its points with --dry_run")
    raise UserError(f"--point {wanted}: {runs[0].call.sweep.path} has no such point: {hint}")


def _same(mine: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether the parameters are the same, whatever a server made of 1.0 and 1."""
    return all(
        key in other and other[key] == value and isinstance(other[key], bool) == isinstance(value, bool)
        for key, value in mine.items()
    )


def _to_run(run: PointRun, retry_diverged: bool) -> bool:
    return run.state not in ("finished", "running") and (run.state != "diverged" or retry_diverged)


def _list(runs: Sequence[PointRun], retry_diverged: bool, console: Console) -> None:
    for run in runs:
        state = run.state
        console.print(f"{run.name}: {state}, {run.folder}", highlight=False, markup=False, soft_wrap=True)
        if conflict := run.conflict():
            print(f"  cannot be run: {conflict}")
        elif _to_run(run, retry_diverged):
            print(f"  {shlex.join(run.command(afresh=state == 'diverged'))}")
        else:
            print(f"  {shlex.join(run.first_command)}")
    console.print(table(runs, f"{runs[0].call.sweep.name}: {counts(run.state for run in runs)}"))
