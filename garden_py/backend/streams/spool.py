"""A process's input on its way: a memfd that the kernel keeps for as long as the agent holds it.

What a client sends is appended, so the file's size is how much was accepted. From there it is moved into the pipe by
splice(2) at the file's own position, so that position is how much was fed: bytes and count move in one system call,
which SIGKILL cannot cut in two. The agent keeps the descriptor beside its duplicate of the pipe, and both share one
open file description (open(2)); so a restarted server finds both numbers, and feeds no byte twice and leaves none out.
F_SEAL_GROW (fcntl(2)) says that the input has ended.
"""

from __future__ import annotations

import array
import errno
import fcntl
import os
import termios

from garden_py.backend.host.syscalls import punch_hole

_ADD_SEALS, _GET_SEALS, _SEAL_GROW = 1033, 1034, 4  # linux/fcntl.h
_MOVE_BYTES = 1 << 20
_PUNCH_AT_BYTES = 1 << 20
_PAGE_BYTES = os.sysconf("SC_PAGESIZE")


class NoSpool(Exception):
    """The descriptor is none of a spool."""


class Spool:
    """The numbers are of bytes, and are read once: nobody else is believed to move them.

    Args:
        fd: owned from here on.

    Raises:
        NoSpool: the descriptor is still the caller's.
    """

    def __init__(self, fd: int) -> None:
        try:
            self.ended = bool(fcntl.fcntl(fd, _GET_SEALS) & _SEAL_GROW)
        except OSError as error:  # EINVAL: a file of another file system, whose reads might never return
            raise NoSpool(os.strerror(error.errno or errno.EINVAL)) from error
        self.fd = fd
        self.size = os.fstat(fd).st_size
        self.fed = min(os.lseek(fd, 0, os.SEEK_CUR), self.size)
        self._punched = 0

    @classmethod
    def create(cls) -> Spool:
        """An empty one."""
        return cls(os.memfd_create("garden-stdin", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))

    @property
    def backlog(self) -> int:
        """Bytes accepted and not fed yet."""
        return self.size - self.fed

    def append(self, data: bytes | memoryview) -> int:
        """Accept bytes; how many it were."""
        written = os.pwrite(self.fd, data, self.size)
        self.size += written
        return written

    def skip(self, count: int) -> None:
        """Count bytes as accepted that nobody will read."""
        self.size += count
        os.ftruncate(self.fd, self.size)
        self.fed = os.lseek(self.fd, self.size, os.SEEK_SET)

    def move(self, pipe_fd: int) -> int:
        """Feed what the pipe takes now; how many bytes it were, 0 if somebody has cut the file.

        Raises:
            BlockingIOError: the pipe is full.
            OSError: nobody reads it any more.
        """
        count = min(self.backlog, _MOVE_BYTES)
        moved = os.splice(self.fd, pipe_fd, count, flags=os.SPLICE_F_NONBLOCK)
        self.fed += moved
        self._give_back(pipe_fd)
        return moved

    def write(self, fd: int) -> int:
        """As move, into something that splice cannot serve: a terminal's master."""
        moved = os.write(fd, os.pread(self.fd, min(self.backlog, _PAGE_BYTES), self.fed))
        self.fed = os.lseek(self.fd, self.fed + moved, os.SEEK_SET)
        return moved

    def _give_back(self, pipe_fd: int) -> None:
        """Free the memory of what has been read. What is still in the pipe are the file's own pages."""
        if self.fed - self._punched < 2 * _PUNCH_AT_BYTES:
            return
        unread = array.array("i", [0])
        fcntl.ioctl(pipe_fd, termios.FIONREAD, unread)
        read = (self.fed - unread[0]) // _PAGE_BYTES * _PAGE_BYTES
        if read - self._punched >= _PUNCH_AT_BYTES:
            punch_hole(self.fd, self._punched, read - self._punched)
            self._punched = read

    def end(self) -> None:
        """Accept no more. Twice is fine."""
        if not self.ended:
            fcntl.fcntl(self.fd, _ADD_SEALS, _SEAL_GROW)
            self.ended = True

    def close(self) -> None:
        """Close our descriptor; twice is fine."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
