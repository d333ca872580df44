"""Lightning callbacks that watch, or change, the geometry of training: Lightning outside, geometry inside.

Everything that a script of your own needs at first is here: the probes, when they speak (`Schedule`), the base class of
a probe of your own (`CalibratedProbe`, `View`), and the table that a run writes (`MetricsCSV`). Importing this package
loads torch, Lightning and nothing that draws or tabulates.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if __name__ == "callbacks":  # the folder of a checkout, as 0.1.0 had it: the installed package, loaded once
    import_module("mini_gpt_pl.callbacks")
    _LOADED = {name: module for name, module in sys.modules.items() if name.startswith("mini_gpt_pl.callbacks")}
    sys.modules.update({name.removeprefix("mini_gpt_pl."): module for name, module in _LOADED.items()})

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
from mini_gpt_pl.callbacks.progress import LiveNumbers
from mini_gpt_pl.callbacks.schedule import Schedule, StepRange
from mini_gpt_pl.callbacks.settled import SettledObjects
from mini_gpt_pl.callbacks.streaming_fisher import StreamingFisher
from mini_gpt_pl.callbacks.switching import SwitchingProbe
from mini_gpt_pl.callbacks.termination import AgreedTermination
from mini_gpt_pl.callbacks.trajectory import TrajectoryRecorder
from mini_gpt_pl.callbacks.wandb_run import WandbSegments
from mini_gpt_pl.errors import missing_package
from mini_gpt_pl.runs.logs import MetricsCSV

if TYPE_CHECKING:
    from mini_gpt_pl.callbacks.pictures import GeometryPictures

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
    "MetricsCSV",
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

# Loaded when they are asked for: they need packages of an extra.
_LATER = {"GeometryPictures": "mini_gpt_pl.callbacks.pictures"}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(_LATER[name]), name)
    except ModuleNotFoundError as error:
        raise (missing_package(error) or error) from error
