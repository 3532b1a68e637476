"""The bar of a copy: it changes nothing of what passes, and is there only where somebody looks."""

from __future__ import annotations

import pytest

from garden_py.cli.progress import counted

CHUNKS = [b"a" * 400_000, b"b" * 600_000]


def test_bytes_are_counted_as_they_pass(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a terminal: how much of how much. Names with brackets are shown as they are."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "150")
    monkeypatch.setenv("TERM", "xterm")
    assert list(counted(CHUNKS, "src[1]", total=1_000_000, show=True)) == CHUNKS
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "src[1]" in shown.err
    assert "1.0/1.0 MB" in shown.err


def test_nobody_looks(capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing goes into a log or a pipe."""
    assert list(counted(CHUNKS, "src", total=None, show=False)) == CHUNKS
    assert capsys.readouterr() == ("", "")
