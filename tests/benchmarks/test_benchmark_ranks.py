"""The benchmark of two ranks runs, on the CPU, and survives arms that fail; how fast anything is, no test asserts."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import cache_dir, quiet_trainer, tiny_gpt

from benchmarks import ranks
from mini_gpt_pl.callbacks import AgreedTermination

TINY = Path(__file__).parents[1] / "tiny.yaml"
ROOT = TINY.parents[1]

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")


def run(monkeypatch: pytest.MonkeyPatch, out: Path, *more: str) -> dict[str, Any]:
    monkeypatch.chdir(ROOT)
    short = ["--steps", "3", "--start", "1", "--sequences", "4", "--out", str(out)]
    data = ["-c", str(TINY), f"--data.cache_dir={cache_dir()}", "--trainer.val_check_interval", "1000"]
    monkeypatch.setattr(sys, "argv", ["ranks", *short, *more, *data])
    ranks.main()
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def test_two_ranks_through_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run(monkeypatch, tmp_path / "x.json", "--arms", "bf16", "sum")
    assert found["left_out"] == {}
    for arm in ("bf16", "sum"):
        speed, ms = found["tokens_per_second"][arm], found["ms_per_step"][arm]
        assert speed * ms / 1e3 == pytest.approx(8 * 64)
    assert found["times"] == {}  # there is nothing to compare with
    assert set(found["reduce_alone"]) == {"whole_ms", "buckets_ms", "bf16_ms", "two_counts_ms"}
    assert all(value > 0 for value in found["reduce_alone"].values())
    assert 4e5 < found["gradient_bytes"] < 4e6
    assert "tokens/s" in capsys.readouterr().out


@pytest.mark.parametrize("arm", ranks.ARMS)
def test_arms(arm: str, tmp_path: Path) -> None:
    options = argparse.Namespace(sequences=8, steps=3, start=2)
    words = ranks.command(arm, ["-c", "x.yaml"], tmp_path, options)
    given = yaml.safe_load((tmp_path / "arm.yaml").read_text())
    assert given["trainer"]["devices"] == (1 if arm.startswith("one") else 2)
    assert given["data"]["batch_size"] == (4 if arm in ("strong", "sum_strong") else 8)
    assert (given["trainer"]["strategy"] == "one_sum") == arm.startswith("sum")
    assert ("configs/probes/off.yaml" in words) == (not arm.endswith("probes"))
    assert words.index("x.yaml") < words.index(str(tmp_path / "arm.yaml"))  # ours wins
    assert ("--trainer.callbacks.init_args.asks=True" in words) == (arm == "asking")
    assert ("--trainer.callbacks.init_args.split=False" in words) == (arm == "whole")


@pytest.mark.parametrize("asks", [True, False])
def test_an_arm_that_asks_leaves_it_to_lightning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asks: bool) -> None:
    agreed, watch = AgreedTermination(), ranks.RankWatch(asks=asks)
    trainer, module = quiet_trainer(tmp_path, [agreed, watch], max_steps=1), tiny_gpt()
    monkeypatch.setattr(type(trainer), "world_size", 2)
    loop = trainer.fit_loop.epoch_loop
    lightnings = loop._broadcast_sigterm_tensor
    agreed.setup(trainer, module, "fit")
    watch.on_train_start(trainer, module)
    assert (loop._broadcast_sigterm_tensor == lightnings) == asks


def test_two_ranks_are_compared_with_one_of_their_kind() -> None:
    def found(ms: float, positions: int, unequal: float = 1.0) -> list[dict[str, float]]:
        return [{"ms_per_step": ms, "positions": positions, "weights": 100, "longest_over_mean": unequal}]

    arms = {"one": found(10, 4), "one_probes": found(12, 4), "two": found(11, 8, 1.05), "two_probes": found(12, 8)}
    result = ranks.report(arms | {"strong": found(6, 4), "static": []})
    assert result["times"] == pytest.approx({"two": 20 / 11, "two_probes": 2.0, "strong": 10 / 6})
    assert result["longer_ms"] == {"two": 1, "two_probes": 0} and result["gradient_bytes"] == 400
    assert result["of_it_unequal_stories_ms"]["two"] == pytest.approx(0.5)


def test_arms_that_fail_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that crashes, one that takes too long, one that is not begun any more."""
    asked = []

    def measure(arm: str, *_: object) -> dict[str, float]:
        asked.append(arm)
        if arm == "two":
            raise RuntimeError("exit status 1: it crashed")
        return {"ranks": 1, "ms_per_step": 2.0, "positions": 10, "weights": 100, "longest_over_mean": 1.0}

    monkeypatch.setattr(ranks, "measure_arm", measure)
    monkeypatch.setattr(ranks, "reduce_alone", lambda *_: {"whole_ms": 1.0})
    found = run(monkeypatch, tmp_path / "x.json", "--arms", "one", "two", "strong")
    assert asked == ["one", "two", "strong"] and set(found["ms_per_step"]) == {"one", "strong"}
    assert found["left_out"] == {"two": "exit status 1: it crashed"}
    found = run(monkeypatch, tmp_path / "x.json", "--arms", "one", "--budget", "-1")
    assert found["left_out"] == {"one": "the time was over"} and found["ms_per_step"] == {}
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="not done after 0 s"):
        ranks.run_apart([sys.executable, "-c", "import time; time.sleep(60)"], 0.2)
    with pytest.raises(RuntimeError, match=r"(?s)exit status 3: .*told"):
        ranks.run_apart([sys.executable, "-c", "import sys; print('told'); sys.exit(3)"], 60)
