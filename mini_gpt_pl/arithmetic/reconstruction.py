r"""Accuracy of a finished run rebuilt from few directions, in sample and out of sample, beside random ones.

mini_gpt_pl reconstruction runs/grokking/multitask --other runs/grokking/second --out rebuilt.csv

The final point is rebuilt as theta_0 + P_k (theta_T - theta_0), where P_k projects on the first k of some orthonormal
directions. If these are principal directions of a path that ends in theta_T, k = T of them rebuild it exactly, and a
few do nearly: that says how many snapshots' worth of directions the path takes, not how many the solution needs.
Directions that do not know the end (of the first part of the path, or of another run) say something; random ones in
the path's own span, and the same shortening of the true drift, say what a share of the drift is worth by itself.

The run's recorder must have kept all weights, as in configs/grokking/multitask.yaml.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mini_gpt_pl.arithmetic.data import ResidueData
from mini_gpt_pl.arithmetic.milestones import MEMORISED
from mini_gpt_pl.arithmetic.module import ResidueClassifier
from mini_gpt_pl.arithmetic.operations import Examples
from mini_gpt_pl.atomic import write_text
from mini_gpt_pl.command_line import CommandParser
from mini_gpt_pl.errors import UserError
from mini_gpt_pl.geometry.path import pca
from mini_gpt_pl.geometry.path.snapshots import SnapshotFolder, combine
from mini_gpt_pl.geometry.vectors.selection import Vector
from mini_gpt_pl.runs.folder import Run
from mini_gpt_pl.training.restore import restore as restore_run
from mini_gpt_pl.training.restore import selection_of

END = "end"
"""Basis of the row that is the final point itself."""


def principal(gram: Float[Tensor, "n n"], k: int, until: int | None = None) -> Float[Tensor, "K n"]:
    """First k uncentred principal directions of the drift from theta_0, fewer where the path has fewer.

    They are coefficients over (theta_0, d_1, ..., d_T), the same in every group, of unit vectors over the whole
    selection, whose Gram matrix is given. `until` is the index of the last snapshot that they may know.

    Raises:
        ValueError: Nothing has moved until then.
    """
    rows = pca.drifts(len(gram))[1:]
    return pca.pca(gram, rows[: until if until is not None else len(rows)]).directions[:k]


def in_span(gram: Float[Tensor, "n n"], k: int, generator: torch.Generator) -> Float[Tensor, "K n"]:
    """Random orthonormal directions of the space that the drifts span, as coefficients; see `principal`."""
    whole = principal(gram, len(gram))
    turn = torch.randn(len(whole), len(whole), generator=generator, dtype=torch.float64)
    return torch.linalg.qr(turn)[0][:k] @ whole


@dataclass(frozen=True, eq=False)
class Rebuilt:
    """What the first k directions hold of theta_T - theta_0, and its share of ||theta_T - theta_0||^2."""

    k: int
    share: float
    drift: Float[Tensor, " D"]


def rebuilt(directions: Float[Tensor, "K D"], drift: Float[Tensor, " D"]) -> Iterator[Rebuilt]:
    """Project a drift, theta_T - theta_0, on the first k = 1 .. K of independent directions.

    The directions are made orthonormal here, in their order.
    """
    basis = torch.linalg.qr(directions.double().T)[0]
    wanted = drift.double()
    along, total = basis.T @ wanted, float(wanted.square().sum())
    held = torch.zeros_like(wanted)
    for k, part in enumerate(along, 1):
        held = held + part * basis[:, k - 1]
        yield Rebuilt(k, float(held.square().sum()) / total if total else float("nan"), held.to(drift.dtype))


def shortened(drift: Float[Tensor, " D"], shares: Sequence[float]) -> Iterator[Rebuilt]:
    """The drift itself, scaled to hold a share of its squared length: what the loss of length alone does."""
    for k, share in enumerate(shares, 1):
        yield Rebuilt(k, share, drift * share**0.5)


def rebuild(run: Run, other: Run | None = None, k: int = 20, seed: int = 0) -> pd.DataFrame:
    """Accuracy and loss on the whole sets of theta_0 + P_k (theta_T - theta_0), for k = 1 .. K directions.

    Bases: `whole`, uncentred principal directions of all snapshots, the end among them (in sample); `until_<step>`,
    of the snapshots up to memorisation, to half and to nine tenths of the run; `other`, of another run's path (out of
    sample); `span`, random directions in the span of all drifts; `random`, of the whole space; `shortened`, the true
    drift scaled to the length that `whole` holds at that k; and `end`, the final point itself.

    Args:
        run: Its recorder kept all weights.
        other: A run of the same model with another seed.
        k: K, the largest number of directions.
        seed: Of the random directions.

    Returns:
        Columns basis, k, share (of ||theta_T - theta_0||^2), and what the module's `evaluate` gives.

    Raises:
        UserError: k is below 1, nothing has moved, the recorder kept some weights only, the runs are of different
            models, or snapshots are missing.
    """
    if k < 1:
        raise UserError(f"{k} directions rebuild nothing: give --k 1 or more")
    module, data = restore(run)
    selection = selection_of(run, module)
    if selection.dim != sum(p.numel() for p in module.parameters()):
        raise UserError(f"the recorder of {run.path} kept {selection.dim} weights, not all: record all of them")
    gram = run.trajectory.gram()
    ends = vectors(run, module, torch.stack([pca.theta0(len(gram)), run.drift_rows[-1]]))
    rows = []
    for basis, points in _bases(run, other, module, ends[1], k, seed):
        for part in points:
            scores = _scores(module, data.sets, Vector(ends[0] + part.drift, selection))
            rows.append({"basis": basis, "k": part.k, "share": part.share, **scores})
    end = _scores(module, data.sets, Vector(ends[0] + ends[1], selection))
    rows.append({"basis": END, "k": len(gram) - 1, "share": 1.0, **end})
    return pd.DataFrame(rows)


def fewest_directions(table: pd.DataFrame, level: float = 0.98) -> pd.DataFrame:
    """Smallest k from which on each accuracy stays at a share of that of the end, k*, for each basis of `rebuild`.

    A basis that knows the end needs few directions whatever the solution is: what counts is how many more, or fewer,
    one needs that does not know it, and the drift shortened to the same length.

    Returns:
        A row for each basis but the end, a column for each accuracy; missing where K directions do not suffice, or the
        end has none.
    """
    scores = [str(name) for name in table.columns if str(name).endswith("_accuracy")]
    (end,) = table[table["basis"] == END][scores].to_dict("records")
    rows = []
    for basis, part in table[table["basis"] != END].groupby("basis", sort=False):
        row: dict[str, object] = {"basis": basis, "k": int(part["k"].max())}
        for name in scores:
            below = part["k"][part[name] < level * end[name]]
            enough = part["k"][part["k"] > below.max()] if len(below) else part["k"]
            row[name] = int(enough.iloc[0]) if len(enough) and end[name] > 0 else None
        rows.append(row)
    return pd.DataFrame(rows).astype(dict.fromkeys(scores, "Int64"))


def _bases(
    run: Run, other: Run | None, module: ResidueClassifier, drift: Tensor, k: int, seed: int
) -> Iterator[tuple[str, Iterator[Rebuilt]]]:
    gram, generator = run.trajectory.gram(), torch.Generator().manual_seed(seed)

    def along(source: Run, coefficients: Tensor) -> Iterator[Rebuilt]:
        return rebuilt(vectors(source, module, coefficients), drift)

    whole = list(along(run, principal(gram, k)))
    yield "whole", iter(whole)
    for step in _early(run):
        until = run.trajectory.steps.index(step)
        yield f"until_{step}", along(run, principal(gram, k, until))
    if other is not None:
        yield "other", along(other, principal(other.trajectory.gram(), k))
    yield "span", along(run, in_span(gram, k, generator))
    isotropic = torch.randn(min(k, drift.numel()), drift.numel(), generator=generator)
    yield "random", rebuilt(isotropic, drift)
    yield "shortened", shortened(drift, [part.share for part in whole])


def _early(run: Run) -> list[int]:
    """Snapshots at memorisation, half and nine tenths of the run: bases that do not know its end."""
    steps = run.trajectory.steps
    memorised = MEMORISED.in_series(run.series("eval/train_accuracy"))
    wanted = [*([] if memorised is None else [memorised]), 0.5 * steps[-1], 0.9 * steps[-1]]
    nearest = {max(step for step in steps if step <= max(limit, steps[1])) for limit in wanted}
    return sorted(nearest)


def restore(run: Run) -> tuple[ResidueClassifier, ResidueData]:
    """Build the module, with its initial weights, and the data, with its sets, of a run of residues.

    Raises:
        UserError: There is no configuration, it is of another task, or it does not fit this version.
    """
    module, data = restore_run(run)
    if not isinstance(module, ResidueClassifier) or not isinstance(data, ResidueData):
        raise UserError(f"{run.path} is a run of the task {run.task}: give one of residues")
    data.setup()
    return module, data


def vectors(run: Run, module: ResidueClassifier, coefficients: Float[Tensor, "K n"]) -> Float[Tensor, "K D"]:
    """Vectors (K, D), float32, from their coefficients over (theta_0, d_1, ...), by one pass over the snapshots.

    A row of coefficients is a vector, the same in every group; the module says which weights they are.

    Raises:
        UserError: A snapshot is missing, or of another model.
    """
    selection = selection_of(run, module)
    folder = SnapshotFolder(run.snapshot_folder, selection)
    steps = run.trajectory.steps[: coefficients.shape[1]]
    groups = len(selection.groups)
    named = {str(k): row.expand(groups, -1) for k, row in enumerate(coefficients)}
    combined = combine(steps, folder.read, named, selection, torch.device("cpu"))
    return torch.stack([combined[str(k)].values for k in range(len(coefficients))])


@torch.no_grad()
def _scores(module: ResidueClassifier, sets: dict[str, Examples], theta: Vector) -> dict[str, float]:
    """What an evaluation says at given weights, without the names' common beginning."""
    parts = theta.selection.unflatten(theta)
    for name, parameter in module.named_parameters():
        parameter.copy_(parts[name])
    return {name.removeprefix("eval/"): float(value) for name, value in module.evaluate(sets).items()}


def main(args: Sequence[str] | None = None) -> None:
    """Print the table and k* of each basis, and write both where asked to."""
    parser = CommandParser("reconstruction", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a run whose recorder kept all weights")
    parser.add_argument("--other", type=Path, help="folder of a run of the same model with another seed")
    parser.add_argument("--k", type=int, default=20, help="largest number of directions")
    parser.add_argument("--seed", type=int, default=0, help="of the random directions")
    parser.add_argument("--level", type=float, default=0.98, help="share of the end's accuracy that k* keeps")
    parser.add_argument("--out", type=Path, help="CSV file for the table; k* goes into one beside it, NAME_fewest.csv")
    options = parser.parse_args(args)
    if options.out is not None and not options.out.parent.is_dir():
        raise UserError(f"there is no folder {options.out.parent} to write {options.out.name} into: make it first")
    table = rebuild(Run(options.run), None if options.other is None else Run(options.other), options.k, options.seed)
    counts = fewest_directions(table, options.level)
    if options.out is not None:
        write_text(options.out, table.to_csv(index=False))
        write_text(options.out.with_name(f"{options.out.stem}_fewest.csv"), counts.to_csv(index=False))
    print(table.to_string(index=False, float_format="{:.4f}".format))
    print(f"\nk*, directions from which on {options.level:.0%} of the accuracy at the end is kept; - for none of them")
    print(counts.astype(object).where(counts.notna(), "-").to_string(index=False))
