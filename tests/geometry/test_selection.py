"""Which weights, in which order: names, fingerprints, flat vectors and their inner products."""

from __future__ import annotations

import copy
import gc
import itertools
import weakref

import numpy as np
import pytest
import torch
from conftest import SMALL, normal, one_line_error
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mini_gpt_pl.geometry.vectors.selection import FingerprintError, ParameterSelection, Vector, plain_name


class Net(nn.Module):
    """Two layers and a norm; module order interleaves the groups `up` and `down`."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(2, 3, bias=False), "down": nn.Linear(3, 2)}) for _ in range(2)
        )
        self.norm = nn.LayerNorm(2)


BY_KIND = r"layers\.\d+\.(?P<group>up|down)\.weight"
BY_LAYER = r"layers\.(?P<group>\d+)\..*weight"


def test_groups_lie_contiguously_in_module_order() -> None:
    selection = ParameterSelection.of(Net(), BY_KIND)
    assert selection.groups == ("up", "down") and selection.dims == (12, 12) and selection.dim == 24
    assert selection.names == tuple(f"layers.{n}.{kind}.weight" for kind in ("up", "down") for n in (0, 1))
    assert selection.shapes == ((3, 2), (3, 2), (2, 3), (2, 3))
    assert list(selection.items()) == [("up", slice(0, 12)), ("down", slice(12, 24))]


def test_without_a_named_group_there_is_one() -> None:
    assert ParameterSelection.of(Net(), "weight").groups == ("all",)
    # An optional group that takes no part in the match falls back to the same name.
    assert ParameterSelection.of(Net(), r"norm|layers\.(?P<group>\d)").groups == ("0", "1", "all")


@pytest.mark.parametrize(
    ("module", "pattern", "message"),
    [
        (Net(), "attn", "selects no parameter of Net.*layers.0.up.weight"),
        (nn.ReLU(), ".", "has no parameters"),
        (Net(), "layers.(", "no regular expression"),
        (Net(), "a\n(", "no regular expression"),
    ],
)
def test_patterns_that_cannot_serve(module: nn.Module, pattern: str, message: str) -> None:
    with one_line_error(message):
        ParameterSelection.of(module, pattern)


def test_wrappers_leave_no_trace_in_names() -> None:
    net = Net()
    plain = ParameterSelection.of(net, BY_LAYER)
    compiled_in_place = Net()
    compiled_in_place.compile()
    wrapped = torch.compile(nn.DataParallel(net))
    assert isinstance(wrapped, nn.Module) and next(iter(wrapped.state_dict())).startswith("_orig_mod.module.")
    inner = nn.ModuleDict({"gpt": wrapped})
    for module in (compiled_in_place, wrapped, nn.DataParallel(net)):
        assert ParameterSelection.of(module, BY_LAYER) == plain
        assert len(plain.parameters(module)) == 4
    assert ParameterSelection.of(inner, BY_LAYER).names == tuple(f"gpt.{name}" for name in plain.names)
    assert plain_name("my_module.weight") == "my_module.weight"  # a whole component, never a suffix


def test_names_that_collide_without_wrappers() -> None:
    net = nn.Sequential()
    net.add_module("a", nn.Linear(2, 2, bias=False))
    net.add_module("module", nn.ModuleDict({"a": nn.Linear(2, 2, bias=False)}))
    with one_line_error("2 weights of Sequential are called 'a.weight'"):
        ParameterSelection.of(net, "weight")


def test_fingerprint_sees_names_order_shapes_and_groups() -> None:
    names, shapes, owners = ("v", "w"), ((2, 3), (2, 3)), ("g", "g")
    variants = [
        ParameterSelection(names, shapes, owners),
        ParameterSelection(names[::-1], shapes, owners),
        ParameterSelection(names, ((2, 3), (3, 2)), owners),
        ParameterSelection(names, ((6,), (2, 3)), owners),
        ParameterSelection(names, shapes, ("g", "h")),
        ParameterSelection(("v", "x"), shapes, owners),
    ]
    assert len({selection.fingerprint for selection in variants}) == len(variants)
    assert ParameterSelection(names, shapes, owners).fingerprint == variants[0].fingerprint
    a = Vector(normal(12).float(), variants[0])
    for other in variants[1:]:
        b = Vector(normal(12).float(), other)
        for operation in (a.dots, a.__sub__, variants[0].unflatten):
            with one_line_error("different parameter selections", FingerprintError):
                operation(b)


def test_weights_are_copies_and_gradients_may_be_missing() -> None:
    net = Net()
    selection = ParameterSelection.of(net, BY_KIND)
    before = selection.weights(net)
    expected = torch.cat([net.get_parameter(name).flatten() for name in selection.names])
    assert torch.equal(before.values, expected)
    net.get_parameter("layers.1.up.weight").sum().backward()
    gradient = selection.gradients(net).values
    assert torch.equal(gradient, torch.tensor([0.0] * 6 + [1.0] * 6 + [0.0] * 12))
    assert net.get_parameter("layers.0.up.weight").grad is None
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(1.0)
    one_weight = ParameterSelection.of(net, r"norm\.weight")
    copied = one_weight.weights(net)
    copied.values.zero_()
    assert torch.equal(net.norm.weight, torch.full((2,), 2.0))
    moved = (selection.weights(net) - before).values
    torch.testing.assert_close(moved, torch.ones(24), rtol=0, atol=1e-6)


def test_a_model_that_does_not_fit() -> None:
    selection = ParameterSelection.of(Net(), BY_KIND)
    with one_line_error("no parameter 'layers.0.up.weight'"):
        selection.parameters(nn.Linear(2, 2))
    other = Net()
    other.set_submodule("layers.1.up", nn.Linear(5, 3, bias=False))
    with one_line_error(r"'layers.1.up.weight' has shape \(3, 5\), the selection has \(3, 2\)"):
        selection.weights(other)
    with pytest.raises(ValueError, match="shapes"):
        selection.flatten(list(other.parameters()))


def test_parameters_are_found_again_where_they_were_and_seen_when_they_change() -> None:
    net = Net()
    selection = ParameterSelection.of(net, BY_KIND)
    first = selection.parameters(net)
    assert all(a is b for a, b in zip(first, selection.parameters(net), strict=True))
    name = selection.names[1]
    net.get_submodule(name.rpartition(".")[0]).weight = nn.Parameter(torch.zeros(selection.shapes[1]))
    again = selection.parameters(net)
    assert again[1] is net.get_parameter(name) is not first[1] and again[0] is first[0]
    twin = copy.deepcopy(net)
    assert selection.parameters(twin)[0] is twin.get_parameter(selection.names[0])
    gone = weakref.ref(net)
    del net, first, again
    gc.collect()
    assert gone() is None  # what is remembered keeps no model alive


SHAPES = st.lists(st.lists(st.integers(1, 4), max_size=3).map(tuple), min_size=1, max_size=5)


@given(shapes=SHAPES, seed=st.integers(0, 10**6))
def test_unflatten_inverts_flatten(shapes: list[tuple[int, ...]], seed: int) -> None:
    names = tuple(f"w{k}" for k in range(len(shapes)))
    selection = ParameterSelection(names, tuple(shapes), names)
    tensors = [normal(*shape, seed=seed + k).float() for k, shape in enumerate(shapes)]
    vector = selection.flatten(tensors)
    assert len(vector.values) == selection.dim == sum(selection.dims)
    parts = selection.unflatten(vector)
    assert list(parts) == list(names)
    assert all(torch.equal(part, tensor) for part, tensor in zip(parts.values(), tensors, strict=True))


@pytest.mark.parametrize("chunk", [1, 4, 6, 9, 1 << 22])
def test_dots_are_float64_sums_per_group(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mini_gpt_pl.geometry.vectors.selection._CHUNK", chunk)
    x, y = normal(2, SMALL.dim).float()
    x[:2], y[:2] = torch.tensor([1e6, -1e6]), torch.tensor([1.0, 1.0])  # float32 sums would lose the rest
    found = Vector(x, SMALL).dots(Vector(y, SMALL))
    edges = itertools.pairwise([0, 6, 15])
    expected = [float(np.dot(x[lo:hi].double().numpy(), y[lo:hi].double().numpy())) for lo, hi in edges]
    assert found.dtype == torch.float64 and found.tolist() == pytest.approx(expected, rel=1e-9, abs=0)
