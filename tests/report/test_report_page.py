"""The HTML page: complete, self-contained, escaped, and whole in a real browser at the width of a phone."""

from __future__ import annotations

import base64
import html
import json
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from conftest import one_line_error
from report_runs import ADAMW, BLOCKS, config, learning_curve, path_of, write_replay, write_run
from rich.console import Console
from test_figures import CURVE, replay_record

from mini_gpt_pl.report import page
from mini_gpt_pl.report.calibration import calibrate_run
from mini_gpt_pl.report.contents import MORE, claimed
from mini_gpt_pl.report.page import Steps
from mini_gpt_pl.report.sheet import kind_of, tabulate, word
from mini_gpt_pl.report.summary import Headline, headline
from mini_gpt_pl.runs.folder import Run
from mini_gpt_pl.stories.study.contents import COMPARISON_SECTIONS, RUN_FIGURES, RUN_SECTIONS, story_findings

# Enough snapshots for windows of ten.
STEPS = [0, *range(50, 950, 50)]
HOSTILE = "<script>alert('x')</script> & \"quoted\""
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def full_run(folder: Path) -> Run:
    """A run with everything that a report can show: a replay, switches and a parent."""
    settings = config(steps=900, corpus={"name": HOSTILE})
    run = write_run(folder, STEPS, configuration=settings, metrics=learning_curve(CURVE))
    write_replay(run, 400, replay_record(event="peak"))
    write_replay(run, 900, replay_record(2.0))
    side = {"cosine": 0.5, "control_cosine": 0.25, "controls": 3.0}
    kinds = {
        "energy_2_6": 0.1,
        "energy_2_6_percentile": 0.5,
        "cosine_percentile": 0.5,
        "transverse": 0.75,
        "share": 1.0,
    }
    sides = dict.fromkeys(("trunk", *BLOCKS.groups), side | kinds)
    switch = {"peak": 400, "trough": 700, "snapshots": [400, 700], "groups": 1.5, "run": sides, "past": sides}
    record = {"metric": "probe/p_ood", "steps": [100, 400, 700], "values": [0.1, 0.6, 0.3], "switches": [switch]}
    events = [{"kind": "peak", "index": 1, "step": 400, "value": 0.6, "declared": 700}]
    pairs = {"cosines": [[1.0]], "mean": None, "control_mean": None}
    (folder / "switching.json").write_text(json.dumps(record | {"events": events, "pairwise": pairs}))
    (folder / "reheat.json").write_text(
        json.dumps({"parent": "gone", "parent_step": 10, "lr": 1e-3, "p0": 0.1, "gain": 0.5})
    )
    return run


def comparable_runs(folder: Path) -> list[Run]:
    made = []
    for name, seed, beta2 in (("a", 1, 0.95), ("b", 2, 0.95), ("c", 1, 0.8)):
        settings = config(settings={**ADAMW, "betas": [0.9, beta2]}, seed=seed, steps=900)
        made.append(write_run(folder / name, STEPS, path_of(STEPS, seed), settings, learning_curve(CURVE)))
    return made


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = full_run(tmp_path_factory.mktemp("runs") / "<b>bold</b>")
    page.main([str(run.path), "--title", HOSTILE])
    return run.path / "report" / "report.html"


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    comparable_runs(folder)
    page.main([str(folder), "--out", str(folder / "out")])
    return folder / "out" / "report.html"


@dataclass
class Parsed(HTMLParser):
    """What a page holds: identifiers, links, images, and everything that loads something."""

    ids: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    images: list[dict[str, str]] = field(default_factory=list)
    loads: list[str] = field(default_factory=list)
    tags: set[str] = field(default_factory=set)
    text: str = ""

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.tags.add(tag)
        self.ids += [given["id"]] if "id" in given else []
        self.links += [given["href"]] if tag == "a" else []
        self.images += [given] if tag == "img" else []
        self.loads += [given[name] for name in ("src", "href", "srcset", "data", "action") if name in given]

    def handle_data(self, data: str) -> None:
        self.text += data


def parse(file: Path) -> Parsed:
    found = Parsed()
    found.feed(file.read_text())
    return found


# -------------------------------------------------------------------------------------------------- the page


def test_every_section_figure_and_table_of_a_full_run_is_there(single: Path) -> None:
    found = parse(single)
    for section in (section for section in RUN_SECTIONS if section.plates and section.anchor != "experiments"):
        assert section.anchor in found.ids
        assert section.sentence in found.text
        for plate in (plate for plate in section.plates if plate.name != "significance"):  # there is no switch
            assert f"figure-{plate.name}" in found.ids
            assert plate.caption in found.text
            for kind, magic in ((".png", b"\x89PNG"), (".pdf", b"%PDF")):
                assert (single.parent / "figures" / f"{plate.name}{kind}").read_bytes().startswith(magic)
    tables = sorted(file.stem for file in (single.parent / "tables").glob("*.csv"))
    assert tables and sorted(file.stem for file in (single.parent / "tables").glob("*.md")) == tables
    assert sorted(name.removeprefix("table-") for name in found.ids if name.startswith("table-")) == tables


def test_every_figure_has_its_section() -> None:
    shown = [plate.name for section in RUN_SECTIONS for plate in section.plates]
    assert sorted(shown) == sorted(RUN_FIGURES)


@pytest.mark.parametrize("which", ["single", "compared"])
def test_links_lead_somewhere_and_identifiers_are_unique(which: str, request: pytest.FixtureRequest) -> None:
    found = parse(request.getfixturevalue(which))
    assert len(set(found.ids)) == len(found.ids)
    assert {link.removeprefix("#") for link in found.links} <= set(found.ids)


@pytest.mark.parametrize("which", ["single", "compared"])
def test_the_page_is_one_file_that_loads_nothing(which: str, request: pytest.FixtureRequest) -> None:
    file: Path = request.getfixturevalue(which)
    found = parse(file)
    assert all(load.startswith(("#", "data:image/")) for load in found.loads)
    assert not found.tags & {"script", "link", "iframe", "object", "embed", "base"}
    text = re.sub(r"data:image/[^\"]*", "", file.read_text())
    assert not re.search(r"https?:|@import|url\(", text)
    for image in found.images:
        kind, content = image["src"].removeprefix("data:image/").split(";base64,")
        start = base64.b64decode(content)[:100]
        assert start.startswith(b"\x89PNG" if kind == "png" else b"<?xml")
        assert int(image["width"]) > 0 and int(image["height"]) > 0 and image["alt"]
    assert file.stat().st_size < 3e6


def test_whatever_comes_from_outside_is_escaped(single: Path) -> None:
    found = parse(single)
    assert found.text.count(HOSTILE) >= 3  # title, heading and corpus; the command has it in shell quotes
    assert "<b>bold" not in single.read_text() and "<script" not in single.read_text()


def test_the_command_makes_the_page_again(single: Path) -> None:
    command = next(line for line in parse(single).text.splitlines() if line.startswith("mini_gpt_pl report"))
    _, name, *args = shlex.split(command)
    before = single.read_bytes()
    assert name == "report"
    page.main(args)
    assert single.read_bytes() == before


def test_several_runs_are_compared_before_each_is_told(compared: Path) -> None:
    found = parse(compared)
    sections = [name for name in found.ids if name in {section.anchor for section in COMPARISON_SECTIONS}]
    assert sections == ["runs", "beta2", "seeds"] or sections == ["runs", "matched", "beta2", "seeds"]
    entries = [name for name in found.ids if re.fullmatch(r"run-\d", name)]
    assert entries == ["run-1", "run-2", "run-3"]
    assert found.ids.index("seeds") < found.ids.index("run-1")
    assert {f"#{entry}" for entry in entries} <= set(found.links)
    assert "Each run: a, b, c" in found.text
    for finding in story_findings(page.expand([compared.parent.parent])):
        assert f"{finding.topic}: {finding.said}" in found.text
    assert {file.stem for file in (compared.parent / "figures").glob("*.png")} >= {
        "beta2_pc1",
        "seeds",
        "run-3-backbone",
    }


def test_a_bare_run_leaves_out_what_it_has_no_data_for(tmp_path: Path) -> None:
    run = write_run(tmp_path / "bare", STEPS[:3], metrics=None)
    page.main([str(run.path)])
    found = parse(run.path / "report" / "report.html")
    assert not {"learning", "fisher", "switching", "logit-lens", "reheating"} & set(found.ids)
    assert {"nulls", "spectrum", "again"} <= set(found.ids)


def test_a_run_that_never_moved_still_has_a_page(tmp_path: Path) -> None:
    still = path_of(STEPS)[:1].expand(len(STEPS), -1)
    run = write_run(tmp_path / "still", STEPS, still, metrics=learning_curve(CURVE))
    page.main([str(run.path)])
    found = parse(run.path / "report" / "report.html")
    assert "no interval for any of its numbers" in found.text
    assert "learning" in found.ids and "backbone" not in found.ids


# -------------------------------------------------------------------------------------------------- headline


def test_the_verdict_is_whether_the_interval_leaves_out_zero(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", STEPS, metrics=learning_curve(CURVE))
    found, told = calibrate_run(run), headline(run)
    judged = [one for one in found.values() if one.low == one.low]
    stands_out = [row["verdict"].text == "**stands out**" for row in told.verdicts.rows]
    assert stands_out == [one.low > 0 or one.high < 0 for one in judged]
    assert told.without_interval == len(found) - len(judged)
    assert told.learned == (
        "Validation loss was lowest, 1.500 nats per token, at step 700 (it has risen by 0.250 since: over-fitting).",
        "Retrieval at long gaps, p_ood, was highest, 0.600, at step 400, and is 0.200 at the end.",
    )
    assert told.facts["snapshots"] == f"{len(STEPS)}, every 50 steps"


@pytest.mark.parametrize(
    ("out", "said"),
    [
        ((True, False), "Out of the null: a. Within the null: b."),
        ((True, True), "Out of the null: a; b."),
        ((False, False), "Within the null: a; b."),
    ],
)
def test_the_headline_names_what_stands_out(out: tuple[bool, bool], said: str) -> None:
    words = {True: "**stands out**", False: "within the null"}
    rows = [{"quantity": word(name), "verdict": word(words[one])} for name, one in zip("ab", out, strict=True)]
    assert Headline("", {}, (), tabulate("verdicts", "Verdicts", rows), 0).found == said


@pytest.mark.parametrize(
    ("outcome", "said"),
    [
        (None, "recorded up to step 900 of 4,000, its end is not on record"),
        ({"state": "diverged", "step": 77}, "diverged at step 77"),
        ({"state": "finished", "step": 1900}, "finished at step 1,900"),
    ],
)
def test_the_headline_tells_how_the_run_ended(tmp_path: Path, outcome: dict[str, Any] | None, said: str) -> None:
    run = write_run(tmp_path / "run", STEPS)
    if outcome:
        (run.path / "outcome.json").write_text(json.dumps(outcome))
    assert said in headline(run).sentence


# -------------------------------------------------------------------------------------------------- findings


def said(runs: list[Run]) -> dict[str, str]:
    return {finding.topic: finding.said for finding in story_findings(runs)}


def test_findings_count_the_runs_that_stand_out(tmp_path: Path) -> None:
    runs = comparable_runs(tmp_path)
    found = [calibrate_run(run)["pc1"] for run in runs]
    above = [run.path.name for run, one in zip(runs, found, strict=True) if one.low > 0]
    sentence = said(runs)["PC1 of the drift, raw, against the decaying walk"]
    assert sentence.startswith("of 3 runs from scratch ") and f"above in {len(above)}" in sentence
    assert f"{100 * min(one.excess for one in found):+.1f} pt to" in sentence


def test_findings_over_beta2_seeds_and_optimizers(tmp_path: Path) -> None:
    runs = []
    for k, (name, seed, beta2) in enumerate((("a", 1, 0.8), ("b", 1, 0.9), ("c", 1, 0.95), ("d", 2, 0.95))):
        settings = config(settings={**ADAMW, "betas": [0.9, beta2]}, seed=seed, steps=900)
        runs.append(write_run(tmp_path / name, STEPS, path_of(STEPS, k), settings, learning_curve(CURVE)))
    sgd = config("torch.optim.SGD", {"lr": 1e-3, "weight_decay": 0.5}, 1, 900)
    runs.append(write_run(tmp_path / "sgd", STEPS, path_of(STEPS, 9), sgd, learning_curve(CURVE)))
    found = said(runs)
    excess = [100 * calibrate_run(run)["pc1"].excess for run in runs]
    trend = found["Excess of PC1 of the drift, raw by beta2"]
    mean = (excess[2] + excess[3]) / 2
    assert f"{excess[0]:+.1f} pt at 0.8, {excess[1]:+.1f} pt at 0.9, {mean:+.1f} pt at 0.95" in trend
    ordered = sorted((excess[0], excess[1], mean))
    rises, falls = [excess[0], excess[1], mean] == ordered, [mean, excess[1], excess[0]] == ordered
    assert trend.split(" ")[0] == ("rises" if rises else "falls" if falls else "neither")
    assert "over 2 seeds" in found["Over seeds"]
    (optimizers,) = [text for topic, text in found.items() if topic.startswith("PC1 by optimizer")]
    assert "sgd " in optimizers and "c " in optimizers and "a " not in optimizers.split(".")[0].split(", ")
    assert found["Over-fitting"].startswith("validation loss rose again in 5 of 5 runs")


def test_findings_leave_out_what_diverged_and_set_gains_beside_the_control(tmp_path: Path) -> None:
    runs = comparable_runs(tmp_path)
    (runs[0].path / "outcome.json").write_text('{"state": "diverged", "step": 77}')
    for name, record in (
        ("control", {"factor": 1.0, "gain": 0.01}),
        ("low", {"lr": 3e-4, "gain": 0.25}),
        ("high", {"lr": 1e-3, "gain": 0.5}),
    ):
        runs.append(write_run(tmp_path / name, STEPS, metrics=learning_curve(CURVE)))
        (tmp_path / name / "reheat.json").write_text(json.dumps({"parent": "gone", **record}))
    found = said(runs)
    assert found["Diverged"].startswith("a (at step 77);")
    assert found["PC1 of the drift, raw, against the decaying walk"].startswith("of 2 runs from scratch")
    assert (
        found["Gain in p_ood by reheating"] == "lr 1e-3 +0.500, lr 3e-4 +0.250; without reheating, the control: +0.010."
    )


# ----------------------------------------------------------------------------------------- tables and sections


@pytest.mark.parametrize(
    ("cells", "kind"),
    [
        (["1.5", "-", "+0.2 ± 0.1", "", "−3", "81 %"], "number"),
        (["1.5", "AdamW"], "words"),
        (["word " * 12, "1"], "long"),
        ([], "number"),
    ],
)
def test_columns_are_set_by_what_they_hold(cells: list[str], kind: str) -> None:
    assert kind_of(cells) == kind


def test_a_table_goes_to_the_first_section_that_claims_it_or_to_the_end() -> None:
    shared = claimed(RUN_SECTIONS, ["overview", "table2_pc1_blocks", "windows", "unheard_of"])
    assert {anchor: names for anchor, names in shared.items() if names} == {
        "nulls": ["overview"],
        "spectrum": ["table2_pc1_blocks"],
        "growth": ["windows"],
        MORE.anchor: ["unheard_of"],
    }


# -------------------------------------------------------------------------------------------------- which runs


def test_a_folder_of_runs_stands_for_the_runs_in_it(tmp_path: Path) -> None:
    for name in ("b", "a", "deep/c"):
        write_run(tmp_path / name, STEPS[:3])
    write_run(tmp_path / "a" / "reheat" / "000100", STEPS[:3])  # a run inside a run
    write_run(tmp_path / "wandb" / "files", STEPS[:3])  # a copy of a configuration
    write_run(tmp_path / "unfinished", STEPS[:3])
    (tmp_path / "unfinished" / "trajectory.safetensors").unlink()
    told: list[str] = []
    found = page.expand([tmp_path], told.append)
    assert [str(run.path.relative_to(tmp_path)) for run in found] == ["a", "b", "deep/c"]
    assert told == [f"left out: {tmp_path / 'unfinished'} has no trajectory.safetensors"]
    assert [run.path for run in page.expand([tmp_path / "b", tmp_path / "a"])] == [tmp_path / "b", tmp_path / "a"]


def test_what_cannot_be_reported_on_is_one_line(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", STEPS[:3])
    with one_line_error("there is no run folder"):
        page.main([str(tmp_path / "missing")])
    (tmp_path / "empty").mkdir()
    with one_line_error("is no run folder and holds none"):
        page.main([str(tmp_path / "empty")])
    with one_line_error("cannot be written to .*give another --out"):
        page.main([str(run.path), "--out", str(run.path / "config.yaml")])
    with one_line_error("are the same folder"):
        page.main([str(run.path), str(run.path), "--out", str(tmp_path / "out")])
    (run.path / "trajectory.safetensors").unlink()
    with one_line_error("has no trajectory.safetensors"):
        page.main([str(run.path)])


def test_without_arguments_the_usage_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        page.main([])
    assert ended.value.code == 2
    assert "usage: mini_gpt_pl report" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------- progress


def test_without_a_terminal_every_step_is_a_line(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as log, Steps(Console(file=log)) as steps:
        steps.expect(2)
        steps.begin("one")
        steps.begin("two")
    assert (tmp_path / "log").read_text().splitlines() == ["1/2 one", "2/2 two"]


def test_on_a_terminal_there_is_a_bar_that_leaves_nothing_behind(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as log:
        console = Console(file=log, force_terminal=True, width=80)
        with Steps(console) as steps:
            steps.expect(2)
            steps.begin("one")
    assert "1/2 one" not in (tmp_path / "log").read_text()
    assert "\x1b[?25h" in (tmp_path / "log").read_text()  # the cursor is shown again


# --------------------------------------------------------------------------------------------- a real browser

# Test-only: shows a page in a frame of a given width and writes what it finds as JSON.
_WRAPPER = """<!doctype html><meta charset="utf-8"><body><pre id="found"></pre>
<iframe id="page" src="{source}" style="width:{width}px;height:900px;border:0"></iframe>
<script>
document.getElementById("page").onload = (event) => {{
  const page = event.target.contentDocument, root = page.documentElement;
  document.getElementById("found").textContent = JSON.stringify({{
    title: page.title,
    headings: [...page.querySelectorAll("h2")].map((part) => part.textContent),
    images: [...page.images].map((image) => image.complete && image.naturalWidth),
    width: root.clientWidth, scroll: root.scrollWidth,
    overflowing: [...page.body.querySelectorAll("*")].filter((part) => !part.closest(".box")
      && part.getBoundingClientRect().right > root.clientWidth + 1).map((part) => part.tagName),
  }});
}};
</script>
"""


@pytest.fixture(scope="module")
def browser() -> str:
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    return found


def run_browser(browser: str, folder: Path, address: str, *options: str) -> str:
    """Open a page without any network of its own and return what the browser printed."""
    quiet = ("--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update")
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-sync", *quiet)
    command = [browser, *flags, f"--user-data-dir={folder}", *options, address]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("which", ["single", "compared"])
def test_the_page_is_whole_in_a_browser(
    which: str, width: int, browser: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    file: Path = request.getfixturevalue(which)
    wrapper = tmp_path / "wrapper.html"
    wrapper.write_text(_WRAPPER.format(source=file.as_uri(), width=width))
    options = ("--hide-scrollbars", "--allow-file-access-from-files", "--virtual-time-budget=20000", "--dump-dom")
    dom = run_browser(browser, tmp_path / "profile", wrapper.as_uri(), *options)
    answer = re.search(r'<pre id="found">(.*?)</pre>', dom, re.DOTALL)
    assert answer
    found = json.loads(html.unescape(answer[1]))
    parsed = parse(file)
    assert found["title"] == (HOSTILE if which == "single" else "3 runs")
    assert len(found["images"]) == len(parsed.images) and min(found["images"]) > 100
    assert (found["width"], found["scroll"]) == (width, width)
    assert found["overflowing"] == []
    sections = RUN_SECTIONS if which == "single" else COMPARISON_SECTIONS
    expected = [section.title for section in sections if section.anchor in parsed.ids]
    assert [heading for heading in found["headings"] if heading in expected] == expected


def test_the_page_can_be_photographed_on_desk_and_phone(single: Path, browser: str, tmp_path: Path) -> None:
    for width in (1280, 390):
        picture = tmp_path / f"{width}.png"
        size = (f"--window-size={width},900", f"--screenshot={picture}")
        run_browser(browser, tmp_path / f"profile-{width}", single.as_uri(), *size)
        assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000
