"""Lightning callbacks that watch, or change, the geometry of training: Lightning outside, geometry inside."""

if __name__ != "mini_gpt_pl.callbacks":
    raise ImportError(f"the package {__name__!r} is installed as mini_gpt_pl.callbacks: import that, not its folder")

from mini_gpt_pl.callbacks.anatomy import OptimizerAnatomy
from mini_gpt_pl.callbacks.attention import AttentionProbe
from mini_gpt_pl.callbacks.bases import BasisSource
from mini_gpt_pl.callbacks.calibrated import CalibratedProbe, View
from mini_gpt_pl.callbacks.commutator import CommutatorProbe
from mini_gpt_pl.callbacks.cost import CostControl
from mini_gpt_pl.callbacks.data_wait import DataWait
from mini_gpt_pl.callbacks.divergence import StopOnDivergence
from mini_gpt_pl.callbacks.fisher import FisherProbe
from mini_gpt_pl.callbacks.gradient_alignment import GradientAlignment
from mini_gpt_pl.callbacks.intervention import SubspaceIntervention
from mini_gpt_pl.callbacks.kick import Kick
from mini_gpt_pl.callbacks.pictures import GeometryPictures
from mini_gpt_pl.callbacks.progress import LiveNumbers
from mini_gpt_pl.callbacks.schedule import Schedule, StepRange
from mini_gpt_pl.callbacks.settled import SettledObjects
from mini_gpt_pl.callbacks.streaming_fisher import StreamingFisher
from mini_gpt_pl.callbacks.switching import SwitchingProbe
from mini_gpt_pl.callbacks.termination import AgreedTermination
from mini_gpt_pl.callbacks.trajectory import TrajectoryRecorder
from mini_gpt_pl.callbacks.wandb_run import WandbSegments

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
