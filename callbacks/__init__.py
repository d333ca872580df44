"""Lightning callbacks that watch the geometry of training: Lightning on the outside, geometry on the inside."""

from callbacks.divergence import StopOnDivergence
from callbacks.gradient_alignment import GradientAlignment
from callbacks.schedule import Schedule, StepRange
from callbacks.trajectory import TrajectoryRecorder

__all__ = ["GradientAlignment", "Schedule", "StepRange", "StopOnDivergence", "TrajectoryRecorder"]
