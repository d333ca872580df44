"""Cost and error of one commutator, by method and dtype, beside one training gradient, all in one run.

    python -m benchmarks.commutator -c configs/quickstart.yaml --out commutator.json

What is no option of this script goes to `fit`: model and data are as configured, the weights the initial ones. The arms
alternate, and the median counts:

* `gradient`: one forward and backward pass of a batch, in the configured precision.
* `hessian` and `differences` in float64 and float32: a sample as `CommutatorProbe` takes it, D and the finite step too.
* `subtracted`: what was published: two orders of two steps of eta on float32 weights, and their difference.

Beside the times, how far D is from that of `hessian` in float64, as a ratio. On a GPU the model's fused head has no
second derivative in float32: that arm is left out there.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device

from benchmarks.clock import described, here, milliseconds
from benchmarks.throughput import configured
from mini_gpt_pl.callbacks.measuring import training_loss
from mini_gpt_pl.errors import UserError
from mini_gpt_pl.geometry.curvature import commutator
from mini_gpt_pl.geometry.curvature.commutator import Lengths
from mini_gpt_pl.geometry.vectors.free_weights import FreeWeights, Loss
from mini_gpt_pl.geometry.vectors.selection import ParameterSelection

GRADIENT, REFERENCE, SUBTRACTED = "gradient", "hessian, float64", "subtracted"
WAYS = {"hessian": commutator.by_hessian, "differences": commutator.by_differences}


class Case:
    """A model, two batches and a step size.

    Args:
        arguments: Of `fit`.
        size: Samples in a batch; None for the configured number.
        eta: Step size.
    """

    def __init__(self, arguments: list[str], size: int | None, eta: float) -> None:
        self.module, data, _ = configured(arguments)
        self.device, self.eta = here(), eta
        self.module.to(self.device).eval()
        drawn = [data.draw_batch(np.random.Generator(np.random.Philox(key=key)), size) for key in (0, 1)]
        self.batches = move_data_to_device(drawn, self.device)
        self.selection = ParameterSelection.of(self.module, "")

    def gradient(self) -> None:
        """One gradient as training takes it."""
        with self.module.trainer.precision_plugin.forward_context():
            loss = training_loss(self.module, self.batches[0])
        torch.autograd.grad(loss, self.selection.parameters(self.module))

    def _free(self, dtype: torch.dtype) -> tuple[Loss, Loss, torch.Tensor]:
        free = FreeWeights(self.module, self.selection, dtype)
        first, second = (free.loss(partial(training_loss, self.module, batch)) for batch in self.batches)
        return first, second, free.weights.values

    def defect(self, method: str, dtype: torch.dtype) -> float:
        """D of one sample."""
        loss_a, loss_b, theta = self._free(dtype)
        found = WAYS[method](loss_a, loss_b, theta)
        stepped = commutator.finite(found, loss_a, loss_b, theta, self.eta)
        return float(Lengths.of(found, stepped, theta, self.eta).defect)

    def subtracted(self) -> float:
        """D as published."""
        losses, theta = self._free(torch.float32)[:2], self._free(torch.float32)[2]
        gradients = [commutator.gradient(loss, theta) for loss in losses]
        ends = []
        for first, second in ((0, 1), (1, 0)):
            place = theta - self.eta * gradients[first]
            ends.append(place - self.eta * commutator.gradient(losses[second], place))
        lengths = [self.eta * float(torch.linalg.vector_norm(g)) for g in gradients]
        return float(torch.linalg.vector_norm(ends[0] - ends[1])) / (lengths[0] * lengths[1])


def main() -> None:
    """Print milliseconds and D of every arm."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, help="samples in a batch")
    parser.add_argument("--eta", type=float, default=1e-3, help="step size")
    parser.add_argument("--repeats", type=int, default=3, help="times that each arm is measured, alternating")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    options, rest = parser.parse_known_args()
    case = Case(rest, options.size, options.eta)
    arms: dict[str, Callable[[], Any]] = {GRADIENT: case.gradient}
    for method in WAYS:
        for name in ("float64", "float32"):
            arms[f"{method}, {name}"] = partial(case.defect, method, getattr(torch, name))
    arms[SUBTRACTED] = case.subtracted
    defects, times = measure(arms, options.repeats, case.device)
    taken = {name: median(values) for name, values in times.items()}
    gradients = {name: value / taken[GRADIENT] for name, value in taken.items()}
    ratios = {name: value / defects[REFERENCE] for name, value in defects.items()}
    for name, value in taken.items():
        shown = f"D {defects[name]:.6g}, {ratios[name]:.8f} of the exact" if name in defects else ""
        print(f"{name:24s} {value:10.1f} ms {gradients[name]:7.1f} gradients  {shown}")
    result = {"ms": taken, "over_gradient": gradients, "defect": defects, "over_exact": ratios, "eta": options.eta}
    result |= {"dim": case.selection.dim, "samples": len(case.batches[0].tokens), **described(case.device)}
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")


def measure(
    arms: dict[str, Callable[[], Any]], repeats: int, device: torch.device
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """D and milliseconds of each arm, alternating, after one round for caches; an arm that cannot run is dropped."""
    defects: dict[str, float] = {}
    for name, arm in list(arms.items()):
        try:
            if (found := arm()) is not None:
                defects[name] = found
        except UserError as error:
            print(f"{name} is left out: {error}")
            del arms[name]
    times: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(repeats):
        for name, arm in arms.items():
            times[name].append(milliseconds(arm, device))
    return defects, times


if __name__ == "__main__":
    main()
