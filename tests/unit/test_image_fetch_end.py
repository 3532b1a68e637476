"""The end of a process that fetches or unpacks."""

from __future__ import annotations

import asyncio
import gc
import os
import select
from typing import Any

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
