"""A container, blocking: the verbs that act on one handle."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from time import sleep
from types import TracebackType
from typing import Self, Unpack

from garden_py.client import calls, tar_pack, tarball
from garden_py.client import values as v
from garden_py.client.errors import GardenError, NotFound
from garden_py.client.retry import Patience, RetryPolicy
from garden_py.client.sync.link import Link
from garden_py.client.sync.process import Process


class Container:
    """A handle with verbs. Making one asks nobody; every verb raises NotFound if the container is gone.

    As a context manager it destroys the container at the end of the block.
    """

    def __init__(
        self, link: Link, handle: str, retry: RetryPolicy, created: v.ContainerInfo | None = None
    ) -> None:
        self.handle = handle
        self.created = created
        self._link = link
        self._retry = retry

    def __repr__(self) -> str:
        return f"<Container {self.handle}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(NotFound):  # destroyed inside the block, or by its grace time
            self.destroy()

    def info(self) -> v.ContainerInfo:
        """The container as it is now."""
        return self._link.unary(calls.info(self.handle))

    def stop(self, *, kill: bool = False, grace: timedelta | None = None) -> None:
        """End all processes: SIGTERM, `grace` (None: 10 s), SIGKILL; with `kill` SIGKILL at once.

        Raises:
            Unavailable: with code UNKILLABLE, the kernel holds on to one, which ends when it can.
        """
        self._link.unary(calls.stop(self.handle, kill=kill, grace=grace))

    def destroy(self) -> None:
        """End and remove the container with everything it had.

        Raises:
            Unavailable: with code UNKILLABLE, the kernel holds on to something; the server keeps trying.
        """
        self._link.unary(calls.destroy(self.handle))

    def set_grace_time(self, grace_time: timedelta | None) -> None:
        """How long the container may be unused before the server destroys it; None: for ever."""
        self._link.unary(calls.set_grace_time(self.handle, grace_time))

    def properties(self) -> Mapping[str, str]:
        """All properties."""
        return self.info().properties

    def update_properties(
        self, to_set: Mapping[str, str] | None = None, *, remove: Iterable[str] = ()
    ) -> dict[str, str]:
        """Set and remove properties in one step; returns all of them. Removing an absent one is no error."""
        return self._link.unary(calls.update_properties(self.handle, to_set or {}, remove))

    def metrics(self) -> v.ContainerMetrics:
        """Usage now. The entry's `error` says why it could not be measured."""
        (entry,) = self._link.unary(calls.metrics([self.handle]))
        return entry

    def limits(self, process_id: str = "") -> v.Limits:
        """The limits in force, read back from the kernel: the container's, or a process's own.

        Raises:
            FailedPrecondition: the process has exited (PROCESS_EXITED), or it has neither limits of its own nor rlimits
                that it or the container states (PROCESS_NOT_LIMITED).
        """
        return self._link.unary(calls.limits(self.handle, process_id))

    def update_limits(self, changed: v.Limits, process_id: str = "") -> v.Limits:
        """Change the limits that are stated, the container's or a process's own; returns those now in force.

        Rlimits are put in force in what runs already, too: in all of the container but where a process states the
        resource itself, or in the process and its descendants.

        Raises:
            FailedPrecondition: the kernel refuses, e.g. more memory is in use (LIMIT_REFUSED); or as `limits`.
        """
        return self._link.unary(calls.update_limits(self.handle, changed, process_id))

    def map_port(
        self, container_port: int = 0, *, host_port: int = 0, protocol: v.PortProtocol = v.PortProtocol.TCP
    ) -> v.PortMapping:
        """Make a port reachable on the host; host port 0: any free one, container port 0: the same."""
        return self._link.unary(
            calls.map_port(self.handle, v.PortMapping(host_port, container_port, protocol))
        )

    def egress(self) -> v.EgressPolicy:
        """The egress policy in force, with counters."""
        return self._link.unary(calls.egress(self.handle))

    def set_egress(self, policy: v.EgressPolicy, *, cut: bool = False) -> v.EgressPolicy:
        """Replace the whole policy atomically.

        Args:
            policy: the new one.
            cut: end connections that it does not allow, instead of letting established ones go on.

        Raises:
            Aborted: `policy.etag` is given and somebody has changed the policy since.
        """
        return self._link.unary(calls.set_egress(self.handle, policy, cut=cut))

    def explain_egress(self, destination: v.Destination) -> v.EgressDecision:
        """What would become of a new connection, and which rule or setting decides; no packet is sent."""
        return self._link.unary(calls.explain_egress(self.handle, destination))

    def run(
        self,
        command: v.ProcessSpec | Sequence[str],
        *,
        request_id: str = "",
        **fields: Unpack[v.ProcessFields],
    ) -> Process:
        """Start a process and stay with it; returns when it runs.

        Args:
            command: argv or a spec.
            request_id: makes a retry with the same process id harmless.
            fields: fields of ProcessSpec that shall differ from `command`'s.

        Raises:
            NotFound: no such container, program or user.
        """
        spec = v.process_spec(command, fields)
        first = calls.run_first(self.handle, spec, request_id)
        return Process._run(self._link, spec.id, self.handle, first, self._retry)

    def start(
        self,
        command: v.ProcessSpec | Sequence[str],
        *,
        request_id: str = "",
        **fields: Unpack[v.ProcessFields],
    ) -> v.ProcessInfo:
        """Start a process and leave it alone; `attach` joins it later. Arguments as for `run`."""
        return self._link.unary(calls.start(self.handle, v.process_spec(command, fields), request_id))

    def attach(
        self, process_id: str, *, stdout_offset: int | None = 0, stderr_offset: int | None = 0
    ) -> Process:
        """Join a process, running or finished.

        Args:
            process_id: which.
            stdout_offset: the first byte to read; None: from the end, what is written from now on.
            stderr_offset: the same for stderr.

        Raises:
            OutOfRange: the bytes are no longer kept; `first_offset` says which are.
        """
        wanted = {v.Stream.STDOUT: stdout_offset, v.Stream.STDERR: stderr_offset}
        offsets = {stream: offset for stream, offset in wanted.items() if offset is not None}
        return Process._attach(self._link, self.handle, process_id, offsets, self._retry)

    def processes(self) -> list[v.ProcessInfo]:
        """All processes that callers started, running and finished, oldest first."""
        return self._link.unary(calls.processes(self.handle))

    def signal(self, process_id: str, which: int | str, *, group: bool = False) -> bool:
        """Send a signal by number or name; False: the process had exited."""
        message = calls.signal_message(which, group=group)
        return self._link.unary(calls.signal(self.handle, process_id, message))

    def wait(self, process_id: str, timeout: timedelta | None = None) -> v.ExitStatus | None:
        """Exit status of a process; None when the timeout passed first."""
        return self._link.unary(calls.wait(self.handle, process_id, timeout))

    def read_output(
        self,
        process_id: str,
        stream: v.Stream = v.Stream.STDOUT,
        *,
        offset: int = 0,
        follow: bool = False,
        limit_bytes: int = 0,
    ) -> Iterator[v.OutputChunk]:
        """Output of one stream from an offset: what is there, or with `follow` until the stream is closed.

        Goes on by itself after a broken connection, from the offset it has reached.

        Args:
            process_id: which.
            stream: which of its streams.
            offset: the first byte wanted.
            follow: wait for more until the stream is closed.
            limit_bytes: at most this many; 0: all.

        Raises:
            OutOfRange: the bytes are no longer kept (`first_offset` says which are), or not written yet.
        """
        reading = calls.Reading(self.handle, process_id, stream, offset, follow, limit_bytes)
        patience = Patience(self._retry)
        while not reading.ended:
            try:
                for chunk in self._link.answers(reading.call()):
                    patience.restore()
                    yield reading.advance(chunk)
                reading.ended = True
            except GardenError as error:
                if not reading.started:
                    raise  # never connected: that is an answer, not a break
                sleep(patience.next_delay_s(error))

    def stream_in(self, chunks: Iterable[bytes], *, path: str, user: str = "") -> None:
        """Unpack a tar stream into a directory of the container, as a user of the container."""
        self._link.upload(calls.stream_in(self.handle, path, user), chunks)

    def stream_out(self, path: str, *, user: str = "") -> Iterator[bytes]:
        """A tar stream of a file or directory; with a trailing slash of the directory's contents."""
        return self._link.answers(calls.stream_out(self.handle, path, user))

    def diagnose(self) -> Iterator[bytes]:
        """A tar, in pieces, of all that can be found out about the container, in whatever state it is.

        `summary.json`, its last member, names the parts that could not be had. Values of environment variables are
        removed.
        """
        return self._link.answers(calls.diagnose(self.handle))

    def copy_in(self, source: Path | str, target_dir: str, *, name: str = "", user: str = "") -> None:
        """Copy a local file or directory into a directory of the container.

        Args:
            source: local path; symbolic links below it stay links.
            target_dir: directory in the container, made if missing.
            name: the copy's name; empty: the source's; ".": the contents of a source directory.
            user: owner of the copy.
        """
        self.stream_in(tar_pack.pack(Path(source), name), path=target_dir, user=user)

    def copy_out(self, path: str, target_dir: Path | str, *, name: str = "", user: str = "") -> None:
        """Copy a file or directory of the container into a local directory, made if missing.

        Nothing is ever written outside target_dir, whatever the container sends.

        Args:
            path: what to copy; with a trailing slash, a directory's contents.
            target_dir: where to.
            name: the copy's name; empty: as in the container.
            user: who reads in the container.

        Raises:
            UnsafeArchive: a member would leave target_dir, or is a device.
        """
        tarball.unpack(self.stream_out(path, user=user), Path(target_dir), name)

    def write_file(self, path: str, data: bytes, *, mode: int = 0o644, user: str = "") -> None:
        """Make or replace one file of the container."""
        directory, name = tarball.split_container_path(path)
        self.stream_in(tar_pack.pack_bytes(name, data, mode), path=directory, user=user)

    def read_file(self, path: str, *, user: str = "") -> bytes:
        """The contents of one regular file of the container."""
        collected = io.BytesIO()
        tarball.unpack_single(self.stream_out(path, user=user), collected)
        return collected.getvalue()
