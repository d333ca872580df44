"""Which weights are measured, in which order, in which group: the one owner of parameter order.

Every flat vector carries the fingerprint of its selection, and an inner product between vectors of different
fingerprints raises. Two parts of a program can therefore never disagree silently about which coordinate is which.

Where the ranks of a run share the weights (FSDP2, tensor parallelism), a flat vector holds what this rank owns, and
inner products are added up over the ranks; names, shapes, dims and fingerprint stay those of the whole.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate
from torch.nn.parameter import is_lazy

from mini_gpt_pl.errors import UserError

# Prefixes and infixes that wrappers (compile, DDP, FSDP) add to parameter names.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_forward_module|_fsdp_wrapped_module|module)\.")
# Values summed in float64 at a time: bounds the temporary to 32 MiB.
_CHUNK = 1 << 22


def plain_name(name: str) -> str:
    """Return a parameter's name as it was before `torch.compile`, DDP or FSDP wrapped its module."""
    return _WRAPPERS.sub("", name)


# Names of what a pruned (`_orig`) or a parametrized weight is computed from.
_ORIGINAL = re.compile(r"parametrizations\.(\w+)\.original\d*$|_orig$")


def role(name: str) -> str:
    """Return the name of the weight that a parameter stands for: its own, unless that is pruned or parametrized."""
    return _ORIGINAL.sub(lambda match: match[1] or "", name)


def assign_groups(names: Sequence[str], pattern: str) -> dict[str, str]:
    """Return the group of each name that a pattern of `ParameterSelection.of` selects: group by group, names in order.

    Names are without wrapper prefixes. What a pruned or parametrized weight is computed from is selected by the
    weight's name too.

    Raises:
        UserError: The pattern is no regular expression.
    """
    try:
        regex = re.compile(pattern)
    except re.error as error:
        raise UserError(f"the weight pattern {pattern!r} is no regular expression: {error}") from None
    groups: dict[str, list[str]] = {}
    for name in names:
        if match := regex.search(name) or regex.search(role(name)):
            groups.setdefault(match.groupdict().get("group") or "all", []).append(name)
    return {name: group for group, members in groups.items() for name in members}


def local_part(tensor: Tensor) -> Tensor:
    """Return a tensor's values on this rank: a plain tensor itself, a shard or a replica of a distributed one."""
    if not isinstance(tensor, DTensor):
        return tensor
    # A sum that the ranks have not added up yet (a gradient under tensor parallelism) is no value.
    settled = [Replicate() if placement.is_partial() else placement for placement in tensor.placements]
    return tensor.redistribute(placements=settled).to_local().detach()


def as_real(tensor: Tensor) -> Tensor:
    """View a tensor as plain real numbers: complex ones as pairs, a sparse gradient with its zeros."""
    tensor = tensor.to_dense() if tensor.layout is not torch.strided else tensor
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def real_shape(tensor: Tensor) -> tuple[int, ...]:
    """Return the shape of `as_real`, for a distributed tensor that of the whole."""
    return (*tensor.shape, 2) if tensor.is_complex() else tuple(tensor.shape)


def width(tensors: Sequence[Tensor]) -> torch.dtype:
    """Return what holds the values of some tensors: float64 where one of them is in it, else float32."""
    wide = any(tensor.dtype in (torch.float64, torch.complex128) for tensor in tensors)
    return torch.float64 if wide else torch.float32


@dataclass(frozen=True)
class Shards:
    """How the ranks of a device mesh share some weights: every coordinate has one owner among them.

    Weights that the same ranks hold in copies belong to the first of them. Mesh axes along which everything is a copy
    (the replicas of HSDP) take no part, `axes` are the others: each replica adds up its own shards. `shapes` are those
    of what this rank owns of each weight, (0,) where it is another rank's copy and not `owned`.
    """

    mesh: DeviceMesh
    axes: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]
    owned: tuple[bool, ...]

    @classmethod
    def of(cls, parameters: Sequence[Tensor]) -> Shards | None:
        """Read off how weights are shared; None if every rank has all of them, UserError on several device meshes."""
        meshes = {p.device_mesh for p in parameters if isinstance(p, DTensor)}
        if len(meshes) > 1:
            raise UserError("the selected weights lie on different device meshes: choose weights of one by the pattern")
        cuts = [_cut_axes(p) for p in parameters]
        axes = tuple(sorted(set().union(*cuts)))
        if not axes:
            return None
        mesh = meshes.pop()
        place = _coordinate(mesh)
        owned = tuple(all(axis in cut or place[axis] == 0 for axis in axes) for cut in cuts)
        parts = [tuple(local_part(p).shape) if own else (0,) for p, own in zip(parameters, owned, strict=True)]
        return cls(mesh, axes, tuple(parts), owned)

    @property
    def count(self) -> int:
        """Number of ranks that share the weights."""
        return math.prod(self.mesh.size(axis) for axis in self.axes)

    @property
    def index(self) -> int:
        """Position of this rank among them, from 0."""
        place, index = _coordinate(self.mesh), 0
        for axis in self.axes:
            index = index * self.mesh.size(axis) + place[axis]
        return index

    @property
    def first_replica(self) -> bool:
        """Whether this rank is in the first of the groups that share the weights, that of global rank 0."""
        others = (at for axis, at in enumerate(_coordinate(self.mesh)) if axis not in self.axes)
        return not any(others) and bool((self.mesh.mesh == 0).any())

    def take(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Empty those of this rank's parts that another rank owns."""
        return [part if own else part.reshape(-1)[:0] for part, own in zip(parts, self.owned, strict=True)]

    def total(self, partial: Tensor) -> Tensor:
        """Add up over the ranks, with one reduction for each axis that cuts: FSDP and HSDP have one."""
        summed = partial.to(self.mesh.device_type, copy=True)  # rows may be kept on the host, where NCCL cannot go
        for axis in self.axes:
            dist.all_reduce(summed, group=self.mesh.get_group(axis))
        return summed.to(partial.device)


@dataclass(frozen=True)
class ParameterSelection:
    r"""Named weights in a fixed order, cut into named groups that are contiguous in the flat vector.

    Each has its whole shape and its group, its owner. Shards are None where every rank has all of the parameters.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(2, 1, bias=False))
        >>> selection = ParameterSelection.of(net, r"(?P<group>\d+)\.weight")
        >>> selection.groups, selection.dims
        (('0', '1'), (6, 2))
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    owners: tuple[str, ...]
    shards: Shards | None = field(default=None, repr=False)

    @classmethod
    def of(cls, module: nn.Module, pattern: str) -> ParameterSelection:
        r"""Select the parameters of a module whose name matches a regular expression.

        It is searched in each name without wrapper prefixes. A named group `(?P<group>...)` in it assigns the weight to
        a group, as in `(?P<group>layer\d+)\..*weight`; without one, every selected weight is in the group `all`.

        Raises:
            UserError: The pattern is no regular expression, or it selects nothing, or two selected weights have
                one name once wrapper prefixes are taken off, or lie on different device meshes, or a selected weight of
                a lazy module has no shape yet.
        """
        _reshard(module)
        every = [(plain_name(raw), parameter) for raw, parameter in module.named_parameters()]
        lazy = assign_groups([name for name, parameter in every if is_lazy(parameter)], pattern)
        if lazy:
            raise UserError(
                f"the weight {next(iter(lazy))!r} of a lazy module has no shape yet: let the model see one batch "
                "before training, for example in configure_model"
            )
        named = [(name, p) for name, p in every if is_lazy(p) or p.numel()]  # without values there is no direction
        owners = assign_groups([name for name, _ in named], pattern)
        if not owners:
            examples = ", ".join(name for name, _ in named[:4])
            raise UserError(
                f"the weight pattern {pattern!r} selects no parameter of {type(module).__name__}; "
                f"its names look like: {examples or '(it has no parameters)'}"
            )
        name, count = Counter(name for name, _ in named if name in owners).most_common(1)[0]
        if count > 1:
            raise UserError(
                f"{count} weights of {type(module).__name__} are called {name!r} once wrapper prefixes "
                "(`module.` and the like) are taken off: rename the submodule that looks like a wrapper"
            )
        available = dict(named)
        selected = [available[name] for name in owners]
        return cls(tuple(owners), tuple(map(real_shape, selected)), tuple(owners.values()), Shards.of(selected))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over names, shapes and groups, in order: equal exactly when flat vectors are comparable."""
        lines = [
            f"{owner} {name} {shape}" for owner, name, shape in zip(self.owners, self.names, self.shapes, strict=True)
        ]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    @cached_property
    def groups(self) -> tuple[str, ...]:
        """Group names in the order in which they lie in the flat vector."""
        return tuple(dict.fromkeys(self.owners))

    @property
    def local_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shape of what this rank's flat vectors hold of each parameter."""
        return self.shapes if self.shards is None else self.shards.shapes

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Number of values of each parameter in this rank's flat vectors."""
        return tuple(math.prod(shape) for shape in self.local_shapes)

    @property
    def local_dim(self) -> int:
        """Length of this rank's flat vectors: D where every rank has all of the parameters."""
        return sum(self.sizes)

    @cached_property
    def dims(self) -> tuple[int, ...]:
        """Number of values of each group, over all ranks."""
        return self._by_group([math.prod(shape) for shape in self.shapes])

    @property
    def dim(self) -> int:
        """Number of selected values over all ranks, D."""
        return sum(self.dims)

    @cached_property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """First and last-plus-one place of each group in this rank's flat vectors."""
        return tuple(itertools.pairwise(itertools.accumulate(self._by_group(self.sizes), initial=0)))

    @cached_property
    def slices(self) -> tuple[slice, ...]:
        """Where each group lies in this rank's flat vectors."""
        return tuple(itertools.starmap(slice, self.spans))

    def _by_group(self, sizes: Sequence[int]) -> tuple[int, ...]:
        totals = Counter[str]()
        for owner, size in zip(self.owners, sizes, strict=True):
            totals[owner] += size
        return tuple(totals.values())

    def parameters(self, module: nn.Module) -> list[nn.Parameter]:
        """Return the selected parameters of a module, in order; UserError if one is missing or of another shape."""
        places = _PLACES.get(module, {}).get(self.fingerprint, [])
        present = [parameter for place in places if (parameter := place.parameter()) is not None]
        if present and len(present) == len(places):
            return present
        sharded = _reshard(module)
        available = {plain_name(name): parameter for name, parameter in module.named_parameters()}
        # Pruned or parametrized since: the values are those of another name now.
        available = {role(name): parameter for name, parameter in available.items()} | available
        for name, shape in zip(self.names, self.shapes, strict=True):
            if name not in available:
                raise UserError(f"the model has no parameter {name!r} that the selection names")
            if (own := real_shape(available[name])) != shape:
                raise UserError(f"parameter {name!r} has shape {own}, the selection has {shape}")
        if not sharded:  # there, weights change places within a step
            every = _places_of(module)
            _PLACES.setdefault(module, {})[self.fingerprint] = [every[name] for name in self.names]
        return [available[name] for name in self.names]

    def flatten(self, tensors: Sequence[Tensor], dtype: torch.dtype = torch.float32) -> Vector:
        """Copy one tensor per selected parameter (whole, sharded as they are, or this rank's part) into a new vector.

        Raises:
            ValueError: The tensors are not one per parameter, with the parameters' shapes (and sharding) and order.
        """
        parts = [as_real(local_part(tensor)) for tensor in tensors]
        if self.shards is not None:
            parts = self.shards.take(parts)
        if tuple(part.shape for part in parts) != self.local_shapes:
            raise ValueError("the tensors' shapes are not those of the selected parameters, in order")
        with torch.no_grad():  # probes ask at every step: one call for all parts, not several for each
            return Vector(torch.cat([part.reshape(-1) for part in parts]).to(dtype), self)

    def weights(self, module: nn.Module) -> Vector:
        """Copy the selected weights of a module, in float64 where one of them is in it, else in float32."""
        parameters = self.parameters(module)
        return self.flatten(parameters, width(parameters))

    def gradients(self, module: nn.Module) -> Vector:
        """Copy the selected weights' `.grad`, as wide as `weights`; a weight without gradient counts as zero."""
        return self.filled([parameter.grad for parameter in self.parameters(module)], module)

    def gradient_of(self, loss: Float[Tensor, ""], module: nn.Module) -> Vector:
        """Gradient of a loss by the selected weights, as a new vector; no `.grad` changes, the graph is used up.

        Under FSDP2 the mean over the ranks, as in training: all of them must call it.
        """
        return self.filled(self.partials(loss, module), module)

    def partials(self, loss: Float[Tensor, ""], module: nn.Module, *, by_backward: bool = False) -> list[Tensor | None]:
        """Gradient of a loss by each selected weight, as `gradient_of` has it; None where the graph does not reach it.

        With `by_backward` as training does it, with every hook on a gradient, instead of by `torch.autograd.grad`.
        """
        parameters = self.parameters(module)
        # FSDP2 takes a process group, without which no module has to be gone through.
        sharded = dist.is_initialized() and any(isinstance(part, FSDPModule) for part in module.modules())
        if sharded or by_backward:
            # Its hooks gather the weights outside of the graph and hand gradients over to `.grad` only.
            _reshard(module)
            with _grads_aside(module):
                loss.backward()
                return [parameter.grad for parameter in self.parameters(module)]
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        gradients = iter(torch.autograd.grad(loss, trained, allow_unused=True) if trained else ())
        return [next(gradients) if parameter.requires_grad else None for parameter in parameters]

    def filled(self, parts: Sequence[Tensor | None], module: nn.Module) -> Vector:
        """Flatten one tensor per selected weight, zero for None."""
        parameters = self.parameters(module)
        pairs = zip(parts, parameters, strict=True)
        return self.flatten([torch.zeros_like(p) if part is None else part for part, p in pairs], width(parameters))

    def unflatten(self, vector: Vector) -> dict[str, Tensor]:
        """View a flat vector as one tensor per parameter name, each what this rank holds of it."""
        self.accept(vector.selection)
        parts = vector.values.split(self.sizes)
        shaped = zip(self.names, self.local_shapes, parts, strict=True)
        return {name: part.view(shape) for name, shape, part in shaped}

    def squares(self, values: Float[Tensor, " D"]) -> list[float]:
        """Squared length of each parameter in a flat vector of this rank, over all ranks, in float64."""
        parts = values.split(self.sizes)
        return [float(v) for v in self.total(torch.stack([_dot(part, part) for part in parts]))]

    def total(self, partial: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Add up over the ranks what each has found on its own coordinates; all of them must call it.

        Without shards the partial result is the total, and nothing is sent.
        """
        return partial if self.shards is None else self.shards.total(partial)

    def require(self, fingerprint: str) -> None:
        """Raise FingerprintError where a fingerprint is not this selection's."""
        if fingerprint != self.fingerprint:
            raise FingerprintError(self.fingerprint, fingerprint)

    def accept(self, other: ParameterSelection) -> None:
        """Check that another selection's flat vectors hold the same coordinates in the same places.

        Raises:
            FingerprintError: They are of other parameters, or in another order.
            ValueError: They are of the same parameters, but shared otherwise by the ranks.
        """
        self.require(other.fingerprint)
        if self.local_shapes != other.local_shapes:
            raise ValueError("one vector is whole and the other a shard, or they are shards of different sharding")

    def items(self) -> Iterator[tuple[str, slice]]:
        """Iterate over group names and their slices of this rank's flat vectors."""
        return zip(self.groups, self.slices, strict=True)


def _cut_axes(parameter: Tensor) -> set[int]:
    """Mesh axes along which ranks hold different parts of a parameter."""
    if not isinstance(parameter, DTensor):
        return set()
    sizes = parameter.device_mesh.shape
    return {axis for axis, placed in enumerate(parameter.placements) if sizes[axis] > 1 and not placed.is_replicate()}


def _coordinate(mesh: DeviceMesh) -> Sequence[int]:
    place = mesh.get_coordinate()
    assert place is not None, "a rank that is not in the mesh has no weights on it"
    return place


def _reshard(module: nn.Module) -> bool:
    """Let FSDP2 register its shards, if there are any: after a forward, its root leaves the gathered weights there.

    A backward that is still to come gathers them again.
    """
    sharded = [part for part in module.modules() if isinstance(part, FSDPModule)]
    for part in sharded:
        part.reshard()
    return bool(sharded)


class _Place(NamedTuple):
    """Where a module keeps a parameter: probes ask at every step, and to go through all modules takes a millisecond."""

    owner: weakref.ref[nn.Module]
    name: str
    held: weakref.ref[nn.Parameter]

    def parameter(self) -> nn.Parameter | None:
        """The parameter, if it is still there and the one that it was."""
        owner, held = self.owner(), self.held()
        return held if owner is not None and held is not None and owner._parameters.get(self.name) is held else None


# By module, then by a selection's fingerprint.
_PLACES: weakref.WeakKeyDictionary[nn.Module, dict[str, list[_Place]]] = weakref.WeakKeyDictionary()


def _places_of(module: nn.Module) -> dict[str, _Place]:
    """Where each parameter is kept, by its plain name."""
    places = {
        plain_name(f"{prefix}.{name}" if prefix else name): _Place(weakref.ref(part), name, weakref.ref(parameter))
        for prefix, part in module.named_modules()
        for name, parameter in part._parameters.items()
        if parameter is not None
    }
    return {role(name): place for name, place in places.items()} | places


@contextmanager
def _grads_aside(module: nn.Module) -> Iterator[None]:
    """Put every `.grad` of a module away, and back afterwards."""
    aside = [(parameter, parameter.grad) for parameter in module.parameters()]
    for parameter, _ in aside:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, grad in aside:
            parameter.grad = grad


class FingerprintError(UserError):
    """Two vectors, or a vector and a file, order their coordinates differently."""

    def __init__(self, expected: str, other: str) -> None:
        super().__init__(
            f"the vectors belong to different parameter selections ({expected[:12]} and {other[:12]}): "
            "their coordinates do not correspond, so no inner product between them means anything"
        )


@dataclass(frozen=True, eq=False)
class Vector:
    """A flat vector in weight space that knows which coordinate is which, by its selection.

    Where the ranks share the weights, it holds the coordinates that this rank owns.
    """

    values: Float[Tensor, " D"]
    selection: ParameterSelection

    def dots(self, other: Vector) -> Float[Tensor, " G"]:
        """Inner products group by group, accumulated in float64 on the vectors' device.

        Where the ranks share the weights, over all coordinates: every rank must call it.

        Raises:
            FingerprintError: The vectors order their coordinates differently.
        """
        self.selection.accept(other.selection)
        partial = torch.stack([_dot(self.values[part], other.values[part]) for part in self.selection.slices])
        return self.selection.total(partial)

    def to(self, device: torch.device) -> Vector:
        """Move the coordinates."""
        return Vector(self.values.to(device), self.selection)

    def __sub__(self, other: Vector) -> Vector:
        self.selection.accept(other.selection)
        return Vector(self.values - other.values, self.selection)


def _dot(a: Float[Tensor, " D"], b: Float[Tensor, " D"]) -> Float[Tensor, ""]:
    """Inner product in float64, in chunks so that the float64 copies stay small."""
    total = torch.zeros((), dtype=torch.float64, device=a.device)
    for x, y in zip(a.split(_CHUNK), b.split(_CHUNK), strict=True):
        total = total + torch.dot(x.double(), y.double())
    return total
