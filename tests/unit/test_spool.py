"""Results on disk: complete or not there, and nobody stumbles over the one that is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from supervisor.spool import Spool


def test_a_record_comes_back_as_it_was(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "deep" / "results")
    record = {"text": "ü\0\ud800", "list": [1, None, 2.5]}
    spool.put("a", record)
    spool.put("b", {})
    assert spool.names() == ["a", "b"]
    assert dict(spool.records()) == {"a": record, "b": {}}
    spool.remove("a")
    spool.remove("a")
    assert spool.names() == ["b"]


def test_an_empty_spool_needs_no_directory(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "missing")
    assert (spool.names(), list(spool.records())) == ([], [])


def test_it_is_nobody_elses_business(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "results")
    spool.put("a", {})
    assert spool.directory.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("content", [b"", b'{"half": ', b"\xff\xfe\0"])
def test_what_makes_no_sense_is_set_aside(tmp_path: Path, content: bytes) -> None:
    spool = Spool(tmp_path)
    (tmp_path / "bad.json").write_bytes(content)
    spool.put("good", {"n": 1})
    assert dict(spool.records()) == {"bad": None, "good": {"n": 1}}
    spool.set_aside("bad")
    assert spool.names() == ["good"]
    assert (tmp_path / "bad.unreadable").read_bytes() == content


def test_a_write_that_was_cut_off_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "cut.tmp").write_text("{")
    assert Spool(tmp_path).names() == []
