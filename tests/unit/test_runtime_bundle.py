"""The runtime bundle: complete, closed to others, built once."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from garden_py.backend.rootfs import runtime_bundle
from garden_py.backend.rootfs.runtime_bundle import RuntimeBundle, RuntimeBundleError, build_runtime_bundle

# Modules PID 1 may have loaded once it serves. Each further one is paid for in every container.
ALLOWED_MODULES = {
    "__future__", "__main__", "_abc", "_codecs", "_ctypes", "_frozen_importlib", "_frozen_importlib_external",
    "_imp", "_io", "_signal", "_socket", "_thread", "_warnings", "_weakref", "abc", "builtins", "codecs",
    "encodings", "encodings.aliases", "encodings.utf_8", "errno", "fcntl", "io", "marshal", "posix", "select",
    "sys", "time", "winreg", "zipimport",
}  # fmt: skip


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> RuntimeBundle:
    return build_runtime_bundle(tmp_path_factory.mktemp("bundles"))


def run_in_bundle(bundle: RuntimeBundle, code: str) -> str:
    *command, _ = bundle.argv(str(bundle.directory.parent))
    env = dict(item.split("=", 1) for item in bundle.env)
    return subprocess.run([*command, code], check=True, capture_output=True, text=True, env=env).stdout


def test_the_agent_stays_within_its_import_budget(bundle: RuntimeBundle) -> None:
    """Start-up time and memory of every container hang on this list."""
    output = run_in_bundle(bundle, "import garden_py.agent.main, sys; print(*sys.modules)")
    loaded = {name for name in output.split() if not name.startswith("garden_py")}
    assert loaded <= ALLOWED_MODULES
    assert "garden_py.agent.files" not in output.split()


def test_everything_loaded_comes_from_the_bundle(bundle: RuntimeBundle) -> None:
    """A library of the host would be missing in the container, or be the image's."""
    code = "import garden_py.agent.main, garden_py.agent.files; print(open('/proc/self/maps').read())"
    paths = {line.split()[-1] for line in run_in_bundle(bundle, code).splitlines() if "/" in line}
    assert paths
    assert all(path.startswith(str(bundle.directory)) for path in paths), paths


def test_a_library_archive_of_the_image_is_not_used(bundle: RuntimeBundle) -> None:
    """Python would take `lib/python3xx.zip` of any directory above its own, up to the image's /lib."""
    planted = bundle.directory.parent / "lib" / f"python{sys.version_info[0]}{sys.version_info[1]}.zip"
    planted.parent.mkdir()
    with zipfile.ZipFile(planted, "w") as archive:
        archive.writestr("encodings/__init__.py", "raise SystemExit('code of the image')")
    try:
        paths = run_in_bundle(bundle, "import sys; print(*sys.path, sep='\\n')").splitlines()
    finally:
        shutil.rmtree(planted.parent)
    assert all(path.startswith(str(bundle.directory)) for path in paths), paths


def test_tar_works_without_compression_libraries(bundle: RuntimeBundle) -> None:
    """The built-in programs import tarfile; three libraries less are copied for it."""
    assert (
        run_in_bundle(bundle, "import garden_py.agent.files, tarfile; print(tarfile.__name__)") == "tarfile\n"
    )


def test_network_code_stays_on_the_host(bundle: RuntimeBundle) -> None:
    """PID 1 must not even have the code that could open the network."""
    names = {path.name for path in bundle.directory.rglob("*.pyc")}
    assert "main.pyc" in names
    assert not names & {"netrules.pyc", "rtnetlink.pyc", "nft.pyc"}


def test_nobody_else_can_write_it(bundle: RuntimeBundle) -> None:
    """It is code that runs as PID 1 of every container (CVE-2019-5736 is the class)."""
    for path in [bundle.directory, *bundle.directory.rglob("*")]:
        status = path.lstat()
        assert not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH), path
        assert status.st_mode & stat.S_IROTH, path
        assert status.st_uid == os.geteuid(), path


def test_a_tight_umask_of_the_server_does_not_close_it(tmp_path: Path) -> None:
    """The directory that is mounted is entered by users of other uid ranges."""
    before = os.umask(0o077)
    try:
        bundle = build_runtime_bundle(tmp_path / "runtime")
    finally:
        os.umask(before)
    for path in (bundle.directory.parent, bundle.directory, bundle.directory / "lib"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o755


def test_the_loader_ignores_the_images_preload_list(bundle: RuntimeBundle) -> None:
    """/etc/ld.so.preload of an image would put any code into PID 1."""
    assert b"/etc/ld.so.preload" not in (bundle.directory / "lib" / bundle.loader).read_bytes()


def test_a_second_build_finds_the_first(bundle: RuntimeBundle) -> None:
    """Every server start calls it."""
    before = bundle.directory.stat().st_ino
    assert build_runtime_bundle(bundle.directory.parent) == bundle
    assert bundle.directory.stat().st_ino == before


def test_racing_builders_agree_and_leave_nothing_behind(tmp_path: Path) -> None:
    """Two servers may start at once on a fresh host. Not threads, of which Python's parser takes one at a time."""
    build = "from garden_py.backend.rootfs.runtime_bundle import *; from pathlib import Path; import sys; "
    build += "print(build_runtime_bundle(Path(sys.argv[1])).directory)"
    racing = [
        subprocess.Popen([sys.executable, "-c", build, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    built = {process.communicate(timeout=120)[0].strip() for process in racing}
    assert [process.returncode for process in racing] == [0] * 4
    assert built == {str(path) for path in tmp_path.iterdir()}
    assert len(built) == 1


def test_the_command_line_names_paths_below_the_mount(bundle: RuntimeBundle) -> None:
    """The parent is mounted, so that a container keeps the version it was started with."""
    argv = bundle.argv("/run/garden/")
    assert argv[0] == f"/run/garden/{bundle.version}/lib/{bundle.loader}"
    assert f"/run/garden/{bundle.version}/python3" in argv


def test_an_executable_that_is_no_elf_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message names the file; a traceback from a parser would not help an operator."""
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\n")
    monkeypatch.setattr(sys, "_base_executable", str(script))
    with pytest.raises(RuntimeBundleError, match=str(script)):
        build_runtime_bundle(tmp_path / "bundles")


def test_a_musl_interpreter_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its loader has neither --library-path semantics nor the layout this module copies."""
    monkeypatch.setattr(
        runtime_bundle, "_read_elf_interpreter", lambda path: Path("/lib/ld-musl-x86_64.so.1")
    )
    with pytest.raises(RuntimeBundleError, match="musl"):
        build_runtime_bundle(tmp_path)


def test_a_missing_library_is_named() -> None:
    """`ldd` lists it and exits 0."""
    output = "\tlibnope.so.1 => not found\n"
    with pytest.raises(RuntimeBundleError, match=r"libnope\.so\.1"):
        list(runtime_bundle._parse_ldd(Path("/usr/bin/python3"), output))
