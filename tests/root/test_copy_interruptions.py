"""Copies that end before their time: by the archiver, by the caller."""

from __future__ import annotations

import io
import tarfile
import threading
from collections.abc import Iterator

import grpc
import pytest
from kit.garden import text_of, wait_until

from garden_py.api._pb import garden_pb2 as pb
from garden_py.api._pb import garden_pb2_grpc
from garden_py.client import Container

pytestmark = pytest.mark.root


def archive() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        entry = tarfile.TarInfo("file")
        entry.size = 5
        tar.addfile(entry, io.BytesIO(b"hello"))
    return buffer.getvalue()


def requests(
    container: Container, data: bytes, never: threading.Event, *, path: str = "/tmp", user: str = ""
) -> Iterator[pb.StreamInRequest]:
    """A caller that sends some data and then neither more nor the end."""
    yield pb.StreamInRequest(target=pb.StreamInRequest.Target(handle=container.handle, path=path, user=user))
    yield pb.StreamInRequest(data=data)
    never.wait(30)


def archivers(container: Container) -> int:
    """How many run: children of the agent, which have its name until they take their own."""
    return int(text_of(container, "ps -o comm | grep -cE '^(garden-init|tar-in|tar-out)'")) - 1


@pytest.mark.parametrize(
    ("data", "path", "user", "code"),
    [
        (archive(), "/root/not-mine", "1000", grpc.StatusCode.PERMISSION_DENIED),
        (b"no tar" * 1000, "/tmp", "", grpc.StatusCode.INVALID_ARGUMENT),
    ],
)
def test_archiver_that_gives_up_does_not_wait_for_the_caller(
    stub: garden_pb2_grpc.GardenStub, box: Container, data: bytes, path: str, user: str, code: grpc.StatusCode
) -> None:
    """The error comes although the caller still holds its stream open."""
    never = threading.Event()
    with pytest.raises(grpc.RpcError) as caught:
        stub.StreamIn(requests(box, data, never, path=path, user=user), timeout=20)
    never.set()
    assert caught.value.code() is code, caught.value.details()


def test_caller_that_leaves_a_copy_in_leaves_no_archiver_behind(
    stub: garden_pb2_grpc.GardenStub, box: Container
) -> None:
    """The process that unpacks ends with the call."""
    never = threading.Event()
    call = stub.StreamIn.future(requests(box, archive()[:700], never))
    wait_until(lambda: archivers(box) == 1, "the archiver")
    call.cancel()
    never.set()
    wait_until(lambda: archivers(box) == 0, "the end of the archiver")


def test_caller_that_leaves_a_copy_out_leaves_no_archiver_behind(
    stub: garden_pb2_grpc.GardenStub, box: Container
) -> None:
    """The process that packs ends with the call, however much it had still to send."""
    text_of(box, "dd if=/dev/zero of=/tmp/big bs=1M count=64")
    call = stub.StreamOut(pb.StreamOutRequest(handle=box.handle, path="/tmp/big"))
    assert next(call).data
    call.cancel()
    wait_until(lambda: archivers(box) == 0, "the end of the archiver")
