"""Suppression of the direction in which the objectives differ: against dense algebra, and a run that is resumed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import one_line_error
from torch import Tensor

from mini_gpt_pl import main as cli
from mini_gpt_pl.geometry.vectors.selection import ParameterSelection, Vector
from mini_gpt_pl.runs.checkpoints import read_checkpoint
from mini_gpt_pl.runs.folder import Run
from mini_gpt_pl.stories.suppression import ObjectiveSuppression, alike_in_every_weight, leading
from mini_gpt_pl.training import cli as trainer_cli

TINY = str(Path(cli.__file__).resolve().parents[1] / "tests" / "tiny.yaml")
SELECTION = ParameterSelection(("a", "b"), ((30, 4), (50,)), ("all", "all"))


def _fit(folder: Path, *options: str, **settings: Any) -> dict[str, Tensor]:
    """Train the tiny run for six steps and return its last weights."""
    names = ", ".join(f"{name}: {value}" for name, value in {"every": 2, "batch_size": 4, **settings}.items())
    more = "trainer: {callbacks+: [{class_path: mini_gpt_pl.stories.suppression.ObjectiveSuppression, "
    args = ["fit", "-c", TINY, "-c", more + f"init_args: {{{names}}}}}]}}", "--data.cache_dir", str(folder / "cache")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_cli, "draw_all", lambda run: [])
        patch.setattr(sys, "argv", ["mini_gpt_pl"])
        trainer_cli.run_cli([*args, "--run_dir", str(folder / "run"), *options])
    state: dict[str, Tensor] = read_checkpoint(Run(folder / "run").checkpoints[6])["state_dict"]
    return state


def _same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, b[name]) for name, value in a.items())


def test_the_leading_directions_are_right_singular_vectors() -> None:
    dense = torch.randn(7, SELECTION.dim, generator=torch.Generator().manual_seed(1))
    rows = leading([Vector(row, SELECTION) for row in dense], dense.double() @ dense.double().T, 3)
    expected = torch.linalg.svd(dense.double(), full_matrices=False).Vh[:3]
    assert torch.allclose((rows.double() @ expected.T).abs(), torch.eye(3, dtype=torch.float64), atol=1e-5)


def test_directions_that_repeat_count_once() -> None:
    row = torch.randn(SELECTION.dim, generator=torch.Generator().manual_seed(1))
    gram = row.double().square().sum().expand(4, 4)
    assert leading([Vector(row, SELECTION)] * 4, gram, 3).shape == (1, SELECTION.dim)


def test_random_directions_are_as_long_in_every_weight() -> None:
    rows = torch.randn(2, SELECTION.dim, generator=torch.Generator().manual_seed(2)) * torch.linspace(0.1, 3, 170)
    drawn = alike_in_every_weight(rows, SELECTION, torch.Generator().manual_seed(5))
    for part in (slice(0, 120), slice(120, 170)):
        assert torch.allclose(drawn[:, part].norm(dim=-1), rows[:, part].norm(dim=-1), rtol=1e-5)
    assert float(torch.nn.functional.cosine_similarity(drawn, rows).abs().max()) < 0.3


def test_nothing_is_left_along_the_basis_at_full_strength(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind the callback, every gradient is orthogonal to the directions, and what is taken is their part alone."""
    seen: list[tuple[int, float, float, float]] = []
    act = ObjectiveSuppression._act

    def spy(self: Any, trainer: Any, optimizer: Any) -> None:
        before = {name: p.grad.clone() for name, p in self._named.items() if p.grad is not None}
        act(self, trainer, optimizer)
        after = {name: p.grad for name, p in self._named.items() if p.grad is not None}
        selection = self._files.selection
        stacked = torch.stack([u.values for u in self._directions.values()]).double()
        basis = torch.linalg.svd(stacked, full_matrices=False).Vh[:3]
        old, new = (torch.cat([part[name].flatten() for name in selection.names]).double() for part in (before, after))
        expected = old - self.strength * basis.T @ (basis @ old)
        seen.append(
            (len(stacked), float((basis @ new).norm() / old.norm()), float((new - expected).norm()), float(old.norm()))
        )

    monkeypatch.setattr(ObjectiveSuppression, "_act", spy)
    _fit(tmp_path)
    assert [count for count, *_ in seen] == [1, 1, 2, 2, 3, 3]  # a direction before steps 1, 3 and 5
    for _, along, off, length in seen:
        assert along < 1e-5 and off < 1e-5 * length


def test_a_direction_is_where_the_objectives_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small step along the first direction raises the probe's loss and lowers the language model's."""
    found: list[tuple[float, float]] = []
    begin = ObjectiveSuppression.on_train_start

    def spy(self: Any, trainer: Any, module: Any) -> None:
        begin(self, trainer, module)
        direction = next(iter(self._directions.values()))
        named = dict(module.named_parameters())
        moves = direction.selection.unflatten(direction)
        batch = trainer.datamodule.draw_batch(np.random.default_rng(0), 64)

        def losses() -> dict[str, float]:
            with torch.no_grad():
                return {name: float(module.named_losses(batch)[name]) for name in ("lm", "probe")}

        start = losses()
        for name, move in moves.items():
            named[name].data.add_(move, alpha=0.05)
        there = losses()
        for name, move in moves.items():
            named[name].data.sub_(move, alpha=0.05)
        found.append((there["lm"] - start["lm"], there["probe"] - start["probe"]))

    monkeypatch.setattr(ObjectiveSuppression, "on_train_start", spy)
    _fit(tmp_path, batch_size=32)
    (lm, probe) = found[0]
    assert probe > 0 and probe > lm


def test_no_strength_changes_no_bit(tmp_path: Path) -> None:
    plain = _fit(tmp_path / "none", strength=0.0)
    assert not _same(plain, _fit(tmp_path / "full"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ObjectiveSuppression, "_act", lambda *_: None)
        assert _same(plain, _fit(tmp_path / "off"))


@pytest.mark.parametrize("arm", ["objectives", "random"])
def test_a_resumed_run_is_the_whole_one(tmp_path: Path, arm: str) -> None:
    whole = _fit(tmp_path / "whole", arm=arm, history=3)
    broken = tmp_path / "broken"
    with pytest.MonkeyPatch.context() as patch:
        act = ObjectiveSuppression._act

        def stop(self: Any, trainer: Any, optimizer: Any) -> None:
            if trainer.global_step == 4:
                raise KeyboardInterrupt
            act(self, trainer, optimizer)

        patch.setattr(ObjectiveSuppression, "_act", stop)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            _fit(broken, arm=arm, history=3)
    last = Run(broken / "run").checkpoints[3]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_cli, "draw_all", lambda run: [])
        patch.setattr(sys, "argv", ["mini_gpt_pl"])
        trainer_cli.main(["fit", "--ckpt_path", str(last)])
    assert _same(whole, read_checkpoint(Run(broken / "run").checkpoints[6])["state_dict"])


def test_another_run_in_the_folder_takes_nothing_of_the_one_before(tmp_path: Path) -> None:
    first = _fit(tmp_path, every=1)
    _fit(tmp_path, "--overwrite", "true", every=2)
    assert len(list((tmp_path / "run" / "suppression" / "objectives").iterdir())) == 3  # before steps 1, 3 and 5
    assert _same(first, _fit(tmp_path, "--overwrite", "true", every=1))


def test_settings_that_make_no_sense_are_refused() -> None:
    for settings in ({"strength": 1.5}, {"rank": 0}, {"rank": 4, "history": 3}):
        with one_line_error("ObjectiveSuppression: strength"):
            ObjectiveSuppression(**settings)
