"""Addresses that no door can have."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from garden_py.config import Config
from garden_py.model.errors import InvalidField
from garden_py.wiring import running_server


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"listen": "nonsense"}, "listen"),
        ({"listen": "127.0.0.1:99999"}, "listen"),
        ({"listen": "127.0.0.1:7777"}, "listen"),  # without TLS
        ({"listen": "127.0.0.1:7777", "tls_cert": "/c"}, "tls_client_ca"),
        ({"garden_http": "0.0.0.0:7777"}, "garden_http"),
        ({"metrics": "0.0.0.0:9100"}, "metrics"),
        ({"debug": "0.0.0.0:9101"}, "debug"),
        ({"debug": "unix:/d"}, "debug"),
    ],
)
async def test_they_are_refused_before_anything_is_touched(
    tmp_path: Path, settings: dict[str, Any], field: str
) -> None:
    """A server of other settings may be running, or leave its containers to the next one."""
    config = Config(state_dir=tmp_path / "state", run_dir=tmp_path / "run", **settings)
    with pytest.raises(InvalidField) as refused:
        async with running_server(config):
            raise AssertionError("it serves")
    assert [each.field for each in refused.value.violations] == [field]
    assert os.listdir(tmp_path) == []
