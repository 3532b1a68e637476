"""One directory per container below the state directory; mkdir(2) is the claim.

<state>/containers/<handle>/   config.json, image.json, egress-rules, runtime log, agent log, etc/, upper/, work/,
                               streams/<process>/, sidecars/<process>/
<state>/trash/                 directories of destroyed containers, deleted in the background
<run>/agents/<hash>.sock       the agents' sockets; short names, since sun_path holds 108 bytes (unix(7))
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import re
import shutil
import stat
import uuid
from pathlib import Path

import structlog

from garden_py.model.errors import HostFault
from garden_py.model.handle import name_problem

log = structlog.get_logger()
TRASH_NAME = re.compile(r"[0-9a-f]{32}")
_CONTENTS = frozenset(
    {
        "agent.log",
        "config.json",
        "egress-rules",
        "etc",
        "image.json",
        "pid",
        "runtime.log",
        "sidecars",
        "streams",
        "upper",
        "work",
    }
)  # of a container's directory; whoever adds to it adds here


def why_foreign(path: Path) -> str:
    """What shows that something below `containers/` was not made by a server; empty if nothing does.

    Raises:
        FileNotFoundError: it is not there.
    """
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode):
        return "it is not a directory"
    if name_problem(path.name):
        return "no container can have this name"
    if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) != 0o700:
        return f"its owner is {found.st_uid} and its mode {stat.S_IMODE(found.st_mode):o}, not 700"
    strangers = sorted(set(os.listdir(path)) - _CONTENTS)
    return f"it holds {strangers[0]!r}" if strangers else ""


class Depot:
    """The directories of one server. All are 0700: what is in them belongs to containers, not to host users.

    Args:
        state_dir, run_dir: the server's.
        store: where images and volumes are, if that is a file system of its own; it has a trash of its own.
    """

    def __init__(self, state_dir: Path, run_dir: Path, store: Path | None = None) -> None:
        self.containers = state_dir / "containers"
        self.trash = state_dir / "trash"
        self._store = store
        self.agents = run_dir / "agents"
        self._doomed: set[Path] = set()
        self._sweeping: set[asyncio.Task[None]] = set()

    def open(self) -> None:
        """Make the directories, and start deleting what an earlier server had no time for."""
        for directory in (self.containers, *self._trashes, self.agents):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.sweep()

    def directory(self, handle: str) -> Path:
        """A container's directory, whether it exists or not."""
        return self.containers / handle

    def streams(self, handle: str, process_id: str) -> Path:
        """Where a process's output is kept."""
        return self.containers / handle / "streams" / process_id

    def socket(self, handle: str) -> Path:
        """The socket of a container's agent."""
        return self.agents / f"{hashlib.sha256(handle.encode()).hexdigest()[:24]}.sock"

    def refuse_foreign(self, handle: str) -> None:
        """Make sure that a container of this name would not take the place of something else.

        Raises:
            HostFault: something is there that no server has made. Undoing a create would throw it away.
        """
        directory = self.directory(handle)
        if os.path.lexists(directory) and (why := why_foreign(directory)):
            raise HostFault("claim directory", f"{directory} is not a garden server's: {why}")

    def claim(self, handle: str) -> Path:
        """Make a container's directory. One that a crash left without a journal entry is thrown away first."""
        directory = self.directory(handle)
        try:
            directory.mkdir(mode=0o700)
        except FileExistsError:
            self.discard(handle)
            directory.mkdir(mode=0o700)
        return directory

    def discard(self, handle: str) -> None:
        """Take a container's directory and socket away at once; its contents are deleted in the background."""
        self.socket(handle).unlink(missing_ok=True)
        self.throw_away(self.directory(handle))

    def throw_away(self, directory: Path) -> None:
        """Take a directory of ours away at once; gone is fine. Its contents are deleted in the background.

        On a full btrfs there is no room for another name, and under a project quota none leads out of the project
        (EXDEV); then it is deleted where it is.
        """
        try:
            os.rename(directory, self._trash_for(directory) / uuid.uuid4().hex)
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EXDEV):
                raise
            self._doomed.add(directory)
        self.sweep()

    @property
    def _trashes(self) -> tuple[Path, ...]:
        """One for each file system: rename(2) does not leave one."""
        return (self.trash,) if self._store is None else (self.trash, self._store / "trash")

    def _trash_for(self, directory: Path) -> Path:
        return self._trashes[-1] if self._store in directory.parents else self.trash

    def handles(self) -> list[str]:
        """Every container directory there is; what somebody else has put beside them is not one."""
        return sorted(name for name in os.listdir(self.containers) if not why_foreign(self.containers / name))

    @property
    def sweeping(self) -> bool:
        """Whether the trash is being emptied."""
        return bool(self._sweeping)

    def sweep(self) -> None:
        """Start emptying the trash, unless that goes on already."""
        if not self._sweeping:
            task = asyncio.ensure_future(asyncio.to_thread(self._empty_trash))
            self._sweeping.add(task)
            task.add_done_callback(self._swept)

    def _swept(self, task: asyncio.Task[None]) -> None:
        self._sweeping.discard(task)
        if task.cancelled():
            return
        if (error := task.exception()) is not None:
            log.error("depot.sweep_failed", error=str(error))
        elif self._rubbish():
            self.sweep()

    def _rubbish(self) -> list[Path]:
        found = [trash / name for trash in self._trashes for name in os.listdir(trash)]
        return [*self._doomed, *(path for path in found if TRASH_NAME.fullmatch(path.name))]

    def _empty_trash(self) -> None:
        """Delete what is there; one that cannot be deleted does not keep the others."""
        failure: OSError | None = None
        for path in self._rubbish():
            try:
                shutil.rmtree(path)
                self._doomed.discard(path)
            except OSError as error:
                failure = error
        if failure is not None:
            raise failure

    async def settle(self) -> None:
        """Wait for deletions under way."""
        while self._sweeping:
            await asyncio.gather(*self._sweeping, return_exceptions=True)  # _swept has told of failures
