"""Pseudo-terminals: made through devpts, and pumped into a pipe so that output survives the server."""

from __future__ import annotations

import errno
import fcntl
import posix

from garden_py.agent.loop import READABLE, WRITABLE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from garden_py.agent.loop import Loop

# asm-generic/ioctls.h; x86, arm, riscv and s390 use these numbers. The module `termios` knows them too, but
# is one more shared library to ship and load.
_TIOCSCTTY = 0x540E
_TIOCSWINSZ = 0x5414
_TIOCSPTLCK = 0x40045431
_TIOCGPTPEER = 0x5441

DEFAULT_ROWS = 24
DEFAULT_COLUMNS = 80

_CHUNK_BYTES = 16 << 10  # a pty rarely holds more, and splice allocates pages for all of it


def open_master(devpts_fd: int) -> int:
    """A new, unlocked pty master of the given devpts mount; non-blocking, close-on-exec. pts(4)."""
    flags = posix.O_RDWR | posix.O_NOCTTY | posix.O_CLOEXEC | posix.O_NONBLOCK
    master = posix.open("ptmx", flags, dir_fd=devpts_fd)
    try:
        fcntl.ioctl(master, _TIOCSPTLCK, bytes(4))
    except OSError:
        posix.close(master)
        raise
    return master


def open_slave(master: int) -> int:
    """The other side, opened without a path, so nothing mounted in the container can stand in for it."""
    return fcntl.ioctl(master, _TIOCGPTPEER, posix.O_RDWR | posix.O_NOCTTY | posix.O_CLOEXEC)


def make_controlling(slave: int) -> None:
    """Make it the controlling terminal of the calling session leader."""
    fcntl.ioctl(slave, _TIOCSCTTY, 0)


def set_size(master: int, rows: int, columns: int) -> None:
    """Set the window size, 0 meaning the default of a dimension; the kernel sends SIGWINCH on change."""
    sizes = (rows or DEFAULT_ROWS, columns or DEFAULT_COLUMNS, 0, 0)
    fcntl.ioctl(master, _TIOCSWINSZ, b"".join(size.to_bytes(2, "little") for size in sizes))


class Terminal:
    """Moves what a pty master yields into a pipe whose read end is the server's.

    The kernel buffers only 4 KiB for a pty and offers no way to keep them; a pipe holds 1 MiB and lives on
    while the server is away. When it is full the master is not read, so the writer blocks: nothing is lost.
    """

    def __init__(self, master: int, pipe_write: int, loop: Loop) -> None:
        self._master = master
        self._pipe = pipe_write
        self._loop = loop
        self._unwritten = b""  # only where splice is refused
        self._can_splice = True
        self._is_pumping = False
        self._owns_master = False

    def start(self) -> None:
        """Begin to pump; once the child has opened the slave, for a master without one reads as hung up."""
        if not self._is_pumping and self._pipe >= 0:
            self._is_pumping = True
            self._loop.watch(self._master, READABLE, self._on_ready)

    def resize(self, rows: int, columns: int) -> None:
        """See `set_size`."""
        set_size(self._master, rows, columns)

    def finish_alone(self) -> bool:
        """Take over the master and close it when all output has been moved; False if that is the case now.

        For a process that is forgotten while its last output is in the pty, which closing would discard.
        """
        self._owns_master = self._is_pumping and self._pipe >= 0
        return self._owns_master

    def close(self) -> None:
        """Stop pumping and close the pipe's write end; the master is the caller's. Idempotent."""
        if self._pipe < 0:
            return
        self._loop.forget(self._master)
        self._loop.forget(self._pipe)
        posix.close(self._pipe)
        self._pipe = -1
        if self._owns_master:
            posix.close(self._master)

    def _on_ready(self, events: int) -> None:
        # One chunk a turn: a terminal that never stops writing must not starve the others.
        try:
            moved = self._move()
        except BlockingIOError:
            self._wait_for_room()
        except OSError as error:
            # EIO: no slave is open any more. EPIPE: nobody can ever read the output.
            if error.errno not in (errno.EIO, errno.EPIPE):
                raise
            self.close()
        else:
            if moved == 0:
                self.close()

    def _move(self) -> int:
        """Move one chunk; 0 at the end of output, BlockingIOError if one side is not ready."""
        if self._can_splice:
            try:
                return posix.splice(
                    self._master,
                    self._pipe,
                    _CHUNK_BYTES,
                    flags=posix.SPLICE_F_NONBLOCK | posix.SPLICE_F_MOVE,
                )
            except OSError as error:
                if error.errno != errno.EINVAL:  # kernels 5.10 and some patch levels cannot splice from a tty
                    raise
                self._can_splice = False
        if not self._unwritten:
            self._unwritten = posix.read(self._master, _CHUNK_BYTES)
        written = posix.write(self._pipe, self._unwritten)
        self._unwritten = self._unwritten[written:]
        return written

    def _wait_for_room(self) -> None:
        """Either side may have refused; wait for room first, then for output again.

        If the pipe has room after all, epoll says so at once and the master is waited for again: one extra
        turn instead of a question to the kernel about which side it was.
        """
        self._loop.forget(self._master)
        self._loop.watch(self._pipe, WRITABLE, self._on_room)

    def _on_room(self, events: int) -> None:
        self._loop.forget(self._pipe)
        if events & ~WRITABLE:  # EPOLLERR: no reader is left
            self.close()
            return
        self._loop.watch(self._master, READABLE, self._on_ready)
