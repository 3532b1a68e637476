"""What image plugins say is looked at without trust in the file system that it is about."""

from __future__ import annotations

import asyncio
import os
import threading
from typing import Any

import pytest

from garden_py.backend.plugin.image import ImagePlugins
from garden_py.backend.plugin.program import Ended
from garden_py.model.limits import Limits


class Answering:
    """Runs nothing."""

    async def run(self, *_: object, **__: object) -> Ended:
        return Ended(0, '{"root": {"path": "/hanging"}}', "")


async def test_a_root_whose_file_system_hangs_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A destroy ends the create, and with it the look at what the plugin has made."""
    loop, looked, may_end = asyncio.get_running_loop(), asyncio.Event(), threading.Event()

    def hang(path: str) -> bool:
        loop.call_soon_threadsafe(looked.set)
        return may_end.wait(10)

    monkeypatch.setattr(os.path, "isdir", hang)
    caller: Any = Answering()
    plugins = ImagePlugins({False: ("/p",), True: ()}, caller, create_timeout_s=1)
    making = asyncio.ensure_future(plugins.create("box", "docker:///a", None, Limits(), privileged=False))
    await looked.wait()
    making.cancel()
    try:
        done, _ = await asyncio.wait([making], timeout=1)
        assert done
    finally:
        may_end.set()
