"""The command line about images and disk space, on a real server."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from kit.oci_images import Layout, busybox_layer, entry
from kit.server import running_server
from test_cli_session import Shell, Terminal

pytestmark = [pytest.mark.root, pytest.mark.host]


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    layout = Layout(tmp_path_factory.mktemp("images") / "layout")
    config = {"Env": ["WHO=image"], "Cmd": ["sh", "-c", "echo hello from $WHO"], "Labels": {"a": "b"}}
    layout.add("1", [busybox_layer(entry("content", b"x" * 200_000))], config=config)
    return layout


@pytest.fixture(scope="module")
def garden() -> Iterator[Shell]:
    with running_server("--store-size", "1G") as server:
        yield Shell(server.address)


def test_pull_list_inspect_remove(garden: Shell, layout: Layout) -> None:
    image = layout.reference("1")
    image_id = garden("image", "pull", image).strip()
    assert image_id.startswith("sha256:")
    assert garden("image", "pull", "-q", image).strip() == image_id
    (listed,) = json.loads(garden("image", "ls", "-o", "json"))
    assert (listed["id"], listed["names"], listed["in_use"]) == (image_id, [image], 0)
    table = garden("image", "ls")
    assert image in table
    assert image_id[7:19] in table
    shown = garden("image", "inspect", image_id[7:19])
    for text in ("cmd", "hello from $WHO", "WHO=image", "a=b", "linux/amd64"):
        assert text in shown
    garden("image", "rm", image)
    assert garden("image", "ls", "-q") == ""
    garden("image", "rm", image, code=1)
    garden("image", "inspect", "nonsense", code=1)


def test_a_pull_on_a_terminal_shows_a_bar(garden: Shell, layout: Layout) -> None:
    terminal = Terminal(garden.environ, "image", "pull", layout.reference("1"))
    terminal.wait_for(r"1/1 layers")
    terminal.wait_for(r"sha256:[0-9a-f]{64}")
    assert terminal.process.wait(30) == 0


def test_what_an_image_says_is_run_without_a_program(garden: Shell, layout: Layout) -> None:
    handle = garden("create", "--image", layout.reference("1")).strip()
    assert garden("run", handle) == "hello from image\n"
    assert garden("run", "--entrypoint", handle, "echo", "other") == "other\n"
    shown = garden("info", handle)
    assert layout.reference("1") in shown
    assert re.search("image id +sha256:", shown)
    assert re.search("labels +a=b\n", shown)
    garden("image", "rm", layout.reference("1"), code=1)
    garden("destroy", handle)


def test_import_and_prune(garden: Shell, tmp_path: Path) -> None:
    tar = tmp_path / "root.tar"
    tar.write_bytes(busybox_layer(entry("content", b"imported")))
    first = garden("image", "import", str(tar), "tool:1").strip()
    assert garden("image", "import", "-", "tool:2", stdin=tar.read_bytes()).strip() == first
    handle = garden("create", "--image", "store:tool:1").strip()
    assert garden("run", handle, "cat", "/content") == "imported"
    assert first not in garden("image", "prune", "--all")
    garden("destroy", handle)
    assert first in garden("image", "prune", "--all")
    garden("image", "import", str(tmp_path / "nothing"), "tool:3", code=1)
    garden("image", "import", "-", "tool:3", stdin=b"no tar " * 200, code=1)


def test_references_that_are_none(garden: Shell) -> None:
    for arguments in (
        ("image", "pull", "busybox"),
        ("create", "--image", "ftp://x"),
        ("image", "import", "-", "Upper"),
    ):
        garden(*arguments, code=2)
    garden("create", "--image", "docker:///x", "--image-user", "me", code=2)


def test_disk_limits(garden: Shell) -> None:
    handle = garden("create", "--disk", "10M").strip()
    assert "disk 10.0M" in garden("limits", handle)
    garden("run", handle, "dd", "if=/dev/zero", "of=/root/a", "bs=1M", "count=12", "conv=fsync", code=1)
    assert "disk 40.0M with the image" in garden("limits", handle, "--disk", "40M", "--disk-scope", "total")
    garden("run", handle, "dd", "if=/dev/zero", "of=/root/a", "bs=1M", "count=12", "conv=fsync")
    headings, figures = garden("metrics", handle).splitlines()
    assert re.match(r"[12]\d\.\dM +[12]\d\.\dM ", figures[headings.index("DISK") :])
    garden("limits", handle, "--disk-inodes", "100", code=1)
    garden("limits", handle, "--disk", "5", code=2)
    garden("destroy", handle)
