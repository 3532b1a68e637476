"""Runtime bundles that differ from the present one: another build, a later or an earlier version, a broken one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import garden_py
from garden_py.backend.rootfs.runtime_bundle import RuntimeBundle, build_runtime_bundle

PACKAGE = Path(garden_py.__file__).parent


def copy_package(place: Path) -> Path:
    """A copy of the agent's sources, to be changed."""
    package = place / "garden_py"
    shutil.copytree(PACKAGE / "agent", package / "agent", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("__init__.py", "wire.py"):
        shutil.copyfile(PACKAGE / name, package / name)
    return package


def build_changed(parent: Path, place: Path, change: Callable[[Path], None]) -> RuntimeBundle:
    """A bundle beside the others in `parent`, of sources that were changed.

    Args:
        parent: where the bundles are.
        place: for the sources; must not exist.
        change: called with the package's directory.
    """
    package = copy_package(place)
    change(package)
    return build_runtime_bundle(parent, package)


def replace_in(file: Path, old: str, new: str) -> None:
    """Change a source; the text must be there."""
    text = file.read_text()
    assert old in text, f"{file} does not hold {old!r}"
    file.write_text(text.replace(old, new, 1))


def append(file: str, line: str) -> Callable[[Path], None]:
    """A change for `build_changed`: one more line at a file's end."""

    def change(package: Path) -> None:
        with (package / file).open("a") as stream:
            stream.write(f"\n{line}\n")

    return change
