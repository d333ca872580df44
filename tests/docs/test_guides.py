"""The guides hold: their code runs and prints what they show, their commands parse, and what they name exists.

In docs/how-to and docs/concepts:

* a ```python block is run, the blocks of a page in one namespace and one folder, in which `docs` and `configs` lie as
  they do in a checkout. `<!-- not run: reason -->` above a block leaves it out;
* a ```text block right behind a python block is what that prints; with `<!-- numbers vary -->` above it, but for
  digits;
* a ```console or ```bash block holds commands;
* a ```text block in the section "What goes wrong" quotes errors, a line each.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib.util
import io
import re
import runpy
import shlex
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pandas as pd
import pytest
from jsonargparse import ArgumentParser
from matplotlib.image import imread

from docs.tools import concept_figures
from mini_gpt_pl import main as cli
from mini_gpt_pl.metrics import registry
from mini_gpt_pl.presets import with_presets
from mini_gpt_pl.tasks import commands as listed_commands
from mini_gpt_pl.tasks import task_named, tasks
from mini_gpt_pl.training import cli as trainer_cli
from mini_gpt_pl.training.trust import split_trust

ROOT = Path(cli.__file__).resolve().parents[1]
PAGES = sorted([*(ROOT / "docs" / "how-to").glob("*.md"), *(ROOT / "docs" / "concepts").glob("*.md")])
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_COMMENT = re.compile(r"<!-- (not run: \S.*|numbers vary) -->\s*\Z")
_ERRORS = "What goes wrong"


@dataclass(frozen=True)
class Block:
    """A fenced block of a page; `mark` is the comment above it, `after_python` whether a python block ends there."""

    page: Path
    line: int
    language: str
    text: str
    mark: str
    section: str
    after_python: bool


def blocks(page: Path) -> list[Block]:
    text, found, python_end = page.read_text(), [], -1
    for match in _FENCE.finditer(text):
        above = text[: match.start()]
        comment = _COMMENT.search(above)
        before = above[: comment.start()] if comment else above
        follows = python_end >= 0 and not before[python_end:].strip()
        line = above.count("\n") + 1
        mark, section = comment[1] if comment else "", re.findall(r"^#+ (.*)$", _FENCE.sub("", above), re.MULTILINE)[-1]
        found.append(Block(page, line, match[1], match[2], mark, section, follows))
        python_end = match.end() if match[1] == "python" else -1
    return found


def all_blocks(language: str) -> list[Block]:
    return [block for page in PAGES for block in blocks(page) if block.language == language]


def spans() -> Iterator[tuple[Path, str]]:
    """Code in running text."""
    for page in PAGES:
        for found in re.findall(r"`([^`\n]+)`", _FENCE.sub("", page.read_text())):
            yield page, found


# --------------------------------------------------------------------------------------------------- python


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_runs_and_prints_what_the_page_shows(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("docs", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    namespace: dict[str, Any] = {"__name__": "__main__"}
    printed = ""
    for block in blocks(page):
        if block.language == "python" and not block.mark.startswith("not run"):
            printed = _run(block, namespace)
        elif block.language == "text" and block.after_python:
            assert _comparable(printed, block.mark) == _comparable(block.text, block.mark), f"{page}:{block.line}"


def _run(block: Block, namespace: dict[str, Any]) -> str:
    # Blank lines above it, so that an error names the page's own line.
    code = compile("\n" * block.line + block.text, str(block.page), "exec")
    out = io.StringIO()
    with contextlib.redirect_stdout(out), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(code, namespace)
    return out.getvalue()


def _comparable(text: str, mark: str) -> list[str]:
    if mark == "numbers vary":
        text = re.sub(r"[+-]?\d+(\.\d+)?(e[+-]\d+)?", "#", text)
    return [" ".join(line.split()) for line in text.strip().splitlines()]


# ------------------------------------------------------------------------------------------------- commands


class _Parsed(Exception):
    """A command line was understood; nothing more is done."""


@cache
def parser(task: str = "stories") -> ArgumentParser:
    """The parser of the commands that train or evaluate."""

    class Stopped(trainer_cli.ProbedCLI):
        def parse_arguments(self, parser: Any, args: Any) -> NoReturn:
            raise _Parsed(parser)

    with pytest.raises(_Parsed) as caught:
        Stopped(
            task,
            save_config_callback=trainer_cli.RunConfig,
            auto_configure_optimizers=False,
            parser_kwargs={
                "exit_on_error": False,
                **{name: {"exit_on_error": False} for name in trainer_cli.subcommands(task)},
            },
            args=[],
        )
    found: ArgumentParser = caught.value.args[0]
    return found


_TRAINER = set(listed_commands(trainer=True))


def commands() -> list[tuple[str, str]]:
    """Commands of ours on the pages: where, and the command on one line."""
    found = []
    for block in [*all_blocks("console"), *all_blocks("bash")]:
        for line in block.text.replace("\\\n", " ").splitlines():
            found.append((f"{block.page.name}:{block.line}", line))
    found += [(page.name, span) for page, span in spans()]
    ours = re.compile(r"(?:[A-Z_]+=\S* )*(python cli\.py|mini_gpt_pl|python -m (mini_gpt_pl|benchmarks)\.\S+) \S")
    return [(where, " ".join(line.split("  #")[0].split())) for where, line in found if ours.match(line)]


def test_commands_parse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    found = commands()
    assert len(found) > 20
    for where, command in found:
        words = shlex.split(command)
        words = words[next(i for i, word in enumerate(words) if "=" not in word) :]
        try:
            _parse(words, monkeypatch)
        except _Parsed:
            continue
        except BaseException as error:
            pytest.fail(f"{where}: {command}\n{error}")
        pytest.fail(f"{where}: {command}\nnothing parsed it")


def _parse(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if words[:2] == ["python", "-m"]:
        assert importlib.util.find_spec(words[2]), f"no module {words[2]}"
        _parse_plain(lambda: runpy.run_module(words[2], run_name="__main__"), words[2:], monkeypatch)
        return
    args, _ = split_trust(with_presets(words[2:] if words[0] == "python" else words[1:]))
    if args[0] in listed_commands(trainer=False):
        _parse_plain(cli.main, ["cli.py", *args], monkeypatch)
        return
    assert args[0] in _TRAINER, f"no command {args[0]}"
    parser(task_named(args)).parse_args(args)
    raise _Parsed


def _parse_plain(main: Any, argv: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a command as far as its options."""
    parse = argparse.ArgumentParser.parse_args

    def stop(self: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> NoReturn:
        parse(self, *args, **kwargs)
        raise _Parsed

    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # runpy's, of modules that were imported before
        patch.setattr("sys.argv", argv)
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        main()


@cache
def options() -> frozenset[str]:
    """Every option of every command."""
    found: set[str] = set()
    for task, name in [(listed, name) for listed in tasks() for name in trainer_cli.subcommands(listed)]:
        found |= set(parser(task)._subcommands_action._name_parser_map[name]._option_string_actions)  # type: ignore[union-attr]
    for file in [*(ROOT / "mini_gpt_pl").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]:
        found |= set(re.findall(r"add(?:_argument)?\(\s*\"(--\w+)\"", file.read_text()))
    return frozenset(found)


def test_options_in_the_text_exist() -> None:
    named = {
        (page.name, option)
        for page, span in spans()
        if not re.match(r"(pip|wandb|torchrun|git) ", span)
        for option in re.findall(r"(?<![\w-])--[\w.-]+", span)
    }
    assert len(named) > 15
    unknown = {(page, option) for page, option in named if option.split("=")[0] not in options()}
    assert not {(page, o) for page, o in unknown if ".init_args." not in o}


# ------------------------------------------------------------------------------------------ metrics, errors


def test_metrics_in_the_text_are_logged() -> None:
    """As a kept run logged them or, where it had no such probe, as the glossary has them, which runs are held to."""
    logged = set(pd.read_csv(ROOT / "docs" / "h100_full" / "metrics.csv", nrows=0).columns)
    families = {name.split("/")[0] for name in logged if "/" in name}
    unknown = set()
    for page, span in spans():
        if re.fullmatch(rf"({'|'.join(families)})/[\w/<>*.]+", span) and not span.endswith("/"):
            form = re.sub(r"<\w+>|\*", "§", span)
            pattern = re.compile(re.escape(form).replace("§", r"[\w.]+(/[\w.]+)*"))
            known = any(pattern.fullmatch(name) for name in logged) or registry.find(form.replace("§", "trunk"))
            if not known:
                unknown.add((page.name, span))
    assert not unknown


@cache
def messages() -> list[re.Pattern[str]]:
    """Every text in the code that is long enough to be an error, with its holes."""
    found = []
    files = [ROOT / "cli.py", *(ROOT / "callbacks").glob("*.py"), *(ROOT / "mini_gpt_pl").rglob("*.py")]
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [str(p.value) if isinstance(p, ast.Constant) else None for p in node.values]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                parts = [node.value]
            else:
                continue
            if sum(len(part) for part in parts if part) >= 15:
                found.append(re.compile("".join(".+" if part is None else re.escape(part) for part in parts)))
    return found


def test_quoted_errors_are_the_programs_own() -> None:
    sections = [block for block in all_blocks("text") if block.section == _ERRORS]
    quoted = [(block, line) for block in sections for line in block.text.splitlines()]
    lines = [(block, line.removeprefix("mini_gpt_pl: error: ")) for block, line in quoted if line.strip()]
    assert len(lines) > 30
    strange = [f"{b.page.name}: {line}" for b, line in lines if not any(m.fullmatch(line) for m in messages())]
    assert not strange


# -------------------------------------------------------------------------------------------------- figures


def test_figures_are_drawn_again_as_they_are_committed(tmp_path: Path) -> None:
    files = concept_figures.draw(ROOT / "docs", tmp_path)
    committed = ROOT / "docs" / "concepts" / "figures"
    assert {file.name for file in files} == {file.name for file in committed.glob("*.png")}
    for file in files:
        assert file.stat().st_size < 100_000
        assert _pixels(file) == pytest.approx(_pixels(committed / file.name), abs=0.02)


def _pixels(file: Path) -> Any:
    """Mean colour of each of 12 x 12 fields: fonts differ a little between versions, curves do not."""
    image = imread(file)[..., :3]
    rows = np.array_split(image, 12, axis=0)
    return np.array([[field.mean() for field in np.array_split(row, 12, axis=1)] for row in rows])
