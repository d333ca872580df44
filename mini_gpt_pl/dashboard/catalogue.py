"""Every panel of the workspace, by section: patterns of metric names, each with what chance gives beside it."""

from __future__ import annotations

from mini_gpt_pl.dashboard.layout import GROUP, PICTURES, WHOLE, Logged, Panel, Section

_RECORDER, _GRADIENT, _ANATOMY = "TrajectoryRecorder", "GradientAlignment", "OptimizerAnatomy"
_STREAM, _FISHER, _SWITCH = "StreamingFisher", "FisherProbe", "SwitchingProbe"
_PICTURES, _REHEAT, _COST, _WAIT = "GeometryPictures", "ReheatProbe", "CostControl", "DataWait"

STANDARD = frozenset({"", _RECORDER, _GRADIENT, _SWITCH, _STREAM, _PICTURES, _COST, _WAIT, _REHEAT})
"""Who logs in a run with `configs/probes/standard.yaml`, or in one reheated from it."""

_FIXED = ("batch_mean", "per_sample", "monte_carlo")
_FLOOR = f"anatomy/{WHOLE}/noise_floor"


def _backbone(title: str, quantity: str) -> Panel:
    name = f"backbone/{WHOLE}/{quantity}"
    return Panel(title, (name,), (f"{name}_null",), probe=_RECORDER)


def _excess(title: str, *quantities: str, label: str = WHOLE) -> Panel:
    names = tuple(f"backbone/{label}/{quantity}_excess" for quantity in quantities)
    return Panel(title, names, level=0.0, chance="decaying walk", probe=_RECORDER)


def _anatomy(title: str, *quantities: str, nulls: tuple[str, ...] = (), log_y: bool = False) -> Panel:
    values, beside = (tuple(f"anatomy/{WHOLE}/{name}" for name in names) for names in (quantities, nulls))
    return Panel(title, values, beside, probe=_ANATOMY, log_y=log_y)


def _fisher(title: str, quantity: str, *kinds: str, label: str = WHOLE, level: float | None = None) -> Panel:
    names = tuple(f"fisher/{label}/{kind}/{quantity}" for kind in kinds)
    probe = _STREAM if kinds[0].startswith("streaming") else _FISHER
    return Panel(title, names, level=level, chance="isotropic", probe=probe, log_y=quantity in ("anisotropy", "trace"))


TRAINING = Section(
    "training",
    (
        Panel("Language-model loss, nats per token", ("train/lm_loss", "val/loss")),
        Panel("Loss of the probe, nats per token", ("train/probe_loss", "probe/nll_in", "probe/nll_ood")),
        Panel("Key retrieval, exact match", ("probe/p_in", "probe/p_ood")),
        Panel("Learning rate", ("train/lr",)),
        Panel("Gradient norm, before clipping", ("train/grad_norm",)),
        Panel("Weight of the probe's loss", ("train/probe_weight",)),
    ),
)

BACKBONE = Section(
    "backbone",
    (
        _backbone("PC1 of the drift, raw", "pc1"),
        _backbone("PC1, unit rows", "pc1_unit"),
        _backbone("PC1 of the decay-corrected drift", "pc1_corrected"),
        _backbone("k95, raw", "k95"),
        _backbone("Coordinate along v_b", "coordinate"),
        _backbone("Residual across v_b", "residual"),
        _backbone("cos(v_b, theta_0)", "cos_theta0"),
        _backbone("Persistence, drift over the free walk's", "persistence"),
        _backbone("Autocorrelation of updates, lag 1", "autocorrelation"),
        _excess("Excess", "pc1", "pc1_unit", "pc1_corrected", "cos_theta0", "persistence", "autocorrelation"),
        _excess("Excess of k95", "k95"),
        _excess("Excess of PC1 by group", "pc1", label=GROUP),
        _excess("Excess of PC1, unit rows, by group", "pc1_unit", label=GROUP),
        _excess("Excess of persistence by group", "persistence", label=GROUP),
    ),
)

IMAGES = Section(
    "pictures",
    tuple(
        Panel(title, (key,), probe=_PICTURES, kind="images")
        for title, key in zip(
            ("Spectrum beside both nulls", "Path on PC1 and PC2 beside the decaying walk", "Groups over training"),
            PICTURES,
            strict=True,
        )
    ),
)

LADDER = Section(
    "alignment",
    (
        _anatomy(
            "Ladder: cosine with v_b of the past",
            *("cos_gradient", "cos_momentum", "cos_normalised", "cos_update", "cos_decay"),
            nulls=("noise_floor",),
        ),
        Panel(
            "|cos| of gradients in units of the noise floor",
            tuple(f"alignment/{WHOLE}/{name}" for name in ("gradient_z", "lm_z", "probe_z", "*_z")),
            level=1.0,
            chance="isotropic noise",
            probe=_GRADIENT,
        ),
        Panel(
            "Cosine of gradients with v_b of the past",
            tuple(f"alignment/{WHOLE}/{name}" for name in ("gradient", "lm", "probe")),
            (_FLOOR,),
            level=0.0,
            probe=_GRADIENT,
        ),
        Panel(
            "Cosine of the latest snapshot's update with v_b of its past",
            (f"alignment/{WHOLE}/update",),
            (f"alignment/{WHOLE}/update_null",),
            level=0.0,
            chance="walk",
            probe=_RECORDER,
        ),
        Panel(
            "Cosine of two parts' gradients",
            (f"alignment/{WHOLE}/lm_vs_probe", f"alignment/{WHOLE}/*_vs_*"),
            level=0.0,
            probe=_GRADIENT,
        ),
        Panel("Running sum of <g, v_b>", (f"alignment/{WHOLE}/bias_sum",), level=0.0, probe=_GRADIENT),
        Panel(
            "|cos| of the gradient in units of the noise floor, by group",
            (f"alignment/{GROUP}/gradient_z",),
            level=1.0,
            chance="isotropic noise",
            probe=_GRADIENT,
        ),
        Panel(
            "Excess of the latest update's cosine, by group",
            (f"alignment/{GROUP}/update_excess",),
            level=0.0,
            chance="decaying walk",
            probe=_RECORDER,
        ),
    ),
)

FISHER = Section(
    "Fisher",
    (
        _fisher("Anisotropy, training gradients", "anisotropy", "streaming", "streaming_per_sample", level=1.0),
        _fisher("Anisotropy, fixed batches", "anisotropy", *_FIXED, level=1.0),
        _fisher("Anisotropy by group, training gradients", "anisotropy", "streaming", label=GROUP, level=1.0),
        Panel(
            "|<u_1, v_b>| in units of the noise floor",
            tuple(f"fisher/{WHOLE}/{kind}/overlap_z" for kind in _FIXED),
            level=1.0,
            chance="isotropic noise",
            probe=_FISHER,
        ),
        _fisher("Trace, training gradients", "trace", "streaming", "streaming_per_sample"),
        _fisher("Trace, fixed batches", "trace", *_FIXED),
        _fisher("Gradient noise scale, samples", "noise_scale", "streaming_per_sample"),
        Panel(
            "Leading eigenvalues, fixed batches",
            tuple(f"fisher/{WHOLE}/batch_mean/lambda_{k}" for k in range(1, 6)),
            probe=_FISHER,
            log_y=True,
        ),
        _fisher("Share of the mean gradient in the trace", "mean_share", *_FIXED),
    ),
)

BETA2 = Section(
    "beta2",
    (
        _anatomy(
            "Update with other beta2: cosine with v_b",
            *("cos_update", "cos_update_beta2_*"),
            nulls=("noise_floor",),
        ),
        _anatomy(
            "m / (sqrt(v) + eps) with other beta2: cosine with v_b",
            *("cos_normalised", "cos_normalised_beta2_*"),
            nulls=("noise_floor",),
        ),
        _anatomy("Cosine of that step with the true one", "agreement_beta2_*"),
        _anatomy("Backbone fraction a^2 / |x|^2", "fraction", nulls=("fraction_walk", "fraction_decaying_walk")),
        _anatomy(
            "Fraction that eq. 21 predicts",
            "fraction_predicted",
            nulls=("fraction_predicted_walk", "fraction_predicted_decaying_walk"),
        ),
        _anatomy("Coherence of u^2", "coherence", nulls=("coherence_null",)),
        _anatomy("Median coherence of u^2", "coherence_median", nulls=("coherence_median_null",)),
        _anatomy("Mean |u| and eq. 19", "update_size", "update_size_predicted", nulls=("update_size_null",)),
        _anatomy("Amplification and eq. 18", "amplification", "amplification_predicted"),
        _anatomy("Variance of the momentum and eq. 17", "momentum_variance", "momentum_variance_predicted", log_y=True),
        _anatomy("Shares of the displacement (sum: 1)", "share_gradient", "share_decay", "share_clipping"),
        _anatomy("Parts of the displacement along v_b", "along_gradient", "along_decay", "along_clipping"),
        _anatomy("Signal-to-noise, freed of its null", "snr"),
        _anatomy("Spread of the preconditioner, decades", "preconditioner_spread"),
        _anatomy("What the formulae leave over", "unexplained", "split_unexplained", log_y=True),
    ),
)

SWITCHING = Section(
    "switching",
    (
        Panel("Peaks and troughs so far", ("switching/peaks", "switching/troughs"), probe=_SWITCH),
        Panel("Height of peaks and troughs", ("switching/peak_value", "switching/trough_value"), probe=_SWITCH),
        Panel(
            "|cos(v_sw, v_b)|, v_b before the switch",
            (f"switching/{WHOLE}/cosine",),
            (f"switching/{WHOLE}/control_cosine",),
            probe=_SWITCH,
        ),
        Panel(
            "|cos(v_sw, v_b)|, v_b of the whole run",
            (f"switching/{WHOLE}/run_cosine",),
            (f"switching/{WHOLE}/run_control_cosine",),
            probe=_SWITCH,
        ),
        Panel(
            "Rank of a switch among stretches of its length",
            tuple(f"switching/{WHOLE}/{name}_percentile" for name in ("cosine", "energy_2_6", "energy_2_6_across")),
            level=0.5,
            chance="mean of the uniform",
            probe=_SWITCH,
        ),
        Panel(
            "|cos| of pairs of switches, whole run",
            (f"switching/{WHOLE}/run_pair_cosine",),
            (f"switching/{WHOLE}/run_pair_control",),
            probe=_SWITCH,
        ),
    ),
)

REHEATS = Section(
    "reheats",
    tuple(
        Panel(f"{title} (compare with the control's)", names, probe=_REHEAT)
        for title, names in (
            ("Coordinate a on the parent's v_b", ("reheat/coordinate",)),
            ("Residual |r| off the parent's v_b", ("reheat/residual",)),
            ("Moved along and across the parent's v_b", ("reheat/along", "reheat/across")),
            ("Re-entry gain G", ("reheat/gain",)),
            ("Peak of p_ood, and p_ood of the checkpoint", ("reheat/peak", "reheat/p0")),
        )
    ),
)

OVERHEAD = Section(
    "overhead",
    (
        Panel("Probes' share of training time", ("overhead/fraction",), probe=_COST),
        Panel(
            "By probe",
            (*(f"overhead/{name}" for name in (_RECORDER, _GRADIENT, _STREAM, _SWITCH)), "overhead/[A-Z]*"),
            probe=_COST,
        ),
        Panel("Factor by which schedules are stretched", ("overhead/stretch",), probe=_COST),
        Panel("Share of training time waiting for data", ("overhead/data_wait",), probe=_WAIT),
    ),
)

CATALOGUE = (TRAINING, BACKBONE, IMAGES, LADDER, FISHER, BETA2, SWITCHING, REHEATS, OVERHEAD)
"""The workspace, top to bottom."""


def standard() -> Logged:
    """What a run with the standard probes logs, where no run says so: the whole selection's metrics, no group's."""
    patterns = [panel for section in CATALOGUE for panel in section.panels if panel.probe in STANDARD]
    names = {name for panel in patterns for name in panel.metrics if GROUP not in name and "*" not in name}
    kept = {name for name in names if not name.startswith(("anatomy/", "pictures/"))}
    return Logged(frozenset(name.replace(WHOLE, "trunk") for name in kept), probes=STANDARD)
