"""What an optimizer's own settings and state say about its updates."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer

# torch keeps the two kinds of decay apart by class, or by this flag on Adam and its relatives.
_DECOUPLED = ("AdamW", "SGDW", "Muon")


def group_of(optimizer: Optimizer, parameter: Tensor) -> dict[str, Any]:
    """Return the optimizer's parameter group that holds a parameter.

    Raises:
        ValueError: None does.
    """
    for group in optimizer.param_groups:
        if any(parameter is member for member in group["params"]):
            return group
    raise ValueError("the optimizer does not train this parameter")


def decay_rate(optimizer: Optimizer, parameter: Tensor) -> float:
    """Share of a parameter that weight decay takes away in one step at the current learning rate.

    Decoupled decay (AdamW, SGDW, Muon): lr wd. L2 inside SGD's gradient: lr wd / (1 - momentum), its rate once the
    momentum buffer has filled. L2 inside an adaptive gradient is rescaled per coordinate and is no shrinkage at any
    common rate: 0.
    """
    group = group_of(optimizer, parameter)
    rate = float(group["lr"]) * float(group.get("weight_decay", 0.0))
    kinds = {kind.__name__ for kind in type(optimizer).__mro__}
    if kinds & set(_DECOUPLED) or group.get("decoupled_weight_decay"):
        return rate
    if "SGD" in kinds:
        return rate / (1.0 - float(group.get("momentum", 0.0)))
    return 0.0
