r"""How much of each weight decay takes in a step: measured on shadows, whatever the optimizer is.

Beside training a twin of the optimizer, of the same class with the same settings, steps a few scalars of its own whose
gradient is zero. What is left of them is what decay alone leaves of a weight: momentum, dampening, averages and
schedules included, and nothing has to be known about the rule.

Weights of one parameter group of one optimizer, one number of dimensions and one history (the steps at which they had a
gradient) share their shadows:

* 1 and 2, with zero gradient. Where 2 is not left as twice 1, decay is no shrinkage (L2 inside an adaptive gradient).
* two that begin each step where the first one does, with gradients +1 and -1. Their mean is again the first one where
  decay does not depend on the gradient (it does where a whole update, decay included, is scaled to some length).
* for matrices, a tall one, so that a rate that depends on a weight's shape is seen.

Where one of these fails the share is not known: NaN. All are stepped until decay has acted `PROBATION` times; from then
on the first one is.
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

PROBATION = 16
_INSIDE = "is no shrinkage"
_SCALARS = ("steps", "acted", "decays", "reason", "source")
# Settings that only say how tensors are gone through.
_PLAIN = {"foreach": False, "fused": False, "capturable": False, "differentiable": False}
_STARTS = (1.0, 2.0, 1.0, 1.0, 1.0)
_GRADIENTS = (0.0, 0.0, 1.0, -1.0, 0.0)


class _Unknown(Exception):
    """The share that decay takes is not known; says why."""


class _Class:
    """Weights of one group, number of dimensions and history, and what follows their decay.

    Attributes:
        members: Positions of the weights.
        key: Position of the group among the optimizer's, and number of dimensions.
        twin: Of the optimizer, with the shadows as its only weights; None before the first step.
        steps: How many the twin has taken.
        acted: In how many of them decay has moved the first shadow.
        decays: Whether a setting that is called decay is not zero.
        reason: Why the share is not known; empty where it is.
        source: Number of the optimizer among those that have stepped.
        saved: State of the twin in a checkpoint, until there is one.
    """

    def __init__(self, members: Sequence[int], key: Sequence[int], **state: Any) -> None:
        self.members, self.key = list(members), (key[0], key[1])
        self.twin: Optimizer | None = None
        self.steps: int = state.get("steps", 0)
        self.acted: int = state.get("acted", 0)
        self.decays: bool = state.get("decays", False)
        self.reason: str = state.get("reason", "")
        self.source: int = state.get("source", 0)
        self.saved: dict[str, Any] | None = state.get("twin")

    @property
    def shadows(self) -> list[nn.Parameter]:
        assert self.twin is not None
        found: list[nn.Parameter] = self.twin.param_groups[0]["params"]
        return found

    def prepare(self, optimizer: Optimizer, sparse: bool) -> None:
        """Give the twin the settings that the step has, and its shadows their gradients."""
        group = optimizer.param_groups[self.key[0]]
        # A flag such as decoupled_weight_decay says how, not how much.
        decays = any("decay" in name and type(v) in (int, float) and v != 0 for name, v in group.items())
        late, self.decays = decays and not self.decays, decays
        if self.twin is None:
            self.twin = _twin(optimizer, group, _new_shadows(self.key[1]))
            _fill(self.twin, self.saved)
            self.saved = None
        elif late and not self.acted and len(self.shadows) == 1:
            # Decay is about to begin; until now it has left no trace in any state.
            first = self.shadows[0]
            for start in _STARTS[1:4]:
                self.shadows.append(nn.Parameter(torch.full_like(first, start)))
                for part in _tree(self.twin):
                    if first in part.state:
                        part.state[self.shadows[-1]] = copy.deepcopy(part.state[first])
        for own, original in zip(_tree(self.twin), _tree(optimizer), strict=True):
            for mine, other in zip(own.param_groups, _groups_of(original, group), strict=True):
                mine.update(_settings(other))
        for shadow, gradient in zip(self.shadows, _GRADIENTS, strict=False):
            full = torch.full_like(shadow, gradient)
            shadow.grad = full.to_sparse() if sparse else full

    def share(self) -> float:
        """Step the twin: the share that decay leaves in this step.

        Raises:
            _Unknown: The shadows contradict one another.
        """
        first, before = self.shadows[0], float(self.shadows[0].detach())
        with torch.no_grad():
            for shadow in self.shadows[2:4]:
                shadow.copy_(first)
        try:
            _step(self.twin)
        except Exception as error:
            if self.steps:
                raise
            self.twin = _rebuilt(self.twin, error)  # a class that makes its state when it is constructed
            _step(self.twin)
        after = [float(shadow.detach().mean()) for shadow in self.shadows]
        self._check(before, after)
        self.steps += 1
        self.acted += after[0] != before
        done = self.acted >= PROBATION or (self.steps >= PROBATION and not self.decays)
        if done and not isinstance(self.twin, torch.optim.LBFGS):  # that one knows its weights by their number
            del self.shadows[1:]
        return _as_set(after[0] / before if before else 1.0, self.twin.param_groups[0] if self.twin else {})

    def _check(self, before: float, after: list[float]) -> None:
        name, first = type(self.twin).__name__, after[0]
        if not math.isfinite(first) or first < 0.0:
            raise _Unknown(f"the decay of {name} alone would leave {first:g} of a weight of 1")
        if len(after) == 1:
            if first != before and not self.acted:
                raise _Unknown(f"the decay of {name} begins after {self.steps} steps, and no setting says so")
            return
        near = 1e-12 * before + 1e-6 * abs(before - first)
        if abs(after[1] - 2.0 * first) > 2.0 * near:
            raise _Unknown(f"the decay of {name} {_INSIDE}: it takes other shares of large and of small weights")
        if abs(after[2] + after[3] - 2.0 * first) > 2.0 * (near + 1e-12 * abs(after[2] - after[3])):
            raise _Unknown(f"the decay of {name} {_INSIDE}: what it takes depends on the gradient")
        if len(after) > 4 and abs(after[4] - first) > near:
            raise _Unknown(f"the decay of {name} depends on a weight's shape")

    def branch(self, members: Sequence[int], optimizer: Optimizer) -> _Class:
        """Split some weights off, whose history is another one from now on."""
        other = _Class(members, self.key, **{name: getattr(self, name) for name in _SCALARS})
        if self.twin is not None:
            other.twin = _twin(optimizer, optimizer.param_groups[self.key[0]], _new_shadows(self.key[1]))
            _fill(other.twin, _state(self.twin))
        return other

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and primitives only, the arguments of another one."""
        kept = {name: getattr(self, name) for name in ("members", *_SCALARS)}
        kept |= {"key": list(self.key), "twin": None}
        try:
            return {**kept, "twin": self.saved if self.twin is None else _state(self.twin)}
        except _Unknown as error:
            return {**kept, "reason": str(error)}


class DecayShadows:
    """Follows what decay alone leaves of some weights, step by step.

    Training is not touched: twins have their own weights, state and settings, on the host, and the random state is put
    back. Of what an optimizer holds beside groups and state only plain values and other optimizers are copied; where it
    holds anything else, no twin is made.

    Args:
        parameters: The weights.

    Attributes:
        left: Share of each weight that decay alone has left since the start; NaN where it is not known.
        taken: Share of each that the latest step has taken.
        reasons: Why some are not known.

    Example:
        >>> weight = nn.Parameter(torch.ones(3))
        >>> optimizer = torch.optim.AdamW([weight], lr=0.1, weight_decay=0.5)
        >>> shadows = DecayShadows([weight])
        >>> weight.grad = torch.ones(3)
        >>> shadows.read(optimizer)
        >>> shadows.step()
        >>> shadows.left
        [0.95]
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = list(parameters)
        self.left = [1.0] * len(self.parameters)
        self.taken = [0.0] * len(self.parameters)
        self.reasons: list[str] = []
        self._classes: list[_Class] = []
        self._moving: list[_Class] = []
        self._optimizers: list[Optimizer] = []

    def rebind(self, parameters: Sequence[Tensor]) -> None:
        """Follow these weights from now on, which stand in the place of those so far; new ones have no history."""
        same = [new is old for new, old in zip(parameters, self.parameters, strict=True)]
        self.parameters = list(parameters)
        for found in self._classes:
            found.members = [i for i in found.members if same[i]]
        self._classes = [found for found in self._classes if found.members]

    def read(self, optimizer: Optimizer) -> None:
        """Read which weights a step is about to move and with which settings: gradients complete, nothing moved yet."""
        place = {id(p): (i, p.ndim) for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
        moving = {i: place[id(p)] for i, p in enumerate(self.parameters) if p.grad is not None and id(p) in place}
        self._moving = []
        self._optimizers += [] if any(known is optimizer for known in self._optimizers) else [optimizer]
        source = next(number for number, known in enumerate(self._optimizers) if known is optimizer)
        for found in [found for found in self._classes if found.source == source]:
            here = [i for i in found.members if i in moving]
            if here and (len(here) < len(found.members) or moving[here[0]] != found.key):
                rest = [i for i in found.members if i not in moving]
                if rest:  # from here on they have different histories
                    self._classes.append(found.branch(rest, optimizer))
                found.members = here
            if here:
                self._moving.append(found)
        followed = {i for found in self._classes if found.source == source for i in found.members}
        for key in dict.fromkeys(moving.values()):
            if members := [i for i, at in moving.items() if at == key and i not in followed]:
                self._moving.append(_Class(members, key, source=source))
                self._classes.append(self._moving[-1])
        for found in self._moving:
            gradients = [self.parameters[i].grad for i in found.members]
            sparse = any(g is not None and g.is_sparse for g in gradients)
            self._attempt(found, partial(found.prepare, optimizer, sparse))

    def step(self) -> None:
        """Step the shadows of the weights that have just been stepped."""
        self.taken = [0.0] * len(self.parameters)
        moving, self._moving = self._moving, []
        random = torch.get_rng_state()
        for found in moving:
            share = self._attempt(found, partial(self._share, found))
            share = math.nan if share is None else share
            for i in found.members:
                self.left[i] *= share
                self.taken[i] = 1.0 - share
        torch.set_rng_state(random)

    def _share(self, found: _Class) -> float:
        share = found.share()
        for dtype in {self.parameters[i].dtype for i in found.members}:
            # Whether such a weight moves at all depends on what else an optimizer adds before it rounds.
            if torch.finfo(dtype).bits < 32 and 0.0 < 1.0 - share < torch.finfo(dtype).eps:
                raise _Unknown(f"a decay of {1.0 - share:.1g} a step is below the rounding of weights in {dtype}")
        return share

    def _attempt(self, found: _Class, act: Callable[[], float | None]) -> float | None:
        if found.reason:
            return math.nan
        try:
            return act()
        except _Unknown as error:
            reason = str(error)
        except Exception as error:  # whatever the optimizer's class may raise
            reason = f"no twin of {type(found.twin).__name__} steps ({error})".splitlines()[0]
        found.reason, found.twin = reason, None
        if reason not in self.reasons:
            self.reasons.append(reason)
        return math.nan

    @property
    def inside(self) -> bool:
        """Whether every share that is not known is of decay that belongs to the update: L2, a scaled step."""
        return all(_INSIDE in reason for reason in self.reasons)

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and primitives only, for a checkpoint."""
        return {"left": list(self.left), "classes": [found.state_dict() for found in self._classes]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        self.left = list(state["left"])
        self._classes = [_Class(**found) for found in state["classes"]]
        self.reasons = list(dict.fromkeys(found.reason for found in self._classes if found.reason))


# ------------------------------------------------------------------------------------------------------- twins


def _new_shadows(ndim: int) -> list[nn.Parameter]:
    """1, 2, two beside the first, and for matrices a tall one."""
    shapes = [(1,) * ndim] * 4 + ([(2,) + (1,) * (ndim - 1)] if ndim > 1 else [])
    pairs = zip(shapes, _STARTS, strict=False)
    return [nn.Parameter(torch.full(shape, start, dtype=torch.float64)) for shape, start in pairs]


def _tree(optimizer: Any) -> list[Optimizer]:
    """An optimizer and those that it holds, in a fixed order."""
    found = [optimizer]
    for value in vars(optimizer).values():
        parts = value if isinstance(value, list | tuple) else [value]
        found += [inner for part in parts if isinstance(part, Optimizer) for inner in _tree(part)]
    return found


def _groups_of(optimizer: Optimizer, group: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The groups of an optimizer that hold weights of one group."""
    mine = set(map(id, group["params"]))
    groups = optimizer.param_groups
    return [other for other in groups if other is group or any(id(p) in mine for p in other["params"])]


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    found = {name: _copied(value, {}) for name, value in group.items() if name != "params"}
    return found | {name: value for name, value in _PLAIN.items() if name in found}


def _twin(
    optimizer: Optimizer, group: Mapping[str, Any], shadows: list[nn.Parameter], memo: dict[int, Any] | None = None
) -> Optimizer:
    """Make an optimizer of the same class with the settings of one group and weights of its own.

    Raises:
        _Unknown: It holds what cannot be copied.
    """
    memo = {id(group["params"]): shadows} if memo is None else memo
    twin: Optimizer = object.__new__(type(optimizer))
    memo[id(optimizer)] = twin
    memo.setdefault(id(optimizer.state), defaultdict(dict))
    if id(optimizer.param_groups) not in memo:
        groups = _groups_of(optimizer, group)
        for other in groups:
            memo.setdefault(id(other), {"params": shadows, **_settings(other)})
            memo[id(other["params"])] = shadows
        memo[id(optimizer.param_groups)] = [memo[id(other)] for other in groups]
    for name, value in vars(optimizer).items():
        parts = value if isinstance(value, list | tuple) else [value]
        if name.startswith("_optimizer_"):
            twin.__dict__[name] = OrderedDict()  # hooks
        elif parts and all(isinstance(part, Optimizer) for part in parts):
            made = [memo.get(id(part)) or _twin(part, group, shadows, memo) for part in parts]
            twin.__dict__[name] = type(value)(made) if value is parts else made[0]
        elif name not in ("step", "zero_grad"):  # which learning rate schedulers wrap
            twin.__dict__[name] = _copied(value, memo)
    return twin


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    """Copy a plain value; what belongs to training is replaced by the twin's.

    Raises:
        _Unknown: It is none.
    """
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, Tensor) and value.numel() == 1 and not isinstance(value, nn.Parameter):
        return float(value)
    if isinstance(value, dict):
        plain = type(value) in (dict, OrderedDict)
        return type(value)({key: _copied(part, memo) for key, part in value.items()}) if plain else {}
    if isinstance(value, list | tuple | set):
        return type(value)(_copied(part, memo) for part in value)
    simple = isinstance(value, int | float | complex | str | bytes | type | torch.dtype | torch.device)
    if value is None or simple or (callable(value) and getattr(value, "__closure__", 0) is None):
        return value
    raise _Unknown(f"the decay of an optimizer that holds a {type(value).__name__} of its own cannot be followed")


def _step(twin: Any) -> None:
    step = type(twin).step
    if getattr(step, "hooked", False):  # around this, PyTorch calls everybody's hooks
        step = step.__wrapped__
    step(twin, lambda: torch.zeros(()))


def _rebuilt(twin: Any, error: Exception) -> Optimizer:
    """Construct a twin in the ordinary way, with the settings that it has.

    Raises:
        _Unknown: Its class asks for more than that.
    """
    try:
        assert len(_tree(twin)) == 1, "it holds others"
        made: Optimizer = type(twin)([dict(group) for group in twin.param_groups])
    except Exception:
        raise _Unknown(f"no twin of {type(twin).__name__} steps ({error})") from None
    return made


def _state(twin: Optimizer) -> dict[str, Any]:
    """What a twin remembers: its weights, and the state of each of the optimizers that it holds.

    Raises:
        _Unknown: There is something that no checkpoint can hold.
    """
    shadows = twin.param_groups[0]["params"]
    states = [[_kept(part.state.get(shadow, {})) for shadow in shadows] for part in _tree(twin)]
    return {"weights": [shadow.detach().clone() for shadow in shadows], "states": states}


def _kept(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _kept(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_kept(part) for part in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise _Unknown(f"what decay leaves is not known after resuming: the state holds a {type(value).__name__}")


def _fill(twin: Optimizer, state: Mapping[str, Any] | None) -> None:
    """Give a twin what another one remembered."""
    if state is None:
        return
    shadows = twin.param_groups[0]["params"]
    del shadows[len(state["weights"]) :]
    with torch.no_grad():
        for shadow, value in zip(shadows, state["weights"], strict=True):
            shadow.copy_(value)
    for part, states in zip(_tree(twin), state["states"], strict=True):
        for shadow, found in zip(shadows, states, strict=True):
            if found:
                part.state[shadow] = copy.deepcopy(found)


def _as_set(share: float, group: Mapping[str, Any]) -> float:
    """Replace a measured share by 1 - lr wd where it is that up to rounding: products of it then carry none."""
    lr, decay = group.get("lr"), group.get("weight_decay")
    if not isinstance(lr, int | float) or not isinstance(decay, int | float):
        return share
    closed = 1.0 - float(lr) * float(decay)
    return closed if abs(share - closed) <= 1e-9 * abs(lr * decay) + 1e-15 else share
