"""Flags under the names of the reference Garden server."""

from __future__ import annotations

from typing import Any

import pytest

from garden_py.cli import serve
from garden_py.cli.reference_flags import REFERENCE_FLAGS, translate
from garden_py.config import Config, load_config
from garden_py.model.errors import InvalidField


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"mtu": 0}, {"mtu": 0}),
        ({"bind_socket": "/tmp/g.sock"}, {"garden_http": "unix:/tmp/g.sock"}),
        ({"bind_ip": "127.0.0.1"}, {"garden_http": "127.0.0.1:7777"}),
        ({"bind_ip": "::1", "bind_port": "80"}, {"garden_http": "[::1]:80"}),
        ({"debug_bind_ip": "127.0.0.1"}, {"debug": "127.0.0.1:17013"}),
        ({"debug_bind_ip": "127.0.0.1", "debug_bind_port": "9"}, {"debug": "127.0.0.1:9"}),
        ({"default_grace_time": "5m"}, {"default_grace_time_s": 300.0}),
        ({"default_grace_time": "0"}, {"default_grace_time_s": 0.0}),
        ({"read_header_timeout": "1m30s"}, {"read_header_timeout_s": 90.0}),
        ({"runtime_plugin": "/opt/runc"}, {"runtime": "/opt/runc"}),
    ],
)
def test_flag_means_a_setting(given: dict[str, Any], expected: dict[str, Any]) -> None:
    """And the setting takes it."""
    assert translate(given) == expected
    load_config(translate(given), environ={})


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"bind_port": "7777"}, "bind_port"),
        ({"debug_bind_port": "17013"}, "debug_bind_port"),
        ({"bind_socket": "/a", "garden_http": "unix:/b"}, "bind_socket"),
        ({"bind_socket": "/a", "bind_ip": "127.0.0.1"}, "bind_ip"),
        ({"default_grace_time": "soon"}, "default_grace_time"),
        ({"default_grace_time": "5m", "default_grace_time_s": 300}, "default_grace_time"),
    ],
)
def test_what_is_ambiguous_is_refused(given: dict[str, Any], field: str) -> None:
    """Neither of two flags is silently ignored."""
    with pytest.raises(InvalidField) as refused:
        translate(given)
    assert refused.value.field == field


def test_names_are_free_and_settings_exist() -> None:
    """No flag is declared twice, and each stands for a setting that there is."""
    assert not {flag.name for flag in REFERENCE_FLAGS} & set(Config.model_fields)
    assert {flag.setting for flag in REFERENCE_FLAGS} <= set(Config.model_fields)
    assert {flag.name for flag in REFERENCE_FLAGS} <= {parameter.name for parameter in serve._parameters()}
