"""Leftovers, planted by hand: what a server could have lost on a host, and what only looks like it."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from garden_py.config import load_config
from kit.server import ServerProcess

NUMBER = 0x99  # offset in the pool of an address that no container of a test gets
RUNTIME_ID, RUBBISH, SOCKET = "0123456789abcdef", "0" * 32, "f" * 24 + ".sock"
Name = tuple[str, str]  # kind and name, as `garden doctor --leaks` shows them


def run(*argv: str, stdin: str | None = None) -> str:
    """A command that must succeed; its output."""
    return subprocess.run(argv, check=True, capture_output=True, text=True, timeout=20, input=stdin).stdout


@dataclass(frozen=True)
class Site:
    """Names of one server's things."""

    server: ServerProcess

    @property
    def state(self) -> Path:
        return self.server.place / "state"

    @property
    def run_dir(self) -> Path:
        return self.server.place / "run"

    @property
    def tag(self) -> str:
        return load_config({"state_dir": self.state}, environ={}).tag

    @property
    def pool(self) -> str:
        return self.server.flags[self.server.flags.index("--network-pool") + 1]

    @property
    def address(self) -> str:
        return f"{self.pool.rpartition('.')[0]}.{NUMBER}"

    @property
    def link(self) -> str:
        return f"gdn{self.tag}-{NUMBER:x}"

    def launcher_pid(self) -> int:
        children = run("pgrep", "-P", str(self.server.pid), "-f", "launcher.main").split()
        return int(children[0])


def cgroup_roots() -> list[Path]:
    """Two hierarchies: one that limits use, and one that only the runtime does; on v2 the only one."""
    root = Path("/sys/fs/cgroup")
    return [root] if (root / "cgroup.controllers").exists() else [root / "pids", root / "freezer"]


@contextlib.contextmanager
def orphans(site: Site) -> Iterator[set[Name]]:
    """One of each kind that needs no server to plant; taken away at the end, whoever did it before."""
    tag, table = site.tag, f"inet garden_{site.tag}"
    with contextlib.ExitStack() as undo:
        (site.state / "containers" / "lost").mkdir(mode=0o700)
        (site.state / "containers" / "lost" / "upper").mkdir()
        (site.state / "trash" / RUBBISH).mkdir()
        (site.run_dir / "runc").mkdir(exist_ok=True)
        (site.run_dir / "runc" / RUNTIME_ID).mkdir()
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(site.run_dir / "agents" / SOCKET))
        sleeper = undo.enter_context(contextlib.closing(_Process(["sleep", "1000"])))
        for root in cgroup_roots():
            (root / f"garden-{tag}" / "lost" / "work").mkdir(parents=True)
            (root / f"garden-{tag}" / "lost" / "work" / "cgroup.procs").write_text(str(sleeper.pid))
        run("ip", "link", "add", site.link, "type", "veth", "peer", "name", f"gt{tag}peer")
        undo.callback(subprocess.run, ["ip", "link", "del", site.link], capture_output=True)
        run("ip", "link", "set", site.link, "alias", "lost")
        run("nft", "-f", "-", stdin=(
            f"add element {table} members {{ \"{site.link}\" . {site.address} }}\n"
            f"add element {table} portmap {{ udp . 777 : {site.address} . 53 }}\n"
            f"add chain {table} egress_{NUMBER:x}\n"
            f"add element {table} egress {{ {site.address} : goto egress_{NUMBER:x} }}\n"
        ))  # fmt: skip
        yield {
            ("PROCESS", str(sleeper.pid)),
            ("CGROUP", f"garden-{tag}/lost"),
            ("LINK", site.link),
            ("NFT_ELEMENT", f"member {site.link} {site.address}"),
            ("NFT_ELEMENT", f"portmap udp 777 {site.address} 53"),
            ("NFT_ELEMENT", f"egress {site.address} egress_{NUMBER:x}"),
            ("NFT_CHAIN", f"egress_{NUMBER:x}"),
            ("RUNTIME", f"runc/{RUNTIME_ID}"),
            ("SOCKET", SOCKET),
            ("DIRECTORY", "containers/lost"),
            ("DIRECTORY", f"trash/{RUBBISH}"),
        }


@contextlib.contextmanager
def launcher_of_a_dead_server(site: Site) -> Iterator[Name]:
    """It waits for its predecessor's lock as long as somebody holds its socket."""
    ours, theirs = socket.socketpair()
    argv = [
        sys.executable, "-m", "garden_py.backend.launcher.main", str(theirs.fileno()),
        str(site.run_dir / "mnt"), str(site.run_dir / "mnt.lock"),
    ]  # fmt: skip
    with ours, contextlib.closing(_Process(argv, pass_fds=[theirs.fileno()])) as process:
        theirs.close()
        yield ("PROCESS", str(process.pid))


@contextlib.contextmanager
def mount_in_the_launcher(site: Site) -> Iterator[Name]:
    """As a worker leaves it that was killed in the middle."""
    inside = ["nsenter", "--mount", f"--target={site.launcher_pid()}"]
    lower = site.run_dir / "mnt" / RUNTIME_ID / "lower"
    run(*inside, "mkdir", "-p", str(lower))
    run(*inside, "mount", "-t", "tmpfs", "none", str(lower))
    yield ("MOUNT", f"launcher:{RUNTIME_ID}")


@contextlib.contextmanager
def lookalikes(site: Site) -> Iterator[set[Name]]:
    """Somebody else's things with names like the server's; those returned are told, the others not even seen.

    At the end they must all be there.
    """
    tag, table = site.tag, f"inet garden_{site.tag}"
    other = "ffff" if tag != "ffff" else "eeee"
    notes = site.state / "containers" / "notes"
    notes.mkdir(mode=0o700)
    (notes / "todo.txt").write_text("mine")
    (site.run_dir / "runc").mkdir(exist_ok=True)
    record = site.run_dir / "runc" / "by-hand"
    record.mkdir()
    mount_point = site.state / "trash" / "disk"
    mount_point.mkdir()
    groups = [root / f"garden-{other}" / "theirs" for root in cgroup_roots()]
    links = [f"gdn{other}-1", f"gdn{tag}-zz", f"gdn{tag}-98"]
    with contextlib.ExitStack() as undo:
        run("mount", "-t", "tmpfs", "none", str(mount_point))
        undo.callback(mount_point.rmdir)
        undo.callback(run, "umount", str(mount_point))
        for group in groups:
            group.mkdir(parents=True)
            undo.callback(group.parent.rmdir)
            undo.callback(group.rmdir)
        for link in links:
            run("ip", "link", "add", link, "type", "bridge")
            undo.callback(run, "ip", "link", "del", link)
        run("nft", "add", "table", "inet", f"garden_{other}")
        undo.callback(run, "nft", "delete", "table", "inet", f"garden_{other}")
        run("nft", "add", "chain", *table.split(), "mine")
        undo.callback(run, "nft", "delete", "chain", *table.split(), "mine")
        yield {
            ("DIRECTORY", "containers/notes"),
            ("DIRECTORY", "trash/disk"),
            ("MOUNT", str(mount_point)),
            ("RUNTIME", "runc/by-hand"),
            ("LINK", f"gdn{tag}-zz"),
            ("LINK", f"gdn{tag}-98"),
            ("NFT_CHAIN", "mine"),
        }
        assert (notes / "todo.txt").read_text() == "mine"
        (notes / "todo.txt").unlink()
        notes.rmdir()
        record.rmdir()


class _Process:
    """A process that is ended and reaped when closed."""

    def __init__(self, argv: list[str], pass_fds: list[int] | None = None) -> None:
        self._process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, start_new_session=True, pass_fds=pass_fds or []
        )
        self.pid = self._process.pid

    def close(self) -> None:
        self._process.kill()
        self._process.wait(10)


def exists(name: Name, site: Site) -> bool:
    """Whether one of the planted things is still there."""
    kind, text = name
    table = f"inet garden_{site.tag}"
    match kind:
        case "PROCESS":
            return (
                os.path.exists(f"/proc/{text}")
                and "State:\tZ" not in Path(f"/proc/{text}/status").read_text()
            )
        case "CGROUP":
            return any((root / text).exists() for root in cgroup_roots())
        case "LINK":
            return os.path.exists(f"/sys/class/net/{text}")
        case "NFT_ELEMENT":
            return text.split(" ")[-2] in run("nft", "list", "table", *table.split())
        case "NFT_CHAIN":
            return f"chain {text} " in run("nft", "list", "table", *table.split())
        case "RUNTIME":
            return (site.run_dir / text).exists()
        case "SOCKET":
            return (site.run_dir / "agents" / text).exists()
        case "MOUNT" if text.startswith("launcher:"):
            inside = [
                "nsenter",
                "--mount",
                f"--target={site.launcher_pid()}",
                "ls",
                str(site.run_dir / "mnt"),
            ]
            return text.partition(":")[2] in run(*inside).split()
        case "MOUNT":
            return os.path.ismount(text)
        case _:
            return (site.state / text).exists()
