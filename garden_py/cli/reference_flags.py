"""Flags of the reference Garden server that mean what a setting of ours means, under their names. Pure.

Those with the same name need no word here; docs/garden-compatibility.md lists all, also those that are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from garden_py.cli.parse import BadInput, parse_duration
from garden_py.model.errors import InvalidField


@dataclass(frozen=True, slots=True)
class ReferenceFlag:
    """A flag as `garden server` takes it.

    Attributes:
        name: with `_` for `-`.
        setting: the field of Config that it stands for.
        text: its help.
        default: of a flag that completes another one; meaningless without that.
    """

    name: str
    setting: str
    text: str
    default: str = ""


REFERENCE_FLAGS: Final = (
    ReferenceFlag("bind_socket", "garden_http", "PATH: as --garden-http unix:PATH."),
    ReferenceFlag("bind_ip", "garden_http", "IP: as --garden-http IP:PORT, PORT being that of --bind-port."),
    ReferenceFlag("bind_port", "garden_http", "Goes with --bind-ip.", default="7777"),
    ReferenceFlag("debug_bind_ip", "debug", "IP: as --debug IP:PORT, PORT being that of --debug-bind-port."),
    ReferenceFlag("debug_bind_port", "debug", "Goes with --debug-bind-ip.", default="17013"),
    ReferenceFlag("default_grace_time", "default_grace_time_s", "As --default-grace-time-s, e.g. 5m."),
    ReferenceFlag("read_header_timeout", "read_header_timeout_s", "As --read-header-timeout-s, e.g. 30s."),
    ReferenceFlag("runtime_plugin", "runtime", "As --runtime."),
    ReferenceFlag("insecure_docker_registry", "insecure_registry", "HOST:PORT[,…]: as --insecure-registry."),
)
_DURATIONS: Final = ("default_grace_time", "read_header_timeout")
_BY_NAME: Final = {flag.name: flag for flag in REFERENCE_FLAGS}


def translate(given: Mapping[str, Any]) -> dict[str, Any]:
    """Flags with those of the reference replaced by the settings they stand for.

    Raises:
        InvalidField: two flags say the same setting, one lacks the one it goes with, or a duration is none.
    """
    found = {name: value for name, value in given.items() if name not in _BY_NAME}
    said = {name: str(value) for name, value in given.items() if name in _BY_NAME}
    for port, ip in (("bind_port", "bind_ip"), ("debug_bind_port", "debug_bind_ip")):
        number = said.pop(port, _BY_NAME[port].default)
        if ip in said:
            said[ip] = f"[{said[ip]}]:{number}" if ":" in said[ip] else f"{said[ip]}:{number}"
        elif port in given:
            raise InvalidField(port, f"goes with --{ip.replace('_', '-')}")
    for name, text in said.items():
        setting = _BY_NAME[name].setting
        if setting in found:
            raise InvalidField(
                name,
                f"says the same as --{setting.replace('_', '-')}, which is {_text(found[setting])} already",
            )
        if name in _DURATIONS:
            found[setting] = _seconds(name, text)
        else:
            found[setting] = _translated(name, text)
    return found


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _translated(name: str, text: str) -> Any:
    match name:
        case "bind_socket":
            return f"unix:{text}"
        case "insecure_docker_registry":
            return tuple(filter(None, text.split(",")))
        case _:
            return text


def _seconds(name: str, text: str) -> float:
    try:
        return parse_duration(text).total_seconds()
    except BadInput as error:
        raise InvalidField(name, str(error)) from error
