"""Lightning callbacks that watch the geometry of training: Lightning on the outside, geometry on the inside."""

from callbacks.anatomy import OptimizerAnatomy
from callbacks.attention import AttentionProbe
from callbacks.calibrated import CalibratedProbe, View
from callbacks.commutator import CommutatorProbe
from callbacks.cost import CostControl
from callbacks.data_wait import DataWait
from callbacks.divergence import StopOnDivergence
from callbacks.fisher import FisherProbe
from callbacks.gradient_alignment import GradientAlignment
from callbacks.pictures import GeometryPictures
from callbacks.progress import LiveNumbers
from callbacks.routing import RoutingProbe
from callbacks.schedule import Schedule, StepRange
from callbacks.streaming_fisher import StreamingFisher
from callbacks.switching import SwitchingProbe
from callbacks.trajectory import TrajectoryRecorder
from callbacks.wandb_run import WandbSegments

__all__ = [
    "AttentionProbe",
    "CalibratedProbe",
    "CommutatorProbe",
    "CostControl",
    "DataWait",
    "FisherProbe",
    "GeometryPictures",
    "GradientAlignment",
    "LiveNumbers",
    "OptimizerAnatomy",
    "RoutingProbe",
    "Schedule",
    "StepRange",
    "StopOnDivergence",
    "StreamingFisher",
    "SwitchingProbe",
    "TrajectoryRecorder",
    "View",
    "WandbSegments",
]
