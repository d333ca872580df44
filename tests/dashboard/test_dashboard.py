"""Every panel of the dashboard names what runs really log, beside its null; nothing is sent where nothing should be."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import wandb
import yaml
from conftest import one_line_error
from helpers import cache_dir
from PIL import Image
from test_wandb_run import config_of, geometry_of, history

from docs.tools import dashboard_preview as preview
from mini_gpt_pl import main as cli
from mini_gpt_pl.dashboard import objects, workspace_sections
from mini_gpt_pl.dashboard.command import describe, main
from mini_gpt_pl.dashboard.layout import AXIS, Logged, Panel, Section, catalogue
from mini_gpt_pl.dashboard.sweeps import SweepRuns, find_sweep, flatten, report_sections
from mini_gpt_pl.metrics.registry import find
from mini_gpt_pl.runs.folder import Run
from mini_gpt_pl.training import cli as trainer_cli

ROOT = Path(cli.__file__).resolve().parents[1]
TINY = str(ROOT / "tests" / "tiny.yaml")
PATTERN = r"(?P<group>blocks\.\d+)\.(attn\.(qkv|out_proj)|mlp\.(w_up|w_down))\.weight"
# At this rate the validation loss goes up and down, so that there are switches.
RESTLESS = {"lr": 0.1, "betas": [0.9, 0.95], "weight_decay": 0.1}


def _callback(name: str, **settings: Any) -> dict[str, Any]:
    return {"class_path": name if "." in name else f"callbacks.{name}", "init_args": settings}


EVERY_PROBE = {
    "model": {"optimizer": {"init_args": RESTLESS}, "schedule": {"warmup": 2, "total": 24, "floor": 0.1}},
    "trainer": {
        "max_steps": 24,
        "val_check_interval": 1,
        "accumulate_grad_batches": 2,
        "logger": {
            "class_path": "lightning.pytorch.loggers.WandbLogger",
            "init_args": {"project": "tiny-project", "offline": True},
        },
        "callbacks": [
            _callback("TrajectoryRecorder", pattern=PATTERN, schedule={"every": 1}),
            _callback("GradientAlignment", schedule={"every": 1}, split_schedule={"every": 2}),
            _callback("SwitchingProbe", metric="val/loss", prominence=0.0, reach=1),
            _callback("StreamingFisher", schedule={"every": 1}),
            _callback(
                "FisherProbe",
                schedule={"every": 12},
                kinds=["batch_mean", "per_sample", "monte_carlo"],
                batches=6,
                block=6,
            ),
            _callback("OptimizerAnatomy", schedule={"every": 2}, counterfactual_beta2=[0.99, 0.8], split=True),
            _callback("GeometryPictures", schedule={"every": 100}),
            # No budget is kept: a probe that is thinned out may never speak.
            _callback("CostControl", max_overhead=1000.0, warmup=1),
            _callback("DataWait", warmup=1),
            _callback(
                "lightning.pytorch.callbacks.ModelCheckpoint",
                **{
                    "every_n_train_steps": 12,
                    "save_top_k": -1,
                    "filename": "{step:06d}",
                    "auto_insert_metric_name": False,
                },
            ),
        ],
    },
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Run]]:
    """A run with every probe, offline, and one reheated from it."""
    folder = tmp_path_factory.mktemp("dashboard")
    (folder / "probes.yaml").write_text(yaml.safe_dump(EVERY_PROBE))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("WANDB_DATA_DIR", str(folder / "staging"))
        patch.setattr(trainer_cli, "draw_all", lambda run: [])
        patch.setattr(sys, "argv", ["mini_gpt_pl"])
        patch.chdir(folder)
        options = ["-c", TINY, "-c", "probes.yaml", "--run_dir", str(folder / "run"), "--data.cache_dir", cache_dir()]
        trainer_cli.run_cli(trainer_cli.with_run_config(["fit", *options]))
        reheat = [
            "reheat",
            "--ckpt_path",
            str(folder / "run/checkpoints/000024.ckpt"),
            "--run_dir",
            str(folder / "again"),
        ]
        settings = ["--steps", "3", "--warmup", "1", "--eval_every", "1", "--lr", "0.1"]
        trainer_cli.run_cli(trainer_cli.with_run_config([*reheat, *settings]))
        yield [Run(folder / "run"), Run(folder / "again")]
        wandb.finish()


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is not replaced in a test must not need a server."""

    def refuse(*_: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    for name in ("WANDB_MODE", "WANDB_ENTITY", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)


def names_of(sections: list[Section]) -> set[str]:
    return {name for section in sections for panel in section.panels for name in panel.metrics}


def panels_of(sections: Sequence[Section]) -> list[Panel]:
    return [panel for section in sections for panel in section.panels]


# ------------------------------------------------------------------------------------------- what runs logged


def test_a_run_fills_every_panel_of_the_catalogue(runs: list[Run]) -> None:
    """So each pattern is a name that something logs: a probe that renames a metric turns this red."""
    logged = Logged.of(runs)
    unfilled = [p.title for p in panels_of(catalogue()) if logged.resolve(p) is None]
    # Without a pair of switches, or stretches that no switch overlaps, these have nothing to say.
    assert set(unfilled) <= {"pairs of switches, |cos|"}, unfilled
    patterns = {name for panel in panels_of(catalogue()) for name in panel.values}
    groups = ("blocks.0", "blocks.1")
    every = {name.replace("{whole}", "trunk").replace("{group}", group) for name in patterns for group in groups}
    assert len(every) > 100
    named = {name for name in every if "{" not in name}  # a curve for each name that fits a further placeholder
    rare = {name for name in named if "percentile" in name or "run_pair" in name or "lambda_" in name}
    assert named - rare - logged.names == {f"pictures/{name}" for name in ("spectrum", "path", "blocks")}


def test_every_panel_names_what_the_runs_logged(runs: list[Run]) -> None:
    """In the CSV, and in what W&B was given."""
    sections = workspace_sections(Logged.of(runs))
    assert [section.name for section in sections][:9] == [section.name for section in catalogue()]
    images = {name for panel in panels_of(sections) if panel.kind == "images" for name in panel.values}
    columns = {str(name) for run in runs for name in run.metrics}
    given = {name for run in runs for row in history(run.path) for name in row}
    assert len(images) == 3 and {f"{name}/path" for name in images} <= given
    assert names_of(sections) - images <= columns & given
    report = report_sections(Logged.of(runs), SweepRuns("x", ("model.optimizer.init_args.lr",), names=("a",)))
    assert names_of(report) <= columns & given


def test_the_default_names_what_standard_probes_log(runs: list[Run]) -> None:
    loaded = yaml.safe_load((ROOT / "configs" / "probes" / "standard.yaml").read_text())
    listed = {entry["class_path"].rpartition(".")[2] for entry in loaded["trainer"]["callbacks"]}
    assert Logged.standard().probes == listed | {""}
    sections = workspace_sections(Logged.standard())
    images = {name for panel in panels_of(sections) if panel.kind == "images" for name in panel.values}
    rare = {name for name in names_of(sections) if "percentile" in name or "run_pair" in name}
    assert names_of(sections) - images - rare <= Logged.of(runs).names
    assert {panel.probe for panel in panels_of(sections)} == listed - {"ModelCheckpoint"} | {"", "ReheatProbe"}


def test_no_value_stands_without_the_null_that_was_logged(runs: list[Run]) -> None:
    logged = Logged.of(runs)
    report = report_sections(logged, SweepRuns("x", ("steps",), numbers=("steps",), names=("a",)))
    for panel in panels_of(workspace_sections(logged) + report):
        for value in panel.values:
            known = {f"{value}{ending}" for ending in ("_null", "_walk", "_decaying_walk")} & logged.names
            known |= {value.replace("/cosine", "/control_cosine")} & logged.names if "/cosine" in value else set()
            assert known - {value} <= set(panel.nulls), panel.title


def test_no_geometry_panel_is_without_a_null() -> None:
    for section in catalogue():
        for panel in section.panels if section.name in ("backbone", "alignment") else ():
            beside = [metric is not None and metric.beside for metric in map(find, panel.values)]
            assert panel.nulls or panel.level is not None or all(beside), panel.title


def test_old_runs_get_the_panels_that_they_can_fill() -> None:
    """No anatomy, no Fisher, no pictures: no empty panel."""
    run = Run(ROOT / "docs" / "replication" / "runs" / "seeds" / "seed42")
    sections = workspace_sections(Logged.of([run]))
    assert names_of(sections) <= set(map(str, run.metrics))
    assert not {"beta2", "pictures", "backbone"} & {section.name for section in sections}
    newer = Run(ROOT / "docs" / "h100_full")
    sections = workspace_sections(Logged.of([newer]))
    assert names_of(sections) <= set(map(str, newer.metrics))
    by_group = next(panel for panel in panels_of(sections) if panel.title == "Excess of PC1 by group")
    assert by_group.values == tuple(f"backbone/blocks.{k}/pc1_excess" for k in range(8))


def csv_run(folder: Path, *names: str) -> Run:
    folder.mkdir()
    (folder / "metrics.csv").write_text(f"step,{','.join(names)}\n1,{','.join('1' for _ in names)}\n")
    return Run(folder)


def test_a_readers_own_probes_get_a_section(tmp_path: Path) -> None:
    """A family that nobody knows: values beside their nulls, and what the module itself logs."""
    own = (
        "mine/trunk/x",
        "mine/trunk/x_null",
        "mine/trunk/x_excess",
        "accuracy",
        "train/accuracy",
        "backbone/trunk/k99",
    )
    run = csv_run(tmp_path / "own", *own, "backbone/trunk/pc1")
    found = {section.name: section.panels for section in workspace_sections(Logged.of([run]))}
    assert [panel.metrics for panel in found["mine"]] == [
        ("mine/trunk/x", "mine/trunk/x_null"),
        ("mine/trunk/x_excess",),
    ]
    assert found["mine"][1].level == 0
    assert {panel.values for panel in found["more"]} == {("accuracy",), ("train/accuracy",)}
    assert "backbone/trunk/k99" not in names_of([Section("", panels) for panels in found.values()])


def test_the_whole_has_the_name_that_the_recorder_gave(tmp_path: Path) -> None:
    first = csv_run(tmp_path / "a", "backbone/body/pc1", "backbone/body/pc1_null")
    logged = Logged.of([first])
    assert (logged.whole, logged.groups) == ("body", ())
    (panel,) = (p for p in panels_of(workspace_sections(logged)) if p.title.startswith("PC1 of the drift"))
    assert panel.metrics == ("backbone/body/pc1", "backbone/body/pc1_null")
    with one_line_error("different names \\(body, trunk\\)"):
        Logged.of([first, csv_run(tmp_path / "b", "backbone/trunk/pc1")])


# ---------------------------------------------------------------------------------------------------- lineage


def test_a_reheated_run_names_its_parents_artifact(runs: list[Run]) -> None:
    parent, child = runs
    (artifact,) = geometry_of(parent.path)
    assert config_of(child.path)["parent_artifact"] == f"{artifact.name}:latest"
    assert [found.name for found in geometry_of(child.path)] != [artifact.name]
    assert "parent_artifact" not in config_of(parent.path)


# ------------------------------------------------------------------------------------------------- the command


def test_a_dry_run_names_every_panel_and_metric(
    runs: list[Run], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without network, login, entity or the extra."""
    monkeypatch.setattr(objects, "_library", lambda name: pytest.fail(f"{name} was imported"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(ROOT)  # sweep files name theirs from there
    folders = [str(run.path) for run in runs]
    main([*folders, "--dry_run", "--sweep", "configs/sweeps/reheat.yaml"])
    told = capsys.readouterr().out
    logged = Logged.of(runs)
    sections = workspace_sections(logged)
    for panel in panels_of(sections):
        (line,) = [
            line for line in told.split("\nreport ")[0].splitlines() if line.strip().startswith(f"{panel.heading}: ")
        ]
        assert all(name in line for name in panel.metrics)
    assert all(f"\n  {section.name}\n" in told for section in sections)
    assert told.startswith("workspace 'geometry' in project tiny-project")
    assert "report 'Sweep reheat' in project tiny-project: runs lr1e-3, lr6e-4, lr3e-4, control, grouped by " in told
    main(["--dry-run"])
    assert "backbone/trunk/pc1_null" in capsys.readouterr().out


def test_the_command_line_knows_the_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["mini_gpt_pl", "dashboard", "--dry_run", "--project", "p", "--name", "view"])
    cli.main()
    assert capsys.readouterr().out.startswith("workspace 'view' in project p\n")


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["nowhere"], "no run folder nowhere"),
        (["--dryrun"], "--dryrun; did you mean --dry_run"),
        (["--sweep", "No-Such", "--dry_run"], "no sweep file, none in configs/sweeps, and no id"),
        (["--sweep", "no.yaml", "--dry_run"], "no sweep file no.yaml"),
    ],
)
def test_mistakes_are_one_line(args: list[str], told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with one_line_error(told):
        main(args)


def test_offline_there_is_no_server_to_save_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    with one_line_error("WANDB_MODE is offline: unset it, or use --dry_run"):
        main([])


def test_a_missing_extra_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", None)
    with one_line_error(r"pip install 'mini_gpt_pl\[dashboard\]'"):
        main(["--entity", "me"])


def test_no_login_and_no_entity_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise wandb.errors.UsageError("No API key configured.\nUse `wandb login`.")

    monkeypatch.setattr(wandb, "Api", refuse)
    with one_line_error(r"needs a W&B login \(No API key configured\): log in with `wandb login`"):
        main([])
    monkeypatch.setattr(wandb, "Api", lambda: type("Api", (), {"default_entity": None}))
    with one_line_error("no entity of its own: give --entity"):
        main([])


# ----------------------------------------------------------------------------------------- what W&B is to take


@pytest.fixture
def saved(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was saved, in order, with the server's side replaced."""
    ws = pytest.importorskip("wandb_workspaces.workspaces")
    reports = pytest.importorskip("wandb_workspaces.reports.v2.interface")
    found: list[Any] = []
    for kind in (ws.Workspace, reports.Report):
        monkeypatch.setattr(kind, "save", lambda self: found.append(self))
        monkeypatch.setattr(kind, "url", property(lambda self: f"https://w/{type(self).__name__}"))
    monkeypatch.setattr(reports, "_get_api", lambda: None)
    monkeypatch.setattr(reports, "execute_graphql", lambda *_: {"project": {"internalId": "42"}})
    return found


def test_the_workspace_that_is_saved(runs: list[Run], saved: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    main([str(runs[0].path), str(runs[1].path), "--entity", "me", "--project", "p"])
    assert capsys.readouterr().out == "workspace: https://w/Workspace\n"
    (view,) = saved
    sections = workspace_sections(Logged.of(runs))
    assert (view.entity, view.project, view.name) == ("me", "p", "geometry")
    built = json.loads(view._to_model().spec.model_dump_json(by_alias=True, exclude_none=True))
    bank = built["section"]["panelBankConfig"]["sections"]
    assert [part["name"] for part in bank[: len(sections)]] == [section.name for section in sections]
    for part, section in zip(bank, sections, strict=False):
        for panel, wanted in zip(part["panels"], section.panels, strict=True):
            assert panel["config"]["chartTitle"] == wanted.heading
            if wanted.kind == "images":
                assert panel["viewType"] == "Media Browser" and panel["config"]["mediaKeys"] == list(wanted.values)
                continue
            assert panel["viewType"] == "Run History Line Plot"
            assert panel["config"]["metrics"] == list(wanted.metrics)
            assert panel["config"]["xAxis"] == AXIS
            assert panel["config"].get("yLogScale", False) == wanted.log_y


def test_the_report_that_is_saved(runs: list[Run], saved: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    main([str(runs[0].path), "--entity", "me", "--project", "p", "--sweep", "beta2"])
    _, report = saved
    spec = json.loads(report._to_model().spec.model_dump_json(by_alias=True, exclude_none=True))
    grids = [block["metadata"] for block in spec["blocks"] if block["type"] == "panel-grid"]
    assert len(grids) == 3
    for grid in grids:
        (run_set,) = grid["runSets"]
        assert run_set["grouping"] == [{"section": "config", "name": "model.value.optimizer.init_args.betas"}]
        assert "['0.99', '0.95', '0.90', '0.80', '0.0']" in json.dumps(run_set["filters"]).replace('"', "'")
    panels = [panel for grid in grids for panel in grid["panelBankSectionConfig"]["panels"]]
    bars = {
        panel["config"]["chartTitle"]: panel["config"]["metrics"]
        for panel in panels
        if panel["viewType"] == "Bar Chart"
    }
    assert bars["k95, raw, at the end"] == ["backbone/trunk/k95", "backbone/trunk/k95_null"]
    (parallel,) = (panel for panel in panels if panel["viewType"] == "Parallel Coordinates Plot")
    columns = [column["accessor"] for column in parallel["config"]["columns"]]
    assert columns[0] == "config:model.value.optimizer.init_args.betas"
    # The summary of a metric with a best value is kept under that word.
    assert {"summary:val/loss.min", "summary:probe/p_ood.max", "summary:backbone/trunk/pc1_excess"} <= set(columns)


def test_summaries_are_kept_where_the_report_looks_for_them(runs: list[Run]) -> None:
    last = runs[0].last("backbone/trunk/pc1_excess")
    summary = summary_of(runs[0].path)
    assert summary["backbone/trunk/pc1_excess"] == last
    assert summary["val/loss"] == {"min": runs[0].series("val/loss").min()}
    assert objects.last_of("val/loss") == "val/loss.min" and objects.last_of("val/perplexity") == "val/perplexity"


def summary_of(folder: Path) -> dict[str, Any]:
    from test_wandb_run import records

    found: dict[str, Any] = {}
    for record in records(folder):
        for item in record.summary.update if record.WhichOneof("record_type") == "summary" else []:
            found[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
    return found


def test_a_server_that_refuses_is_one_line(saved: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    ws = pytest.importorskip("wandb_workspaces.workspaces")

    def refuse(self: Any) -> None:
        raise ValueError("project 'me/p' not found.\nPlease verify")

    monkeypatch.setattr(ws.Workspace, "save", refuse)
    with one_line_error(r"did not take the workspace \(project 'me/p' not found\).*--entity and --project"):
        main(["--entity", "me"])
    assert not saved


# ------------------------------------------------------------------------------------------------------ sweeps


@pytest.mark.parametrize(
    ("name", "varied", "numbers"),
    [
        ("beta2", {"model.optimizer.init_args.betas"}, set()),
        ("reheat", {"probe_weight", "lr"}, set()),  # what tells the same runs apart is named once
        ("reheat_beta2", {"ckpt_path", "probe_weight", "lr"}, set()),
    ],
)
def test_a_sweep_file_says_what_varies(
    name: str, varied: set[str], numbers: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files named in `config` are read: W&B keeps the settings in them, not their names."""
    monkeypatch.chdir(ROOT)
    sweep = find_sweep(name, [])
    assert set(sweep.varied) == varied
    assert set(sweep.numbers) == numbers
    assert "config" not in sweep.varied


def test_numeric_settings_are_scattered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    sweep = find_sweep("seeds", [])
    assert sweep.numbers == sweep.varied == ("seed_everything",)
    assert sweep.names == ("seed42", "seed271")
    sections = report_sections(Logged.standard(), sweep)
    scatters = [panel for panel in panels_of(sections) if panel.kind == "scatter"]
    assert [panel.across for panel in scatters] == [("seed_everything",)] * 4
    pytest.importorskip("wandb_workspaces")
    built = objects._panel(scatters[1])._to_model()
    assert built.config.x_axis == "config:seed_everything.value"
    assert built.config.y_axis == "summary:backbone/trunk/pc1_excess"


def test_runs_say_what_a_sweep_of_the_server_varies(tmp_path: Path) -> None:
    folders = []
    for lr in (0.1, 0.2):
        run = csv_run(tmp_path / f"lr{lr}", "val/loss")
        config = {"run_dir": str(run.path), "model": {"optimizer": {"init_args": {"lr": lr, "betas": [0.9, 0.95]}}}}
        (run.path / "config.yaml").write_text(yaml.safe_dump(config))
        folders.append(run)
    sweep = find_sweep("abcd1234", folders)
    assert (sweep.identifier, sweep.names) == ("abcd1234", ())
    assert sweep.varied == sweep.numbers == ("model.optimizer.init_args.lr",)
    pytest.importorskip("wandb_workspaces")
    run_set = objects._run_set(objects._library("wandb_workspaces.reports.v2"), sweep, "", "")._to_model()
    told = json.dumps(run_set.filters, default=str)
    assert '"sweep"' in told and "abcd1234" in told


def test_settings_are_flattened_as_wandb_keeps_them() -> None:
    assert flatten({"a": {"b": 1, "c": [1, 2], "d": {}}, "e": None}) == {"a.b": 1, "a.c": [1, 2], "a.d": {}, "e": None}


# ----------------------------------------------------------------------------------------------------- preview


def test_the_preview_is_laid_out_as_the_workspace(runs: list[Run], tmp_path: Path) -> None:
    figure = preview.draw_preview(runs[0], ["backbone", "pictures", "overhead"])
    logged = Logged.of([runs[0]])
    sections = [s for s in workspace_sections(logged) if s.name in ("backbone", "pictures", "overhead")]
    titles = [axes.get_title(loc="left").replace("\n", " ") for part in figure.subfigs for axes in part.axes]
    assert [title for title in titles if title] == [panel.heading for panel in panels_of(sections)]
    preview.write_preview(figure, tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as image:
        assert image.size[0] > 700 and len(set(image.convert("L").tobytes())) > 20
    with one_line_error("no section nonsense: .* fills training, backbone"):
        preview.draw_preview(runs[0], ["nonsense"])


def test_the_preview_command(runs: list[Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    preview.main([str(runs[1].path), "--out", str(tmp_path / "p.png"), "--sections", "reheats"])
    assert (tmp_path / "p.png").stat().st_size < 200_000
    with pytest.raises(SystemExit) as ended:
        preview.main([str(tmp_path)])
    assert ended.value.code == 2 and "no metrics.csv" in capsys.readouterr().err


def test_the_committed_preview_is_small() -> None:
    assert (ROOT / "docs" / "dashboard.png").stat().st_size < 200_000


def test_descriptions_are_readable() -> None:
    panel = Panel("A", ("x",), ("x_null",), level=0.0, chance="walk")
    lines = describe([Section("s", (panel,))], "title")
    assert lines == ["title", "  s", "    A (walk: 0): x; null x_null"]
