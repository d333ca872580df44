"""Files are written whole or not at all, and beside nothing that somebody put in their way."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mini_gpt_pl.atomic import replacing, write_bytes, write_text


def test_text_and_bytes_are_written_as_they_are(tmp_path: Path) -> None:
    write_text(tmp_path / "new" / "a.txt", "θ\r\n")
    write_bytes(tmp_path / "new" / "b", b"\x00\xff", sync=False)
    assert (tmp_path / "new" / "a.txt").read_bytes() == "θ\r\n".encode()
    assert (tmp_path / "new" / "b").read_bytes() == b"\x00\xff"
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["a.txt", "b"]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    write_text(file, "old")
    with pytest.raises(RuntimeError), replacing(file) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]


def test_a_planted_link_is_not_followed(tmp_path: Path) -> None:
    outside, folder = tmp_path / "outside", tmp_path / "run"
    folder.mkdir()
    outside.write_text("untouched")
    for name in (".a.txt.partial", "a.txt"):
        (folder / name).symlink_to(outside)
    write_text(folder / "a.txt", "new")
    assert outside.read_text() == "untouched"
    assert not (folder / "a.txt").is_symlink() and (folder / "a.txt").read_text() == "new"


def test_permissions_are_those_of_any_new_file(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("")
    write_text(tmp_path / "a.txt", "")
    assert os.stat(tmp_path / "a.txt").st_mode == os.stat(plain).st_mode
