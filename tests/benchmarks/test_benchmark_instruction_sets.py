"""The script that runs the tests under other instruction sets counts what pytest found, and fails when it does."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import instruction_sets
from benchmarks.instruction_sets import SETTINGS, Result, capability, counts, emulable, environment, main, table

SMALL = """
import os
import pytest

def test_good():
    assert os.environ["ATEN_CPU_CAPABILITY"] == "default" and os.environ["OMP_NUM_THREADS"] == "2"

@pytest.mark.parametrize("x", [1, 2])
def test_bad(x):
    assert x == {bad}

@pytest.mark.skip
def test_left_out():
    pass

@pytest.fixture
def broken():
    yield
    raise RuntimeError

def test_with_a_broken_fixture({fixture}):
    pass
"""


def small_suite(folder: Path, bad: str, fixture: str) -> list[str]:
    """Options of pytest that run a suite of the test's own."""
    file = folder / "test_small.py"
    file.write_text(SMALL.format(bad=bad, fixture=fixture))
    return ["--", str(file), "--rootdir", str(folder), "-c", "/dev/null", "-p", "no:cacheprovider"]


@pytest.fixture
def obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU with AVX2 that does what it is told: asking the real one takes an import of PyTorch each time."""
    monkeypatch.setattr(instruction_sets, "capability", lambda setting: setting.get("ATEN_CPU_CAPABILITY", "avx2"))
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # their imports take longer than the tests


@pytest.mark.usefixtures("obeyed")
def test_failures_are_counted_and_named_and_are_the_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--all", "--settings", "default", "--threads", "2", *small_suite(tmp_path, "1", "broken")]
    assert main(given) == 1
    printed = capsys.readouterr().out
    assert "| default, 2 threads | 2 | 2 | 1 |" in printed
    assert "failed under default, 2 threads: test_small::test_bad[2]" in printed
    assert "test_small::test_with_a_broken_fixture" in printed and "test_good" not in printed


@pytest.mark.usefixtures("obeyed")
def test_a_sound_suite_ends_with_0_and_one_without_tests_does_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--all", "--settings", "default", "--threads", "2", *small_suite(tmp_path, "x", "")]
    assert main(given) == 0
    assert "| default, 2 threads | 4 | 0 | 1 |" in capsys.readouterr().out
    assert main([*given, "-k", "nothing"]) == 1
    assert "pytest ended with status 5" in capsys.readouterr().out


def test_a_setting_beyond_the_cpu_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(instruction_sets, "capability", lambda setting: "avx2")
    for given, words in (
        (["--settings", "avx512"], "cannot emulate avx512: choose from default, avx2, compatible"),
        (["--settings", "default"], "PyTorch uses avx2 where the setting default asks for default"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(given)
        assert caught.value.code == 2 and words in capsys.readouterr().err


def test_pytorch_obeys_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    own = capability({})  # the CPU's, not the variable's
    assert "ATEN_CPU_CAPABILITY" not in environment({})
    if own in SETTINGS:
        assert list(emulable(own))[:-1] == list(SETTINGS)[: list(SETTINGS).index(own) + 1]
        assert capability(SETTINGS["default"]) == "default"
    else:
        assert emulable(own) == {own: {}}


def test_a_test_that_is_listed_twice_counts_once() -> None:
    found = '<x><testcase classname="a" name="b"><error/></testcase><testcase classname="a" name="b"/></x>'
    assert counts(found) == (0, ("a::b",), 0)
    assert not Result("avx2, 1 thread", 0, (), 0, 1.0, 0).sound
    assert (
        table([Result("avx2, 1 thread", 7, (), 1, 61.4, 0)]).splitlines()[-1] == "| avx2, 1 thread | 7 | 0 | 1 | 61 |"
    )
