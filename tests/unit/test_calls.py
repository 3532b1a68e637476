"""The id of a request: whose is taken, and what logs under it."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import pytest
from structlog.contextvars import get_contextvars

from garden_py.observe.apart import apart
from garden_py.observe.calls import begin_call, choose_request_id, name_container


@pytest.mark.parametrize("given", ["ticket-17", "a" * 128, "00-4bf9/x:y@z+1="])
def test_callers_may_choose(given: str) -> None:
    assert choose_request_id(given) == given


@pytest.mark.parametrize("given", ["", "a" * 129, "two words", "line\nbreak", '"quoted"', "ümlaut", "a\0"])
def test_what_could_forge_a_line_is_replaced(given: str) -> None:
    made = choose_request_id(given)
    assert made != given
    assert len(made) == 16
    assert choose_request_id(given) != made


async def test_tasks_log_under_the_call_that_started_them_and_what_is_apart_under_none() -> None:
    heard: list[dict[str, object]] = []
    done = asyncio.Event()

    async def work() -> None:
        heard.append(get_contextvars())

    def later() -> None:
        heard.append(get_contextvars())
        done.set()

    begin_call("first", "old")
    begin_call("ticket", "")
    name_container("web")
    await asyncio.ensure_future(work())
    apart(asyncio.get_running_loop().call_later, 0, later)
    await done.wait()
    assert heard == [{"request_id": "ticket", "handle": "web"}, {}]


def test_a_name_may_be_anything_and_is_cut() -> None:
    begin_call("ticket", "x" * 1_000_000)
    assert len(get_contextvars()["handle"]) == 128


def test_processes_that_log_nothing_load_no_structlog() -> None:
    """The launcher's workers are many and small, and a server waits for the first at its start."""
    program = "import sys, garden_py.backend.launcher.worker; print('structlog' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == "False\n"
