"""Every step of whatever optimizer trains some weights, seen from its own `step()`.

Nothing is inferred from how often a trainer calls a hook: a closure that is called several times (SAM, LBFGS), several
optimizers in any order, several steps on one batch and steps that are left out are all counted as what they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from mini_gpt_pl.errors import UserError
from mini_gpt_pl.geometry.vectors.selection import local_part

# Steps of several backward passes whose weights are compared by value, until it is clear that nothing moves them.
PROBATION = 4


@dataclass(eq=False)
class Step:
    """One step of an optimizer that trains the observed weights.

    Attributes:
        number: On the run's own axis, counted from 1, such as `trainer.global_step` after the step.
        count: Which step it is of those that trained these weights; what schedules count.
        optimizer: Whose; the outermost one, where one wraps another.
        evaluations: How often its closure has computed a gradient so far; 0 where it was given none.
        ready: Whether `before_step` has been called; it is not where an optimizer is given a closure and never calls
            it, which is known once its first step is over.
        elsewhere: Whether `.grad` now belongs to other weights than those that the step began from, as it does between
            the two halves of a SAM step.
    """

    number: int
    count: int
    optimizer: Optimizer
    evaluations: int = 0
    ready: bool = False
    elsewhere: bool = False


class Watcher(Protocol):
    """Wants to see steps."""

    def before_step(self, step: Step) -> None:
        """Look at the weights, which have not moved yet, and at their complete, unclipped gradient."""

    def after_step(self, step: Step) -> None:
        """Look at the weights, which have just moved; `.grad` is still what the step was made of."""


class StepObserver:
    """Calls watchers around every step that trains some weights; it changes nothing.

    Hooks on all optimizers find the steps, so that one that is wrapped in another is seen too: the outermost step
    counts. Where a step computes its own gradient through a closure, `before_step` comes once the closure has been
    called for the first time. A trainer that clips inside of the closure says earlier that the gradient is complete
    (`gradient_ready`), and before each backward pass that one begins (`backward_begins`).

    A step that raises, or that a loss scaler leaves out, has a `before_step` and no `after_step`; it is not counted.

    Args:
        parameters: The observed weights, as the optimizers have them.
        clock: Gives the run's own count of steps so far.
        alone: Whether that counts steps of these weights only; a step that was left out may then be counted as well.
        watchers: Called in this order.

    Example:
        >>> import torch
        >>> class Print:
        ...     def before_step(self, step):
        ...         print("before", step.count)
        ...
        ...     def after_step(self, step):
        ...         print("after", step.count)
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = torch.optim.SGD([weight], lr=0.1)
        >>> with StepObserver([weight], lambda: 0, watchers=[Print()]):
        ...     optimizer.step()
        before 1
        after 1
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        clock: Callable[[], int],
        alone: bool = False,
        watchers: Sequence[Watcher] = (),
    ) -> None:
        self.watchers = list(watchers)
        self.count = 0
        self.number = 0
        self.rebind(parameters)
        self._clock = clock
        self._alone = alone
        self._hooks: list[RemovableHandle] = []
        self._open: Step | None = None
        self._running: Optimizer | None = None
        self._depth = 0  # a class whose `step` calls that of its base class runs every hook twice
        self._deaf: list[Optimizer] = []  # were given a closure and have not called it
        self._first: list[int] | None = None  # versions of the weights at the first backward pass since the last step
        self._values: list[Tensor] = []  # and some of their values there
        self._silent = 0  # steps whose several backward passes had the same weights, versions and values
        self._moved = self._moves = False  # whether values have moved since, without a version; whether they ever have
        self._begun: list[int] = []  # versions when `step()` was called; `_left`, when the last one was over
        self.outside = False
        """Whether something else than the optimizers has moved the weights between two steps."""
        self._sampled: tuple[int, list[Tensor]] = (-1, [])

    def rebind(self, parameters: Sequence[Tensor]) -> None:
        """Observe these weights from now on, which stand in the place of those so far."""
        self._parameters = list(parameters)
        self._mine = set(map(id, self._parameters))
        self._left = self._versions()

    def __enter__(self) -> StepObserver:
        self._hooks = [register_optimizer_step_pre_hook(self._begin), register_optimizer_step_post_hook(self._end)]
        self._open, self._running, self._first, self._left = None, None, None, self._versions()
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def trains(self, optimizer: Optimizer) -> bool:
        """Whether an optimizer has any of the weights."""
        return any(id(parameter) in self._mine for group in optimizer.param_groups for parameter in group["params"])

    @property
    def next(self) -> int:
        """Count of the step that is being prepared."""
        return self.now + 1 if self._alone else self.count + 1

    @property
    def now(self) -> int:
        """Place on the run's own axis between the last step and the next."""
        return max(self._clock(), self.number)

    def sample(self) -> None:
        """Keep a few of the weights as they are after the last step, if nothing has changed them since."""
        if self._versions() == self._left:
            self._sampled = self.number, self._sample()

    @property
    def replaced(self) -> bool:
        """Whether weights that were sampled after the last step are no longer in their place."""
        number, sampled = self._sampled
        return number == self.number and not all(map(torch.equal, sampled, self._sample()))

    def _sample(self) -> list[Tensor]:
        return [local_part(parameter).detach().reshape(-1)[:8].clone() for parameter in self._parameters]

    def left_out(self) -> bool:
        """Count what the run's own clock, of these weights alone, has counted as steps and no optimizer has taken."""
        now = self._clock()
        if not self._alone or now <= self.number or self.replaced:
            return False
        self.count = self.number = now
        return True

    # ------------------------------------------------------------------------------ what a trainer may tell

    def settle(self) -> None:
        """Say that no step is under way: one that has not ended by now was left out, or has raised."""
        self._open = self._running = None

    def backward_begins(self, by_value: bool = False) -> bool:
        """Say that a backward pass is about to begin; whether it is at the weights that the step begins from.

        Args:
            by_value: Compare some of the values as well: what is written through `.data` counts no version. That waits
                for the device, so it ends after some steps of several passes in which nothing has moved like that.
        """
        versions, look = self._versions(), by_value and (self._moves or self._silent < PROBATION)
        if self._first is None:
            self._first, self._values, self._moved = versions, self._sample() if look else [], False
            back = self._sampled[0] == self.number and not self.replaced  # averages that were here meanwhile
            self.outside |= versions != self._left and not back
        elif look and self._values:
            self._moved = not all(map(torch.equal, self._values, self._sample()))
            self._moves |= self._moved
            self._silent += 1
        return not self._elsewhere(versions) and (self._open is None or not self._open.ready)

    def _elsewhere(self, versions: list[int]) -> bool:
        """Whether the last backward pass was at other weights than the first one."""
        return self._moved or (self._first is not None and versions != self._first)

    def gradient_ready(self, optimizer: Optimizer) -> None:
        """Say that `.grad` is complete, and not clipped yet."""
        if self._running is None and self._open is not None and self._open.ready:
            self.settle()  # that one was left out
        if self._running not in (None, optimizer) or not self.trains(optimizer):
            return
        self._open = self._open or self._new(optimizer)
        if not self._open.ready:
            self._ready(self._open)

    # ------------------------------------------------------------------------------------------------ hooks

    def _begin(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._running is optimizer:
            self._depth += 1
            return None
        if self._running is not None or not self.trains(optimizer):
            return None
        if self._open is None or self._open.optimizer is not optimizer:
            self._open = self._new(optimizer)
        self._running, self._depth, self._begun = optimizer, 1, self._versions()
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if not callable(closure) or does_nothing(closure) or optimizer in self._deaf:
            if not self._open.ready:
                self._ready(self._open)
            return None
        return args[:1], {**kwargs, "closure": partial(self._evaluate, optimizer, self._open, closure)}

    def _evaluate(self, optimizer: Optimizer, step: Step, closure: Callable[[], Any]) -> Any:
        if self.watchers and not step.ready and self._versions() != self._begun:
            raise UserError(
                f"{type(optimizer).__name__} moves the weights before it asks for their gradient: "
                "no gradient of the weights that its step begins from exists, and its steps cannot be measured"
            )
        result = closure()
        step.evaluations += 1
        self.gradient_ready(optimizer)
        return result

    def _end(self, optimizer: Optimizer, *_: Any) -> None:
        if self._running is not optimizer:
            return
        self._depth -= 1
        if self._depth:
            return
        step, first, self._open, self._running, self._first = self._open, self._first, None, None, None
        if self.replaced and first is None:
            return  # no backward pass has been made: it moves averages by a gradient of long ago
        self._left, self._moved = self._versions(), False
        if bool(getattr(optimizer, "found_inf", False)):
            return  # a fused optimizer has found an overflow and left the step out by itself
        assert step is not None
        if not step.ready:
            self._deaf.append(optimizer)
        self.count, self.number = step.count, step.number
        for watcher in self.watchers:
            watcher.after_step(step)

    def _ready(self, step: Step) -> None:
        versions = self._versions()
        # Without a word of a backward pass, weights that were moved since the last step may have been moved for one.
        unseen = self._first is None and self._running is not None and versions != self._left
        step.ready, step.elsewhere = True, unseen or self._elsewhere(versions)
        for watcher in self.watchers:
            watcher.before_step(step)

    def _new(self, optimizer: Optimizer) -> Step:
        return Step(self.now + 1, self.next, optimizer)

    def _versions(self) -> list[int]:
        return [parameter._version for parameter in self._parameters]


def does_nothing(closure: Any) -> bool:
    """Whether a closure is what Lightning hands on where a module calls `optimizer.step()` without one."""
    if isinstance(closure, partial):
        return any(does_nothing(part) for part in closure.args)
    return getattr(closure, "__name__", "") == "do_nothing_closure"


def require_observable(optimizer: Any) -> None:
    """Refuse what has no hooks around its steps.

    Raises:
        UserError: It is no optimizer of PyTorch.
    """
    if not isinstance(optimizer, Optimizer):
        raise UserError(
            f"{type(optimizer).__name__} is no torch.optim.Optimizer, so that its steps cannot be observed: "
            "derive it from that class, or train without probes"
        )
