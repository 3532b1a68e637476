"""Pseudo-terminals: made through devpts, and pumped from and into pipes so that nothing is lost with the server."""

from __future__ import annotations

import errno
import fcntl
import posix

from garden_py.agent.loop import READABLE, WRITABLE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from garden_py.agent.loop import Loop
    from garden_py.wire import Value

# asm-generic/ioctls.h; x86, arm, riscv and s390 use these numbers. The module `termios` knows them too, but
# is one more shared library to ship and load.
_TIOCSCTTY = 0x540E
_TIOCSWINSZ = 0x5414
_TIOCSPTLCK = 0x40045431
_TIOCGPTPEER = 0x5441

DEFAULT_ROWS = 24
DEFAULT_COLUMNS = 80

_TYPED_BYTES = 4 << 10  # N_TTY's buffer of a line, termios(3) "canonical mode"
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
    """Moves bytes between a pty master and two pipes whose other ends are the server's.

    The kernel buffers only 4 KiB for a pty and offers no way to keep them; a pipe holds 1 MiB and lives on
    while the server is away. When it is full the master is not read, so the writer blocks: nothing is lost.

    Input takes the same way, for two reasons. Whoever holds the master can have anybody else who writes to it wait
    (F_SETFL clears O_NONBLOCK for all holders of one open file description, fcntl(2)), so the server must not hold what
    the container's PID 1 holds; a pipe can be opened anew. And what the server has written is here even if it dies.

    Args:
        fds: four descriptors, owned from here on: the master; the write end of the pipe that the server reads; the read
            end of the pipe that the server writes; and a duplicate of the master to wait for room in it, since the
            loop has one handler for each descriptor. All are -1 for a terminal that has been closed.
    """

    def __init__(self, fds: list[int], loop: Loop) -> None:
        self._master, self._output, self._input, self._typing = fds
        self._loop = loop
        self._on_end: Callable[[Terminal], None] | None = None
        self._unwritten = b""  # output; only where splice is refused
        self._untyped = b""  # input that the master had no room for
        self._can_splice = True
        self._is_pumping = False
        self._is_hung_up = False

    @property
    def is_open(self) -> bool:
        """Whether output may still come."""
        return self._output >= 0

    def start(self) -> None:
        """Begin to pump; once the child has opened the slave, for a master without one reads as hung up."""
        if not self._is_pumping and self.is_open:
            self._is_pumping = True
            self._loop.watch(self._master, READABLE, self._on_ready)
            self._watch_input()

    def resize(self, rows: int, columns: int) -> None:
        """See `set_size`; nothing happens when the terminal has been closed."""
        if self.is_open:
            set_size(self._master, rows, columns)

    def finish_alone(self, on_end: Callable[[Terminal], None]) -> bool:
        """Go on until all output has been moved, then close and call `on_end`; False if that is the case now.

        For a process that is forgotten while its last output is in the pty, which closing would discard.
        """
        if not self._is_pumping or not self.is_open:
            self.close()
            return False
        self._on_end = on_end
        self._stop_input()
        return True

    def close(self) -> None:
        """Stop pumping and close everything. Idempotent."""
        if not self.is_open:
            return
        self._stop_input()
        self._loop.forget(self._master)
        self._loop.forget(self._output)
        posix.close(self._output)
        posix.close(self._master)
        posix.close(self._typing)
        self._output = self._master = self._typing = -1
        if self._on_end is not None:
            self._on_end(self)

    def hand_over(self, keep: Callable[[int], int]) -> dict[str, Value]:
        """All there is to it, for `take_over` in the next program; `keep` is told every descriptor."""
        return {
            "fds": [keep(fd) for fd in (self._master, self._output, self._input, self._typing)],
            "unwritten": self._unwritten,
            "untyped": self._untyped,
            "pumping": self._is_pumping,
        }

    @classmethod
    def take_over(cls, state: dict[str, Any], loop: Loop) -> Terminal:
        """Go on where `hand_over` was called."""
        terminal = cls(state["fds"], loop)
        terminal._unwritten = state["unwritten"]
        terminal._untyped = state["untyped"]
        if state["pumping"]:
            terminal.start()
        return terminal

    # --- output

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
            self._end(for_sure=error.errno == errno.EPIPE)
        else:
            if moved == 0:
                self._end(for_sure=False)
            else:
                self._is_hung_up = False

    def _end(self, *, for_sure: bool) -> None:
        """Close, unless the end may come too early: then the next turn asks once more.

        The kernel looks for output first, and whether the slave is closed after that (n_tty_read, drivers/tty/n_tty.c).
        What is written and closed in between is told as EIO, though the output is there. Whoever has seen the slave
        closed and asks again gets it.
        """
        if for_sure or self._is_hung_up:
            self.close()
        self._is_hung_up = True

    def _move(self) -> int:
        """Move one chunk; 0 at the end of output, BlockingIOError if one side is not ready."""
        if self._can_splice and not self._unwritten:
            try:
                return posix.splice(
                    self._master,
                    self._output,
                    _CHUNK_BYTES,
                    flags=posix.SPLICE_F_NONBLOCK | posix.SPLICE_F_MOVE,
                )
            except OSError as error:
                if error.errno != errno.EINVAL:  # kernels 5.10 and some patch levels cannot splice from a tty
                    raise
                self._can_splice = False
        if not self._unwritten:
            self._unwritten = posix.read(self._master, _CHUNK_BYTES)
        written = posix.write(self._output, self._unwritten)
        self._unwritten = self._unwritten[written:]
        return written

    def _wait_for_room(self) -> None:
        """Either side may have refused; wait for room first, then for output again.

        If the pipe has room after all, epoll says so at once and the master is waited for again: one extra
        turn instead of a question to the kernel about which side it was.
        """
        self._loop.forget(self._master)
        self._loop.watch(self._output, WRITABLE, self._on_room)

    def _on_room(self, events: int) -> None:
        self._loop.forget(self._output)
        if events & ~WRITABLE:  # EPOLLERR: no reader is left
            self.close()
            return
        self._loop.watch(self._master, READABLE, self._on_ready)

    # --- input

    def _watch_input(self) -> None:
        if self._untyped:
            self._loop.watch(self._typing, WRITABLE, self._on_typing_room)
        elif self._input >= 0:
            self._loop.watch(self._input, READABLE, self._on_typed)

    def _on_typed(self, events: int) -> None:
        self._untyped = posix.read(self._input, _TYPED_BYTES)
        if not self._untyped:  # every writer has gone, ourselves included: the process is being forgotten
            self._stop_input()
            return
        if not self._type():
            self._loop.forget(self._input)
            self._watch_input()

    def _on_typing_room(self, events: int) -> None:
        if self._type():
            self._loop.forget(self._typing)
            self._watch_input()

    def _type(self) -> bool:
        """Write what was typed to the master; False if it does not take all of it now."""
        try:
            written = posix.write(self._master, self._untyped)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            written = len(self._untyped)  # no slave is open any more: there is nobody to read it
        self._untyped = self._untyped[written:]
        return not self._untyped

    def _stop_input(self) -> None:
        self._untyped = b""
        self._loop.forget(self._typing)
        if self._input >= 0:
            self._loop.forget(self._input)
            posix.close(self._input)
            self._input = -1
