"""What a run was, in words and numbers that can be compared: read from its folder, never retyped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from mini_gpt_pl.runs.folder import METRICS, Run
from mini_gpt_pl.runs.record import Record
from mini_gpt_pl.tasks import tasks

WORDS = {
    "model": "model",
    "weights": "weights",
    "optimizer": "optimizer",
    "learning_rate": "learning rate",
    "weight_decay": "weight decay",
    "beta1": "beta1",
    "beta2": "beta2",
    "momentum": "momentum",
    "nesterov": "Nesterov",
    "more_optimizers": "further optimizers",
    "warmup": "warm-up",
    "length": "schedule length",
    "steps": "steps",
    "epochs": "epochs",
    "examples": "examples a step",
    "clipping": "clipping",
    "precision": "precision",
    "seed": "seed",
}
"""Each fact in words, in the order in which a page has them."""
OF_OPTIMIZER = ("optimizer", "learning_rate", "weight_decay", "beta1", "beta2", "momentum", "nesterov")


@dataclass(frozen=True)
class Facts:
    """What decides how any run goes, as far as its folder says; None for what it does not.

    A null that turns something off is a value of its own, such as "none" for clipping: it differs from an option that
    is not there.

    Args:
        model: Class of the module.
        weights: Number of its values.
        optimizer: Class of the first optimizer.
        learning_rate: Peak, or that of the first parameter group.
        weight_decay: Of the optimizer.
        beta1: Of an adaptive optimizer.
        beta2: Of an adaptive optimizer.
        momentum: Of SGD.
        nesterov: Whether momentum looks ahead.
        more_optimizers: Classes of the others.
        warmup: Steps of the warm-up.
        length: Steps of the schedule.
        steps: Optimizer steps asked for.
        epochs: Epochs asked for.
        examples: Of one step, over all processes and accumulated batches.
        clipping: Of gradients.
        precision: As Lightning names it.
        seed: Of everything.
    """

    model: str | None = None
    weights: int | None = None
    optimizer: str | None = None
    learning_rate: float | None = None
    weight_decay: float | None = None
    beta1: float | None = None
    beta2: float | None = None
    momentum: float | None = None
    nesterov: bool | None = None
    more_optimizers: str | None = None
    warmup: int | None = None
    length: int | None = None
    steps: int | None = None
    epochs: int | None = None
    examples: int | None = None
    clipping: float | str | None = None
    precision: str | None = None
    seed: int | None = None

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> Self:
        """Read a configuration of LightningCLI, whose module takes its own options or is named by a class path."""
        model, data, trainer = (mapping(config, part) for part in ("model", "data", "trainer"))
        options = {**model, **mapping(model, "init_args")}
        optimizer = mapping(options, "optimizer") or mapping(config, "optimizer")
        schedule = mapping(options, "schedule")
        named = model.get("class_path")
        of_data = {**data, **mapping(data, "init_args")}
        batch, batches = said(of_data, "batch_size", "all"), trainer.get("accumulate_grad_batches")
        return cls(
            model=_class(named),
            **_of_optimizer(_class(optimizer.get("class_path")), mapping(optimizer, "init_args")),
            warmup=schedule.get("warmup"),
            length=schedule.get("total"),
            steps=trainer.get("max_steps"),
            epochs=trainer.get("max_epochs"),
            examples=batch * (batches or 1) if isinstance(batch, int) else batch,
            clipping=said(trainer, "gradient_clip_val", "none"),
            precision=trainer.get("precision"),
            seed=of_data.get("seed", config.get("seed_everything")),
        )

    @classmethod
    def of_record(cls, record: Record) -> Self:
        """Read what a run's trainer said of it."""
        first = record.optimizers[0] if record.optimizers else {}
        examples = record.batch_size
        return cls(
            model=record.model,
            weights=record.weights,
            **_of_optimizer(first.get("class"), first),
            more_optimizers=", ".join(str(other.get("class")) for other in record.optimizers[1:]) or None,
            steps=record.max_steps,
            epochs=record.max_epochs,
            examples=None if examples is None else examples * record.accumulation * record.processes,
            clipping=record.clipping or "none",
            precision=record.precision,
        )

    @property
    def words(self) -> dict[str, Any]:
        """The facts by their words."""
        return {WORDS[name]: value for name, value in asdict(self).items()}

    @property
    def of_optimizer(self) -> dict[str, Any]:
        """Those of the first optimizer."""
        return {WORDS[name]: getattr(self, name) for name in OF_OPTIMIZER}


def general_facts(run: Run) -> dict[str, Any]:
    """Collect the facts of any run: its trainer's own record, and what its configuration says beyond that."""
    found = Facts.of_config(run.settings).words
    if (record := run.record) is not None:
        found |= {key: value for key, value in Facts.of_record(record).words.items() if value is not None}
    return found


def facts(run: Run) -> Mapping[str, Any]:
    """Collect what decides how a run goes, by words for the reader; what its folder does not say is None.

    A run of a study has the facts that the study names.
    """
    if "facts" in run.__dict__:  # a subject of a report, which has asked before
        return run.__dict__["facts"]
    task = tasks().get(run.task)
    return general_facts(run) if task is None else task.load("contents").facts(run)


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
    # A run that continues another has its parent's configuration.
    asked = facts(run).get("steps") if (record := run.lineage) is None else record.get("steps")
    asked = asked if asked is None or asked > 0 else None  # Lightning's -1 is no limit
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
        "learning_rate": settings.get("lr"),
        "weight_decay": settings.get("weight_decay"),
        "beta1": betas[0],
        "beta2": betas[1],
        "momentum": settings.get("momentum"),
        "nesterov": settings.get("nesterov"),
    }
