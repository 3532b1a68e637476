"""Flags and fixtures of all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import hypothesis
import pytest
from kit.server import ServerProcess, running_server
from kit.sharing import Sharing
from kit.trace import assert_no_trace, snapshot

# How long an example takes is no promise of the code's: both processors may be busy with other tests.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--root", action="store_true", help="also run the tests on real containers; needs root")
    parser.addoption(
        "--quota",
        action="store_true",
        help="also run those that need quotas in the kernel: scripts/test --cgroup2",
    )
    parser.addoption(
        "--one-server",
        action="store_true",
        help="modules that share a server share one with each other: for few tests where a start takes long",
    )
    parser.addoption(
        "--share",
        type=Path,
        metavar="DIRECTORY",
        help="share the modules out among the sessions that are given this directory, which is empty at first",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--root") and os.geteuid() != 0:
        raise pytest.UsageError("--root needs root")
    if directory := config.getoption("--share"):
        config.pluginmanager.register(Sharing(directory), "sharing")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = [
        item
        for item in items
        if any(
            item.get_closest_marker(mark) and not config.getoption(f"--{mark}") for mark in ("root", "quota")
        )
    ]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session")
def no_trace() -> Iterator[None]:
    """The host is at the end of the session as it was at its beginning."""
    before = snapshot()
    yield
    assert_no_trace(before)


def _scope_of_server(fixture_name: str, config: pytest.Config) -> Literal["module", "session"]:
    return "session" if config.getoption("--one-server") else "module"


@pytest.fixture(scope=_scope_of_server)
def garden_server(no_trace: None) -> Iterator[ServerProcess]:
    """A server that the tests of one module share; each module checks that it leaves no trace."""
    before = snapshot()
    with running_server() as server:
        yield server
    assert_no_trace(before)
