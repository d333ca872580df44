"""`mini_gpt_pl experiment RUN NAME`."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from mini_gpt_pl.command_line import CommandParser
from mini_gpt_pl.errors import UserError
from mini_gpt_pl.report.summary import table_console
from mini_gpt_pl.runs.folder import Run
from mini_gpt_pl.stories.experiments import trials
from mini_gpt_pl.stories.experiments.records import Records
from mini_gpt_pl.stories.experiments.relaxation import Laboratory, Protocol
from mini_gpt_pl.stories.experiments.tables import EXPERIMENTS
from mini_gpt_pl.stories.experiments.trials import Checkpoints, Trial
from mini_gpt_pl.stories.stored import StoredRun, add_options, device_of
from mini_gpt_pl.stories.switches import events_of


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        "experiment",
        description="Train again from a run's checkpoints: from peaks and troughs of p_ood (recovery), after noise in "
        "all matrices (depth), or after a move of one block towards the trough (blocks). Every trial is recorded as it "
        "ends in RUN/experiments, and the same command goes on where it was broken off.",
    )
    parser.add_argument("run", type=Path, help="run folder, with a checkpoint at every evaluation")
    parser.add_argument("name", choices=("recovery", "depth", "blocks"), help="the experiment")
    parser.add_argument("--original", action="store_true", help="as the published scripts have it, without nulls")
    parser.add_argument("--pairs", type=int, default=3, help="peaks, each with the trough after it (%(default)s)")
    parser.add_argument(
        "--trials", type=int, default=4, help="draws of the noise of each size, for depth (%(default)s)"
    )
    parser.add_argument("--relax", action="store_true", help="for blocks: evaluate after training too")
    parser.add_argument("--steps", type=int, help="training steps of a trial, instead of the published number")
    parser.add_argument("--batch_size", type=int, help="stories a step, instead of the published 64")
    parser.add_argument("--compile", action="store_true", help="compile the model first")
    add_options(parser)
    return parser


def main(args: Sequence[str]) -> None:
    """Do the trials of an experiment that are not recorded yet, and print its tables.

    Args:
        args: Of the command line, behind `experiment`.

    Raises:
        UserError: Something in them, or in the run folder, is not as it should be.
    """
    options = _parser().parse_args(list(args))
    _check(options)
    run, console = Run(options.run), table_console()
    records = Records(run, options.name + ("_original" if options.original else ""))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # of the initial weights, from which recovery starts too
        stored = StoredRun(run, device_of(options.accelerator), options.set)
    laboratory = Laboratory(stored.module, stored.data, stored.device, options.precision)
    todo = list(_trials(options, _checkpoints(stored)))
    settings = {"protocol": asdict(todo[0].protocol), "precision": options.precision, "questions": laboratory.questions}
    records.begin(settings, overwrite=options.overwrite)
    if options.compile:
        stored.module.gpt.compile()
    _do(todo, laboratory, records, console)
    for table in EXPERIMENTS[options.name](run):
        console.print(table.markdown(), highlight=False, markup=False, soft_wrap=True)
    console.print(f"  {records.file}", highlight=False, markup=False, soft_wrap=True)


def _check(options: argparse.Namespace) -> None:
    if options.original and options.name == "depth":
        raise UserError("--original: the published depth is the one that `depth` does; leave the option out")
    if options.relax and options.name != "blocks":
        raise UserError(f"--relax: {options.name} trains in any case; the option is for blocks")
    for option in ("pairs", "trials", "steps", "batch_size"):
        value = getattr(options, option)
        if value is not None and value < 1:
            raise UserError(f"--{option} {value}: give 1 or more")


def _trials(options: argparse.Namespace, checkpoints: Checkpoints) -> list[Trial]:
    if options.name == "recovery":
        plan = trials.recovery(checkpoints, options.pairs, original=options.original)
    elif options.name == "depth":
        plan = trials.depth(checkpoints, options.pairs, options.trials)
    else:
        plan = trials.blocks(checkpoints, options.pairs, relax=options.relax, original=options.original)
    return [replace(trial, protocol=_as_asked(trial.protocol, options)) for trial in plan]


def _as_asked(protocol: Protocol, options: argparse.Namespace) -> Protocol:
    """A protocol with the options' batch size and number of steps; one without training stays without."""
    steps = options.steps if options.steps and protocol.steps else protocol.steps
    size = options.batch_size or protocol.batch_size
    return replace(
        protocol, batch_size=size, steps=steps, eval_every=min(protocol.eval_every, steps or protocol.eval_every)
    )


def _checkpoints(stored: StoredRun) -> Checkpoints:
    selection = stored.selection
    owned = list(zip(selection.names, selection.owners, strict=True))
    trunk = {group: [name for name, owner in owned if owner == group] for group in selection.groups}

    def state() -> dict[str, Tensor]:
        return {name: value.detach().cpu().clone() for name, value in stored.module.state_dict().items()}

    @lru_cache(maxsize=8)
    def read(step: int) -> dict[str, Tensor]:
        stored.load(step)
        return state()

    return Checkpoints(read, state(), trunk, list(stored.files), events_of(stored.run), stored.data.seed)


def _do(todo: Sequence[Trial], laboratory: Laboratory, records: Records, console: Console) -> None:
    missing = [trial for trial in todo if trial.key not in records.trials]
    if len(missing) < len(todo):
        console.print(f"{len(todo) - len(missing)} of {len(todo)} trials are recorded already", highlight=False)
    for number, trial in enumerate(missing, 1):
        start = time.monotonic()
        laboratory.module.load_state_dict(dict(trial.weights()))
        answers = laboratory.relax(trial.protocol, trial.batches)
        records.add(trial, answers)
        seconds = time.monotonic() - start
        console.print(
            f"{number} of {len(missing)}  {trial.key}: p_ood {answers[0].p_ood:.3f}"
            + (f", then {answers[-1].p_ood:.3f}" if len(answers) > 1 else "")
            + f" ({seconds:.1f} s)",
            highlight=False,
            markup=False,
        )
