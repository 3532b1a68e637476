"""A layer's bytes, read, hashed and uncompressed by a thread that runs ahead of whoever takes them.

    descriptor --> thread: sha256 of what is read, decompress, sha256 of the outcome --> Channel --> take()

zlib, zstd and SHA-256 work without the interpreter's lock, so that the tree is made meanwhile. The channel holds a few
megabytes at most: whoever decompresses waits for whoever writes files.
"""

from __future__ import annotations

import hashlib
import os
import select
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from types import TracebackType
from typing import Final, Self

from garden_py.backend.images.decompress import DETECT_BYTES, Plain, decompressor_for
from garden_py.backend.images.layer_failures import InvalidLayer, UnpackFault

_READ_BYTES: Final = 128 << 10
_AHEAD_BYTES: Final = 4 << 20


class _Closed(Exception):
    """Nobody takes any more."""


class _Channel:
    """Pieces on their way from one thread to another; a failure of the sender is the last thing that arrives."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._pieces: deque[bytes] = deque()
        self._held_bytes = 0
        self._end: BaseException | None = None
        self._is_closed = False

    def put(self, piece: bytes) -> None:
        with self._changed:
            while self._held_bytes > _AHEAD_BYTES and not self._is_closed:
                self._changed.wait()
            if self._is_closed:
                raise _Closed
            self._pieces.append(piece)
            self._held_bytes += len(piece)
            self._changed.notify()

    def end(self, failure: BaseException) -> None:
        with self._changed:
            self._end = failure
            self._changed.notify()

    def get(self) -> bytes | None:
        with self._changed:
            while not self._pieces and self._end is None:
                self._changed.wait()
            if self._pieces:
                piece = self._pieces.popleft()
                self._held_bytes -= len(piece)
                self._changed.notify()
                return piece
        if isinstance(self._end, EOFError):
            return None
        assert self._end is not None
        raise self._end

    def close(self) -> None:
        with self._changed:
            self._is_closed = True
            self._changed.notify()


class LayerSource:
    """The uncompressed layer as an iterator of pieces, each of about a megabyte at most.

    Raises, from `__next__`:
        InvalidLayer: the compression is damaged, or the layer is shorter than it should be.
        UnpackFault: the descriptor cannot be read.
    """

    def __init__(
        self, fd: int, size: int | None, *, on_progress: Callable[[int], None] = lambda _: None
    ) -> None:
        """Read from a descriptor, which stays the caller's.

        Args:
            fd: a file or a pipe at the layer's first byte.
            size: compressed bytes to read; None: to end of file.
            on_progress: told, in another thread, how many compressed bytes have been read.
        """
        self._fd = fd
        self._size = size
        self._on_progress = on_progress
        self._compressed, self._plain = hashlib.sha256(), hashlib.sha256()
        self._channel = _Channel()
        self._thread = threading.Thread(target=self._work, name="layer", daemon=True)
        self._undo = ExitStack()

    def __enter__(self) -> Self:
        # Its end of file wakes a thread that waits for a pipe in vain.
        self._stop, stop_write = os.pipe()
        self._undo.callback(os.close, self._stop)
        self._undo.callback(self._thread.join)
        self._undo.callback(os.close, stop_write)
        self._undo.callback(self._channel.close)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._undo.close()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> bytes:
        piece = self._channel.get()
        if piece is None:
            raise StopIteration
        return piece

    @property
    def digest(self) -> str:
        """`sha256:…` of what was read; of the whole layer once there are no more pieces."""
        return f"sha256:{self._compressed.hexdigest()}"

    @property
    def diff_id(self) -> str:
        """`sha256:…` of the uncompressed bytes; of all once there are no more pieces."""
        return f"sha256:{self._plain.hexdigest()}"

    def _work(self) -> None:
        end: BaseException = EOFError()
        try:
            self._decompress()
        except OSError as error:
            end = UnpackFault(f"the layer cannot be read: {error.strerror}")
        except BaseException as error:  # noqa: BLE001 - it is raised in the other thread
            end = error
        self._channel.end(end)

    def _decompress(self) -> None:
        pieces = self._read()
        head = b""
        while len(head) < DETECT_BYTES and (more := next(pieces, b"")):
            head += more
        decompressor = decompressor_for(head[:DETECT_BYTES])
        if isinstance(decompressor, Plain):
            self._plain = self._compressed  # the same bytes; one pass over them is enough
        while head:
            for plain in decompressor.feed(head):
                if plain:
                    if self._plain is not self._compressed:
                        self._plain.update(plain)
                    self._channel.put(plain)
            head = next(pieces, b"")
        decompressor.finish()

    def _read(self) -> Iterator[bytes]:
        wait = select.poll()
        wait.register(self._fd, select.POLLIN)
        wait.register(self._stop, select.POLLIN)
        done = 0
        while self._size is None or done < self._size:
            if self._stop in (fd for fd, _ in wait.poll()):
                raise _Closed
            wanted = _READ_BYTES if self._size is None else min(_READ_BYTES, self._size - done)
            data = os.read(self._fd, wanted)
            if not data:
                if self._size is None:
                    return
                raise InvalidLayer(
                    f"the layer is truncated: it has {done} bytes instead of {self._size}",
                    size=self._size,
                    received=done,
                )
            done += len(data)
            self._compressed.update(data)
            self._on_progress(done)
            yield data
