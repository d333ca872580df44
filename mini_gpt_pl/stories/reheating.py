"""What a late checkpoint is restarted with: its schedule, its optimizer's moments, its place in the data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mini_gpt_pl.errors import UserError
from mini_gpt_pl.runs.folder import Run
from mini_gpt_pl.stories.objective import ProbeWeight
from mini_gpt_pl.training.optimizers import ClippedCosine, Continued

Moments = Literal["zeroed", "kept"]
DataOrder = Literal["restart", "continue"]


@dataclass(frozen=True)
class Reheating:
    """The settings of one reheat. Steps count from the reheated checkpoint.

    With a learning rate (or none, which means the parent's peak) the schedule starts anew: warm-up, then a clipped
    cosine. With a factor the parent's schedule goes on, multiplied by it. Factor 1 with kept moments, continued data
    and the parent's probe weight is the parent's own continuation, bit for bit: the control without reheating.

    The settings are the options of the command, which `StoryTrainer.reheat` documents.

    Raises:
        UserError: A setting is out of range, or both a learning rate and a factor are given.
    """

    steps: int = 2000
    lr: float | None = None
    factor: float | None = None
    warmup: int = 200
    floor: float = 0.1
    probe_weight: float | None = 4.0
    eval_every: int = 100
    moments: Moments = "zeroed"
    data_order: DataOrder = "restart"
    threshold: float = 0.6

    def __post_init__(self) -> None:
        if self.steps < 1 or self.eval_every < 1:
            raise UserError("reheat: give --steps and --eval_every of 1 or more")
        if self.lr is not None and self.factor is not None:
            raise UserError("reheat: give either --lr, for a new schedule, or --factor, to go on with the parent's")
        for name, value in (("lr", self.lr), ("factor", self.factor), ("probe_weight", self.probe_weight)):
            if value is not None and value < 0:
                raise UserError(f"reheat: --{name} {value} is negative")

    def schedule(self, parent: Callable[[int], float], offset: int) -> Callable[[int], float]:
        """Return the factor on the learning rate, given the parent's and the steps that it took."""
        if self.factor is not None:
            return Continued(parent, offset, self.factor)
        return ClippedCosine(warmup=min(self.warmup, self.steps), total=self.steps, floor=self.floor)

    def weight(self, parent: ProbeWeight, offset: int) -> ProbeWeight:
        """Return lambda(t), given the parent's and the steps that it took."""
        if self.probe_weight is not None:
            return ProbeWeight(self.probe_weight, self.probe_weight, 0)
        return ProbeWeight(parent.first, parent.second, max(parent.switch_step - offset, 0))

    def optimizer_state(self, checkpoint: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the parent's optimizer, as its `state_dict` gave it, if the moments are to be kept.

        Raises:
            UserError: The checkpoint holds weights alone.
        """
        if self.moments == "zeroed":
            return None
        states = checkpoint.get("optimizer_states")
        if not states:
            raise UserError("reheat: the checkpoint holds no optimizer: give a full one, or --moments zeroed")
        state: dict[str, Any] = states[0]
        return state

    def data_position(self, checkpoint: Mapping[str, Any]) -> dict[str, int] | None:
        """Return where the parent stood in its data if they are to go on.

        Raises:
            UserError: The checkpoint does not say.
        """
        if self.data_order == "restart":
            return None
        try:
            position: dict[str, int] = checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"][0]
        except (KeyError, IndexError):
            raise UserError(
                "reheat: the checkpoint does not say where in the data it was: give --data_order restart"
            ) from None
        return position


def is_reheated(run: Run) -> bool:
    """Whether a run was started by `reheat`: its configuration then holds the settings of that command."""
    return "data_order" in run.settings


def closing_lines(run: Run) -> list[str]:
    """What is printed when a reheated run has ended: its gain, and its way in the parent's basis if it has one."""
    if (record := run.lineage) is None:
        return []
    lines = [
        "re-entry gain G = {gain:+.3f}: p_ood {p0:.3f} -> {peak:.3f} at step {peak_step:.0f}".format_map(record),
    ]
    if "coordinate_before" in record:
        moved = (
            "in the parent's basis: a {coordinate_before:.2f} -> {coordinate_after:.2f}, "
            "||r|| {residual_before:.2f} -> {residual_after:.2f}"
        )
        lines.append(moved.format_map(record))
    return lines
