"""The numbers that a commutator probe takes from its samples, and their names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from mini_gpt_pl.geometry.curvature.commutator import Commutator, Lengths, median, quartiles
from mini_gpt_pl.geometry.curvature.two_steps import TwoSteps
from mini_gpt_pl.geometry.directions.subspace import Basis, restrict
from mini_gpt_pl.geometry.directions.subspace_nulls import Projection, flipped_cosine
from mini_gpt_pl.geometry.vectors.alignment import cosines
from mini_gpt_pl.geometry.vectors.selection import ParameterSelection, Vector

# Logged with their quartiles over the samples.
SPREAD = ("defect", "defect_eta", "c", "c_theta2", "relative")
STEPS = ("step_defect", "step_memory", "step_curvature", "step_cosine")


@dataclass(frozen=True)
class Measured:
    """Small tensors of the samples of one step, on their device until they are named.

    Args:
        step: Optimizer steps taken before it.
        lengths: Of each sample.
        projections: Of each sample's bracket, by the name of the basis.
        shares: Each group's share of the bracket's and of the gradients' squared length.
        aligned: Cosine of the bracket with the last increment, and how large it is with coins for signs.
        steps: Of each sample, as in `STEPS`.
    """

    step: int
    lengths: list[Lengths] = field(default_factory=list)
    projections: dict[str, list[Projection]] = field(default_factory=dict)
    shares: list[Float[Tensor, "2 G"]] = field(default_factory=list)
    aligned: list[Float[Tensor, " 2"]] = field(default_factory=list)
    steps: list[Float[Tensor, " 4"]] = field(default_factory=list)

    def add(
        self,
        found: Commutator,
        stepped: Float[Tensor, " D"],
        theta: Vector,
        eta: float,
        bases: Mapping[str, Basis],
        recorded: ParameterSelection | None,
        last: Vector | None,
    ) -> None:
        """Keep what one sample shows.

        Args:
            found: The sample.
            stepped: `commutator.finite` of it, with steps of size eta.
            theta: The weights.
            eta: That size.
            bases: To project its bracket on, by name.
            recorded: Weights whose groups' shares are asked for.
            last: Increment that the bracket is compared with.
        """
        self.lengths.append(Lengths.of(found, stepped, theta.values, eta))
        bracket, *gradients = (Vector(v, theta.selection) for v in (found.bracket, found.grad_a, found.grad_b))
        for name, basis in bases.items():
            self.projections.setdefault(name, []).append(basis.project(bracket))
        if recorded is not None:
            self.shares.append(torch.stack([_shares([bracket], recorded), _shares(gradients, recorded)]))
        if last is not None:
            inside = restrict(bracket, last.selection)
            self.aligned.append(torch.stack([cosines(inside, last)[-1], flipped_cosine(inside.values, last.values)]))

    def add_steps(self, found: TwoSteps, bracket: Float[Tensor, " D"]) -> None:
        """Keep what the order of two of the optimizer's own steps changes, beside the bracket."""
        vectors = (found.step_a, found.step_b, found.change, found.memory, found.curvature, bracket)
        a, b, change, memory, curvature, size = (torch.linalg.vector_norm(v, dtype=torch.float64) for v in vectors)
        cosine = torch.dot(found.curvature.double(), bracket.double()) / (curvature * size)
        self.steps.append(torch.stack([change / (a * b), memory / (a * b), curvature / (a * b), cosine]))

    def metrics(self, name: str, dim: int, recorded: tuple[str, ParameterSelection] | None) -> dict[str, float]:
        """Name everything by the name of the weights that move, D of them, and of the recorded ones; no NaN."""
        lengths = Lengths.stack(self.lengths)
        resolved = lengths.resolved > 0
        found = length_metrics(lengths)
        if self.steps:
            found |= {key: float(median(v)) for key, v in zip(STEPS, torch.stack(self.steps).cpu().T, strict=True)}
        for basis, parts in self.projections.items():
            projected = Projection.stack(parts).cpu()
            known = replace(projected, total=torch.where(resolved, projected.total, 0.0))
            found |= projection_metrics(basis, known)
        if self.aligned:
            cosine, flip = torch.stack(self.aligned).cpu()[resolved].T
            found["alignment"] = float(cosine.mean())
            found["alignment_rms"] = float(cosine.square().mean().sqrt())
            found["alignment_flip"] = float(flip.square().mean().sqrt())
        named = {f"commutator/{name}/{key}": value for key, value in found.items()}
        if recorded is not None:
            named |= share_metrics(torch.stack(self.shares).cpu()[resolved], *recorded, dim)
        return {key: value for key, value in named.items() if value == value}


def length_metrics(lengths: Lengths) -> dict[str, float]:
    """Medians over the samples of what lengths say, some with their quartiles."""
    shown = {
        "defect": lengths.defect,
        "defect_eta": lengths.defect_eta,
        "c": lengths.scaled,
        "c_theta2": lengths.scale_free,
        "relative": lengths.relative,
        "bracket": torch.where(lengths.resolved > 0, lengths.bracket, torch.nan),
        "norm_a": lengths.norm_a,
        "norm_b": lengths.norm_b,
        "gradient_cosine": lengths.cosine,
        "weights": lengths.weights,
        "step_resolution": lengths.step_resolution,
        "float32_signal": lengths.float32_signal,
    }
    found = {name: float(median(values)) for name, values in shown.items()}
    for name in SPREAD:
        found[f"{name}_low"], found[f"{name}_high"] = quartiles(shown[name]).tolist()
    return {**found, "resolved": float(lengths.resolved.mean())}


def projection_metrics(name: str, found: Projection) -> dict[str, float]:
    """Medians over the samples of how much lies in a basis, beside what random directions hold."""
    below = [null.below(share) for null, share in zip(found.null(), found.share.tolist(), strict=True)]
    expected = found.matched.sqrt()
    return {
        f"on_{name}": float(median(found.ratio)),
        f"on_{name}_null": float(median(expected)),
        f"on_{name}_isotropic": found.isotropic**0.5,
        f"on_{name}_ratio": float(median(found.ratio / expected)),
        f"on_{name}_below": float(median(torch.tensor(below, dtype=torch.float64))),
    }


def share_metrics(
    shares: Float[Tensor, "K 2 G"], whole: str, recorded: ParameterSelection, dim: int
) -> dict[str, float]:
    """Medians over the samples of each group's share of the bracket and of the gradients, and of the weights."""
    if not len(shares):
        return {}
    middle = torch.cat([shares, shares.sum(-1, keepdim=True)], -1).quantile(0.5, dim=0).tolist()
    labels, sizes = (*recorded.groups, whole), (*recorded.dims, recorded.dim)
    named: dict[str, float] = {}
    for group, size, bracket, gradient in zip(labels, sizes, *middle, strict=True):
        prefix = f"commutator/{group}/"
        named |= {prefix + "share": bracket, prefix + "share_null": size / dim, prefix + "gradient_share": gradient}
    return named


def _shares(vectors: list[Vector], recorded: ParameterSelection) -> Float[Tensor, " G"]:
    """Each group's share of the squared lengths of some vectors together."""
    cut = [restrict(vector, recorded) for vector in vectors]
    inside = torch.stack([part.dots(part) for part in cut]).sum(0)
    return inside / torch.stack([vector.dots(vector).sum() for vector in vectors]).sum()
