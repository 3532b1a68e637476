"""What nft lists, on the host or in a container's network namespace.

In a child of the worker: it may join a namespace, and hang in the kernel, without the worker doing so. libnftables
finds no tool of the container's: it is loaded before the child joins.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import time
from typing import NoReturn

from garden_py.agent.netrules import load_tools
from garden_py.agent.nft import Nft, NftError
from garden_py.model.errors import HostFault

_DEADLINE_S = 4.0
_END_S = 1.0
_TEXT_MAX_BYTES = 768 << 10  # of what fits a frame (wire.MAX_PAYLOAD)
_READ_BYTES = 64 << 10
_CLONE_NEWNET = 0x4000_0000  # linux/sched.h


def list_in_child(command: str, netns_fd: int | None) -> str:
    """The text that `nft COMMAND` prints.

    Raises:
        HostFault: it is refused, e.g. because there is no such table, or takes too long.
    """
    tools = load_tools()
    ours, theirs = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        _run_child(command, netns_fd, theirs, tools.libc)
    os.close(theirs)
    try:
        data = _read_until_end(ours)
    finally:
        os.close(ours)
        _end_child(pid)
    failed, text = data[:1] != b"0", data[1:].decode(errors="replace")
    if failed:
        raise HostFault("nft", text or "its child ended without a word")
    return text


def _end_child(pid: int) -> None:
    """One that the kernel holds on to is left: the worker has other things to do."""
    pidfd = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)  # one that is done is a zombie, and does not mind
        if select.select([pidfd], [], [], _END_S)[0]:
            os.waitpid(pid, 0)
    finally:
        os.close(pidfd)


def _read_until_end(fd: int) -> bytes:
    deadline, found = time.monotonic() + _DEADLINE_S, bytearray()
    while len(found) < _TEXT_MAX_BYTES:
        readable, _, _ = select.select([fd], [], [], max(0.0, deadline - time.monotonic()))
        if not readable:
            raise HostFault("nft", f"no answer in {_DEADLINE_S:g} s")
        if not (data := os.read(fd, _READ_BYTES)):
            break
        found += data
    return bytes(found[:_TEXT_MAX_BYTES])


def _run_child(command: str, netns_fd: int | None, pipe: int, libc: ctypes.CDLL) -> NoReturn:
    """First byte 0: the listing follows; 1: the reason why there is none."""
    answer = b"1"
    try:
        if netns_fd is not None and libc.setns(netns_fd, _CLONE_NEWNET) != 0:
            answer += os.strerror(ctypes.get_errno()).encode()
        else:
            with Nft() as nft:
                answer = b"0" + nft.run(command).encode()
    except (NftError, OSError) as error:
        answer += str(error).encode()
    except BaseException as error:  # noqa: BLE001 - nothing of the parent's may run on in the child
        answer += repr(error).encode()
    finally:
        with open(pipe, "wb", closefd=False) as out:
            out.write(answer)
        os._exit(0)
