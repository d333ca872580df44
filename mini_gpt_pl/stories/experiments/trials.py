r"""What each experiment does: a list of trials, every one of which sets weights, trains them on, and is recorded.

* recovery: from peaks of p_ood, from the troughs after them, from the peak moved as far as the trough lies in a
  direction drawn at random (per matrix), and from initial weights: does a trough come back sooner than any weights do?
* depth: every matrix W of the trunk becomes W + sigma rms(W) N(0, 1), so that it moves by sigma ||W||. sigma_1/2 is the
  noise at which what training restores of p_ood has fallen to half.
* blocks: one block moves from the peak towards the trough, by a share epsilon of the way, beside three moves of the
  same length in each of its matrices in random directions.

Recovery and blocks have the variant `original`, as the published scripts have it, for comparison: there, recovery
decays LayerNorms and has AdamW's default betas, and nothing to compare with; a block moves along the unit vector by
epsilon rms(W), a thousandth of its length, which nothing could notice. The published depth is the one here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from mini_gpt_pl.errors import UserError
from mini_gpt_pl.geometry.path.switching import Event
from mini_gpt_pl.stories.experiments.relaxation import Protocol, displaced

State = Mapping[str, Tensor]
RECOVERY = Protocol(lr=1e-3, probe_weight=8.0, steps=1000, eval_every=50)
RELAXATION = Protocol(lr=6e-4, probe_weight=4.0, steps=300, eval_every=300)
NO_TRAINING = replace(RELAXATION, steps=0)
SIGMAS = (0.0, 0.01, 0.03, 0.1, 0.3)
SHARES = (0.5, 1.0, 1.5, 2.0)
_RANDOM = 3  # moves of a block in random directions


@dataclass(frozen=True)
class Trial:
    """One start, and how it is trained on.

    Args:
        key: Its name in the records.
        labels: What tables need to know of it: checkpoint, kind of start, size of the move, number of the trial.
        weights: Makes the weights to start from.
        protocol: How they are trained.
        batches: Number of the stream of training batches.
    """

    key: str
    labels: Mapping[str, str | float]
    weights: Callable[[], State]
    protocol: Protocol
    batches: int = 0


class Checkpoints:
    """Weights of a run at its peaks and troughs.

    Args:
        read: Reads the weights of a step.
        initial: Weights that nothing was trained on.
        trunk: Names of the matrices that are moved, by block.
        stored: Steps whose weights are stored.
        events: Peaks and troughs of p_ood.
        seed: Of everything drawn.

    Raises:
        UserError: No peak with a trough after it has weights stored at both.
    """

    def __init__(
        self,
        read: Callable[[int], State],
        initial: State,
        trunk: Mapping[str, Sequence[str]],
        stored: Sequence[int],
        events: Sequence[Event],
        seed: int,
    ) -> None:
        self.read, self.initial, self.trunk, self.seed = read, initial, trunk, seed
        self.last = max(stored)
        kept = [event for event in events if event.step in stored]
        troughs = [event.step for event in kept if event.kind == "trough"]
        after = [
            (event.step, next((step for step in troughs if step > event.step), None))
            for event in kept
            if event.kind == "peak"
        ]
        self.pairs = [(peak, trough) for peak, trough in after if trough is not None]
        if not self.pairs:
            where = ", ".join(f"{event.kind} {event.step:,}" for event in events) or "p_ood has neither"
            raise UserError(
                "no peak of p_ood and trough after it have their weights stored "
                f"({where}): train with a checkpoint at every evaluation (configs/paper/replayable.yaml)"
            )

    @property
    def matrices(self) -> list[str]:
        """Names of all matrices of the trunk."""
        return [name for names in self.trunk.values() for name in names]

    def displaced(self, peak: int, trough: int) -> State:
        """A peak's weights with each matrix moved as far as the trough's lies, in a random direction."""
        here, there = self.read(peak), self.read(trough)
        generator = _generator(self.seed, peak)
        moved = {n: displaced(here[n], (there[n] - here[n]).norm(), generator) for n in self.matrices}
        return {**here, **moved}

    def noisy(self, step: int, sigma: float, trial: int) -> State:
        """Weights with each matrix W moved to W + sigma rms(W) N(0, 1)."""
        weights, generator = self.read(step), _generator(self.seed, step, trial)
        moved = {}
        for name in self.matrices:
            noise = torch.randn(weights[name].shape, generator=generator)
            moved[name] = weights[name] + sigma * weights[name].square().mean().sqrt() * noise
        return {**weights, **moved}

    def towards(self, peak: int, trough: int, block: str, share: float, drawn: int | None, rms: bool) -> State:
        """A peak's weights with one block moved towards the trough, or as far in random directions.

        Args:
            peak: Step of the peak.
            trough: Of the trough.
            block: Which block.
            share: Of the way.
            drawn: Number of a random direction; None for the trough's.
            rms: Move by `share` times the block's rms along the unit vector away from the trough, as published.
        """
        here, there, names = self.read(peak), self.read(trough), self.trunk[block]
        if rms:
            every = torch.cat([here[n].flatten() for n in names])
            way = torch.cat([(here[n] - there[n]).flatten() for n in names])
            share = share * float(every.square().mean().sqrt() / way.norm())
            there = {n: 2 * here[n] - there[n] for n in names}  # away from the trough
        if drawn is None:
            moved = {n: here[n] + share * (there[n] - here[n]) for n in names}
        else:
            generator = _generator(self.seed + 17 * list(self.trunk).index(block), peak, drawn)
            moved = {n: displaced(here[n], share * (there[n] - here[n]).norm(), generator) for n in names}
        return {**here, **moved}


def recovery(checkpoints: Checkpoints, pairs: int = 3, *, original: bool = False) -> Iterator[Trial]:
    """Trials from the first pairs of a peak and a trough, and their nulls; the original variant has no nulls."""
    protocol = replace(RECOVERY, betas=(0.9, 0.999), decay_vectors=True) if original else RECOVERY
    for peak, trough in checkpoints.pairs[:pairs]:
        pair = {"peak": float(peak), "trough": float(trough)}
        starts = {"peak": partial(checkpoints.read, peak), "trough": partial(checkpoints.read, trough)}
        if not original:
            starts["displaced"] = partial(checkpoints.displaced, peak, trough)
        for kind, weights in starts.items():
            yield Trial(f"{kind}-{peak}-{trough}", {"start": kind, **pair}, weights, protocol)
    if not original:
        yield Trial("initial", {"start": "initial"}, lambda: checkpoints.initial, protocol)


def depth(
    checkpoints: Checkpoints, pairs: int = 3, trials: int = 4, sigmas: Sequence[float] = SIGMAS
) -> Iterator[Trial]:
    """Trials at the first pairs of a peak and a trough and at the last checkpoint, each with every size of noise."""
    chosen = checkpoints.pairs[:pairs]
    kinds = {step: "peak" for step, _ in chosen} | {step: "trough" for _, step in chosen}
    kinds.setdefault(checkpoints.last, "last")
    for trial in range(trials):  # the outer loop, as its batches are the same for all weights
        for step, kind in kinds.items():
            for sigma in sigmas:
                labels: dict[str, str | float] = {"kind": kind, "step": step, "sigma": sigma, "trial": trial}
                weights = partial(checkpoints.noisy, step, sigma, trial)
                yield Trial(f"{step}-{sigma:g}-{trial}", labels, weights, RELAXATION, trial)


def blocks(
    checkpoints: Checkpoints,
    pairs: int = 3,
    shares: Sequence[float] = SHARES,
    *,
    relax: bool = False,
    original: bool = False,
) -> Iterator[Trial]:
    """Trials that move one block each, evaluated at once, and after relaxation too where that is asked for."""
    protocol = RELAXATION if relax else NO_TRAINING
    for peak, trough in checkpoints.pairs[:pairs]:
        own = {"peak": float(peak), "trough": float(trough)}
        yield Trial(f"{peak}-0", {**own, "share": 0.0}, partial(checkpoints.read, peak), protocol)
        for block in checkpoints.trunk:
            for share in shares:
                for drawn in (None, *range(_RANDOM)):
                    kind = "switch" if drawn is None else f"random {drawn}"
                    weights = partial(checkpoints.towards, peak, trough, block, share, drawn, original)
                    labels: dict[str, str | float] = {**own, "block": block, "share": share, "direction": kind}
                    yield Trial(f"{peak}-{block}-{share:g}-{kind}", labels, weights, protocol)


def _generator(*words: int) -> torch.Generator:
    """A generator on the host from some integers, each of which may be any below 2^20."""
    seed = 0
    for word in words:
        seed = (seed << 20) + word % (1 << 20)
    return torch.Generator().manual_seed(seed % (1 << 63))
