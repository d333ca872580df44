"""Which weights are measured, in which order, in which group: the one owner of parameter order.

Every flat vector carries the fingerprint of its selection, and an inner product between vectors of different
fingerprints raises. Two parts of a program can therefore never disagree silently about which coordinate is which.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mini_gpt_pl.errors import UserError

# Prefixes and infixes that wrappers (compile, DDP, FSDP) add to parameter names.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_forward_module|_fsdp_wrapped_module|module)\.")
# Values summed in float64 at a time: bounds the temporary to 32 MiB.
_CHUNK = 1 << 22


def plain_name(name: str) -> str:
    """Return a parameter's name as it was before `torch.compile`, DDP or FSDP wrapped its module."""
    return _WRAPPERS.sub("", name)


@dataclass(frozen=True)
class ParameterSelection:
    r"""Named weights in a fixed order, cut into named groups that are contiguous in the flat vector.

    Args:
        names: Parameter names, group by group.
        shapes: Shape of each parameter.
        owners: Group of each parameter, aligned with `names`.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(2, 1, bias=False))
        >>> selection = ParameterSelection.of(net, r"(?P<group>\d+)\.weight")
        >>> selection.groups, selection.dims
        (('0', '1'), (6, 2))
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    owners: tuple[str, ...]

    @classmethod
    def of(cls, module: nn.Module, pattern: str) -> ParameterSelection:
        r"""Select the parameters of a module whose name matches a regular expression.

        Args:
            module: Any module; wrapper prefixes in its parameter names are ignored.
            pattern: Searched in each name. A named group `(?P<group>...)` in it assigns the weight to a group, as in
                `(?P<group>layer\d+)\..*weight`; without one, every selected weight is in the group `all`.

        Raises:
            UserError: The pattern is no regular expression, or it selects nothing, or two selected weights have
                one name once wrapper prefixes are taken off.
        """
        try:
            regex = re.compile(pattern)
        except re.error as error:
            raise UserError(f"the weight pattern {pattern!r} is no regular expression: {error}") from None
        found: list[tuple[str, str, tuple[int, ...]]] = []
        for raw, parameter in module.named_parameters():
            name = plain_name(raw)
            if match := regex.search(name):
                found.append((match.groupdict().get("group") or "all", name, tuple(parameter.shape)))
        if not found:
            examples = ", ".join(plain_name(name) for name, _ in list(module.named_parameters())[:4])
            raise UserError(
                f"the weight pattern {pattern!r} selects no parameter of {type(module).__name__}; "
                f"its names look like: {examples or '(it has no parameters)'}"
            )
        name, count = Counter(name for _, name, _ in found).most_common(1)[0]
        if count > 1:
            raise UserError(
                f"{count} weights of {type(module).__name__} are called {name!r} once wrapper prefixes "
                "(`module.` and the like) are taken off: rename the submodule that looks like a wrapper"
            )
        order = {group: position for position, group in enumerate(dict.fromkeys(g for g, _, _ in found))}
        found.sort(key=lambda item: order[item[0]])  # stable: module order inside a group
        return cls(
            names=tuple(name for _, name, _ in found),
            shapes=tuple(shape for _, _, shape in found),
            owners=tuple(group for group, _, _ in found),
        )

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over names, shapes and groups, in order: equal exactly when flat vectors are comparable."""
        text = "\n".join(
            f"{owner} {name} {shape}" for owner, name, shape in zip(self.owners, self.names, self.shapes, strict=True)
        )
        return hashlib.sha256(text.encode()).hexdigest()

    @cached_property
    def groups(self) -> tuple[str, ...]:
        """Group names in the order in which they lie in the flat vector."""
        return tuple(dict.fromkeys(self.owners))

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Number of values of each parameter."""
        return tuple(torch.Size(shape).numel() for shape in self.shapes)

    @cached_property
    def dims(self) -> tuple[int, ...]:
        """Number of values of each group."""
        totals = dict.fromkeys(self.groups, 0)
        for owner, size in zip(self.owners, self.sizes, strict=True):
            totals[owner] += size
        return tuple(totals.values())

    @property
    def dim(self) -> int:
        """Number of selected values, D."""
        return sum(self.sizes)

    @cached_property
    def slices(self) -> tuple[slice, ...]:
        """Where each group lies in the flat vector."""
        edges = [0]
        for dim in self.dims:
            edges.append(edges[-1] + dim)
        return tuple(slice(lo, hi) for lo, hi in itertools.pairwise(edges))

    def parameters(self, module: nn.Module) -> list[nn.Parameter]:
        """Return the selected parameters of a module, in this selection's order.

        Raises:
            UserError: A selected parameter is missing or has another shape.
        """
        available = {plain_name(name): parameter for name, parameter in module.named_parameters()}
        for name, shape in zip(self.names, self.shapes, strict=True):
            if name not in available:
                raise UserError(f"the model has no parameter {name!r} that the selection names")
            if tuple(available[name].shape) != shape:
                raise UserError(
                    f"parameter {name!r} has shape {tuple(available[name].shape)}, the selection has {shape}"
                )
        return [available[name] for name in self.names]

    def flatten(self, tensors: Sequence[Tensor], dtype: torch.dtype = torch.float32) -> Vector:
        """Copy one tensor per selected parameter into a new flat vector.

        Raises:
            ValueError: The tensors are not one per parameter, with the parameters' shapes and order.
        """
        if tuple(tuple(t.shape) for t in tensors) != self.shapes:
            raise ValueError("the tensors' shapes are not those of the selected parameters, in order")
        return Vector(torch.cat([t.detach().reshape(-1).to(dtype) for t in tensors]), self)

    def weights(self, module: nn.Module) -> Vector:
        """Copy the selected weights of a module, in float32."""
        return self.flatten(self.parameters(module))

    def gradients(self, module: nn.Module) -> Vector:
        """Copy the selected weights' `.grad`, in float32; a weight without gradient counts as zero."""
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.parameters(module)]
        return self.flatten(grads)

    def unflatten(self, vector: Vector) -> dict[str, Tensor]:
        """View a flat vector as one tensor per parameter name."""
        self.require(vector.selection.fingerprint)
        parts = vector.values.split(self.sizes)
        return {name: part.view(shape) for name, shape, part in zip(self.names, self.shapes, parts, strict=True)}

    def require(self, fingerprint: str) -> None:
        """Check that a fingerprint is this selection's.

        Raises:
            FingerprintError: It is not.
        """
        if fingerprint != self.fingerprint:
            raise FingerprintError(self.fingerprint, fingerprint)

    def items(self) -> Iterator[tuple[str, slice]]:
        """Iterate over group names and their slices of the flat vector."""
        return zip(self.groups, self.slices, strict=True)


class FingerprintError(UserError):
    """Two vectors, or a vector and a file, order their coordinates differently."""

    def __init__(self, expected: str, found: str) -> None:
        super().__init__(
            f"the vectors belong to different parameter selections ({expected[:12]} and {found[:12]}): "
            "their coordinates do not correspond, so no inner product between them means anything"
        )


@dataclass(frozen=True, eq=False)
class Vector:
    """A flat vector in weight space that knows which coordinate is which.

    Args:
        values: The coordinates.
        selection: Owner of the coordinates' order.
    """

    values: Float[Tensor, " D"]
    selection: ParameterSelection

    def dots(self, other: Vector) -> Float[Tensor, " G"]:
        """Inner products group by group, accumulated in float64 on the vectors' device.

        Raises:
            FingerprintError: The vectors order their coordinates differently.
        """
        self.selection.require(other.selection.fingerprint)
        return torch.stack([_dot(self.values[part], other.values[part]) for part in self.selection.slices])

    def to(self, device: torch.device) -> Vector:
        """Move the coordinates."""
        return Vector(self.values.to(device), self.selection)

    def __sub__(self, other: Vector) -> Vector:
        self.selection.require(other.selection.fingerprint)
        return Vector(self.values - other.values, self.selection)


def _dot(a: Float[Tensor, " D"], b: Float[Tensor, " D"]) -> Float[Tensor, ""]:
    """Inner product in float64, in chunks so that the float64 copies stay small."""
    total = torch.zeros((), dtype=torch.float64, device=a.device)
    for x, y in zip(a.split(_CHUNK), b.split(_CHUNK), strict=True):
        total = total + torch.dot(x.double(), y.double())
    return total


def by_group(values: Float[Tensor, " G"], groups: Sequence[str]) -> Mapping[str, float]:
    """Name one number per group; moves the tensor to the host once."""
    return dict(zip(groups, values.tolist(), strict=True))
