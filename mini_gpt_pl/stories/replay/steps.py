"""Which stored checkpoints are measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mini_gpt_pl.errors import UserError
from mini_gpt_pl.geometry.path import switching
from mini_gpt_pl.geometry.path.switching import Event

INIT_STEP = 200


def chosen(stored: Sequence[int], wanted: Iterable[int]) -> list[int]:
    """Return steps asked for one by one, in order.

    Raises:
        UserError: One of them is not among the stored ones.
    """
    steps = sorted(set(wanted))
    if missing := [step for step in steps if step not in stored]:
        near = ", ".join(f"{step} (nearest is {nearest(stored, step)})" for step in missing)
        raise UserError(f"--steps: no checkpoint is stored at step {near}")
    return steps


def every(stored: Sequence[int], interval: int) -> list[int]:
    """Return the stored multiples of an interval, and the last checkpoint.

    Raises:
        UserError: The interval is below 1.
    """
    if interval < 1:
        raise UserError(f"--every {interval}: give a number of steps, 1 or more")
    return [step for step in stored if step % interval == 0 or step == stored[-1]]


def paper(stored: Sequence[int], events: Sequence[Event], last: int) -> dict[str, int]:
    """Choose the checkpoints of the paper's gradient and Fisher analyses, each the nearest that is stored.

    They are step 200, the first peak of p_ood and its trough, the middle one of the troughs in the middle half of the
    run, the peak and trough of the highest switch in that half, the last peak, and the end. As without a file of
    evaluation noise in the published analysis, every peak counts.

    Args:
        stored: Steps of the checkpoints.
        events: Peaks and troughs of p_ood.
        last: Last step of the run.

    Returns:
        Stored step by role.

    Raises:
        UserError: There is no peak with a trough after it, so that the run has no such checkpoints.
    """
    pairs = switching.switches(events)
    if not pairs:
        raise UserError("--paper: p_ood has no peak followed by a trough; choose checkpoints with --steps or --every")
    middle = range(last // 4, 3 * last // 4 + 1)
    troughs = [event.step for event in events if event.kind == "trough" and event.step in middle]
    roles = {"init": INIT_STEP, "early_peak": pairs[0].peak.step, "early_trough": pairs[0].trough.step}
    if troughs:
        roles["transition_trough"] = troughs[len(troughs) // 2]
    inside = [pair for pair in pairs if pair.peak.step in middle and pair.trough.step in middle]
    if inside:
        best = max(inside, key=lambda pair: pair.peak.value - pair.trough.value)
    else:
        best = min(pairs, key=lambda pair: abs(pair.peak.step - last / 2))
    roles |= {"mid_peak": best.peak.step, "mid_trough": best.trough.step}
    roles |= {"late_peak": max(event.step for event in events if event.kind == "peak"), "final": last}
    return {role: nearest(stored, step) for role, step in roles.items()}


def nearest(stored: Sequence[int], step: int) -> int:
    """Return the stored step closest to another, the earlier one of two."""
    return min(stored, key=lambda other: (abs(other - step), other))
