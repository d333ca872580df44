"""Cost of a Fisher measurement beside the bare passes that it consists of, and beside curvlinops, all in one run.

    python -m benchmarks.fisher -c configs/paper/base.yaml -c configs/paper/seed42.yaml ... --out fisher.json

What is no option of this script goes to `fit`: model, precision and batches are as configured. The arms alternate, and
the median counts:

* `passes`: M forward and backward passes of the losses of the kind in use, by the recorded weights, with
  `torch.autograd.grad` and nothing else; batches lie on the device.
* `ours, K`: the measurement as `FisherProbe` makes it: Rayleigh quotients along K directions, trace and anisotropy, on
  the host. `ours, K, spectrum`: with the M x M Gram and thus the leading modes, too.
* `curvlinops, K`: its `EFLinearOperator` of the same losses times the same K directions, in the same precision. A
  micro-batch is one datum with a scalar output, so that its gradient is one rank of F. The model is read as plain
  operations without a compiler, as forward derivatives need; `--columns` of the directions go at a time, each of which
  has activations of its own. It gives the quotients; it has no trace.
* `directions`: what the probe takes to build its own directions (backbone, PC2, theta_0, a switch) out of the rows of a
  path, beside the measurement.

Whether both computed the same is part of the result: the largest relative difference of the quotients, in the
configured precision for all M losses, and in float32 for the first two.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any, get_args

import torch
import torch.nn.functional as F
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.clock import described, here, milliseconds
from benchmarks.throughput import configured
from mini_gpt_pl.callbacks.fixed_gradients import FixedGradients, Kind
from mini_gpt_pl.callbacks.measuring import evaluating
from mini_gpt_pl.geometry.curvature import fisher
from mini_gpt_pl.geometry.directions.axes import BACKBONE, Axes, path_coefficients
from mini_gpt_pl.geometry.path.rows import IncrementRows
from mini_gpt_pl.geometry.path.trajectory import Trajectory
from mini_gpt_pl.geometry.vectors.selection import ParameterSelection, Vector
from mini_gpt_pl.stories.data.datamodule import Batch
from mini_gpt_pl.stories.gpt import TRUNK_PATTERN
from mini_gpt_pl.stories.module import ProbedGPT
from mini_gpt_pl.stories.objective import combine, count_targets, loss_terms

# Losses that are compared in float32.
_COMPARED = 2
PASSES, DIRECTIONS = "passes", "directions"


class BatchLoss(nn.Module):
    """The training loss of a micro-batch as the one output of one datum, in plain operations.

    Args:
        module: Gives the model and lambda.
    """

    def __init__(self, module: ProbedGPT) -> None:
        super().__init__()
        self.gpt = module.gpt
        self.weight = module.lambda_now()

    def forward(self, fields: Mapping[str, Tensor]) -> Tensor:
        """Return the loss as a prediction of shape (1, 1); the fields are those of a `Batch`."""
        batch = Batch(**fields)
        features = self.gpt.features(batch.tokens).flatten(0, 1)[batch.rows]
        logits = F.linear(features, self.gpt.tok_emb.weight)[:, : self.gpt.vocab_size].float()
        targets, mask = (values.flatten()[batch.rows][None] for values in (batch.targets, batch.probe_mask))
        nll = F.cross_entropy(logits, targets[0], reduction="none")[None]
        counts = count_targets(targets, mask)
        return combine(loss_terms(nll, targets, mask, counts), counts, self.weight).view(1, 1)


class Case:
    """What the arms share: a model, M micro-batches and the gradients of one kind of Fisher.

    Args:
        arguments: Of `fit`.
        count: M.
        kind: Which Fisher.
    """

    def __init__(self, arguments: list[str], count: int, kind: Kind = "batch_mean") -> None:
        self.module, data, _ = configured(arguments)
        self.device = here()
        self.module.to(self.device).eval()
        fetched: list[Batch] = list(islice(data.train_dataloader(), count))
        data.teardown()
        self.batches: list[Batch] = move_data_to_device(fetched, self.device)
        if self.device.type == "cuda":
            self.module.gpt.compile()
            fetched = [Batch(*(leaf.pin_memory() for leaf in batch)) for batch in fetched]
        self.selection = ParameterSelection.of(self.module, TRUNK_PATTERN)
        # The probe fetches its batches from the host; the bare passes have them at hand.
        self.gradients, self._at_hand = (
            FixedGradients(self.module.trainer, self.module, self.selection, batches, kind)
            for batches in (fetched, self.batches)
        )

    @property
    def precision(self) -> AbstractContextManager[Any]:
        """Context of the configured precision."""
        return self.module.trainer.precision_plugin.forward_context()

    def directions(self, count: int) -> Axes:
        """Draw Gaussian directions; the first stands for the backbone."""
        generator = torch.Generator(self.device).manual_seed(0)
        rows = torch.randn(count, self.selection.dim, generator=generator, device=self.device)
        names = (BACKBONE, *(f"v{k}" for k in range(1, count)))
        return Axes(rows, {name: (k, k) for k, name in enumerate(names)}, self.selection)

    def passes(self) -> None:
        """Compute every gradient, and drop it."""
        weights = self.selection.parameters(self.module)
        for index in range(len(self._at_hand)):
            with self.precision:
                loss, _ = self._at_hand.loss(index)
            torch.autograd.grad(loss, weights)

    def measure(self, axes: Axes, *, spectrum: bool = False) -> list[float]:
        """Measure as the probe does, and return the quotients of the whole selection."""
        count = len(self.gradients)
        with evaluating(self.module):
            found = fisher.survey(self.gradients, count, axes, block=count, gram=spectrum)
        found = found.cpu()
        dims = (*self.selection.dims, self.selection.dim)
        fisher.trace(found)
        fisher.anisotropy(found.projections[BACKBONE].square(), found.squares, dims)
        if spectrum:
            assert found.grams is not None
            fisher.leading(found.grams.sum(0), found.projections[BACKBONE][:, -1])
        return [float(fisher.rayleigh(along).value[-1]) for along in found.projections.values()]

    def measure_in_float32(self, axes: Axes, count: int) -> list[float]:
        """Quotients of the first losses without autocast and compiler."""
        with torch.compiler.set_stance("force_eager"):
            found = fisher.survey(
                lambda i: self.selection.gradient_of(self.module.batch_loss(self.batches[i]), self.module), count, axes
            )
        return [float(fisher.rayleigh(along).value[-1]) for along in found.projections.values()]

    def peer(self, axes: Axes, count: int, columns: int) -> list[float]:
        """Quotients by curvlinops, of the first losses.

        Raises:
            ImportError: It is not installed.
        """
        from curvlinops import EFLinearOperator

        loss = BatchLoss(self.module)
        names = {f"gpt.{name}": parameter for name, parameter in self.module.gpt.named_parameters()}
        weights = [names[name] for name in self.selection.names]
        fields = [batch._asdict() for batch in self.batches[:count]]
        with sdpa_kernel(SDPBackend.MATH):  # forward derivatives exist of attention in plain operations
            with torch.no_grad():  # (f - y)^2 has slope 1 at y = f - 1/2: the gradient is that of the loss itself
                data = [(one, loss(one) - 0.5) for one in fields]
            operator = EFLinearOperator(
                loss,
                nn.MSELoss(reduction="sum"),
                weights,
                data,
                check_deterministic=False,
                num_data=count,
                batch_size_fn=lambda _: 1,
            )
            found = [self._quotients(operator, part) for part in axes.rows.split(columns)]
        return [value / count for values in found for value in values.tolist()]

    def _quotients(self, operator: Any, rows: Tensor) -> Tensor:
        unit = rows / rows.norm(dim=1, keepdim=True)
        parts = [self.selection.unflatten(Vector(row, self.selection)).values() for row in unit]
        vectors = [torch.stack(columns, -1) for columns in zip(*parts, strict=True)]
        products = operator @ vectors
        inner = [(a * b).flatten(0, -2).sum(0) for a, b in zip(products, vectors, strict=True)]
        return torch.stack(inner).sum(0)

    def path(self, snapshots: int) -> tuple[IncrementRows, Trajectory]:
        """Make a random walk of the recorded weights."""
        generator = torch.Generator(self.device).manual_seed(1)
        rows, trajectory = IncrementRows(self.selection), Trajectory.empty(self.selection)
        for step in range(snapshots):
            values = torch.randn(self.selection.dim, generator=generator, device=self.device)
            row = Vector(values, self.selection)
            trajectory.append(step, rows.dots(row))
            rows.push(row)
        return rows, trajectory

    def build(self, rows: IncrementRows, trajectory: Trajectory) -> None:
        """Build the probe's directions, a switch among them."""
        segments = {"switch": (trajectory.steps[len(rows) // 2], trajectory.steps[-1])}
        Axes.along(path_coefficients(trajectory, segments), rows.combine_all, self.selection)


def difference(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Largest relative difference."""
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))


def time_all(arms: Mapping[str, Callable[[], Any]], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Milliseconds of each arm, alternating, after one round for compilers and caches."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(repeats + 1):
        for name, arm in arms.items():
            taken = milliseconds(arm, device)
            if turn:
                times[name].append(taken)
    return times


def time_ours(case: Case, directions: Sequence[int], repeats: int) -> dict[str, list[float]]:
    """Time the bare passes and the measurement along several numbers of directions."""
    arms: dict[str, Callable[[], Any]] = {PASSES: case.passes}
    for count in directions:
        axes = case.directions(count)
        arms[f"ours, {count}"] = partial(case.measure, axes)
    arms[f"ours, {count}, spectrum"] = partial(case.measure, axes, spectrum=True)
    return time_all(arms, repeats, case.device)


def beside_peer(case: Case, axes: Axes, columns: int) -> tuple[float, dict[str, float]]:
    """Time curvlinops once, after one loss for its caches, and compare its numbers with ours.

    Returns:
        Milliseconds, and relative differences by precision.

    Raises:
        ImportError: It is not installed.
        OutOfMemoryError: The device does not hold what it needs.
    """
    count = len(case.batches)
    theirs: list[float] = []

    def multiply() -> None:
        with case.precision:
            theirs.extend(case.peer(axes, count, columns))

    with case.precision:
        case.peer(axes, 1, columns)
    taken = milliseconds(multiply, case.device)
    few = min(_COMPARED, count)
    return taken, {
        "configured": difference(case.measure(axes), theirs),
        "float32": difference(case.measure_in_float32(axes, few), case.peer(axes, few, columns)),
    }


def main() -> None:
    """Print milliseconds of every arm, their ratios to the bare passes, and how far the numbers agree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passes", type=int, default=32, help="M, the number of fixed batches")
    parser.add_argument("--kind", choices=get_args(Kind), default="batch_mean", help="curvlinops has the first")
    parser.add_argument("--directions", type=int, nargs="+", default=[1, 8, 32, 128], help="numbers of directions")
    parser.add_argument("--peer_directions", type=int, nargs="*", default=[1, 8], help="those of curvlinops")
    parser.add_argument("--columns", type=int, default=1, help="directions that curvlinops takes at a time")
    parser.add_argument("--snapshots", type=int, default=51, help="rows of the path behind the probe's own directions")
    parser.add_argument("--repeats", type=int, default=3, help="times that each arm is measured, alternating")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    options, rest = parser.parse_known_args()
    case = Case(rest, options.passes, options.kind)
    times = time_ours(case, options.directions, options.repeats)
    agreement: dict[str, dict[str, float]] = {}
    for count in options.peer_directions if options.kind == "batch_mean" else ():
        try:
            taken, agreement[str(count)] = beside_peer(case, case.directions(count), options.columns)
            times[f"curvlinops, {count}"] = [taken]
        except (ImportError, torch.OutOfMemoryError) as error:
            print(f"curvlinops of {count} directions is left out: {str(error).splitlines()[0]}")
    rows, trajectory = case.path(options.snapshots)
    times |= time_all({DIRECTIONS: lambda: case.build(rows, trajectory)}, options.repeats, case.device)
    result = report(times, agreement)
    result |= {"passes": options.passes, "kind": options.kind, "dim": case.selection.dim, **described(case.device)}
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")


def report(times: dict[str, list[float]], agreement: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Print and collect the result.

    Args:
        times: Milliseconds of each arm, a value a repeat.
        agreement: By the number of directions, relative differences from curvlinops by precision.
    """
    taken = {name: median(values) for name, values in times.items()}
    ratios = {name: value / taken[PASSES] for name, value in taken.items()}
    for name, value in taken.items():
        print(f"{name:24s} {value:10.1f} ms {ratios[name]:9.4f} of the passes")
    for count, found in agreement.items():
        shown = ", ".join(f"{value:.1e} in {precision}" for precision, value in found.items())
        print(f"quotients of {count} differ from those of curvlinops by {shown}")
    return {"ms": taken, "repeats_ms": times, "over_passes": ratios, "difference_from_curvlinops": agreement}


if __name__ == "__main__":
    main()
