"""Measuring leaves modes and random state as they were, and sets modes only where there is one to set."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from conftest import normal
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from typing_extensions import override

from mini_gpt_pl.callbacks.fixed_gradients import FixedGradients
from mini_gpt_pl.callbacks.measuring import evaluating, measuring
from mini_gpt_pl.geometry.vectors.selection import ParameterSelection


class Noisy(LightningModule):
    """Dropout, noise of its own in the loss, a frozen part, and a count of how often its modes were set."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5), nn.Linear(3, 4))
        self.frozen = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)).eval()
        self.settings = 0

    def batch_loss(self, batch: Tensor) -> Tensor:
        return (self.layer(batch) + torch.randn(4)).square().mean()

    @override
    def train(self, mode: bool = True) -> Noisy:
        self.settings = getattr(self, "settings", 0) + 1
        super().train(mode)
        return self


def modes(module: nn.Module) -> dict[str, bool]:
    return {name: part.training for name, part in module.named_modules()}


def trainer() -> Trainer:
    return Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, precision="bf16-mixed")


@contextmanager
def restored(module: Noisy) -> Iterator[None]:
    """Modes, random state and the gradient mode are afterwards as they are now."""
    before, state = modes(module), torch.get_rng_state()
    yield
    assert modes(module) == before and set(before.values()) == {True, False}
    assert torch.equal(torch.get_rng_state(), state) and not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("root", [False, True])
def test_every_mode_is_put_back(root: bool, fails: bool) -> None:
    """Also where the module itself is in evaluation mode and a part of it is not, and where the body sets modes."""
    module = Noisy()
    module.training = root
    with restored(module):
        try:
            with torch.no_grad(), measuring(trainer(), module):
                assert not any(modes(module).values())
                assert torch.is_grad_enabled() and torch.is_autocast_enabled("cpu")
                torch.randn(3)
                module.frozen.train()
                module.layer[1].train()
                if fails:
                    raise KeyError
        except KeyError:
            assert fails


def test_nothing_is_set_where_every_part_is_in_evaluation_mode() -> None:
    module = Noisy().eval()
    before = module.settings
    with measuring(trainer(), module):
        assert not any(modes(module).values())
    assert module.settings == before and not any(modes(module).values())


def test_a_shared_part_has_one_mode() -> None:
    shared = nn.Dropout()
    module = nn.Sequential(shared, nn.Sequential(shared, nn.ReLU()))
    with evaluating(module):
        assert not any(modes(module).values())
    assert all(modes(module).values())


def test_gradients_are_the_same_whenever_they_are_asked_for() -> None:
    """One by one, or all in one stretch, where modes are set once; noise is drawn anew for each."""
    module, batches = Noisy(), [normal(5, 4, seed=k).float() for k in range(2)]
    gradient = FixedGradients(trainer(), module, ParameterSelection.of(module, "layer"), batches, "batch_mean")
    alone = [gradient(index).values for index in (0, 1, 0)]
    assert torch.equal(alone[0], alone[2]) and not torch.equal(alone[0], alone[1])
    before = module.settings
    with restored(module), evaluating(module):
        assert module.settings == before + 1
        for index in (1, 0, 1):
            assert torch.equal(gradient(index).values, alone[index])
            assert not torch.is_autocast_enabled("cpu")  # products of gradients are no part of the forward
        assert module.settings == before + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_flat_vectors_are_copies_in_the_width_that_is_asked_for(dtype: Any) -> None:
    module = nn.Sequential(nn.Linear(3, 2, dtype=torch.bfloat16), nn.Linear(2, 1))
    selection = ParameterSelection.of(module, "")
    weights = selection.parameters(module)
    found = selection.flatten(weights, dtype)
    expected = torch.cat([p.detach().double().flatten() for p in weights]).to(dtype)
    assert torch.equal(found.values, expected) and not found.values.requires_grad
    single = ParameterSelection.of(module, "1.weight")
    copy = single.weights(module)
    copy.values.zero_()
    assert bool(dict(module.named_parameters())["1.weight"].any())
    for wrong in (weights[:-1], [*weights, weights[0]], [w.flatten() for w in weights]):
        with pytest.raises(ValueError, match="are not those of the selected parameters, in order"):
            selection.flatten(wrong, dtype)
