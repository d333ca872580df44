"""What a run was, in words and numbers that can be compared: read from its folder, never retyped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mini_gpt_pl.runs.folder import METRICS, Run
from mini_gpt_pl.tasks import tasks

OF_OPTIMIZER = ("optimizer", "learning rate", "weight decay", "beta1", "beta2", "momentum", "Nesterov")
"""Facts that are an optimizer's own."""
# Learning rates are below it, decays and probabilities above.
_SMALL = 0.03


def config_facts(config: Mapping[str, Any]) -> dict[str, Any]:
    """Read the facts in a configuration of LightningCLI, by their words, in the order in which a page has them.

    None stands for what the configuration does not say. A null that turns something off is a value of its own, such as
    "none" for clipping.

    Args:
        config: Its module takes its own options, or is named by a class path.
    """
    model, data, trainer = (mapping(config, part) for part in ("model", "data", "trainer"))
    options, of_data = ({**part, **mapping(part, "init_args")} for part in (model, data))
    optimizer, schedule = mapping(options, "optimizer") or mapping(config, "optimizer"), mapping(options, "schedule")
    batch, batches = said(of_data, "batch_size", "all"), trainer.get("accumulate_grad_batches")
    return {
        "model": _class(model.get("class_path")),
        "weights": None,
        **_of_optimizer(_class(optimizer.get("class_path")), mapping(optimizer, "init_args")),
        "further optimizers": None,
        "warm-up": schedule.get("warmup"),
        "schedule length": schedule.get("total"),
        "steps": trainer.get("max_steps"),
        "epochs": trainer.get("max_epochs"),
        "examples a step": batch * (batches or 1) if isinstance(batch, int) else batch,
        "clipping": said(trainer, "gradient_clip_val", "none"),
        "precision": trainer.get("precision"),
        "seed": of_data.get("seed", config.get("seed_everything")),
    }


def general_facts(run: Run) -> dict[str, Any]:
    """Collect the facts of any run: its trainer's own record, and what its configuration says beyond that."""
    facts = config_facts(run.settings)
    if (record := run.record) is not None:
        first, *others = record.optimizers or ({},)
        examples = record.batch_size
        recorded = {
            "model": record.model,
            "weights": record.weights,
            **_of_optimizer(first.get("class"), first),
            "further optimizers": ", ".join(str(other.get("class")) for other in others) or None,
            "steps": record.max_steps,
            "epochs": record.max_epochs,
            "examples a step": None if examples is None else examples * record.accumulation * record.processes,
            "clipping": record.clipping or "none",
            "precision": record.precision,
        }
        facts |= {key: value for key, value in recorded.items() if value is not None}
    return facts


def facts(run: Run) -> Mapping[str, Any]:
    """Collect what decides how a run goes, by words for the reader; what its folder does not say is None.

    A run of a study has the facts that the study names.
    """
    if "facts" in run.__dict__:  # a subject of a report, which keeps them
        return run.__dict__["facts"]
    task = tasks().get(run.task)
    return general_facts(run) if task is None else task.load("contents").facts(run)


def differences(a: Mapping[str, Any], b: Mapping[str, Any], ignore: Sequence[str] = ()) -> list[str]:
    """Say which facts of `a` are other than those of `b`, as `steps 4000 instead of 10000`; absent ones agree."""
    return [
        f"{key} {plain(a[key])} instead of {plain(wanted)}"
        for key, wanted in b.items()
        if key not in ignore and None not in (a.get(key), wanted) and a[key] != wanted
    ]


def diverged(run: Run) -> bool:
    """Whether a run ended because its loss was no longer finite."""
    return (ended := run.outcome) is not None and ended.state == "diverged"


def progress(run: Run) -> tuple[int, int | None]:
    """Steps that a run took, as far as is known, and those that it was to take; None if nothing says so.

    A run that broke off took as many as its last entry in the metrics, or its last snapshot, says at least.
    """
    # A run that continues another has its parent's configuration.
    asked = facts(run).get("steps") if (record := run.lineage) is None else record.get("steps")
    asked = asked if asked is None or asked > 0 else None  # Lightning's -1 is no limit
    if (ended := run.outcome) is not None:
        return ended.step, asked
    logged = int(run.metrics.index[-1]) if (run.path / METRICS).is_file() and len(run.metrics) else 0
    return max(logged, run.trajectory.steps[-1]), asked


def optimizer_label(facts: Mapping[str, Any], *, beta2: bool = False) -> str:
    """Name an optimizer by what sets it apart in a run's facts, such as `SGDW, lr 1e-2, momentum 0.9, decay 0.5`."""
    parts = [str(facts["optimizer"] or "optimizer unknown")]
    for key, words in (("learning rate", "lr"), ("momentum", "momentum"), ("weight decay", "decay")):
        if facts.get(key) not in (None, 0) or (key == "weight decay" and facts.get(key) is not None):
            parts.append(f"{words} {plain(facts[key])}")
    if beta2 and facts.get("beta2") is not None:
        parts.append(f"β₂ {plain(facts['beta2'])}")
    return ", ".join(parts)


def plain(value: Any) -> str:
    """Write a setting: small floats as 3e-4, long integers as 10,000."""
    if isinstance(value, float):
        mantissa, _, exponent = f"{value:e}".partition("e")
        small = 0 < abs(value) < _SMALL
        return f"{float(mantissa):g}e{int(exponent)}" if small else f"{value:g}"
    return f"{value:,}" if type(value) is int else str(value)


def transformer(size: Any) -> str | None:
    """Write the size of a transformer, a mapping of its options; None for anything else."""
    values = [mapping({"": size}, "").get(key) for key in ("n_layer", "n_head", "d_model", "d_ff")]
    return None if None in values else "{} blocks, {} heads, width {}, MLP {}".format(*values)


def said(config: Mapping[str, Any], key: str, null: str) -> Any:
    """Return the value of a key, a word for one that is null, and None for one that is absent."""
    return config[key] if config.get(key) is not None else null if key in config else None


def mapping(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Return a section of a configuration, empty where it is missing."""
    found = config.get(key)
    return found if isinstance(found, Mapping) else {}


def _class(path: Any) -> str | None:
    return None if path is None else str(path).rpartition(".")[2]


def _of_optimizer(kind: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    betas = settings.get("betas") or (None, None)
    return {
        "optimizer": kind,
        "learning rate": settings.get("lr"),
        "weight decay": settings.get("weight_decay"),
        "beta1": betas[0],
        "beta2": betas[1],
        "momentum": settings.get("momentum"),
        "Nesterov": settings.get("nesterov"),
    }
