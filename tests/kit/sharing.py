"""Several pytest sessions at once that share their tests out among them, a module at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

APART = "GARDEN_TESTS_APART"


def is_apart() -> bool:
    """Whether this runs apart from the host, by `tests/apart`."""
    return APART in os.environ


class Sharing:
    """Runs the modules that no other session with the same directory has begun; tests marked `host` on the host only.

    Each is begun by one session and run to its end by it: together they have run all when all have ended well.

    Args:
        directory: empty at first; holds a file for each module that was begun.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """In place of pytest's own loop. A module is claimed when the last test of the one before begins."""
        if session.testsfailed:
            raise session.Interrupted(f"{session.testsfailed} errors during collection")
        items = self._claimed(session.items)
        item = next(items, None)
        while item is not None:
            following = next(items, None)
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if session.shouldfail:
                raise session.Failed(session.shouldfail)
            if session.shouldstop:
                raise session.Interrupted(session.shouldstop)
            item = following
        return True

    def _claimed(self, items: list[pytest.Item]) -> Iterator[pytest.Item]:
        modules: dict[str, list[pytest.Item]] = {}
        for item in items:
            modules.setdefault(item.nodeid.partition("::")[0], []).append(item)
        for module in sorted(modules, key=lambda module: not _needs_host(modules[module])):
            if not (is_apart() and _needs_host(modules[module])) and self._claim(module):
                yield from modules[module]

    def _claim(self, module: str) -> bool:
        try:
            (self._directory / f"{module.replace('/', '%')}.begun").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


def _needs_host(items: list[pytest.Item]) -> bool:
    return any(item.get_closest_marker("host") for item in items)
