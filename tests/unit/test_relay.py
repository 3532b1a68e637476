"""The relay between a socket that outlives the server and the server's own."""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

import pytest

from garden_py.api.activation import take_inherited_socket
from garden_py.api.relay import GOAWAY, Flow, Frames, Relay
from garden_py.model.errors import InvalidField


def frame(payload: bytes) -> bytes:
    """An HTTP/2 frame of type 0 on stream 1."""
    return len(payload).to_bytes(3, "big") + bytes([0, 0, 0, 0, 0, 1]) + payload


def test_frames_end_where_they_end_however_they_are_cut() -> None:
    """A GOAWAY within a frame would be taken for its payload, and the connection would be lost."""
    chance = random.Random(1)
    for _ in range(300):
        whole = [frame(bytes(chance.randrange(40))) for _ in range(chance.randrange(1, 8))]
        data = b"".join(whole)
        ends = {sum(map(len, whole[: n + 1])) for n in range(len(whole))}
        frames, position = Frames(), 0
        while position < len(data):
            piece = data[position : position + chance.randrange(1, 30)]
            later = sorted(end for end in ends if position < end <= position + len(piece))
            assert frames.pass_over(memoryview(piece)) == (later[0] - position if later else None)
            position += len(piece)
            assert frames.at_end == (position in ends)


@contextmanager
def relayed(directory: Path) -> Iterator[tuple[socket.socket, socket.socket, str]]:
    """The server's listener, the server's end of the control, and the path that clients connect to."""
    with socket.socket(socket.AF_UNIX) as outer, socket.socket(socket.AF_UNIX) as inner:
        for sock, name in ((outer, "outer"), (inner, "inner")):
            sock.bind(str(directory / name))
            sock.listen()
            sock.settimeout(10)
        ours, theirs = socket.socketpair()
        running = Thread(target=Relay(outer.dup(), theirs, str(directory / "inner")).run)
        running.start()
        try:
            yield inner, ours, str(directory / "outer")
        finally:
            ours.close()
            running.join(10)
            theirs.close()
            assert not running.is_alive()


def receive(sock: socket.socket, count: int) -> bytes:
    found = b""
    while len(found) < count and (data := sock.recv(count - len(found))):
        found += data
    return found


def connect(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(10)
    sock.connect(path)
    return sock


def test_goaway_comes_behind_the_frame_that_is_on_its_way() -> None:
    """And before the next one; nothing else of the connection changes."""
    first, second = frame(b"a" * 100), frame(b"b" * 10)
    server, source = socket.socketpair()
    target, client = socket.socketpair()
    with server, source, target, client:
        for sock in (source, target):
            sock.setblocking(False)
        flow, buffer = Flow(source, target, Frames()), bytearray(1 << 16)
        server.sendall(first[:50])
        flow.move(buffer)
        flow.say_goaway()
        flow.move(buffer)
        assert client.recv(1 << 16) == first[:50]
        server.sendall(first[50:] + second)
        flow.move(buffer)
        assert client.recv(1 << 16) == first[50:] + GOAWAY + second


def test_stopped_relay_leaves_clients_in_the_queue(tmp_path: Path) -> None:
    """The next server's relay finds them there."""
    with relayed(tmp_path) as (inner, control, path):
        with connect(path) as client:
            server, _ = inner.accept()
            control.sendall(b"stop")
            server.sendall(frame(b"settings"))
            expected = frame(b"settings") + GOAWAY
            assert receive(client, len(expected)) == expected
            server.close()
        with connect(path) as waiting:
            waiting.sendall(b"hello")
            inner.setblocking(False)
            with pytest.raises(BlockingIOError):
                inner.accept()


def test_much_passes_both_ways_and_both_ends_are_passed_on(tmp_path: Path) -> None:
    """More than any buffer holds, while both sides send."""
    data = random.Random(2).randbytes(3 << 20)
    with relayed(tmp_path) as (inner, _, path), connect(path) as client:
        server, _ = inner.accept()
        server.settimeout(10)

        def send(sock: socket.socket) -> None:
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)

        senders = [Thread(target=send, args=(sock,)) for sock in (client, server)]
        found: dict[str, bytes] = {}
        readers = [
            Thread(target=lambda name=name, sock=sock: found.update({name: receive(sock, len(data) + 1)}))
            for name, sock in (("client", client), ("server", server))
        ]
        for thread in (*senders, *readers):
            thread.start()
        for thread in (*senders, *readers):
            thread.join(20)
        server.close()
        assert found == {"client": data, "server": data}


def test_variables_of_another_process_are_not_ours() -> None:
    """They were inherited by accident; and nothing that is started from here shall see them."""
    environ = {"LISTEN_PID": "1", "LISTEN_FDS": "1", "LISTEN_FDNAMES": "grpc", "HOME": "/"}
    assert take_inherited_socket(environ) is None
    assert environ == {"HOME": "/"}


def test_one_of_several_sockets_must_be_named() -> None:
    """Taking any would serve the wrong one."""
    environ = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "0"}
    assert take_inherited_socket(environ) is None
    pipe = os.pipe()  # what descriptors 3 and 4 are does not matter before one has been chosen
    try:
        environ = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "2", "LISTEN_FDNAMES": "a:b"}
        with pytest.raises(InvalidField, match="name the one to use grpc"):
            take_inherited_socket(environ)
    finally:
        for fd in pipe:
            os.close(fd)
