"""`mini_gpt_pl study`: train a seed, replay it, do the experiments and reheats on it, and report on all of them."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from mini_gpt_pl.command_line import CommandParser
from mini_gpt_pl.errors import UserError
from mini_gpt_pl.report.summary import table_console
from mini_gpt_pl.runs.folder import Run

REHEATS = ("lr1e-3", "lr6e-4", "lr3e-4", "control")
"""The reheats of a study, each by the name of its shipped configuration."""


class Stage(NamedTuple):
    """One command of a study.

    Attributes:
        words: What it does.
        arguments: Of the command line; None where it is done already.
    """

    words: str
    arguments: Callable[[], list[str] | None]


def stages(root: Path, fit: Sequence[str], replay: Sequence[str], experiment: Sequence[str]) -> list[Stage]:
    """The commands of a study, each of which goes on where it was broken off.

    Args:
        root: Folder of the study: the run in `run`, reheats in `reheat`, the report in `report`.
        fit: Options of the training and of the reheats.
        replay: Options of the replay.
        experiment: Options of every experiment.
    """
    run = root / "run"
    reheats = {name: root / "reheat" / name for name in REHEATS}

    def reheat(name: str) -> list[str] | None:
        begin = ["reheat", "-c", f"paper/reheat/{name}", "--ckpt_path", str(_last(run))]
        return trained(reheats[name], begin)

    return [
        Stage("train", lambda: trained(run, ["fit", *fit])),
        Stage("replay", lambda: ["replay", str(run), *replay]),
        *(
            Stage(name, lambda name=name: ["experiment", str(run), name, *experiment])  # type: ignore[misc]
            for name in ("recovery", "depth", "blocks")
        ),
        *(Stage(f"reheat, {name}", lambda name=name: reheat(name)) for name in REHEATS),  # type: ignore[misc]
        Stage("report", lambda: ["report", str(run), *map(str, reheats.values()), "--out", str(root / "report")]),
    ]


def trained(folder: Path, begin: Sequence[str]) -> list[str] | None:
    """The command that trains a run, or goes on with it from its last checkpoint; None once it has ended."""
    run = Run(folder)
    if run.outcome is not None:
        return None
    if run.checkpoints:
        return ["fit", "--ckpt_path", str(_last(folder))]
    return [*begin, "--run_dir", str(folder), *(["--overwrite", "true"] if run.exists else [])]


def _last(folder: Path) -> Path:
    checkpoints = Run(folder).checkpoints
    if not checkpoints:
        raise UserError(f"{folder} has no checkpoint to go on from: train it with a ModelCheckpoint")
    return checkpoints[max(checkpoints)]


def main(args: Sequence[str]) -> None:
    """Do the stages of a study that are not done yet, one after the other.

    Args:
        args: Of the command line, behind `study`.

    Raises:
        UserError: An option makes no sense, or a stage failed; the ones before it are kept.
    """
    parser = CommandParser(
        "study",
        description="A seed's whole study: train it, replay its checkpoints, experiment on its peaks and troughs, "
        "reheat its end, and report on it. Every stage goes on where it was broken off when the command is repeated. "
        "Options behind -- are those of fit.",
    )
    parser.add_argument("root", type=Path, help="folder of the study")
    parser.add_argument("--replay", default="--paper", metavar="OPTIONS", help="of replay, in quotes (%(default)s)")
    parser.add_argument("--experiment", default="", metavar="OPTIONS", help="of every experiment, in quotes")
    parser.add_argument("--list", action="store_true", help="print the commands and do nothing")
    words = list(args)
    at = words.index("--") if "--" in words else len(words)
    options: argparse.Namespace = parser.parse_args(words[:at])
    fit = words[at + 1 :] or ["-c", "paper/base", "-c", "paper/seed42", "-c", "paper/replayable"]
    console = table_console()
    for stage in stages(options.root, fit, options.replay.split(), options.experiment.split()):
        _do(stage, console, listed=options.list)


def _do(stage: Stage, console: Console, *, listed: bool) -> None:
    try:
        arguments = stage.arguments()
    except UserError as error:
        if not listed:
            raise
        console.print(f"{stage.words}: {error}", highlight=False, markup=False, soft_wrap=True)
        return
    line = "done already" if arguments is None else f"mini_gpt_pl {' '.join(arguments)}"
    console.print(f"{stage.words}: {line}", highlight=False, markup=False, soft_wrap=True)
    if arguments is None or listed:
        return
    status = subprocess.run([sys.executable, "-m", "mini_gpt_pl", *arguments]).returncode
    if status:
        raise UserError(f"{stage.words} ended with status {status}: put it right and give the same command again")
