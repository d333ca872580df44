"""When a probe speaks: one schedule type for all of them."""

from __future__ import annotations

from dataclasses import dataclass, field

from mini_gpt_pl.errors import UserError


@dataclass(frozen=True)
class StepRange:
    """Every `every` steps from `start` to `stop`, both inclusive."""

    start: int
    stop: int
    every: int

    def __post_init__(self) -> None:
        if self.every < 1 or not 0 <= self.start <= self.stop:
            raise UserError(f"a step range needs 0 <= start <= stop and every >= 1, got {self}")


@dataclass(frozen=True)
class Schedule:
    """A set of optimizer steps: the union of what its arguments name.

    Args:
        every: All multiples of this.
        ranges: Stretches with a distance of their own, such as every 50 from 600 to 2000.
        doubling_until: 1, 2, 4, 8, ... up to this step.
        steps: Single steps.

    Example:
        >>> schedule = Schedule(every=200, ranges=[StepRange(600, 700, 50)], doubling_until=4)
        >>> [step for step in range(701) if schedule.due(step)]
        [0, 1, 2, 4, 200, 400, 600, 650, 700]
    """

    every: int | None = None
    ranges: list[StepRange] = field(default_factory=list)
    doubling_until: int = 0
    steps: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.every is not None and self.every < 1:
            raise UserError(f"a schedule's every must be at least 1, got {self.every}")
        if self.every is None and not (self.ranges or self.doubling_until or self.steps):
            raise UserError("a schedule that names no step would record nothing: give every, ranges or steps")

    def due(self, step: int) -> bool:
        """Whether the step belongs to the schedule."""
        return (
            (self.every is not None and step % self.every == 0)
            or any(r.start <= step <= r.stop and (step - r.start) % r.every == 0 for r in self.ranges)
            or (0 < step <= self.doubling_until and step & (step - 1) == 0)
            or step in self.steps
        )
