"""The runtime bundle: what the agent needs to run in any root file system, built once per host.

An image may hold no Python and no libc, so the server copies its own interpreter, that one's libraries and
loader and the few modules the agent imports into a directory, which is bind-mounted read-only into every
container. PID 1 is started through the copied loader with the copied library path, so nothing of the image is
ever loaded into it.

Layout of `<parent>/<version>/`::

    python3                       the interpreter
    lib/ld-linux-x86-64.so.2      its loader (another name on another architecture)
    lib/libc.so.6 ...             the libraries of the interpreter and of the extension modules
    lib/python3.11/*.pyc          modules of the standard library, compiled, without source
    lib/python3.11/lib-dynload/   extension modules that are not built into the interpreter
    lib/python3.11/garden_py/     the agent
    lib/python311.zip             empty, see `_fill`
"""

from __future__ import annotations

import ast
import hashlib
import importlib.machinery
import json
import os
import platform
import py_compile
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

_COMMAND_TIMEOUT_S = 60.0
_PACKAGE = Path(__file__).resolve().parents[2]
_HOST_ONLY = frozenset({"netrules.py", "rtnetlink.py", "nft.py"})  # run on the host's side of the launcher
_ENTRY = "from garden_py.agent.main import main; main({version!r})"

# What the interpreter imports on its own before the first line of the agent, and the landmark by which it
# recognises its library (Modules/getpath.py: os.pyc).
_STARTUP_MODULES = (
    "encodings",
    "encodings.aliases",
    "encodings.utf_8",
    "encodings.ascii",
    "encodings.latin_1",
    "os",
)

# Run by the interpreter to be copied: which files do the agent's modules need? Compression is left out; the
# modules that offer it survive its absence, and it would bring three more libraries.
_PROBE = """
import sys
for absent in ("bz2", "lzma", "zlib"):
    sys.modules[absent] = None
sys.path.insert(0, sys.argv[1])
for name in sys.argv[2:]:
    __import__(name)
found = {}
for name, module in list(sys.modules.items()):
    origin = getattr(getattr(module, "__spec__", None), "origin", None)
    if module is not None and name != "__main__":
        found[name] = origin
print(found)
"""


# Keeps the C library away from the image's files. LC_ALL stops Python from trying C.UTF-8, whose files may
# name a character set and so have a gconv module loaded; `:` is the one TZ for which glibc opens nothing: if
# unset, it reads /etc/localtime, which may be a FIFO (glibc time/tzset.c).
_ENVIRONMENT = ("LC_ALL=C", "TZ=:")


class RuntimeBundleError(Exception):
    """No runtime bundle can be built on this host."""


@dataclass(frozen=True, slots=True)
class RuntimeBundle:
    """A runtime bundle on this host.

    Attributes:
        directory: absolute path on the host; its parent is what containers mount.
        version: name of the directory, a hash of what it was built from.
        loader: file name of the dynamic loader in `lib/`.
        env: complete environment of PID 1, `NAME=value`; its children never see it.
    """

    directory: Path
    version: str
    loader: str
    env: tuple[str, ...] = _ENVIRONMENT

    def argv(self, mounted_at: str) -> list[str]:
        """PID 1's command line when the bundle's *parent* directory is mounted at `mounted_at`."""
        here = f"{mounted_at.rstrip('/')}/{self.version}"
        return [
            f"{here}/lib/{self.loader}",
            "--inhibit-cache",  # never look into the image's /etc/ld.so.cache
            "--library-path",
            f"{here}/lib",
            f"{here}/python3",
            "-I",  # no environment variables, no user site, no script directory
            "-S",  # no site module
            "-B",  # the bundle is read-only
            "-X",
            "utf8",  # no locale, so no locale files of the image
            "-c",
            _ENTRY.format(version=self.version),
        ]


def build_runtime_bundle(parent: Path, package: Path = _PACKAGE) -> RuntimeBundle:
    """Build the bundle for the running interpreter below `parent`, or find it built.

    Safe to call from several servers at once: it is built aside and renamed into place. Bundles of other
    versions stay, since running containers may use them.

    Args:
        parent: made (0755) if missing; must be on a file system that containers may execute from.
        package: directory of the package `garden_py` whose agent goes in.

    Raises:
        RuntimeBundleError: the interpreter is not one that can be copied (not ELF, musl, a library missing).
        OSError: the files cannot be read or written.
    """
    interpreter = _base_interpreter()
    loader = _read_elf_interpreter(interpreter)
    if "ld-musl" in loader.name:
        raise RuntimeBundleError(
            f"{interpreter} is linked with musl ({loader}); the agent needs a glibc interpreter: "
            "run the server with one"
        )
    version = _version(interpreter, loader, package)
    parent.mkdir(parents=True, exist_ok=True)
    parent.chmod(0o755)  # containers of any uid range enter it, whatever our umask
    bundle = RuntimeBundle((parent / version).resolve(), version, loader.name)
    if not bundle.directory.is_dir():
        _build_aside(parent, bundle, interpreter, loader, package)
    return bundle


def _base_interpreter() -> Path:
    """The real executable behind a virtual environment."""
    executable = getattr(sys, "_base_executable", None) or sys.executable
    if not executable:
        raise RuntimeBundleError("the running interpreter does not know its own path")
    return Path(executable).resolve(strict=True)


def _read_elf_interpreter(executable: Path) -> Path:
    """PT_INTERP of an ELF file: the dynamic loader it asks for. elf(5)."""
    with executable.open("rb") as file:
        header = file.read(64)
        if header[:4] != b"\x7fELF" or header[4] != 2 or header[5] != 1:
            raise RuntimeBundleError(f"{executable} is no 64 bit little endian ELF file")
        table_offset = int.from_bytes(header[32:40], "little")
        entry_size = int.from_bytes(header[54:56], "little")
        for index in range(int.from_bytes(header[56:58], "little")):
            file.seek(table_offset + index * entry_size)
            entry = file.read(entry_size)
            if int.from_bytes(entry[:4], "little") == 3:  # PT_INTERP
                file.seek(int.from_bytes(entry[8:16], "little"))
                path = file.read(int.from_bytes(entry[32:40], "little")).rstrip(b"\0")
                return Path(os.fsdecode(path))
    raise RuntimeBundleError(f"{executable} is statically linked; it could not load extension modules")


def _version(interpreter: Path, loader: Path, package: Path) -> str:
    """A cheap key for all that goes in: the interpreter, the C library (by its loader), our own sources.

    This module is one of them: it decides what is built.
    """
    digest = hashlib.sha256()
    facts: list[object] = [sys.version, platform.machine()]
    for path in (interpreter, loader.resolve(strict=True)):
        status = path.stat()
        facts += [str(path), status.st_mtime_ns, status.st_size]
    digest.update(json.dumps(facts).encode())
    digest.update(Path(__file__).read_bytes())
    for source in _agent_sources(package):
        digest.update(f"\0{source.relative_to(package)}\0".encode() + source.read_bytes())
    return digest.hexdigest()[:16]


def _agent_sources(package: Path) -> list[Path]:
    agent = [path for path in (package / "agent").glob("*.py") if path.name not in _HOST_ONLY]
    return sorted([package / "__init__.py", package / "wire.py", *agent])


def _build_aside(parent: Path, bundle: RuntimeBundle, interpreter: Path, loader: Path, package: Path) -> None:
    building = Path(tempfile.mkdtemp(prefix=".building-", dir=parent))
    try:
        _fill(building, interpreter, loader, package)
        _seal(building)
        try:
            building.rename(bundle.directory)
        except OSError:
            # rename(2) refuses to replace a filled directory: another server was faster with the same.
            if not bundle.directory.is_dir():
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _fill(building: Path, interpreter: Path, loader: Path, package: Path) -> None:
    libraries = building / "lib"
    modules = libraries / f"python{sys.version_info[0]}.{sys.version_info[1]}"
    extensions = modules / "lib-dynload"
    extensions.mkdir(parents=True)
    shutil.copyfile(interpreter, building / "python3")
    # getpath looks for this file from the executable's directory upwards before anything else, and would find
    # the image's /lib/python3xx.zip, and run it. Empty, it ends the search and holds no module.
    (libraries / f"python{sys.version_info[0]}{sys.version_info[1]}.zip").touch()
    _copy_loader(loader, libraries / loader.name)
    binaries = [interpreter]
    for name, origin in _needed_modules(interpreter, package).items():
        if origin.suffix == ".py":
            _compile(origin, modules, name)
        else:
            shutil.copyfile(origin, extensions / origin.name)
            binaries.append(origin)
    for source in _agent_sources(package):
        target = modules / "garden_py" / source.relative_to(package).with_suffix(".pyc")
        _compile_file(source, target)
    for library in _libraries(binaries):
        shutil.copyfile(library, libraries / library.name)


def _copy_loader(loader: Path, target: Path) -> None:
    """Copy the loader, without its habit of loading what /etc/ld.so.preload names.

    That file would be the image's: it could put any code into PID 1. The path in the copy becomes the empty
    string, which access(2) answers with ENOENT.
    """
    content = loader.read_bytes().replace(b"\0/etc/ld.so.preload\0", b"\0".ljust(20, b"\0"))
    target.write_bytes(content)


def _needed_modules(interpreter: Path, package: Path) -> dict[str, Path]:
    """Modules of the standard library that are files, by name: what the agent imports, now or later."""
    agent = [
        f"garden_py.agent.{source.stem}"
        for source in _agent_sources(package)
        if source.parent.name == "agent"
    ]
    wanted = [name for name in agent if not name.endswith(("__init__",))]
    output = _run([interpreter, "-I", "-S", "-B", "-c", _PROBE, package.parent, *_STARTUP_MODULES, *wanted])
    found: dict[str, str | None] = ast.literal_eval(output)
    needed = {}
    for name, origin in found.items():
        if name.startswith("garden_py") or origin in (None, "built-in"):
            continue
        path = _frozen_source(name) if origin == "frozen" else Path(str(origin))
        if path is not None:
            needed[name] = path
    return needed


def _frozen_source(name: str) -> Path | None:
    """The source of a module that is frozen into the interpreter; None for those of the import system.

    It is needed besides: `os` is the landmark, and a build may be told not to use frozen modules.
    """
    if name.startswith(("_frozen_importlib", "zipimport")):
        return None
    spec = importlib.machinery.PathFinder.find_spec(name)
    return Path(spec.origin) if spec is not None and spec.origin is not None else None


def _compile(source: Path, modules: Path, name: str) -> None:
    target = modules.joinpath(*name.split("."))
    _compile_file(
        source, (target / "__init__.pyc") if source.name == "__init__.py" else target.with_suffix(".pyc")
    )


def _compile_file(source: Path, target: Path) -> None:
    """Compile to a sourceless module; docstrings and asserts go, they are memory in every container."""
    target.parent.mkdir(parents=True, exist_ok=True)
    py_compile.compile(
        str(source),
        cfile=str(target),
        dfile=f"<agent>/{source.name}",
        doraise=True,
        optimize=2,
        invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
    )


def _libraries(binaries: Iterable[Path]) -> set[Path]:
    """Every shared library the binaries need, as their loader finds them. ldd(1)."""
    return {library for binary in binaries for library in _parse_ldd(binary, _run(["ldd", binary]))}


def _parse_ldd(binary: Path, output: str) -> Iterator[Path]:
    for line in output.splitlines():
        name, arrow, found = line.strip().partition(" => ")
        if not arrow:
            continue  # the vdso, and the loader itself
        if found.startswith("not found"):
            raise RuntimeBundleError(f"{binary} needs the library {name}, which is not installed")
        path = Path(found.rpartition(" (")[0])
        # Loaders of some architectures are listed with an arrow as well; that one is copied on its own.
        if not path.name.startswith("ld-linux"):
            yield path


def _run(command: list[str | Path]) -> str:
    try:
        result = subprocess.run(
            command,
            env={"PATH": os.defpath, "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_COMMAND_TIMEOUT_S,
            check=True,
        )
    except subprocess.CalledProcessError as error:
        raise RuntimeBundleError(f"{command[0]} failed: {error.stderr.strip()}") from error
    return result.stdout


def _seal(building: Path) -> None:
    """Owned by root, executable binaries, nothing writable for anybody else."""
    for directory, _, files in os.walk(building):
        os.chmod(directory, 0o755)  # noqa: S103 - containers of any uid range must enter
        for name in files:
            path = Path(directory, name)
            is_binary = name == "python3" or ".so" in name
            path.chmod(0o755 if is_binary else 0o644)
            if os.geteuid() == 0:
                os.chown(path, 0, 0)
