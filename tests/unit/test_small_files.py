"""Files of the kernel's that name what strangers have named."""

from __future__ import annotations

from pathlib import Path

from garden_py.backend.host.small_files import lines_of, read_small, unescape


def test_only_the_newline_ends_a_line() -> None:
    """All that str.splitlines takes for an end may stand in a name."""
    assert lines_of("a\x0b\x0c\x1c\x85\u2028b\nc\n") == ["a\x0b\x0c\x1c\x85\u2028b", "c"]
    assert lines_of("") == []


def test_paths_of_mounts_are_as_they_were_before_the_kernel_wrote_them() -> None:
    """Letters beyond ASCII stay, and what only looks like an escape was written with one."""
    assert unescape("/a\\040b\\011\u00fc") == "/a b\t\u00fc"
    assert unescape("/\\134040") == "/\\040"


def test_bytes_that_are_no_text_cost_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "stat").write_bytes(b"7 (\xff) S 1\n")
    assert read_small(tmp_path / "stat").rpartition(")")[2].split() == ["S", "1"]
