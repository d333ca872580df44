"""What the study of grokking says of its interventions, beside what the arms that it lacks do: all computed.

A claim is left out where an arm that it takes has not been run. Arms are those of `configs/grokking/interventions`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

from mini_gpt_pl.arithmetic.study.intervention_runs import Delays, Ended
from mini_gpt_pl.report import claims as core
from mini_gpt_pl.report.claims import Claim
from mini_gpt_pl.report.sheet import Table

Arms = Mapping[str, Sequence[Ended]]
# Below this training accuracy a run no longer knows what it was trained on, whatever it does on the test set.
_FORGOTTEN = 0.5
# An arm is later than another if it is in more than this share of the seeds, by more than one evaluation.
_MOST = 0.75
_EVALUATION = 50


def claims_table(arms: Arms, control: str = "none") -> Table:
    """Put every claim that the arms allow beside what they give.

    Args:
        arms: Runs that have ended, by arm.
        control: Name of the arm without intervention.
    """
    claims = [judge(_Bench(arms, control)) for judge in _CLAIMS]
    notes = (
        "Delays: median over seeds against the run of the same seed without intervention, and their range; s is the "
        f"suppressed part. Later: by more than {_EVALUATION} steps in more than {_MOST:.0%} of the seeds that both "
        f"arms have. Forgotten: a training accuracy below {_FORGOTTEN:.0%} after 99 % had been reached.",
    )
    title = "Interventions: what the study says, and what these runs say"
    columns = ("the study says", "here", "beside", "reading")
    return core.claims_table("intervention_claims", title, claims, notes, columns)


class _Bench:
    """Arms, and how to say what became of them."""

    def __init__(self, arms: Arms, control: str) -> None:
        self.arms, self.control = arms, control

    def has(self, *names: str) -> bool:
        return all(name in self.arms for name in (self.control, *names))

    def delays(self, name: str) -> Delays:
        return Delays.between(self.arms[name], self.arms[self.control])

    def later(self, name: str, than: str) -> bool:
        """Whether an arm generalises later than another, or not at all where the other does."""
        delays = Delays.between(self.arms[name], self.arms[than])
        return delays.longer(_EVALUATION) > _MOST * len(delays.steps) if delays.steps else False

    def reached(self, name: str) -> int:
        return sum(run.at is not None for run in self.arms[name])

    def fails(self, name: str) -> bool:
        """Whether some run of an arm did not generalise."""
        return self.reached(name) < len(self.arms[name])

    def accuracy(self, name: str) -> float:
        """Median over seeds of the lowest training accuracy since memorisation."""
        return statistics.median(run.train for run in self.arms[name])

    def told(self, *names: str) -> str:
        """Delays of some arms, one after the other."""
        return "; ".join(f"{name} {self.delays(name)}" for name in names if name in self.arms)

    def fates(self, *names: str) -> str:
        """How many runs of some arms generalised, and what they still knew of the training set."""
        return "; ".join(
            f"{name}: {self.reached(name)} of {len(self.arms[name])} generalise, training accuracy falls to "
            f"{self.accuracy(name):.0%}"
            for name in names
            if name in self.arms
        )


def _dose(bench: _Bench) -> Claim | None:
    """A gradient whose orthogonal part is suppressed is, to Adam, one whose parallel part is amplified."""
    doses = ("pca_s025", "pca_s050", "pca_s075")
    if not bench.has(*doses, "amplify_s075", "scale_s075"):
        return None
    if not bench.later("pca_s075", bench.control):
        reading = "**does not reproduce**: the largest dose is no later than no intervention."
    elif not bench.later("amplify_s075", bench.control):
        reading = "**reproduces**: suppressing delays, and amplifying the other part does not."
    elif bench.later("pca_s075", "amplify_s075"):
        reading = "**partly amplification**: amplifying alone delays too, but less."
    else:
        reading = "**amplification**: the same delay comes with nothing suppressed; Adam takes the common factor out."
    return Claim(
        "Suppressing the gradient across the path delays grokking, +34, +300 and +800 steps at s = 0.25, 0.5, 0.75",
        bench.told(*doses),
        f"parallel part × 4, nothing suppressed: {bench.delays('amplify_s075')}; everything × 0.25: "
        f"{bench.delays('scale_s075')}",
        reading,
    )


def _specific(bench: _Bench) -> Claim | None:
    matched = ("blocks_s075", "rank_one_s075", "theta0_s075", "other_s075")
    if not bench.has("pca_s075", "isotropic_s075", *matched):
        return None
    beaten = [name for name in matched if bench.later("pca_s075", name)]
    equal = [name for name in matched if name not in beaten]
    if not bench.later("pca_s075", bench.control):
        reading = "**nothing to explain**: the path's own directions do not delay."
    elif not equal:
        reading = "**reproduces**: this run's path delays more than any matched directions."
    else:
        longer = f"longer than with {', '.join(beaten)}" if beaten else "longer than with none of them"
        reading = f"**not of this path**: the delay is {longer}, no longer than with {', '.join(equal)}."
    return Claim(
        "It is the subspace: random directions as many delay by less than 50 steps",
        f"path {bench.delays('pca_s075')}; isotropic {bench.delays('isotropic_s075')}",
        bench.told(*matched, "past_s075"),
        reading,
    )


def _confined(bench: _Bench) -> Claim | None:
    """At s = 1 all weights outside the span have no gradient, and decay goes on."""
    if not bench.has("pca_s100", "decay_off_s100"):
        return None
    forgotten = bench.accuracy("pca_s100") < _FORGOTTEN
    if bench.reached("pca_s100"):
        reading = "**does not reproduce**: some runs generalise."
    elif forgotten and bench.accuracy("decay_off_s100") >= _FORGOTTEN:
        reading = "**erased by decay**: the training set is forgotten, but not with decay off; no test of flow."
    elif forgotten:
        reading = "**erased**: the training set is forgotten, with decay and without; no test of flow."
    else:
        reading = "**reproduces**: nothing generalises, and the training set is still known."
    if bench.has("inside_s100") and not bench.fails("inside_s100"):
        reading += " Confined within the attention matrices alone, every run generalises."
    return Claim(
        "Orthogonal flow is necessary: at s = 1, 0 of 12 runs grok",
        bench.fates("pca_s100"),
        bench.fates("decay_off_s100", "decay_span_s100", "decay_off", "inside_s100", "isotropic_s100", "blocks_s100"),
        reading,
    )


def _along(bench: _Bench) -> Claim | None:
    arms = ("remove", "update_remove")
    if not bench.has(*arms, "blocks_remove"):
        return None
    failing = [name for name in arms if bench.fails(name)]
    late = [name for name in arms if bench.later(name, bench.control)]
    if any(bench.accuracy(name) < _FORGOTTEN for name in failing):
        reading = f"**erased**: with {', '.join(failing)} the training set is forgotten; no test of motion."
    elif failing and bench.fails("blocks_remove"):
        reading = "**not of this path**: without random directions of these matrices not every run generalises either."
    elif failing:
        reading = f"**stands**: not every run generalises with {', '.join(failing)}."
    elif late:
        reading = f"**not necessary**: every run generalises without it, later with {', '.join(late)}."
    else:
        earlier = [name for name in arms if bench.later(bench.control, name)]
        when = f"earlier with {', '.join(earlier)}" if earlier else "no later"
        reading = f"**does not stand**: every run generalises without it, and {when}."
    return Claim(
        "Motion along the path is necessary (not tested)",
        f"without the parallel part of the gradient {bench.delays('remove')}, of the update "
        f"{bench.delays('update_remove')}",
        bench.told("blocks_remove"),
        reading,
    )


def _kicks(bench: _Bench) -> Claim | None:
    pairs = [(n, f"{n}_random") for n in ("kick", "sustained_050", "sustained_100", "sustained_200", "sustained_500")]
    pairs = [pair for pair in pairs if bench.has(*pair)]
    if not pairs:
        return None
    differ = [one for one, random in pairs if bench.later(one, random) or bench.later(random, one)]
    reading = "**stands**: at one length the direction does not matter."
    if differ:
        reading = f"**does not stand**: the commutator's direction and random ones differ for {', '.join(differ)}."
    return Claim(
        "Kicks along the commutator and along random directions do alike: 27 of 27 grok, at about 3,200",
        bench.told(*(one for one, _ in pairs)),
        bench.told(*(random for _, random in pairs), "noise"),
        reading,
    )


def _update(bench: _Bench) -> Claim | None:
    if not bench.has("update_s075", "update_scale_s075"):
        return None
    if not bench.later("update_s075", bench.control):
        reading = "**no effect**: it is no later than no intervention."
    elif bench.later("update_s075", "update_scale_s075"):
        reading = "**more than a lower rate**: suppressing across the path costs more than scaling the whole update."
    else:
        reading = "**a lower rate**: scaling the whole update delays as much."
    confined = "update_s100_decay_span"
    if bench.has(confined) and not bench.reached(confined) and bench.accuracy(confined) >= _FORGOTTEN:
        reading += " Confined to the path, decay included, no run generalises, and the training set is still known."
    return Claim(
        "(not tested) the update in place of the gradient, which Adam cannot undo",
        bench.told("update_s075", "update_s100", "update_s100_decay_span"),
        bench.told("update_scale_s075"),
        reading,
    )


_CLAIMS: tuple[Callable[[_Bench], Claim | None], ...] = (_dose, _specific, _confined, _along, _kicks, _update)
