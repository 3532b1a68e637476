"""The server's side of one fetch: a puller process (puller.py); for a bare tar an unpacker, with a downloader.

Nothing of it outlives the server: the processes lead a session of their own, are killed as one, and end when their
stdin does.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from garden_py.backend.images.proxy import METADATA_MAX, Source
from garden_py.backend.images.puller import UNPACKER, read_last_words
from garden_py.model.errors import (
    GardenError,
    HostFault,
    ImageAccessDenied,
    ImageInvalid,
    ImageNotFound,
    ImageTooLarge,
    ImageUnreachable,
    InvalidField,
    NotSupported,
)

PULLER = "garden_py.backend.images.puller"
DOWNLOADER = "garden_py.backend.images.download"
LANES = 3
_LINE_MAX = 2 * METADATA_MAX
_CLOSE_S = 1.0
_LAST_WORDS_S = 1.0
# Flags of the limits that an unpacker names when one is passed.
_FLAGS = {"max_bytes": "--image-max-bytes", "max_entries": "--image-max-entries"}

Progress = Callable[[int], None]


class Failed(Exception):
    """A fetch failed; `facts` are a puller's or unpacker's."""

    def __init__(self, facts: dict[str, Any]) -> None:
        super().__init__(str(facts.get("message", "")))
        self.facts = facts

    def as_garden_error(self, image: str, field: str) -> GardenError:
        """As callers know it."""
        told, details = str(self), self.facts.get("facts", {})
        match self.facts.get("kind"):
            case "denied":
                return ImageAccessDenied(image, told)
            case "missing":
                problem = f"{image} does not exist or you do not have permissions to see it."
                return ImageNotFound(field, f"{problem} ({told})")  # statement M11
            case "ambiguous":
                return InvalidField(
                    field, f"{image} holds several images; name one of them by its tag ({told})"
                )
            case "unreachable":
                return ImageUnreachable(image, told)
            case "invalid" | "image_invalid":
                return ImageInvalid(image, told)
            case "image_too_large":
                flag = _FLAGS.get(str(details.get("limit")), "--image-max-bytes")
                return ImageTooLarge(image, told, flag)
            case "no_skopeo":
                return NotSupported(f"{told}; it fetches images")
            case "no_space":
                return HostFault("unpack image", "no space left on the disk that holds the server's images")
            case _:
                return HostFault("fetch image", told)


class Puller:
    """One puller process. `image` first, then any number of `layer` at a time.

    Args:
        stall_s: seconds without a word from it until it is given up.
    """

    def __init__(self, process: asyncio.subprocess.Process, *, stall_s: float) -> None:
        self._process = process
        self._stall_s = stall_s
        self._opened: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._layers: dict[int, tuple[asyncio.Future[dict[str, Any]], Progress]] = {}
        self._asked = 0.0
        self._reading = asyncio.ensure_future(self._read())

    async def image(self) -> dict[str, Any]:
        """`image` as puller.py says it.

        Raises:
            Failed.
        """
        return await self._opened

    async def layer(self, number: int, job: dict[str, Any], progress: Progress) -> dict[str, Any]:
        """Fetch one layer; `done` as unpack.py says it.

        Raises:
            Failed.
        """
        done: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._layers[number] = (done, progress)
        self._asked = asyncio.get_running_loop().time()
        self.say({"layer": number, **job})
        return await done

    def say(self, value: dict[str, Any]) -> None:
        """Write it a line."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(value).encode() + b"\n")

    async def _read(self) -> None:
        try:
            while (message := await self._next()) is not None:
                self._take(message)
            self._end({"kind": "host_fault", "message": "the process that fetches it has ended"})
        except TimeoutError:
            problem = f"no progress for {self._stall_s:g} s (server flag --image-stall-s)"
            self._end({"kind": "unreachable", "message": problem})
        except Exception as error:  # noqa: BLE001 - whatever it says, those who wait must be told
            self._end(
                {"kind": "host_fault", "message": f"the process that fetches it talks nonsense: {error}"}
            )

    async def _next(self) -> dict[str, Any] | None:
        assert self._process.stdout is not None
        while True:
            try:
                async with asyncio.timeout(self._stall_s):
                    line = await self._process.stdout.readline()
            except TimeoutError:
                if self._opened.done() and not self._is_late():
                    continue  # nothing has been asked of it so long: another pull fetches a layer of ours
                raise
            return json.loads(line) if line else None

    def _is_late(self) -> bool:
        return bool(self._layers) and asyncio.get_running_loop().time() - self._asked > self._stall_s

    def _take(self, message: dict[str, Any]) -> None:
        if "layer" not in message:
            if "trying" not in message and not self._opened.done():
                _settle(self._opened, message, "image")
            return
        done, progress = self._layers[message["layer"]]
        if "progress" in message:
            progress(message["progress"])
        else:
            del self._layers[message["layer"]]
            if not done.done():
                _settle(done, message, "done")

    def _end(self, facts: dict[str, Any]) -> None:
        waiting = [self._opened, *(done for done, _ in self._layers.values())]
        self._layers.clear()
        for future in waiting:
            if not future.done():
                future.set_exception(Failed(facts))
                future.exception()  # nobody may be waiting any more

    async def close(self) -> None:
        """End it, at once."""
        self._reading.cancel()
        await asyncio.wait([self._reading])
        if not self._opened.done():
            self._opened.cancel()
        await asyncio.shield(kill_session(self._process))


def _settle(future: asyncio.Future[dict[str, Any]], message: dict[str, Any], wanted: str) -> None:
    if wanted in message:
        future.set_result(message[wanted])
    else:
        future.set_exception(Failed(message.get("failed", {})))
        future.exception()


@asynccontextmanager
async def pulling(
    sources: list[Source], scratch: Path, limits: dict[str, int], *, stall_s: float
) -> AsyncIterator[Puller]:
    """A puller for the length of a context.

    Args:
        sources: see sources.py.
        scratch: directory for its files.
        limits: `max_bytes` and `max_entries` of one layer.
        stall_s: see Puller.
    """
    process = await _start(PULLER)
    puller = Puller(process, stall_s=stall_s)
    try:
        places = [asdict(source) for source in sources]
        puller.say({"sources": places, "scratch": str(scratch), "limits": limits, "lanes": LANES})
        yield puller
    finally:
        await puller.close()


async def unpack_tar(
    source_fd: int, job: dict[str, Any], progress: Progress, *, stall_s: float
) -> dict[str, Any]:
    """Unpack one tar; `done` as unpack.py says it.

    Args:
        source_fd: to read from, to its end; the caller closes it.
        job: unpack.py's, without the descriptor.
        progress: is told the bytes read so far.
        stall_s: seconds without a word until it is given up.

    Raises:
        Failed.
    """
    process = await _start(UNPACKER, source_fd)
    last: dict[str, Any] = {}
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps({**job, "source_fd": source_fd}).encode() + b"\n")
        while True:
            async with asyncio.timeout(stall_s):
                line = await process.stdout.readline()
            if not line:
                break
            last = json.loads(line)
            if "progress" in last:
                progress(last["progress"])
        status = await process.wait()
    except TimeoutError as error:
        raise Failed({"kind": "unreachable", "message": f"no progress for {stall_s:g} s"}) from error
    finally:
        await asyncio.shield(kill_session(process))
    words = read_last_words(last, status)
    if "failed" in words:
        raise Failed(words["failed"])
    done: dict[str, Any] = words["done"]
    return done


class Download:
    """The body of an answer over HTTP, as it comes.

    Attributes:
        fd: to read it from; -1 when it was closed.
        size: of it in bytes; None: that is not known.
    """

    def __init__(self, process: asyncio.subprocess.Process, fd: int, size: int | None) -> None:
        self._process = process
        self.fd = fd
        self.size = size

    def close(self) -> None:
        """Read no more; twice is fine."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    async def failure(self) -> Failed | None:
        """Why it broke off; None: not that we know. Nothing can be read any more."""
        self.close()  # so that a downloader that waits for us to read goes on, to its end
        assert self._process.stdout is not None
        with suppress(TimeoutError):
            async with asyncio.timeout(_LAST_WORDS_S):
                if line := await self._process.stdout.readline():
                    return Failed(json.loads(line)["failed"])
        return None


@asynccontextmanager
async def downloading(request: dict[str, Any], *, stall_s: float) -> AsyncIterator[Download]:
    """A download for the length of a context.

    Args:
        request: download.py's.
        stall_s: seconds until the answer must have begun.

    Raises:
        Failed: there is no such answer.
    """
    reading, writing = os.pipe()
    try:
        process = await _start(DOWNLOADER, writing, arguments=[str(writing)])
    except BaseException:
        os.close(reading)
        raise
    finally:
        os.close(writing)  # the process alone has it: when that ends, so does the body
    download = Download(process, reading, None)
    try:
        assert process.stdin is not None
        process.stdin.write(json.dumps(request).encode() + b"\n")
        download.size = await _read_size(process, stall_s)
        yield download
    finally:
        download.close()
        await asyncio.shield(kill_session(process))


async def _read_size(process: asyncio.subprocess.Process, stall_s: float) -> int | None:
    assert process.stdout is not None
    try:
        async with asyncio.timeout(stall_s):
            line = await process.stdout.readline()
    except TimeoutError as error:
        raise Failed({"kind": "unreachable", "message": f"no answer for {stall_s:g} s"}) from error
    answer: dict[str, Any] = json.loads(line) if line else {"failed": {"message": "the downloader has ended"}}
    if "failed" in answer:
        raise Failed(answer["failed"])
    size: int | None = answer["size"]
    return size


async def _start(module: str, *fds: int, arguments: Sequence[str] = ()) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        module,
        *arguments,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        pass_fds=fds,
        start_new_session=True,
        limit=_LINE_MAX,
    )


async def kill_session(process: asyncio.subprocess.Process) -> None:
    """Kill a process that leads a session, with all that is in it, and wait for its end."""
    if process.returncode is None:  # else its number may be another's, and whatever it started ends with it
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    await process.wait()
    if process.stdin is not None:
        process.stdin.close()
        # Python 3.11 logs a traceback if nobody asks how it went, where the process ended before it had read all.
        with suppress(OSError, TimeoutError):
            async with asyncio.timeout(_CLOSE_S):
                await process.stdin.wait_closed()
