"""What a run of stories was, and what the paper's main runs were."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from mini_gpt_pl.figures.plotting import Change
from mini_gpt_pl.report.settings import Facts, mapping, transformer
from mini_gpt_pl.runs.folder import TRAJECTORY, Run
from mini_gpt_pl.stories.gpt import PRESETS

PAPER: dict[str, Any] = {
    "model": "8 blocks, 16 heads, width 512, MLP 2048",
    "context": 256,
    "optimizer": "AdamW",
    "learning rate": 1e-3,
    "weight decay": 0.5,
    "beta1": 0.9,
    "beta2": 0.95,
    "warm-up": 1500,
    "schedule length": 10_000,
    "steps": 10_000,
    "sequences a step": 128,
    "clipping": 1.0,
    "lambda": "2 to 4 at step 4000",
    "share of probe sequences": 0.1,
    "corpus": "tinystories",
}
"""Facts of the paper's main runs (paper, Table 1)."""


def story_facts(run: Run) -> dict[str, Any]:
    """Collect what decides how a run of stories goes.

    `tokenizer` is a name without folder and ending, so that one rank file under two paths is one tokenizer.
    """
    config = run.settings
    model, data = mapping(config, "model"), mapping(config, "data")
    found, size, tokenizer = Facts.of_config(config), model.get("size"), data.get("tokenizer")
    return {
        "model": transformer(asdict(PRESETS[size]) if isinstance(size, str) and size in PRESETS else size),
        "tokenizer": None if tokenizer is None else Path(str(tokenizer)).name.split(".")[0],
        "context": data.get("context"),
        **found.of_optimizer,
        "warm-up": found.warmup,
        "schedule length": found.length,
        "steps": found.steps,
        "sequences a step": found.examples,
        "clipping": found.clipping,
        "lambda": _probe_weight(run),
        "share of probe sequences": mapping(data, "probe").get("p_probe"),
        "corpus": mapping(data, "corpus").get("name"),
        "seed": found.seed,
    }


def _probe_weight(run: Run) -> str | None:
    values = _weights(run)
    return None if None in values else "{:g} to {:g} at step {}".format(*values)


def _weights(run: Run) -> tuple[Any, Any, Any]:
    weight = mapping(mapping(run.settings, "model"), "probe_weight")
    return weight.get("first"), weight.get("second"), weight.get("switch_step")


def lambda_change(run: Run) -> Change | None:
    """Return where lambda, the weight of the probe's loss, changes; None where it does not within the run."""
    first, second, step = _weights(run)
    last = run.trajectory.steps[-1] if (run.path / TRAJECTORY).is_file() else int(run.metrics.index[-1])
    if None in (first, second) or not step or not 0 < step < last:
        return None
    return Change(int(step), "" if first == second else f"λ: {first:g} → {second:g}")
