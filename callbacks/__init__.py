"""Lightning callbacks that watch, or change, the geometry of training: Lightning outside, geometry inside."""

from callbacks.anatomy import OptimizerAnatomy
from callbacks.attention import AttentionProbe
from callbacks.bases import BasisSource
from callbacks.calibrated import CalibratedProbe, View
from callbacks.commutator import CommutatorProbe
from callbacks.cost import CostControl
from callbacks.data_wait import DataWait
from callbacks.divergence import StopOnDivergence
from callbacks.fisher import FisherProbe
from callbacks.gradient_alignment import GradientAlignment
from callbacks.intervention import SubspaceIntervention
from callbacks.kick import Kick
from callbacks.pictures import GeometryPictures
from callbacks.progress import LiveNumbers
from callbacks.routing import RoutingProbe
from callbacks.schedule import Schedule, StepRange
from callbacks.settled import SettledObjects
from callbacks.streaming_fisher import StreamingFisher
from callbacks.switching import SwitchingProbe
from callbacks.termination import AgreedTermination
from callbacks.trajectory import TrajectoryRecorder
from callbacks.wandb_run import WandbSegments

__all__ = [
    "AgreedTermination",
    "AttentionProbe",
    "BasisSource",
    "CalibratedProbe",
    "CommutatorProbe",
    "CostControl",
    "DataWait",
    "FisherProbe",
    "GeometryPictures",
    "GradientAlignment",
    "Kick",
    "LiveNumbers",
    "OptimizerAnatomy",
    "RoutingProbe",
    "Schedule",
    "SettledObjects",
    "StepRange",
    "StopOnDivergence",
    "StreamingFisher",
    "SubspaceIntervention",
    "SwitchingProbe",
    "TrajectoryRecorder",
    "View",
    "WandbSegments",
]
