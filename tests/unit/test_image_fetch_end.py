"""The end of a process that fetches or unpacks."""

from __future__ import annotations

import asyncio
import gc
import os
import select
import subprocess
import sys
from typing import Any

import pytest

from garden_py.backend.images.fetch import kill_session


async def test_one_that_was_killed_before_it_heard_its_task_leaves_no_traceback() -> None:
    """The log is for what somebody has to look at; that the image could not be fetched is told already."""
    told: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: told.append(context))
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        "sleep", "60", stdin=pipe, stdout=pipe, start_new_session=True
    )
    assert process.stdin is not None
    pidfd = os.pidfd_open(process.pid)
    process.kill()
    assert select.select([pidfd], [], [], 30)[0], "it has ended, and the loop has not heard of it"
    os.close(pidfd)
    process.stdin.write(b"task\n")
    await kill_session(process)
    del process
    gc.collect()
    await asyncio.sleep(0)
    assert told == []


@pytest.mark.parametrize("heard", [b"", b'{"url": "https://', b'{"sources": [{"ima'])
@pytest.mark.parametrize("module", ["puller", "download"])
def test_one_whose_server_goes_before_it_has_told_the_task_says_nothing(module: str, heard: bytes) -> None:
    """A server may be killed at any moment; that nobody wants anything any more is no error."""
    argv = [sys.executable, "-m", f"garden_py.backend.images.{module}", "1"]
    done = subprocess.run(argv, input=heard, capture_output=True, timeout=60, check=False)
    assert (done.stdout, done.stderr, done.returncode) == (b"", b"", 0)
