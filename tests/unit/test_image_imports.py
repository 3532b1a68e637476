"""Feeding an import: the descriptor of its pipe is closed once, and written to by nobody after that."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from garden_py.backend.host.threads import in_thread
from garden_py.backend.images.images import Images, _write_all
from garden_py.backend.images.store import ImageStore
from garden_py.config import load_config
from garden_py.model.errors import HostFault
from garden_py.model.image import parse_image


async def _chunks() -> AsyncIterator[bytes]:
    yield bytes(1 << 20)


async def test_an_import_that_cannot_begin_leaks_no_descriptor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ImageStore(tmp_path, lambda path: shutil.rmtree(path, ignore_errors=True))
    store.open()
    images = Images(store, load_config({}, environ={}), "/")

    def full() -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "staging", full)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with pytest.raises(HostFault, match="no space left"):
            await images.import_image(parse_image("store:x"), _chunks())
    await asyncio.sleep(0)
    assert len(os.listdir("/proc/self/fd")) == before


async def test_a_cancelled_write_ends_before_its_descriptor_may_be_closed() -> None:
    """Else the rest of the bytes would go into whatever file gets its number next."""
    reading, writing = os.pipe()
    task = asyncio.ensure_future(in_thread(_write_all, writing, bytes(1 << 20)))
    await asyncio.sleep(0.05)
    task.cancel()
    await asyncio.sleep(0.05)
    assert not task.done(), "the thread still writes"
    os.close(reading)
    with pytest.raises(asyncio.CancelledError):
        await task
    os.close(writing)
