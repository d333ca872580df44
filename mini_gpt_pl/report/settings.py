"""What a run was, in words and numbers that can be compared: read from its configuration, never retyped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mini_gpt_pl.runs.folder import METRICS, Run
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


def facts(run: Run) -> dict[str, Any]:
    """Collect what decides how a run goes; what a configuration does not say is None.

    Keys are words for the reader. A null that turns something off is a value of its own, such as "none" for clipping:
    it is no agreement with what another run has. `tokenizer` is a name without folder and ending, so that one rank
    file under two paths is one tokenizer.
    """
    config = run.settings
    model, data, trainer = (_mapping(config, part) for part in ("model", "data", "trainer"))
    schedule, probe = _mapping(model, "schedule"), _mapping(data, "probe")
    return {
        "model": _size(model.get("size")),
        "tokenizer": _name(data.get("tokenizer")),
        "context": data.get("context"),
        **_optimizer(_mapping(model, "optimizer")),
        "warm-up": schedule.get("warmup"),
        "schedule length": schedule.get("total"),
        "steps": trainer.get("max_steps"),
        "sequences a step": _product(_said(data, "batch_size", "all"), trainer.get("accumulate_grad_batches")),
        "clipping": _said(trainer, "gradient_clip_val", "none"),
        "lambda": _probe_weight(_mapping(model, "probe_weight")),
        "share of probe sequences": probe.get("p_probe"),
        "corpus": _mapping(data, "corpus").get("name"),
        "operation": data.get("operation"),
        "modulus": data.get("modulus"),
        "training fraction": data.get("train_fraction"),
        **({} if run.task == "stories" else _residues(run, model, data)),
        "seed": data.get("seed", config.get("seed_everything")),
    }


def _residues(run: Run, model: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """Facts of the second task alone."""
    recorder = next(iter(run.callback_settings("TrajectoryRecorder")), {})
    operations, split = data.get("operations"), _said(data, "split_seed", OWN_SEED)
    return {
        "operations": None if operations is None else ", ".join(operations),
        "mirror pairs together": data.get("mirror_together"),
        "split": OWN_SEED if split == data.get("seed", run.settings.get("seed_everything")) else split,
        "identical blocks": model.get("identical_blocks"),
        "eps": _mapping(_mapping(model, "optimizer"), "init_args").get("eps"),
        "steps a snapshot": _mapping(recorder, "schedule").get("every"),
    }


OWN_SEED = "by the seed"
"""The split of a run that has no seed of its own for it."""


def differences(a: Mapping[str, Any], b: Mapping[str, Any], ignore: Sequence[str] = ()) -> list[str]:
    """Say which facts of `a` are other than those of `b`, as `steps 4000 instead of 10000`; absent ones agree."""
    found = []
    for key, wanted in b.items():
        value = a.get(key)
        if key not in ignore and None not in (value, wanted) and value != wanted:
            found.append(f"{key} {plain(value)} instead of {plain(wanted)}")
    return found


def diverged(run: Run) -> bool:
    """Whether a run ended because its loss was no longer finite."""
    return (ended := run.outcome) is not None and ended.state == "diverged"


def progress(run: Run) -> tuple[int, int | None]:
    """Steps that a run took, as far as is known, and those that it was to take; None if nothing says so.

    A run that broke off took as many as its last entry in the metrics, or its last snapshot, says at least.
    """
    # The configuration of a reheated run is its parent's.
    asked = facts(run)["steps"] if (record := run.reheated) is None else record.get("steps")
    if (ended := run.outcome) is not None:
        return ended.step, asked
    logged = int(run.metrics.index[-1]) if (run.path / METRICS).is_file() and len(run.metrics) else 0
    return max(logged, run.trajectory.steps[-1]), asked


def optimizer_label(found: Mapping[str, Any], *, beta2: bool = False) -> str:
    """Name an optimizer with what sets it apart, such as `SGDW, lr 1e-2, momentum 0.9, decay 0.5`.

    Args:
        found: Facts of a run.
        beta2: Name its beta2 too, if it has one.
    """
    parts = [str(found["optimizer"] or "optimizer unknown")]
    for key, words in (("learning rate", "lr"), ("momentum", "momentum"), ("weight decay", "decay")):
        if found.get(key) not in (None, 0) or (key == "weight decay" and found.get(key) is not None):
            parts.append(f"{words} {plain(found[key])}")
    if beta2 and found.get("beta2") is not None:
        parts.append(f"β₂ {plain(found['beta2'])}")
    return ", ".join(parts)


def plain(value: Any) -> str:
    """Write a setting: small floats as 3e-4, long integers as 10,000."""
    if isinstance(value, float):
        mantissa, _, exponent = f"{value:e}".partition("e")
        small = 0 < abs(value) < _SMALL
        return f"{float(mantissa):g}e{int(exponent)}" if small else f"{value:g}"
    return f"{value:,}" if type(value) is int else str(value)


# Learning rates are below it, decays and probabilities above.
_SMALL = 0.03


def _size(size: Any) -> str | None:
    if isinstance(size, str) and size in PRESETS:
        size = asdict(PRESETS[size])
    if not isinstance(size, Mapping):
        return None
    values = [size.get(key) for key in ("n_layer", "n_head", "d_model", "d_ff")]
    return None if None in values else "{} blocks, {} heads, width {}, MLP {}".format(*values)


def _optimizer(optimizer: Mapping[str, Any]) -> dict[str, Any]:
    settings = _mapping(optimizer, "init_args")
    betas = settings.get("betas") or (None, None)
    kind = optimizer.get("class_path")
    return {
        "optimizer": None if kind is None else str(kind).rpartition(".")[2],
        "learning rate": settings.get("lr"),
        "weight decay": settings.get("weight_decay"),
        "beta1": betas[0],
        "beta2": betas[1],
        "momentum": settings.get("momentum"),
        "Nesterov": settings.get("nesterov"),
    }


def _probe_weight(weight: Mapping[str, Any]) -> str | None:
    values = [weight.get(key) for key in ("first", "second", "switch_step")]
    return None if None in values else f"{values[0]:g} to {values[1]:g} at step {values[2]}"


def _name(path: Any) -> str | None:
    return None if path is None else Path(str(path)).name.split(".")[0]


def _product(a: Any, b: Any) -> Any:
    return a * (b or 1) if isinstance(a, int) else a


def _said(config: Mapping[str, Any], key: str, null: str) -> Any:
    """Value of a key, a word for one that is null, and None for one that is absent."""
    return config[key] if config.get(key) is not None else null if key in config else None


def _mapping(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = config.get(key)
    return found if isinstance(found, Mapping) else {}
