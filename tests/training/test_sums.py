"""Metrics with one tensor of sums: what they compute, what of them is kept, and what passes between two ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from helpers import tiny_gpt
from scripts import run_in_full
from torch import Tensor
from torchmetrics import Metric

from mini_gpt_pl.training.sums import Means, Sums

NAMES = ("loss", "share")
COLLECTIVES = ("all_reduce", "all_gather", "barrier", "reduce", "broadcast", "all_gather_object")


def values_of(rank: int) -> list[Tensor]:
    return list(torch.randn(3, 2, generator=torch.Generator().manual_seed(rank)))


def filled(rank: int) -> tuple[Sums, Means]:
    """Three updates of each; the first rank has no value for the second mean."""
    sums, means = Sums(NAMES), Means(NAMES)
    for count, value in enumerate(values_of(rank), start=1):
        sums.update(value)
        means.update("loss", value[0], torch.tensor(count))
        if rank:
            means.update("share", value[1], torch.tensor(count))
    return sums, means


def test_sums_and_means_are_those_of_plain_additions() -> None:
    first, second, third = values_of(1)
    sums, means = filled(1)
    total = first + second + third
    assert sums.compute() == {"loss": total[0], "share": total[1]}
    assert means.compute() == {"loss": float(total[0] / 6), "share": float(total[1] / 6)}
    assert torch.tensor(filled(0)[1].compute()["share"]).isnan()


def test_a_reset_metric_begins_anew_and_float64_stays() -> None:
    sums, _ = filled(0)
    assert sums.sums.dtype == torch.float32
    sums.reset()
    value = torch.tensor([1 / 3, 2.0], dtype=torch.float64, requires_grad=True)
    sums.update(value)
    loss = sums.compute()["loss"]
    assert isinstance(loss, Tensor)
    assert not loss.requires_grad
    assert float(loss) == 1 / 3


def test_a_checkpoint_of_the_model_holds_no_metric_and_sums_survive_double_precision() -> None:
    module = tiny_gpt()
    assert {name for name, part in module.named_modules() if isinstance(part, Metric)} == {"evaluation", "_window"}
    assert all(name.startswith("gpt.") for name in module.state_dict())
    module.double()
    module.evaluation.reset()
    assert module.evaluation.sums.dtype == torch.float32


def on_rank(rank: int, folder: str) -> None:
    """Compute on one of two ranks; write down the numbers, twice, and the calls that pass between the ranks."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    metrics = filled(rank)
    calls: list[str] = []
    for name in COLLECTIVES:

        def counted(*args: Any, _name: str = name, _call: Any = getattr(dist, name), **kwargs: Any) -> Any:  # noqa: B008
            calls.append(_name)
            return _call(*args, **kwargs)

        patch.object(dist, name, counted).start()
    numbers = [{name: float(value) for name, value in metric.compute().items()} for metric in metrics]
    once = list(calls)
    own = [metric.sums.tolist() for metric in metrics]  # the rank's, to go on with
    metrics[0].update(torch.zeros(2))
    metrics[1].update("loss", torch.tensor(0.0), torch.tensor(0))
    again = [{name: float(value) for name, value in metric.compute().items()} for metric in metrics]
    text = json.dumps({"numbers": numbers, "calls": once, "again": again, "own": own})
    (Path(folder) / f"{rank}.json").write_text(text)
    dist.destroy_process_group()


SCRIPT = """
import sys
import torch
from test_sums import on_rank

if __name__ == "__main__":
    torch.multiprocessing.start_processes(on_rank, args=(sys.argv[1],), nprocs=2, start_method="fork")
"""


@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo")
def test_two_ranks_add_up_their_sums_in_one_reduction_each(tmp_path: Path) -> None:
    run_in_full(SCRIPT, tmp_path)
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    sums = [sum(values_of(rank)[1:], values_of(rank)[0]) for rank in range(2)]
    both = sums[0] + sums[1]
    expected = [
        {"loss": float(both[0]), "share": float(both[1])},
        {"loss": float(both[0] / 12), "share": float(sums[1][1] / 6)},
    ]
    for rank, found in enumerate(ranks):
        assert found["numbers"] == expected
        assert found["calls"] == ["all_reduce", "all_reduce"]
        assert found["again"] == expected  # an update after a reading adds to the rank's own sums
        assert found["own"][0] == sums[rank].tolist()
