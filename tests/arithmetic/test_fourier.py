"""Fourier power over residues: closed forms, the null against random rotations, and the probe beside brute force."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import metrics, quiet_trainer, same
from torch import Tensor

from mini_gpt_pl.arithmetic import fourier
from mini_gpt_pl.arithmetic.data import MarkerSums, ModularArithmetic
from mini_gpt_pl.arithmetic.encoder import EncoderSize
from mini_gpt_pl.arithmetic.fourier_probe import FourierProbe
from mini_gpt_pl.arithmetic.module import ResidueClassifier
from mini_gpt_pl.callbacks import Schedule
from mini_gpt_pl.errors import UserError

SMALL = EncoderSize(n_layer=2, n_head=2, d_model=16, d_ff=32)


def gaussian(p: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(p, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_sums(table: Tensor, order: Tensor) -> Tensor:
    """Shares from the definition, one sum a frequency."""
    m = len(order)
    rows = table[order] - table[order].mean(0)
    n = torch.arange(m, dtype=torch.float64)
    power = []
    for k in range(1, m // 2 + 1):
        angle = 2 * math.pi * k * n / m
        parts = torch.stack([angle.cos(), angle.sin()]) @ rows
        power.append(float(parts.square().sum()) * (1 if 2 * k == m else 2) / m)
    found = torch.tensor(power, dtype=torch.float64)
    assert float(found.sum()) == pytest.approx(float(rows.square().sum()))
    return found / found.sum()


@pytest.mark.parametrize("axis", fourier.AXES)
def test_shares_are_sums_over_characters(axis: fourier.Axis) -> None:
    table = gaussian(13, 5)
    order = torch.arange(13) if axis == "additive" else torch.tensor([pow(2, n, 13) for n in range(12)])
    found = fourier.spectrum(table, axis)
    assert len(found.shares) == 6
    torch.testing.assert_close(found.shares, by_sums(table, order), rtol=1e-10, atol=1e-12)


def test_a_character_of_either_group_is_one_frequency_on_its_axis_only() -> None:
    p = 59
    log = torch.empty(p, dtype=torch.float64)
    log[fourier.residues(p, "multiplicative")] = torch.arange(p - 1, dtype=torch.float64)
    for axis, place, m in (("additive", torch.arange(p).double(), p), ("multiplicative", log, p - 1)):
        angle = 2 * math.pi * 7 * place / m
        table = torch.stack([angle.cos(), angle.sin()], 1)
        table[0] = table[0] if axis == "additive" else 3.0  # residue 0 has no logarithm
        own = fourier.spectrum(table, axis)  # type: ignore[arg-type]
        other = fourier.spectrum(table, "multiplicative" if axis == "additive" else "additive")
        assert own.frequency == 7 and own.largest == pytest.approx(1.0) and own.effective == pytest.approx(1.0)
        assert own.largest > own.largest_null(1 - 1e-9) and other.largest < 0.5 and other.effective > 5


def test_chance_is_one_of_forty_eight() -> None:
    found = fourier.spectrum(gaussian(97, 128))
    assert len(found.shares) == 48
    assert found.largest < 2 / 48
    assert found.largest < found.largest_null(0.999)


@pytest.mark.parametrize(("axis", "p", "d"), [("additive", 23, 6), ("multiplicative", 23, 3), ("additive", 23, 40)])
def test_the_null_is_that_of_turned_residues(axis: fourier.Axis, p: int, d: int) -> None:
    """Haar rotations across the constant, of a table with uneven singular values."""
    m = p if axis == "additive" else p - 1
    table = gaussian(p, d) * torch.linspace(1, 4, d, dtype=torch.float64)
    order = fourier.residues(p, axis)
    rows = table[order] - table[order].mean(0)
    constant = torch.full((m, 1), m**-0.5, dtype=torch.float64)
    across = torch.linalg.qr(torch.cat([constant, gaussian(m, m - 1, 1)], 1))[0][:, 1:]
    largest, squares, shares = [], [], []
    for seed in range(1500):
        turn, triangle = torch.linalg.qr(gaussian(m - 1, m - 1, seed))
        turn = turn * triangle.diagonal().sign()  # Haar
        turned = torch.zeros_like(table)
        turned[order] = across @ turn @ across.T @ rows
        found = fourier.spectrum(turned, axis)
        largest.append(found.largest)
        squares.append(float(found.shares.square().sum()))
        shares.append(found.shares)
    found = fourier.spectrum(table, axis)
    stacked = torch.stack(shares)
    wanted = torch.tensor([null.variance for null in found._nulls], dtype=torch.float64)
    torch.testing.assert_close(stacked.mean(0), torch.tensor([n.mean for n in found._nulls]).double(), rtol=0.1, atol=0)
    torch.testing.assert_close(stacked.var(0), wanted, rtol=0.25, atol=0)
    assert found.effective_null == pytest.approx(1 / np.mean(squares), rel=0.02)
    for q in (0.5, 0.95):
        assert np.quantile(largest, q) * 0.92 < found.largest_null(q) < np.quantile(largest, q) * 1.03


def test_axes_that_do_not_exist_are_refused_in_one_line() -> None:
    with pytest.raises(UserError, match="no prime"):
        fourier.residues(15, "multiplicative")
    with pytest.raises(UserError, match="3 or more"):
        fourier.residues(2, "additive")
    with pytest.raises(UserError, match="same for all"):
        fourier.spectrum(torch.ones(7, 3))


@pytest.mark.parametrize("p", [3, 5, 59, 97])
def test_powers_of_the_generator_are_all_residues_but_zero(p: int) -> None:
    assert sorted(fourier.residues(p, "multiplicative").tolist()) == list(range(1, p))


def fit(folder: Path, *probes: FourierProbe, steps: int = 4) -> ResidueClassifier:
    module = ResidueClassifier(SMALL, vocab_size=11, classes=11)
    trainer = quiet_trainer(folder, probes, max_steps=steps)
    trainer.fit(module, datamodule=ModularArithmetic(modulus=11, batch_size=16))
    return module


def test_the_probe_logs_what_the_tables_hold_and_changes_nothing(tmp_path: Path) -> None:
    module = fit(tmp_path / "probed", FourierProbe(Schedule(every=2)))
    assert same(fit(tmp_path / "bare").state_dict(), module.state_dict())
    rows = metrics(tmp_path / "probed")
    assert [step for step, row in rows.items() if "fourier/additive/head/largest" in row] == [0, 2, 4]
    weights = module.encoder.state_dict()
    product = (
        weights["embedding.weight"] @ weights["blocks.1.attn.w_v.weight"].T @ weights["blocks.1.attn.w_o.weight"].T
    )
    found = by_sums(product.double(), torch.tensor([pow(2, n, 11) for n in range(10)]))
    logged = {
        k.rpartition("/")[2]: v for k, v in rows[4].items() if k.startswith("fourier/multiplicative/blocks.1.value")
    }
    assert logged["largest"] == pytest.approx(float(found.max()), rel=1e-4)
    assert logged["frequency"] == int(found.argmax()) + 1
    assert logged["effective"] == pytest.approx(1 / float(found.square().sum()), rel=1e-4)
    assert logged["largest_null"] < logged["largest_level"] < 1


def test_the_probe_refuses_tokens_that_are_no_residues(tmp_path: Path) -> None:
    data = MarkerSums(batch_size=8, eval_examples=8)
    module = ResidueClassifier(SMALL, data.vocab_size, data.classes, data.length, data.causal)
    with pytest.raises(UserError, match="no axis"):
        quiet_trainer(tmp_path, [FourierProbe()], max_steps=1).fit(module, datamodule=data)
